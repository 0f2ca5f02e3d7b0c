"""The ten lines that run a compiled schedule."""

import numpy as np
import pytest

from mobile_runtime.manifest import ScheduleRow, ScheduleTable
from mobile_runtime.sampler import needs_fresh_noise, sample

NOISE = np.full((1, 4, 2, 2), 2.0, np.float32)


def table(*rows: ScheduleRow) -> ScheduleTable:
    return ScheduleTable(
        scheduler="Test",
        prediction_type="epsilon",
        steps=len(rows),
        init_noise_sigma=3.0,
        rows=rows,
    )


def row(**values: float) -> ScheduleRow:
    names = ("timestep", "input_scale", "u", "v", "a", "b", "c", "d")
    return ScheduleRow(**(dict.fromkeys(names, 0.0) | values))


def test_each_coefficient_does_what_the_manifest_says() -> None:
    asked = []

    def denoise(x: np.ndarray, timestep: float) -> np.ndarray:
        asked.append((float(x[0, 0, 0, 0]), timestep))
        return x + 1

    first = row(timestep=9, input_scale=0.5, u=2, v=10, a=1, b=3, c=7)
    second = row(timestep=4, input_scale=1, u=0, v=1, a=0, b=0, c=1, d=0.25)
    walk = list(
        sample(table(first, second), NOISE, denoise, lambda step: np.full_like(NOISE, step))
    )
    # x = 6; model_in = 3, out = 4; x0 = 2*6 + 10*4 = 52; x_next = 6 + 3*52 (no x0 before)
    # model_in = 162; x_next = the x0 before + 0.25 * fresh noise of step 1
    assert asked == [(3, 9), (162, 4)]
    assert [(step, float(x[0, 0, 0, 0])) for step, x in walk] == [(0, 6), (1, 162), (2, 52.25)]
    assert all(x.dtype == np.float32 and x.shape == NOISE.shape for _, x in walk)


def test_fresh_noise_is_asked_for_only_where_a_row_adds_it() -> None:
    asked: list[int] = []

    def fresh(step: int) -> np.ndarray:
        asked.append(step)
        return np.zeros_like(NOISE)

    rows = [row(d=1.0), row(), row(d=0.5)]
    list(sample(table(*rows), NOISE, lambda x, t: x, fresh))
    assert asked == [0, 2]
    assert needs_fresh_noise(table(*rows))
    assert not needs_fresh_noise(table(row()))


def test_a_schedule_that_needs_noise_is_not_run_without_it() -> None:
    with pytest.raises(ValueError, match="adds noise at its steps"):
        next(sample(table(row(d=1.0)), NOISE, lambda x, t: x))


def test_the_caller_owns_the_loop_and_may_stop_it() -> None:
    calls: list[float] = []

    def denoise(x: np.ndarray, timestep: float) -> np.ndarray:
        calls.append(timestep)
        return x

    walk = sample(table(row(timestep=3), row(timestep=2), row(timestep=1)), NOISE, denoise)
    for step, _ in walk:
        if step == 1:
            break
    assert calls == [3]
