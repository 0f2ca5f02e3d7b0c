"""The desktop pipeline: exact as diffusers, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters import reference as opening
from mobile_runtime.errors import GateError, UserError
from mobile_runtime.noise import Noise
from mobile_runtime.reference import EXACT, Parts, ReferencePipeline, Settings
from mobile_runtime.reference.pipeline import (
    MemoryUsedUpError,
    cut_table,
    noise_levels,
    told_memory,
)
from mobile_runtime.sampler import sample
from recipes import schema
from recipes.schedulers import CLASSES, choose_scheduler

PROMPT = "a large red star on a white background"


def stored_noise(parts: Parts, table: Any, count: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
    """Noise and fresh noise as torch's generator draws them for diffusers."""
    own = parts.generation
    shape = (count, own.latent_channels, own.latent_height, own.latent_width)
    first = Noise(3).draw(shape)
    if not any(row.d for row in table.rows):
        return first, None
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(shape, generator=generator) if row.d else None for row in table.rows]
    return first, np.stack([np.zeros(shape, np.float32) if r is None else r.numpy() for r in rows])


def diffusers_latents(parts: Parts, scheduler: str, noise: np.ndarray, **options: Any) -> Any:
    """What diffusers' StableDiffusionPipeline gives for the same noise."""
    pipe = parts.diffusers
    before = pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.scheduler = choose_scheduler(before, scheduler)
        given = torch.from_numpy(noise)
        generator = torch.Generator().manual_seed(5)
        made = pipe(PROMPT, latents=given, output_type="latent", generator=generator, **options)
        return made.images.numpy()
    finally:
        pipe.scheduler = before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", [*CLASSES])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_exact_is_diffusers_own_pipeline(parts: Parts, scheduler: str, guidance: float) -> None:
    steps = 4
    pipeline = ReferencePipeline(parts)
    table = parts.schedule(steps, scheduler)
    noise, fresh = stored_noise(parts, table)
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    wanted = diffusers_latents(parts, scheduler, noise, **options)
    made = pipeline(
        PROMPT,
        noise=noise,
        fresh_noise=fresh,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance,
    )
    # Euler's latents begin at sigma 4096 here (zero terminal SNR): diffusers' own float32 loses
    # 1e-4; ours is held against float64 below.
    largest = table.init_noise_sigma * np.abs(noise).max()
    assert np.abs(made.latents - wanted).max() <= 1e-5 * max(1, largest / 100)
    picture = parts.diffusers.vae.decode(torch.from_numpy(wanted) / parts.generation.scaling_factor)
    levels = ((picture.sample[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(levels - made.pictures[0].astype(float)).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm_solver_pp_2m"])
def test_exact_is_its_float64_self_but_for_rounding(parts: Parts, scheduler: str) -> None:
    pipeline, table = ReferencePipeline(parts), parts.schedule(4, scheduler)
    noise, _ = stored_noise(parts, table)
    states = pipeline.encode([PROMPT])

    def denoise(x: torch.Tensor, timestep: float) -> torch.Tensor:
        with torch.no_grad():
            return pipeline.models.denoise(x.float(), torch.tensor([timestep]), states).double()

    *_, (_, wanted) = sample(table, torch.from_numpy(noise).double(), denoise)
    made = pipeline(PROMPT, noise=noise, steps=4, scheduler=scheduler).latents
    assert np.abs(made - wanted.numpy()).max() <= 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm_solver_pp_2m"])
def test_image_to_image_is_diffusers_own(parts: Parts, scheduler: str) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = ReferencePipeline(parts)
    first = pipeline(PROMPT, seed=2).pictures[0]
    noise, _ = stored_noise(parts, parts.schedule(8, scheduler))
    made = pipeline(
        PROMPT, noise=noise, image=first, strength=0.6, steps=8, scheduler=scheduler
    ).latents
    pipe = StableDiffusionImg2ImgPipeline(
        **parts.diffusers.components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = choose_scheduler(pipe.scheduler, scheduler)
    scaled = torch.from_numpy(first).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(scaled).latent_dist.mode() * pipe.vae.config.scaling_factor
    # Latents as the image, and the noise handed over, so that nothing is drawn.
    with pytest.MonkeyPatch.context() as patch:
        name = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor"
        patch.setattr(name, lambda *a, **k: torch.from_numpy(noise))
        wanted = pipe(
            PROMPT,
            image=clean,
            strength=0.6,
            num_inference_steps=8,
            guidance_scale=1.0,
            output_type="latent",
        ).images.numpy()
    assert np.abs(made - wanted).max() <= 2e-5


def test_a_repeated_call_has_equal_bits_and_steps_are_told(parts: Parts) -> None:
    pipeline = ReferencePipeline(parts)
    told: list[tuple[int, int]] = []
    first = pipeline(PROMPT, seed=7, on_step=lambda k, n, latents: told.append((k, n)))
    again = pipeline(PROMPT, seed=7)
    assert told == [(1, 2), (2, 2)]
    assert first.latents.tobytes() == again.latents.tobytes()
    assert not torch.are_deterministic_algorithms_enabled()  # set back


def test_a_batch_is_its_pictures_one_by_one(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    prompts = ["a red tent", "the rat", "a tent"]
    batch = pipeline(prompts, seed=4, scheduler="euler_ancestral")
    for k, prompt in enumerate(prompts):
        alone = pipeline(prompt, seed=4 + k, scheduler="euler_ancestral")
        assert np.abs(batch.latents[k] - alone.latents[0]).max() < 1e-4


def test_embeddings_are_kept_and_may_be_given(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    calls = []
    encode = pipeline.models.encode
    object.__setattr__(pipeline.models, "encode", lambda ids: calls.append(1) or encode(ids))
    first = pipeline("a red tent", seed=1)
    assert len(calls) == 2  # the prompt, and the empty one
    assert pipeline("a red tent", seed=1).latents.tobytes() == first.latents.tobytes()
    assert len(calls) == 2
    states = pipeline.encode(["", "a red tent"]).numpy()
    given = pipeline("something else", seed=1, prompt_embeds=states)
    assert given.latents.tobytes() == first.latents.tobytes()
    with pytest.raises(UserError, match="need 2 rows"):
        pipeline("a red tent", prompt_embeds=states[:1])


def test_a_picture_to_start_from_is_checked(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    with pytest.raises(UserError, match=r"it has to be uint8 \(16, 16, 3\)"):
        pipeline("a tent", image=np.zeros((8, 8, 3), np.uint8))
    image = np.zeros((16, 16, 3), np.uint8)
    for strength, why in ((0.0, "out of range"), (0.1, "leaves none")):
        with pytest.raises(UserError, match=why):
            pipeline("a tent", image=image, strength=strength)
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        pipeline("a tent", seed=[1, 2])
    with pytest.raises(UserError, match="no prompt"):
        pipeline([])
    with pytest.raises(UserError, match="2 images for 1 prompts"):
        pipeline("a tent", image=np.stack([image, image]))
    with pytest.raises(UserError, match="no number to guide by"):
        pipeline("a tent", guidance_scale=float("nan"))
    with pytest.raises(UserError, match="2 rows of"):
        pipeline("a tent", prompt_embeds=np.zeros((2, 16, 31), np.float32))
    assert len(pipeline("a tent", seed=np.int64(3)).pictures) == 1
    made = ReferencePipeline(small, Settings(tiny_decoder="random"))("a tent", image=image)
    assert made.pictures.shape == (1, 16, 16, 3)  # taken in by the pipeline's own encoder


def test_a_recipe_is_opened_by_its_name(small_recipe: Path) -> None:
    pipeline = ReferencePipeline.open(str(small_recipe), {"schedule.steps": 3}, device="cpu")
    told: list[int] = []
    pipeline("a red tent", on_step=lambda k, n, latents: told.append(n))
    assert told == [3, 3, 3]


def test_a_process_may_choose_its_own_precision(small: Parts) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        ReferencePipeline(small)("a tent")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", [*CLASSES])
def test_noise_levels_are_the_schedulers(parts: Parts, scheduler: str) -> None:
    own = choose_scheduler(parts.diffusers.scheduler, scheduler)
    own.set_timesteps(8)
    clean, noise = (
        torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    )
    signal, sigma = noise_levels(cut_table(parts.schedule(8, scheduler), 0.5))
    wanted = own.add_noise(clean, noise, own.timesteps[4:5])
    assert torch.allclose(signal * clean + sigma * noise, wanted, atol=1e-5)


def test_out_of_memory_gives_advice() -> None:
    class CompilerError(Exception):
        """A compiler's own error, with what it met inside."""

    wrapped = CompilerError("backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("no")
    for error in (
        wrapped,
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"),
        MemoryError(),
    ):
        advice = r"half .*smaller batch.*tiny decoder"
        with pytest.raises(MemoryUsedUpError, match=advice), told_memory(EXACT, "cuda"):
            raise error
    with pytest.raises(RuntimeError, match="shape"), told_memory(EXACT, "cuda"):
        raise RuntimeError("shape")


def test_a_picture_of_no_numbers_is_no_picture(small: Parts) -> None:
    pipeline = ReferencePipeline(small)
    own = pipeline.models.decode
    object.__setattr__(pipeline.models, "decode", lambda latents: own(latents) * float("nan"))
    with pytest.raises(GateError, match="not finite in float32"):
        pipeline("a tent")


@pytest.mark.full_size
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm_solver_pp_2m"])
def test_exact_is_diffusers_own_pipeline_at_full_size(scheduler: str) -> None:
    changes = {"source.model": "random:sd_turbo"}
    parts = opening.open_recipe(schema.load("sd_turbo_int8", changes).resolved())
    table = parts.schedule(2, scheduler)
    noise, _ = stored_noise(parts, table)
    wanted = diffusers_latents(
        parts, scheduler, noise, num_inference_steps=2, guidance_scale=0.0, height=512, width=512
    )
    made = ReferencePipeline(parts)(PROMPT, noise=noise, steps=2, scheduler=scheduler)
    # Random weights leave latents of up to 67, where float32's own steps are 8e-6.
    assert np.abs(made.latents - wanted).max() <= 1e-5 * np.abs(wanted).max() / 10
