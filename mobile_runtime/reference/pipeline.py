"""The desktop pipeline: text or a picture to pictures, by the device's own schedule table.

It runs the rows of `sampler.py` on PyTorch's tensors, so its steps are a bundle's steps, and takes
the noise of `noise.py`. With `EXACT` it is the yardstick; every other setting is an optimization
whose distance to that can be measured.
"""

import math
import numbers
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobile_runtime.errors import GateError, PocketError, UserError
from mobile_runtime.manifest import ScheduleRow, ScheduleTable
from mobile_runtime.noise import Noise
from mobile_runtime.reference import models
from mobile_runtime.reference.parts import Parts, opener
from mobile_runtime.reference.switches import (
    EXACT,
    Settings,
    asked_of,
    fast_names,
    machine_of,
    missing,
    settings_of,
)
from mobile_runtime.sampler import needs_fresh_noise, sample

TEXTS_TOGETHER = 16
KEPT_PROMPTS = 256
"""Embeddings of so many texts stay on the device."""

OnStep = Callable[[int, int, Any], None]


class MemoryUsedUpError(PocketError):
    """The device's memory does not hold it."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of N prompts. h, w: the latents' size."""

    pictures: np.ndarray  # (N, H, W, 3) uint8
    latents: np.ndarray  # (N, C, h, w) float32, not yet divided by the scaling factor
    seconds: float  # of the call, up to the pictures in main memory


class ReferencePipeline:
    """Text encoder, UNet over a schedule table, decoder, on one device with one set of settings."""

    def __init__(self, parts: Parts, settings: Settings = EXACT, device: str | None = None) -> None:
        """device: as PyTorch names it; None takes the first GPU, else the CPU.

        Raises UserError for a device that is not there, and MemoryUsedUpError.
        """
        self.parts, self.settings = parts, settings
        self.machine = machine_of(device)
        for name, why in missing(asked_of(settings), self.machine).items():
            raise UserError(f"{name}: {why}, or leave it out of the settings")
        self._prompts: OrderedDict[str, Any] = OrderedDict()
        self._timesteps: dict[float, Any] = {}
        with told_memory(settings, self.machine.device):
            self.models = models.prepare(parts, settings, self.machine)

    @classmethod
    def open(
        cls,
        recipe: str = "pocket_turbo",
        changes: Mapping[str, Any] | None = None,
        *,
        fast: bool = False,
        device: str | None = None,
    ) -> "ReferencePipeline":
        """Open a recipe's source, after its float stages; changes: dotted keys to values.

        fast: with every switch that keeps the picture; a warning tells what the machine lacks.
        """
        machine = machine_of(device)
        names = fast_names(machine) if fast else ()
        lacks = missing(names, machine)
        for name, why in lacks.items():
            warnings.warn(f"left out: {name}: {why}", stacklevel=2)
        settings = settings_of([name for name in names if name not in lacks], machine)
        return cls(opener().open_named(recipe, changes or {}), settings, device)

    def encode(self, texts: Sequence[str]) -> Any:
        """The texts' embeddings (N, L, D) on the device; those seen before are not made again."""
        import torch

        new = [text for text in dict.fromkeys(texts) if text not in self._prompts]
        # Exact ones by themselves, so that nobody's company turns a bit; else together, in a size
        # that the batch alone decides, so that no prompt has an encoder compiled anew.
        most = 1 if self.settings.exact else min(len(texts), TEXTS_TOGETHER)
        size = 1 << (most - 1).bit_length()
        for start in range(0, len(new), size):
            some = new[start : start + size]
            padded = [*some, *[some[-1]] * (size - len(some))]
            ids = np.concatenate([self.parts.tokenizer.encode(text) for text in padded])
            with models.arithmetic(self.settings, self.machine):
                made = self.models.encode(torch.from_numpy(ids).long().to(self.machine.device))
            self._prompts.update(zip(some, made.split(1), strict=False))
        found = [self._prompts[text] for text in texts]
        for text in texts:
            self._prompts.move_to_end(text)
        while len(self._prompts) > max(KEPT_PROMPTS, len(texts)):
            self._prompts.popitem(last=False)
        return torch.cat(found)

    def forget(self) -> None:
        """Drop the kept embeddings, so that the next call encodes its prompts."""
        self._prompts.clear()

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        scheduler: str | None = None,
        guidance_scale: float | None = None,
        prompt_embeds: Any = None,
        noise: np.ndarray | None = None,
        fresh_noise: np.ndarray | None = None,
        image: Any = None,
        strength: float = 0.8,
        on_step: OnStep | None = None,
    ) -> Drawn:
        """Draw a picture of each prompt, all in one batch.

        negative_prompt, steps, guidance_scale: None takes the parts' own; guidance of 1 or less is
        none. scheduler: its short name; None is the pipeline's own. seed: of the first picture, the
        next ones count on; or one each. prompt_embeds: (N, L, D), or (2N, L, D) with guidance, the
        negative ones first, in place of the prompts' own; an array, or a tensor as `encode` gives.
        noise (N, C, h, w) and fresh_noise (steps, N, C, h, w), unit normal float32, replace the
        seeds'. image: to start from, (H, W, 3) or (N, H, W, 3) uint8, or PIL's; strength: the share
        of the steps that are then run.
        on_step(k, n, latents on the device) is told after each of the n steps.
        Raises UserError for what cannot be asked, GateError for a picture that is no numbers, and
        MemoryUsedUpError.
        """
        began = time.perf_counter()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise UserError("there is no prompt to draw")
        if other := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"a prompt is text, and {other[0]!r} is none")
        if steps is not None and not isinstance(steps, numbers.Integral):
            raise UserError(f"steps {steps!r} is no whole number")
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise UserError(f"the negative prompt is one text for all, and no {negative_prompt!r}")
        if guidance_scale is not None and not _is_number(guidance_scale):
            raise UserError(f"a guidance scale of {guidance_scale!r} is no number to guide by")
        table = self._table(steps, scheduler)
        own = self.parts.generation
        scale = own.guidance_scale if guidance_scale is None else guidance_scale
        shape = (len(texts), own.latent_channels, own.latent_height, own.latent_width)
        with told_memory(self.settings, self.machine.device):
            states = self._states(texts, negative_prompt, scale, prompt_embeds)
            seeds = _seeds(seed, len(texts))
            first, fresh = self._noise(seeds, table, shape, noise, fresh_noise)
            begin = None
            if image is not None:
                table, begin = self._start_from(image, strength, table, first)
                fresh = None if fresh is None else fresh[-table.steps :]
            with models.arithmetic(self.settings, self.machine):
                latents = self._sample(table, first, begin, states, scale, fresh, on_step)
                decoded = self._decode(latents)
            pictures = decoded.cpu().numpy()  # waits for the device
        return Drawn(pictures, latents.cpu().numpy(), time.perf_counter() - began)

    def _table(self, steps: int | None, scheduler: str | None) -> ScheduleTable:
        wanted = self.parts.generation.default_steps if steps is None else steps
        return self.parts.schedule(wanted, scheduler)

    def _states(self, texts: list[str], negative: str | None, scale: float, embeds: Any) -> Any:
        """Embeddings for the UNet's calls: (N, L, D), or with guidance (2N, L, D)."""
        import torch

        if embeds is not None:
            given = embeds.detach() if isinstance(embeds, torch.Tensor) else _tensor(embeds)
            rows = len(texts) * (2 if scale > 1 else 1)
            width = self.parts.unet.config.cross_attention_dim
            if given.ndim != 3 or len(given) != rows or given.shape[2] != width:
                raise UserError(
                    f"prompt_embeds has shape {tuple(given.shape)}; {len(texts)} prompts need "
                    f"{rows} rows of (L, {width})"
                )
            if not torch.isfinite(given).all():
                raise UserError("prompt_embeds holds values that are not finite")
            return given.to(self.machine.device, getattr(torch, self.settings.precision))
        unsaid = self.parts.generation.negative_prompt if negative is None else negative
        return self.encode([*([unsaid] * len(texts) if scale > 1 else []), *texts])

    def _noise(
        self,
        seeds: list[int],
        table: ScheduleTable,
        shape: tuple[int, ...],
        noise: np.ndarray | None,
        fresh_noise: np.ndarray | None,
    ) -> tuple[Any, Any]:
        """The first noise, and that of each step where the table adds any, on the device."""

        if noise is None or (fresh_noise is None and needs_fresh_noise(table)):
            own, own_fresh = noise_of(seeds, table, shape)
            noise = own if noise is None else noise
            fresh_noise = own_fresh if fresh_noise is None else fresh_noise
        _check_noise("noise", noise, shape)
        fresh = None
        if fresh_noise is not None and needs_fresh_noise(table):
            _check_noise("fresh_noise", fresh_noise, (table.steps, *shape))
            fresh = _tensor(fresh_noise).to(self.machine.device)
        return _tensor(noise).to(self.machine.device), fresh

    def _start_from(
        self, image: Any, strength: float, table: ScheduleTable, noise: Any
    ) -> tuple[ScheduleTable, Any]:
        """The table's last rows, and the picture's latents with the noise of the first of them."""
        import torch

        image, own = np.asarray(image), self.parts.generation
        if self.models.encode_picture is None:
            raise UserError(
                f"{self.parts.name} has a decoder without an encoder, so no picture can be taken; "
                "leave out the image"
            )
        images = image[None] if image.ndim == 3 else image
        if images.ndim != 4:
            raise UserError(f"the image has shape {image.shape}; it has to be (H, W, 3)")
        if len(images) not in (1, len(noise)):
            raise UserError(f"{len(images)} images for {len(noise)} prompts; give one, or one each")
        if images.dtype != np.uint8 or images.shape[1:] != (own.height, own.width, 3):
            raise UserError(
                f"the image is {images.dtype} {images.shape[1:]}; it has to be uint8 "
                f"({own.height}, {own.width}, 3); resize it"
            )
        rest = cut_table(table, strength)
        pixels = _tensor(images).to(self.machine.device)
        dtype = getattr(torch, self.settings.precision)
        with models.arithmetic(self.settings, self.machine):
            scaled = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(dtype)
            latents = self.models.encode_picture(scaled).float() * own.scaling_factor
        signal, sigma = noise_levels(rest)
        return rest, signal * latents.expand(len(noise), -1, -1, -1) + sigma * noise

    def _sample(
        self,
        table: ScheduleTable,
        noise: Any,
        begin: Any,
        states: Any,
        scale: float,
        fresh: Any,
        on_step: OnStep | None,
    ) -> Any:
        """The latents after the table's rows, float32; the models see their own precision."""
        kept: list[Any] = []  # DeepCache's features
        calls = 0

        def unet(x: Any, timestep: Any) -> Any:
            nonlocal calls
            called, calls = calls, calls + 1
            if self.models.full is None or self.models.shallow is None:
                return self.models.denoise(x, timestep, states)
            if called % self.settings.deep_cache:
                return self.models.shallow(x, timestep, states, kept[0])
            out, deep = self.models.full(x, timestep, states)
            kept[:] = [deep]
            return out

        def denoise(x: Any, timestep: float) -> Any:
            import torch

            inner = x.to(states.dtype)
            if self.settings.channels_last:
                inner = inner.contiguous(memory_format=torch.channels_last)
            if scale <= 1:
                return unet(inner, self._timestep(timestep)).float()
            unsaid, said = (
                unet(torch.cat([inner, inner]), self._timestep(timestep)).float().chunk(2)
            )
            return unsaid + scale * (said - unsaid)

        following = None if fresh is None else lambda step: fresh[step]
        for step, latents in sample(table, noise, denoise, following, begin):
            if step and on_step is not None:
                on_step(step, table.steps, latents)
        return latents

    def _timestep(self, timestep: float) -> Any:
        """As a tensor on the device, made once: a number would compile anew for each value."""
        import torch

        if timestep not in self._timesteps:
            made = torch.tensor([timestep], dtype=torch.float32, device=self.machine.device)
            self._timesteps[timestep] = made
        return self._timesteps[timestep]

    def _decode(self, latents: Any) -> Any:
        """(N, H, W, 3) uint8 on the device; GateError if any value is not finite."""
        import torch

        dtype = getattr(torch, self.settings.precision)
        scaled = (latents / self.models.scaling_factor).to(dtype)
        if self.settings.channels_last:
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        decoded = self.models.decode(scaled).float()
        if not torch.isfinite(decoded).all():
            raise GateError(
                f"the pictures hold values that are not finite in {self.settings.precision}; take "
                "bfloat16 or float32, or the switch float_norms"
            )
        levels = (decoded / 2 + 0.5).clamp(0, 1) * 255
        return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def cut_table(table: ScheduleTable, strength: float) -> ScheduleTable:
    """The last rows of a table, as image to image runs them: `strength` of the steps.

    A multi-step row that loses the one before it becomes first-order, as diffusers' schedulers
    begin. Raises UserError where no step would be left.
    """
    if not _is_number(strength) or not 0 < strength <= 1:
        raise UserError(f"strength {strength!r} is out of range; take one above 0, up to 1")
    count = min(int(table.steps * strength), table.steps)
    if count == 0:
        raise UserError(
            f"strength {strength:g} of {table.steps} steps leaves none; take more steps, or a "
            f"strength of {1 / table.steps:.2g} or more"
        )
    rows = table.rows[-count:]
    first = rows[0].model_copy(update={"b": rows[0].b + rows[0].c, "c": 0.0})
    return table.model_copy(update={"steps": count, "rows": (first, *rows[1:])})


def noise_levels(table: ScheduleTable) -> tuple[float, float]:
    """s, n of the latents that a table's first row takes: s * clean + n * noise.

    They follow from the row: the model sees input_scale * x, whose clean share is alpha and whose
    noise is sigma; u and v hold both, by what the model predicts. Raises UserError for a model
    that predicts the clean sample itself: its rows say nothing of the noise.
    """
    row: ScheduleRow = table.rows[0]
    if table.prediction_type == "sample":
        raise UserError(
            "a model that predicts the sample has a schedule without noise levels; image to image "
            "needs epsilon or v_prediction"
        )
    if table.prediction_type == "epsilon":
        alpha = row.input_scale / row.u
        sigma = -row.v * alpha
    else:
        alpha, sigma = row.u / row.input_scale, -row.v
    return alpha / row.input_scale, sigma / row.input_scale


def noise_of(
    seeds: Sequence[int], table: ScheduleTable, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The first noise (N, C, h, w) of each seed, and that of each step where the table adds any.

    In the steps' order, after the first noise, as a CUDA pipeline draws it: (steps, N, C, h, w).
    """
    drawn, one = [Noise(seed) for seed in seeds], (1, *shape[1:])

    def draw() -> np.ndarray:
        return np.concatenate([each.draw(one) for each in drawn])

    first = draw()
    if not needs_fresh_noise(table):
        return first, None
    return first, np.stack([draw() if row.d else np.zeros(shape, np.float32) for row in table.rows])


def _seeds(seed: Any, count: int) -> list[int]:
    """A seed for each picture: counted on from one, or those that are given."""
    if isinstance(seed, numbers.Integral):
        return [int(seed) + k for k in range(count)]
    if isinstance(seed, str) or not isinstance(seed, Sequence | np.ndarray):
        raise UserError(f"seed {seed!r} is no whole number, nor a list of them")
    if len(seed) != count:
        raise UserError(f"{len(seed)} seeds for {count} prompts; give one each")
    if other := [each for each in seed if not isinstance(each, numbers.Integral)]:
        raise UserError(f"seed {other[0]!r} is no whole number")
    return [int(each) for each in seed]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _tensor(array: np.ndarray) -> Any:
    """On the CPU. PyTorch takes no array that is read backwards, nor one that is only read."""
    import torch

    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _check_noise(name: str, noise: np.ndarray, shape: tuple[int, ...]) -> None:
    if noise.shape != shape or noise.dtype != np.float32:
        raise UserError(
            f"{name} has shape {noise.shape} and type {noise.dtype}; "
            f"the pipeline needs {shape} float32"
        )
    if not np.isfinite(noise).all():
        raise UserError(f"{name} holds values that are not finite")


_NO_MEMORY = ("out of memory", "outofmemory", "alloc_failed", "allocate memory", "enough memory")


def _is_for_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that there is no memory left."""
    while error is not None:
        told = f"{type(error).__name__} {error}".lower()
        if isinstance(error, MemoryError) or any(words in told for words in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


@contextmanager
def told_memory(settings: Settings, device: str) -> Iterator[None]:
    """Turn a device's refusal of memory into advice on what takes less."""
    try:
        yield
    except Exception as error:  # a compiler's errors, in which it may be wrapped, share no class
        if isinstance(error, PocketError) or not _is_for_memory(error):
            raise
        ways = ["a smaller batch", "a smaller --resolution"]
        if settings.tiny_decoder is None:
            ways.append("a tiny decoder (--tiny-decoder)")
        if settings.precision == "float32":
            ways.insert(0, "the switch half (half the bytes)")
        raise MemoryUsedUpError(
            f"the memory of {device} does not hold this; try {', '.join(ways[:-1])} or {ways[-1]}"
        ) from error
