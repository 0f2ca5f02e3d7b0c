"""How fast the pipeline is with each switch, and what the switch does to the picture.

Every row takes turns with `exact` in one run, in an order that changes, so that a machine that gets
hotter or busier hits both alike; the ratio of their times is what to trust. Each call gets prompts
and noise that it has not seen, so that nothing is found in a cache. Times are by the clock, from
the text to the pixels in main memory; a GPU's events around the same call stand beside them.
"""

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mobile_runtime.bench import ratio_of
from mobile_runtime.errors import PocketError
from mobile_runtime.machine import peak_memory
from mobile_runtime.parity import SSIM_WINDOW, picture_psnr_db, picture_ssim
from mobile_runtime.reference.models import graphs_compiled, keep_kernels
from mobile_runtime.reference.parts import Parts
from mobile_runtime.reference.pipeline import ReferencePipeline, noise_of, told_memory
from mobile_runtime.reference.rows import Row
from mobile_runtime.reference.switches import EXACT, Machine, Settings, settings_of
from mobile_runtime.runs import brief
from mobile_runtime.sampler import needs_fresh_noise

ROUNDS = 10
BUDGET_S = 60.0
"""A row is not repeated after so long; it has two rounds at least."""
JUDGE_BUDGET_S = 60.0
"""A slow row is judged on fewer pictures than asked for; the table tells on how many."""
COMPARED = 4
"""Pictures that a row's PSNR and SSIM are of."""

Draw = Callable[[Sequence[str], np.ndarray, np.ndarray | None], np.ndarray]
"""Prompts, noise (N, C, h, w) and fresh noise to pictures (N, H, W, 3) uint8."""


@dataclass
class Measured:
    """One row's figures. Seconds are of a picture; the ratio is `exact`'s time over this one's.

    peak_bytes: of a picture after the warm-up: on a GPU of its memory, the row's models included;
    on a CPU, how much the process grew. floor_s: what the arithmetic and the weights' bytes take at
    the machine's measured rates. first_s: the first call, with all that is compiled in it;
    compiled: how many graphs were compiled in it, those that an earlier run left in the cache not
    counted. status: `done`, or why not.
    """

    kind: str
    name: str
    switches: tuple[str, ...]
    steps: int
    scheduler: str
    batch: int
    status: str = "done"
    seconds: float | None = None
    seconds_p90: float | None = None
    device_seconds: float | None = None
    pictures_per_second: float | None = None
    times: float | None = None
    times_low: float | None = None
    times_high: float | None = None
    first_s: float | None = None
    compiled: int = 0
    rounds: int = 0
    peak_bytes: int | None = None
    psnr_db: float | None = None
    equal: bool = False
    ssim: float | None = None
    judged: float | None = None
    judged_pictures: int = 0
    floor_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Bench:
    """The rows of one pipeline on one machine, beside `exact`."""

    def __init__(
        self,
        parts: Parts,
        machine: Machine,
        *,
        steps: int,
        tiny_decoder: str | None = None,
        rounds: int = ROUNDS,
        judged: int = 0,
        compared: int = COMPARED,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """judged: pictures for the judge, where the parts have one. compared: for the PSNR."""
        self.compared = compared
        self.parts, self.machine, self.steps = parts, machine, steps
        self.tiny_decoder, self.rounds = tiny_decoder, rounds
        self.judged = judged if parts.judge else 0
        self.tell = tell
        self.exact = ReferencePipeline(parts, EXACT, machine.device)
        self._turn = 0
        self._drawn: dict[tuple[str | None, int, int], np.ndarray] = {}

    def measure(self, row: Row) -> Measured:
        """One row; what keeps it from being measured is told in its status."""
        steps = self.steps if row.steps is None else row.steps
        scheduler = row.scheduler or "source"
        found = Measured(row.kind, row.name, row.switches, steps, scheduler, row.batch)
        _free(self.machine)  # what the row before has left
        try:
            found.scheduler = self.parts.schedule(steps, row.scheduler).scheduler
            self._measure(row, found)
        except PocketError as error:
            found.status = str(error)
        except Exception as error:  # a compiler's and a driver's errors share no class
            # One row that fails here loses no other; it is told in its place.
            found.status = f"failed: {brief(error)}"
        return found

    def _measure(self, row: Row, found: Measured) -> None:
        settings = settings_of(row.switches, self.machine, self.tiny_decoder)
        before = allocated(self.machine)
        with told_memory(settings, self.machine.device):
            if row.own:
                draw = _diffusers(self.parts, settings, self.machine, found.steps)
            else:
                pipeline = ReferencePipeline(self.parts, settings, self.machine.device)
                draw = self._drawer(pipeline, row)
            self.tell("first call, which may compile")
            compiled, began = graphs_compiled(), time.perf_counter()
            draw(*self._inputs(row, found.steps))
            found.first_s = time.perf_counter() - began
            found.compiled = graphs_compiled() - compiled
            draw(*self._inputs(row, found.steps))
            # After what compiling and choosing kernels took.
            with peak(self.machine) as most_so_far:
                draw(*self._inputs(row, found.steps))
                most = most_so_far()
        found.peak_bytes = None if most is None or before is None else max(0, most - before)
        self._quality(row, found, draw)
        self._times(row, found, draw)
        if self.judged and not row.own:
            self._judge(row, found, draw)

    def _drawer(self, pipeline: ReferencePipeline, row: Row) -> Draw:
        def draw(texts: Sequence[str], noise: np.ndarray, fresh: np.ndarray | None) -> np.ndarray:
            pipeline.forget()  # a prompt is encoded for each picture, as for a user's
            return pipeline(
                texts,
                noise=noise,
                fresh_noise=fresh,
                steps=self.steps if row.steps is None else row.steps,
                scheduler=row.scheduler,
            ).pictures

        return draw

    def _inputs(
        self, row: Row, steps: int, first: int | None = None
    ) -> tuple[list[str], np.ndarray, np.ndarray | None]:
        """Prompts and noise of a row's next batch; first: of the picture of that number."""
        if first is None:
            first, self._turn = self._turn, self._turn + row.batch
        own = self.parts.generation
        prompts = self.parts.judge.prompts if self.parts.judge else self.parts.prompts
        texts = [prompts[(first + k) % len(prompts)] for k in range(row.batch)]
        shape = (row.batch, own.latent_channels, own.latent_height, own.latent_width)
        seeds = range(first, first + row.batch)
        return texts, *noise_of(seeds, self.parts.schedule(steps, row.scheduler), shape)

    def _quality(self, row: Row, found: Measured, draw: Draw) -> None:
        """Against `exact` with the same schedule: what the switches did, and not the steps."""
        if row.own and needs_fresh_noise(self.parts.schedule(found.steps, row.scheduler)):
            return  # diffusers draws that noise itself
        self.tell("compare with exact")
        count = max(self.compared, row.batch)
        made = [
            draw(*self._inputs(row, found.steps, first)) for first in range(0, count, row.batch)
        ]
        b = np.concatenate(made)
        a = np.concatenate([self._exactly(row, found.steps, k) for k in range(len(b))])
        psnr_db = picture_psnr_db(np.concatenate(a), np.concatenate(b))
        found.equal = math.isinf(psnr_db)
        found.psnr_db = None if found.equal else psnr_db
        if min(a.shape[1:3]) >= SSIM_WINDOW:
            pairs = zip(a, b, strict=True)
            found.ssim = float(np.mean([picture_ssim(x, y) for x, y in pairs]))

    def _exactly(self, row: Row, steps: int, number: int) -> np.ndarray:
        """What `exact` draws with a row's schedule as the picture of this number; drawn once."""
        key = (row.scheduler, steps, number)
        if key not in self._drawn:
            alone = replace(row, batch=1)
            self._drawn[key] = self._drawer(self.exact, alone)(*self._inputs(alone, steps, number))
        return self._drawn[key]

    def _times(self, row: Row, found: Measured, draw: Draw) -> None:
        """In turns with `exact`, one picture at a time, by the pipeline's own schedule."""
        self.tell("time, in turns with exact")
        alone = Row("yardstick", "exact", steps=self.steps)
        exact = self._drawer(self.exact, alone)
        exact(*self._inputs(alone, self.steps))
        rng = np.random.default_rng(len(row.name))
        mine: list[float] = []
        theirs: list[float] = []
        on_device: list[float] = []
        began = time.perf_counter()
        while len(mine) < self.rounds and (len(mine) < 2 or time.perf_counter() - began < BUDGET_S):
            for who in rng.permutation(2):
                inputs = self._inputs(row, found.steps) if who else self._inputs(alone, self.steps)
                seconds, device = _timed(draw if who else exact, inputs, self.machine)
                (mine if who else theirs).append(seconds / (row.batch if who else 1))
                if who and device is not None:
                    on_device.append(device / row.batch)
        found.rounds = len(mine)
        found.seconds, found.seconds_p90 = (float(np.percentile(mine, q)) for q in (50, 90))
        found.device_seconds = float(np.median(on_device)) if on_device else None
        found.pictures_per_second = 1 / found.seconds
        ratio = ratio_of([(mine, theirs)])
        found.times, found.times_low, found.times_high = ratio.median, ratio.low, ratio.high

    def _judge(self, row: Row, found: Measured, draw: Draw) -> None:
        assert self.parts.judge is not None
        pictures: list[np.ndarray] = []
        began = time.perf_counter()
        for first in range(0, self.judged, row.batch):
            if pictures and time.perf_counter() - began > JUDGE_BUDGET_S:
                break
            self.tell(f"judge {first} of {self.judged}")
            pictures.append(draw(*self._inputs(row, found.steps, first)))
        right = self.parts.judge.right(np.concatenate(pictures)[: self.judged])
        found.judged, found.judged_pictures = sum(right) / len(right), len(right)


def _diffusers(parts: Parts, settings: Settings, machine: Machine, steps: int) -> Draw:
    """diffusers' own pipeline over the same modules, as its users run it."""
    import copy

    import torch

    dtype = getattr(torch, settings.precision)
    pipe = copy.deepcopy(parts.diffusers).to(machine.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    if settings.compile:
        keep_kernels()
        mode = "max-autotune" if machine.cuda else "default"
        pipe.unet = torch.compile(pipe.unet, mode=mode)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode)

    def draw(texts: Sequence[str], noise: np.ndarray, fresh: np.ndarray | None) -> np.ndarray:
        made = pipe(
            list(texts),
            negative_prompt=[parts.generation.negative_prompt] * len(texts),
            num_inference_steps=steps,
            guidance_scale=parts.generation.guidance_scale,
            height=parts.generation.height,
            width=parts.generation.width,
            latents=torch.from_numpy(noise).to(machine.device, dtype),
            output_type="np",
        ).images
        return np.round(made * 255).astype(np.uint8)

    return draw


def _timed(
    draw: Draw, inputs: tuple[list[str], np.ndarray, np.ndarray | None], machine: Machine
) -> tuple[float, float | None]:
    """Seconds of a call by the clock, and by the device's own events where it has them."""
    if not machine.cuda:
        began = time.perf_counter()
        draw(*inputs)
        return time.perf_counter() - began, None
    import torch

    with torch.cuda.device(machine.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        start.record()
        draw(*inputs)
        end.record()
        torch.cuda.synchronize()
        return time.perf_counter() - began, start.elapsed_time(end) / 1000


def allocated(machine: Machine) -> int | None:
    """Bytes in use now: on the GPU, or of this process.

    On a GPU what the allocator holds, less what it holds for nobody: the activations of a CUDA
    graph lie in a pool of its own, and a replay allocates nothing that `memory_allocated` sees.
    """
    if machine.cuda:
        import torch

        torch.cuda.empty_cache()
        return int(torch.cuda.memory_reserved(machine.device))
    with peak_memory() as now:
        return now()


@contextmanager
def peak(machine: Machine) -> Iterator[Callable[[], int | None]]:
    """The most bytes in use within the block, as a function."""
    if not machine.cuda:
        with peak_memory() as most:
            yield most
        return
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(machine.device)
    yield lambda: int(torch.cuda.max_memory_reserved(machine.device))


def _free(machine: Machine) -> None:
    import torch

    gc.collect()
    torch._dynamo.reset()
    if machine.cuda:
        torch.cuda.empty_cache()
        return
    # glibc keeps what was freed; the next row's growth would seem smaller than it is.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
