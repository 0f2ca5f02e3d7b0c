"""The scales of static activations, from the trajectory that will run.

The float pipeline draws pictures with the recipe's schedule, guidance and size, from seeded noise:
text encoder, UNet at each of its timesteps, decoder (a scale has to fit all steps that run:
Q-Diffusion, arXiv 2302.04304). The input and the output of every planned layer are observed, and an
observer makes a range of what it saw:

    minmax      all of it
    percentile  all but the outermost values at either end
    mse         the clipping that rounds with the least squared error
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobile_runtime.errors import UserError
from recipes import drawn, prompts
from recipes.measure import latent_size, with_modules
from recipes.quantized_layers import ACTIVATION_MAX, ACTIVATION_MIN, Affine, Static
from recipes.schedulers import choose_scheduler
from recipes.schema import Recipe
from recipes.settings import CalibrationSettings

BATCH = 4
"""Pictures drawn together."""
_BINS = 2**14
_CLIPPINGS = torch.linspace(0.2, 1.0, 81, dtype=torch.float64)


class Observer:
    """The range of all values that one tensor took, and how often each value came."""

    def __init__(self, counts: bool) -> None:
        """counts: keep a histogram, too; it takes more time than the range alone."""
        self.low = self.high = 0.0
        self.seen = 0
        # Of values in -radius..radius, a power of two that grows with them.
        self.radius = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64) if counts else None

    def observe(self, x: Tensor) -> None:
        """Take a tensor's values in; those that are not finite make the range so."""
        x = x.detach().float()
        low, high = (float(bound) for bound in x.aminmax())
        self.low, self.high = _least(self.low, low), -_least(-self.high, -high)
        self.seen += x.numel()
        peak = max(-low, high)
        if self.counts is None or not math.isfinite(peak):
            return
        while peak > self.radius:
            if self.radius == 0:
                self.radius = 2.0 ** math.ceil(math.log2(peak))
            else:
                self.radius *= 2
                quarter = torch.zeros(_BINS // 4, dtype=torch.float64)
                self.counts = torch.cat([quarter, self.counts.view(-1, 2).sum(1), quarter])
        if self.radius:
            self.counts += torch.histc(x, _BINS, -self.radius, self.radius)

    @property
    def values(self) -> Tensor:
        """The middle of each bin."""
        return (torch.arange(_BINS, dtype=torch.float64) * 2 + 1 - _BINS) * (self.radius / _BINS)


def _least(a: float, b: float) -> float:
    """The smaller; NaN where either is."""
    return a if a <= b or math.isnan(a) else b


Range = tuple[float, float]


def minmax(observer: Observer, settings: CalibrationSettings) -> Range:
    """All values."""
    return observer.low, observer.high


def percentile(observer: Observer, settings: CalibrationSettings) -> Range:
    """From the (100 - p)th to the pth percentile, to a bin's width."""
    assert observer.counts is not None
    below = observer.counts.cumsum(0) / observer.counts.sum()
    share = settings.percentile / 100
    edge = observer.radius / _BINS
    low = float(observer.values[int((below > 1 - share).nonzero()[0])]) - edge
    high = float(observer.values[int((below >= share - 1e-12).nonzero()[0])]) + edge
    return max(low, observer.low), min(high, observer.high)


def mse(observer: Observer, settings: CalibrationSettings) -> Range:
    """The share of the whole range, cut at both ends alike, that rounds best."""
    assert observer.counts is not None
    full = observer.high - observer.low
    step = (full * _CLIPPINGS / (ACTIVATION_MAX - ACTIVATION_MIN))[:, None]
    zero = (ACTIVATION_MIN - observer.low * _CLIPPINGS[:, None] / step).round()
    taken = observer.counts > 0
    values, counts = observer.values[taken], observer.counts[taken]
    integers = ((values / step).round() + zero).clamp(ACTIVATION_MIN, ACTIVATION_MAX)
    error = ((integers - zero) * step - values).square() @ counts
    best = float(_CLIPPINGS[int(error.argmin())])
    return observer.low * best, observer.high * best


OBSERVERS: dict[str, Callable[[Observer, CalibrationSettings], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}


@dataclass
class Call:
    """What a component was called with once."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Calibration:
    """What a run of the float pipeline showed.

    static: by layer. macs: multiply-adds of a layer in one call of its component, for one picture.
    calls: of each component, on the first pictures, for the sensitivity.
    """

    static: dict[str, Static] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)


def calibrate(
    pipeline: Any,
    layers: Mapping[str, nn.Module],
    static: Collection[str],
    roots: Mapping[str, nn.Module],
    recipe: Recipe,
    settings: CalibrationSettings,
    remember: int = 0,
) -> Calibration:
    """Draw pictures with the float pipeline and find every layer's scales.

    layers: convolutions and linears, by their path in the plan. static: those that get scales.
    roots: the modules to `remember` calls of, for that many pictures. Raises UserError for a layer
    that saw no data, or that would get a scale of zero or one that is not finite.
    """
    counts = settings.observer != "minmax"
    seen = {name: (Observer(counts), Observer(counts)) for name in static}
    found = Calibration(calls={name: [] for name in roots})

    def hook(name: str) -> Callable[..., None]:
        def look(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name in seen:
                reads, gives = seen[name]
                reads.observe(args[0])
                gives.observe(out)
            if name not in found.macs:
                weight = layer.weight
                places = out.numel() // len(out) // weight.shape[0]
                found.macs[name] = places * weight.numel()

        return look

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    first = min(remember, settings.samples)
    with _removed(hooks):
        if first:
            with _removed(_recorders(roots, found.calls)):
                run(pipeline, recipe, settings, range(first), "calibrate")
        run(pipeline, recipe, settings, range(first, settings.samples), "calibrate")
    found.static = {name: _scales(name, *seen[name], settings) for name in static}
    return found


def _recorders(roots: Mapping[str, nn.Module], calls: dict[str, list[Call]]) -> list[Any]:
    def record(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls[name].append(Call(args, kwargs))

    return [
        root.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, root in roots.items()
    ]


@contextmanager
def _removed(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check(recipe: Recipe, settings: CalibrationSettings) -> None:
    """Refuse a prompt file that cannot be used."""
    prompts.check(settings.prompts)


@torch.no_grad()
def run(
    pipeline: Any, recipe: Recipe, settings: CalibrationSettings, numbers: range, told: str
) -> None:
    """Draw the pictures of these numbers, as the recipe will; what hooks see is all that it leaves.

    A picture's prompt and noise depend on the seed and its number alone.
    """
    scheduler = choose_scheduler(pipeline.scheduler, recipe.schedule.scheduler)
    pipeline = with_modules(pipeline, {"scheduler": scheduler})
    draw = prompts.drawer(settings.prompts, recipe)
    shape = pipeline.unet.config.in_channels, *latent_size(pipeline, recipe.height, recipe.width)
    vae = pipeline.vae
    groups: Iterable[range] = [
        numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)
    ]
    for group in tqdm(groups, desc=told, unit=f"x{BATCH} pictures", delay=2, leave=False):
        words = [draw(np.random.default_rng([settings.seed, 31, k]), 1)[0] for k in group]
        for steps in recipe.schedule.every_steps:
            # A list: each picture has a generator of its own (diffusers' randn_tensor).
            fresh: Any = [_generator(settings.seed, k, 33) for k in group]
            noise = torch.stack([_noise(settings.seed, k, shape) for k in group])
            latents = drawn.sample(
                pipeline,
                pipeline.unet,
                words,
                noise.to(pipeline.unet.device),
                steps,
                recipe.schedule.guidance_scale,
                fresh,
            )
            for row in latents.split(1):
                picture = vae.decode(row / vae.config.scaling_factor).sample
                if "vae_encoder" in recipe.components:
                    vae.encode(picture.clamp(-1, 1))


def _noise(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=_generator(seed, number, 32))


def _generator(seed: int, number: int, stream: int) -> torch.Generator:
    words = np.random.SeedSequence([seed, stream, number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def _scales(name: str, reads: Observer, gives: Observer, settings: CalibrationSettings) -> Static:
    if not reads.seen:
        raise UserError(
            f"calibration saw no data for {name}, which no picture of the recipe runs through; "
            "keep it in float with a rule"
        )
    scales = []
    for what, observer in (("read", reads), ("gave", gives)):
        finite = math.isfinite(observer.low) and math.isfinite(observer.high)
        span: Range = (observer.low, observer.high)
        if finite and observer.low < observer.high:
            span = OBSERVERS[settings.observer](observer, settings)
        affine = Affine.covering(*span)
        if not affine.scale > 0:
            values = "nothing but zeros" if finite else "values that are not finite"
            raise UserError(
                f"{name} {what} {values} in the calibration, which makes no scale: keep it in "
                "float with a rule, or mend the source's weights"
            )
        scales.append(affine)
    return Static(*scales)
