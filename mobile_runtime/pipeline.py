"""From a prompt to a picture, over any callables that take and give named arrays.

The components may be files of a bundle in any backend, or torch modules before a bundle exists;
the pipeline is the same code, so that what a converter stores as golden is what a runtime repeats.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mobile_runtime import backends
from mobile_runtime.backends import Runner
from mobile_runtime.errors import GateError, PocketError, UserError
from mobile_runtime.manifest import PIPELINE_COMPONENTS, Generation, ScheduleTable
from mobile_runtime.noise import Noise
from mobile_runtime.sampler import needs_fresh_noise, sample
from mobile_runtime.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle


class Cancelled(PocketError):  # noqa: N818  # not an error: what the caller wanted
    """The caller asked to stop."""


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer: text to ids, (1, L) int32, cut to fit."""

    def encode(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Result:
    """One picture and how it came about. h, w: the latents' size; n: the number of steps."""

    picture: np.ndarray  # (H, W, 3) uint8
    latents: np.ndarray  # (1, C, h, w) float32, not yet divided by the scaling factor
    trajectory: np.ndarray  # (n + 1, C, h, w) float32: the scaled noise, then after each step
    noise: np.ndarray  # (1, C, h, w) float32, unit normal
    fresh_noise: np.ndarray | None  # (n, C, h, w) float32, where the schedule takes any
    prompt_embeds: np.ndarray  # (2, L, D) [negative, prompt] with guidance, else (1, L, D)
    timings_ms: dict[str, float]  # by component, summed over its calls, and "total"


class Pipeline:
    """Text encoder, UNet over a compiled schedule, decoder.

    `encode`, `steps` and `decode` are the three parts, for callers that own the loop; calling the
    pipeline runs them all.
    """

    def __init__(
        self,
        components: dict[str, Runner],
        tokenizer: Tokenizer,
        generation: Generation,
        schedules: Sequence[ScheduleTable],
        unet_batch: int | None = None,
    ) -> None:
        """components: runners of `text_encoder`, `unet` and `vae_decoder`, each dict to dict.

        unet_batch: the UNet's fixed batch; 2 takes [negative, prompt] in one call, 1 is called
        once for each. None: 2 if the generation has guidance, else 1.
        """
        self.components = components
        self.tokenizer = tokenizer
        self.generation = generation
        self.schedules = {table.steps: table for table in schedules}
        has_guidance = generation.guidance_scale > 1
        self.unet_batch = unet_batch if unet_batch is not None else 1 + has_guidance
        self.timings_ms: dict[str, float] = {}

    @classmethod
    def from_bundle(
        cls, bundle: "Bundle", backend: str | None = None, **options: Any
    ) -> "Pipeline":
        """Load a bundle's components in a backend (None: the target's own) with its options."""
        components: dict[str, Runner] = {
            name: backends.load(bundle, name, backend=backend, **options)
            for name in PIPELINE_COMPONENTS
        }
        return cls(
            components,
            ClipTokenizer.from_bundle(bundle),
            bundle.manifest.generation,
            bundle.manifest.schedules,
            unet_batch=bundle.component("unet").inputs[0].shape[0],
        )

    def schedule(self, steps: int | None = None) -> ScheduleTable:
        """The table for a number of steps (None: the default); others are an error."""
        wanted = self.generation.default_steps if steps is None else steps
        return find_schedule(self.schedules.values(), wanted)

    def encode(self, prompt: str, negative_prompt: str | None, guidance_scale: float) -> np.ndarray:
        """The text's embeddings: (2, L, D) [negative, prompt] with guidance, else (1, L, D)."""
        texts = [prompt]
        if guidance_scale > 1:
            default = self.generation.negative_prompt
            texts = [default if negative_prompt is None else negative_prompt, prompt]
        return np.concatenate(
            [
                self._run("text_encoder", input_ids=self.tokenizer.encode(text))[
                    "last_hidden_state"
                ]
                for text in texts
            ]
        )

    def steps(
        self,
        prompt_embeds: np.ndarray,
        table: ScheduleTable,
        noise: np.ndarray,
        guidance_scale: float,
        fresh_noise: Callable[[int], np.ndarray] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (0, the first latents), then (k, the latents after k steps), (1, C, h, w)."""

        def denoise(x: np.ndarray, timestep: float) -> np.ndarray:
            return self._guided(x, timestep, prompt_embeds, guidance_scale)

        return sample(table, noise, denoise, fresh_noise)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (1, C, h, w) to a picture (H, W, 3) uint8.

        Raises GateError if the picture holds anything that is not a number.
        """
        scaled = latents / np.float32(self.generation.scaling_factor)
        sample = self._run("vae_decoder", latent_sample=scaled)["sample"]
        if not np.isfinite(sample).all():
            raise GateError(
                "the picture holds values that are not finite; "
                "find the component with: python -m mobile_runtime validate BUNDLE"
            )
        pixels = np.clip(sample[0] / 2 + 0.5, 0, 1).transpose(1, 2, 0)
        return np.round(pixels * 255).astype(np.uint8)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        noise: np.ndarray | None = None,
        fresh_noise: np.ndarray | None = None,
        on_step: Callable[[int, int, np.ndarray], None] | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Result:
        """Generate one picture.

        negative_prompt, steps, guidance_scale: None takes the bundle's. Guidance of 1 or less is
        none. noise (1, C, h, w) and fresh_noise (steps, C, h, w), unit normal float32, replace the
        seed's. on_step(k, n, latents) is told after each of the n steps. should_cancel is asked
        between the model calls; when it says True, Cancelled is raised.
        """
        started = time.perf_counter()
        self.timings_ms = {}
        table = self.schedule(steps)
        scale = self.generation.guidance_scale if guidance_scale is None else guidance_scale
        g = self.generation
        shape = (1, g.latent_channels, g.latent_height, g.latent_width)
        drawn = Noise(seed)
        if noise is None:
            noise = drawn.draw(shape)
        _check_noise("noise", noise, shape)
        if fresh_noise is not None:
            _check_noise("fresh_noise", fresh_noise, (table.steps, *shape[1:]))
            stored = fresh_noise
        elif needs_fresh_noise(table):
            # Drawn in the steps' order, after the initial noise, as a CUDA pipeline draws it.
            rows = [drawn.draw(shape) if row.d else np.zeros(shape) for row in table.rows]
            stored = np.concatenate(rows).astype(np.float32)

        def check_cancel() -> None:
            if should_cancel is not None and should_cancel():
                raise Cancelled("cancelled")

        check_cancel()
        embeds = self.encode(prompt, negative_prompt, scale)
        check_cancel()
        trajectory = []
        fresh = (lambda step: stored[step : step + 1]) if needs_fresh_noise(table) else None
        for step, latents in self.steps(embeds, table, noise, scale, fresh):
            trajectory.append(latents)
            if on_step is not None and step > 0:
                on_step(step, table.steps, latents)
            check_cancel()
        picture = self.decode(latents)
        self.timings_ms["total"] = 1000 * (time.perf_counter() - started)
        return Result(
            picture=picture,
            latents=latents,
            trajectory=np.concatenate(trajectory),
            noise=noise,
            fresh_noise=stored if fresh else None,
            prompt_embeds=embeds,
            timings_ms=dict(self.timings_ms),
        )

    def _guided(
        self, x: np.ndarray, timestep: float, embeds: np.ndarray, guidance_scale: float
    ) -> np.ndarray:
        """The model's output for x (1, C, h, w), with classifier-free guidance above 1."""
        if guidance_scale <= 1:
            # A UNet of fixed batch 2 computes the prompt twice.
            return self._unet([x] * self.unet_batch, timestep, [embeds[-1:]] * self.unet_batch)[-1:]
        halves = [embeds[:1], embeds[1:]]
        if self.unet_batch == 2:
            both = self._unet([x, x], timestep, halves)
        else:
            both = np.concatenate([self._unet([x], timestep, [half]) for half in halves])
        unconditional, conditional = both[:1], both[1:]
        return unconditional + np.float32(guidance_scale) * (conditional - unconditional)

    def _unet(
        self, samples: list[np.ndarray], timestep: float, embeds: list[np.ndarray]
    ) -> np.ndarray:
        return self._run(
            "unet",
            sample=np.concatenate(samples),
            timestep=np.array([timestep], np.float32),
            encoder_hidden_states=np.concatenate(embeds),
        )["out_sample"]

    def _run(self, component: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        outputs = self.components[component](feeds)
        elapsed_ms = 1000 * (time.perf_counter() - started)
        self.timings_ms[component] = self.timings_ms.get(component, 0.0) + elapsed_ms
        return outputs


def find_schedule(tables: Iterable[ScheduleTable], steps: int) -> ScheduleTable:
    """The table for a number of steps; UserError with the choices where there is none."""
    by_steps = {table.steps: table for table in tables}
    if steps not in by_steps:
        known = ", ".join(str(known) for known in sorted(by_steps))
        raise UserError(f"there is no schedule compiled for {steps} steps; choose: {known}")
    return by_steps[steps]


def _check_noise(name: str, noise: np.ndarray, shape: tuple[int, ...]) -> None:
    if noise.shape != shape or noise.dtype != np.float32:
        raise UserError(
            f"{name} has shape {noise.shape} and type {noise.dtype}; "
            f"the pipeline needs {shape} float32"
        )
