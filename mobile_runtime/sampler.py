"""Runs a compiled schedule: the same ten lines in Python, Swift and Kotlin.

Every scheduler that a bundle can hold is linear in its tensors, so a step is one row of numbers
(see `ScheduleRow`); which scheduler it was, and what the model predicts, is in the numbers.
"""

from collections.abc import Callable, Iterator
from typing import Any

from mobile_runtime.manifest import ScheduleTable

Tensor = Any
"""numpy's or PyTorch's: nothing but sums and products with numbers is asked of it."""
# (model input (1, C, h, w), timestep) -> model output (1, C, h, w); float32
Denoise = Callable[[Tensor, float], Tensor]
# step index -> unit normal noise (1, C, h, w), float32
FreshNoise = Callable[[int], Tensor]


def needs_fresh_noise(table: ScheduleTable) -> bool:
    """Whether any step adds noise (ancestral samplers, LCM, DDPM)."""
    return any(row.d != 0 for row in table.rows)


def sample(
    table: ScheduleTable,
    noise: Tensor,
    denoise: Denoise,
    fresh_noise: FreshNoise | None = None,
    begin: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (0, the first latents), then (k, the latents after k steps); (1, C, h, w) float32.

    noise: unit normal, (1, C, h, w) float32. fresh_noise is asked, in order, for the steps whose
    row has d != 0 and for no other. begin: the first latents in place of the scaled noise.
    """
    if fresh_noise is None and needs_fresh_noise(table):
        raise ValueError(f"{table.scheduler} adds noise at its steps, and none is given")
    x = table.init_noise_sigma * noise if begin is None else begin
    x0_previous = 0 * x
    yield 0, x
    for step, row in enumerate(table.rows):
        model_out = denoise(row.input_scale * x, row.timestep)
        x0 = row.u * x + row.v * model_out
        x = row.a * x + row.b * x0 + row.c * x0_previous
        if row.d != 0 and fresh_noise is not None:
            x = x + row.d * fresh_noise(step)
        x0_previous = x0
        yield step + 1, x
