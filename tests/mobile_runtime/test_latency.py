"""Latency: what is counted, and what is told beside it."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from mobile_runtime.latency import WARM_UP, environment, measure

INPUTS = {"x": np.zeros(3, np.float32)}


def clock_of(durations_s: list[float]) -> Iterator[float]:
    """What a clock shows: at the start, then before and after each timed call."""
    now = 0.0
    yield now
    for index, duration in enumerate(durations_s):
        if index:
            yield now  # the budget's look at the clock
        yield now
        now += duration
        yield now
    yield now


def measured(durations_s: list[float], repeats: int) -> tuple[object, int]:
    calls = []
    ticks = clock_of(durations_s)
    latency = measure(
        lambda feeds: calls.append(feeds) or feeds,  # type: ignore[func-returns-value]
        INPUTS,
        component="unet",
        runtime="fake",
        load_ms=12.0,
        repeats=repeats,
        clock=lambda: next(ticks),
    )
    return latency, len(calls)


def test_median_p90_and_minimum_are_those_of_the_timed_calls_alone() -> None:
    durations_s = [0.005, 0.001, 0.003, 0.002, 0.004]
    latency, calls = measured(durations_s, repeats=5)
    assert calls == WARM_UP + 5
    assert latency.repeats == 5
    assert latency.median_ms == pytest.approx(3)
    assert latency.p90_ms == pytest.approx(np.percentile([5, 1, 3, 2, 4], 90))
    assert latency.min_ms == pytest.approx(1)
    assert latency.load_ms == 12.0


def test_a_slow_component_is_timed_fewer_times_but_at_least_once() -> None:
    latency, calls = measured([60.0, 60.0, 60.0], repeats=3)
    assert latency.repeats == 1
    assert calls == WARM_UP + 1


def test_the_environment_names_the_machine_its_libraries_and_the_threads_that_were_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    here = environment()
    assert here.cpu
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.threads["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in here.threads
    assert here.libraries["numpy"] == np.__version__
