"""Latency: what is counted, and what is told beside it."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

from mobile_runtime.latency import Timing, environment, repeated, summary


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


def timed(durations_s: list[float], repeats: int, warm_up: int = 2) -> tuple[Timing, int]:
    calls: list[int] = []
    ticks = clock_of(durations_s)
    times = repeated(lambda: calls.append(1), warm_up, repeats, lambda: next(ticks))
    timing = Timing(load_ms=12.0, first_ms=9.0, warm_up=warm_up, times_ms=times)
    return timing, len(calls)


def test_the_figures_are_those_of_the_timed_calls_alone() -> None:
    timing, calls = timed([0.005, 0.001, 0.003, 0.002, 0.004], repeats=5)
    latency = summary("unet", "fake", timing, peak_bytes=7)
    assert latency is not None
    assert calls == 2 + 5
    assert latency.repeats == 5
    assert latency.median_ms == pytest.approx(3)
    assert latency.p90_ms == pytest.approx(np.percentile([5, 1, 3, 2, 4], 90))
    assert latency.min_ms == pytest.approx(1)
    assert latency.spread_ms == pytest.approx(2)
    assert (latency.load_ms, latency.first_ms, latency.warm_up) == (12.0, 9.0, 2)
    assert latency.peak_bytes == 7


def test_a_slow_component_is_timed_fewer_times_but_at_least_once() -> None:
    timing, calls = timed([60.0, 60.0, 60.0], repeats=3)
    assert len(timing.times_ms) == 1
    assert calls == 2 + 1


def test_nothing_timed_gives_no_figures() -> None:
    timing = Timing(load_ms=1, first_ms=1, warm_up=0, times_ms=())
    assert summary("unet", "fake", timing) is None


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
