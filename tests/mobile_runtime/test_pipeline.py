"""The pipeline makes the pictures that diffusers makes, from any backend's components."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import GateError, UserError
from mobile_runtime.manifest import Generation
from mobile_runtime.noise import Noise
from mobile_runtime.pipeline import Cancelled, Pipeline
from mobile_runtime.tokenizer import ClipTokenizer
from tests.bundles import Arrays, make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Pipeline:
    return Pipeline.from_bundle(bundle, threads=1)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("stochastic", [False, True])
def test_stored_runs_are_repeated(tmp_path: Path, guidance: float, stochastic: bool) -> None:
    made = make_bundle(tmp_path / "bundle", guidance_scale=guidance, stochastic=stochastic)
    run = Pipeline.from_bundle(made, threads=1)
    stored = made.golden(made.manifest.golden.pipeline)
    for index, golden in enumerate(made.manifest.golden.prompts):
        result = run(
            golden.prompt,
            steps=golden.steps,
            noise=stored[f"{index}/noise"],
            fresh_noise=stored.get(f"{index}/fresh_noise"),
        )
        np.testing.assert_allclose(result.trajectory, stored[f"{index}/trajectory"], atol=1e-5)
        np.testing.assert_array_equal(result.picture, stored[f"{index}/picture"])
        np.testing.assert_array_equal(result.latents, result.trajectory[-1:])
        assert set(result.timings_ms) == {"text_encoder", "unet", "vae_decoder", "total"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "guidance"),
    [("DDIM", 4.0), ("EulerAncestralDiscrete", 4.0), ("LCM", 0.0), ("DDPM", 4.0)],
)
def test_a_seed_gives_the_picture_that_diffusers_gives_with_cudas_noise(
    tiny_pipeline: Any, tmp_path: Path, scheduler: str, guidance: float
) -> None:
    """Every draw of noise in diffusers is replaced by the generator's next; the rest is its own."""
    import diffusers
    import torch
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
    from diffusers.schedulers import (
        scheduling_ddpm,
        scheduling_euler_ancestral_discrete,
        scheduling_lcm,
    )

    from converters.schedule import compile_schedule

    steps, seed = 3, 11
    prompt, negative = "the red fox on the hill", "a rat"
    config = dict(tiny_pipeline.scheduler.config) | {"rescale_betas_zero_snr": False}
    chosen = getattr(diffusers, f"{scheduler}Scheduler").from_config(config)
    theirs = diffusers.StableDiffusionPipeline(
        **(tiny_pipeline.components | {"scheduler": chosen}), requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    noise = Noise(seed)

    def draw(shape: tuple[int, ...], **_: Any) -> torch.Tensor:
        return torch.from_numpy(noise.draw(tuple(shape)))

    with pytest.MonkeyPatch.context() as patch:
        for module in (
            pipeline_stable_diffusion,
            scheduling_ddpm,
            scheduling_euler_ancestral_discrete,
            scheduling_lcm,
        ):
            patch.setattr(module, "randn_tensor", draw)
        expected = theirs(
            prompt,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        ).images[0]

    tiny_pipeline.save_pretrained(tmp_path)
    generation = generation_of(tiny_pipeline, guidance)
    tokenizer = tiny_pipeline.tokenizer
    ours = Pipeline(
        torch_runners(tiny_pipeline),
        ClipTokenizer.from_files(
            tmp_path / "tokenizer/vocab.json",
            tmp_path / "tokenizer/merges.txt",
            max_length=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        generation,
        [compile_schedule(chosen, steps)],
    )
    result = ours(prompt, negative_prompt=negative, seed=seed, steps=steps)
    difference = result.picture.astype(float) - expected * 255
    assert np.abs(difference).max() < 0.5 + 0.05  # rounding to 8 bits, and float32
    assert result.prompt_embeds.shape == (2 if guidance > 1 else 1, 16, 32)


def generation_of(pipeline: Any, guidance: float) -> Generation:
    return Generation(
        latent_channels=4,
        latent_height=8,
        latent_width=8,
        height=64,
        width=64,
        scaling_factor=pipeline.vae.config.scaling_factor,
        guidance_scale=guidance,
        default_steps=3,
    )


def torch_runners(pipeline: Any) -> dict[str, Any]:
    """Components as a converter has them before there is a bundle."""
    import torch

    def runner(function: Any, *names: str) -> Any:
        def run(feeds: Arrays) -> Arrays:
            with torch.inference_mode():
                output = function(*(torch.from_numpy(feeds[name]) for name in names))
            return {"out_sample" if "timestep" in names else OUTPUTS[names[0]]: output.numpy()}

        return run

    return {
        "text_encoder": runner(lambda ids: pipeline.text_encoder(ids)[0], "input_ids"),
        "unet": runner(
            lambda x, t, text: pipeline.unet(x, t, text)[0],
            *("sample", "timestep", "encoder_hidden_states"),
        ),
        "vae_decoder": runner(lambda z: pipeline.vae.decode(z)[0], "latent_sample"),
    }


OUTPUTS = {"input_ids": "last_hidden_state", "latent_sample": "sample"}


def test_the_torch_backend_opens_a_diffusers_folder(tiny_pipeline: Any, tmp_path: Path) -> None:
    from mobile_runtime.backends import torch as torch_backend

    made = make_bundle(tmp_path / "bundle")
    tiny_pipeline.save_pretrained(tmp_path / "folder")
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(0, 600, (1, 16), dtype=np.int32),
        "sample": rng.standard_normal((2, 4, 8, 8), dtype=np.float32),
        "timestep": np.array([500], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 16, 32), dtype=np.float32),
        "latent_sample": rng.standard_normal((1, 4, 8, 8), dtype=np.float32),
    }
    for component, expected in torch_runners(tiny_pipeline).items():
        run = torch_backend.load(made, component, folder=tmp_path / "folder")
        for name, value in expected(feeds).items():
            np.testing.assert_allclose(run(feeds)[name], value, atol=1e-6)


def test_the_torch_backend_reads_no_pickles(tiny_pipeline: Any, tmp_path: Path) -> None:
    from mobile_runtime.backends import torch as torch_backend

    made = make_bundle(tmp_path / "bundle")
    with pytest.raises(UserError, match=r"it has no unet/config\.json"):
        torch_backend.load(made, "unet", folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers advises against pickles, rightly
        tiny_pipeline.unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    with pytest.raises(UserError, match="cannot be opened from safetensors"):
        torch_backend.load(made, "unet", folder=tmp_path)


def test_two_calls_of_a_unet_of_batch_1_give_the_guidance_of_one_call_of_batch_2(
    tmp_path: Path, pipeline: Pipeline
) -> None:
    single = Pipeline.from_bundle(make_bundle(tmp_path / "single", guidance_scale=1.0), threads=1)
    expected = pipeline("red fox", negative_prompt="the rat", guidance_scale=5.0)
    result = single("red fox", negative_prompt="the rat", guidance_scale=5.0)
    np.testing.assert_allclose(result.trajectory, expected.trajectory, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_unet_of_batch_2_without_guidance_follows_the_prompt_alone(
    tmp_path: Path, pipeline: Pipeline, guidance: float
) -> None:
    single = Pipeline.from_bundle(make_bundle(tmp_path / "single", guidance_scale=1.0), threads=1)
    expected = single("red fox")
    result = pipeline("red fox", guidance_scale=guidance)
    assert result.prompt_embeds.shape[0] == 1
    np.testing.assert_allclose(result.trajectory, expected.trajectory, atol=1e-5)


def test_a_seed_repeats_and_another_seed_prompt_or_negative_prompt_differs(
    pipeline: Pipeline,
) -> None:
    first = pipeline("red fox", seed=3).trajectory
    np.testing.assert_array_equal(pipeline("red fox", seed=3).trajectory, first)
    np.testing.assert_array_equal(pipeline("red fox", seed=3, negative_prompt="").trajectory, first)
    assert not np.array_equal(pipeline("red fox", seed=4).trajectory, first)
    assert not np.array_equal(pipeline("the rat", seed=3).trajectory, first)
    other = pipeline("red fox", seed=3, negative_prompt="the rat").trajectory
    assert not np.array_equal(other, first)


def test_each_step_is_told_with_its_latents(pipeline: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    latents: list[np.ndarray] = []

    def on_step(step: int, steps: int, x: np.ndarray) -> None:
        told.append((step, steps))
        latents.append(x)

    result = pipeline("red fox", steps=4, on_step=on_step)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_array_equal(np.concatenate(latents), result.trajectory[1:])


def test_a_cancelled_run_stops_before_the_next_model_call(bundle: Bundle) -> None:
    pipeline = Pipeline.from_bundle(bundle, threads=1)
    calls: list[str] = []
    for name, runner in list(pipeline.components.items()):
        pipeline.components[name] = lambda feeds, name=name, runner=runner: (
            calls.append(name) or runner(feeds)
        )
    with pytest.raises(Cancelled):
        pipeline("red fox", steps=4, should_cancel=lambda: calls.count("unet") == 2)
    assert calls == ["text_encoder", "text_encoder", "unet", "unet"]


def test_steps_that_were_not_compiled_are_refused_with_those_that_were(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="compiled for 3 steps; choose: 2, 4"):
        pipeline("red fox", steps=3)


def test_noise_of_a_wrong_shape_or_type_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match=r"noise has shape \(1, 4, 8, 9\)"):
        pipeline("red fox", noise=np.zeros((1, 4, 8, 9), np.float32))
    with pytest.raises(UserError, match="type float64"):
        pipeline("red fox", noise=np.zeros((1, 4, 8, 8)))
    with pytest.raises(UserError, match=r"the pipeline needs \(4, 4, 8, 8\) float32"):
        pipeline("red fox", steps=4, fresh_noise=np.zeros((3, 4, 8, 8), np.float32))


def test_a_picture_that_is_not_finite_is_an_error_and_no_picture(bundle: Bundle) -> None:
    pipeline = Pipeline.from_bundle(bundle, threads=1)
    decode = pipeline.components["vae_decoder"]

    def broken(feeds: Arrays) -> Arrays:
        sample = decode(feeds)["sample"]
        sample[0, 1, 2, 3] = np.nan
        return {"sample": sample}

    pipeline.components["vae_decoder"] = broken
    with pytest.raises(GateError, match="not finite"):
        pipeline("red fox")


def test_the_parts_can_be_run_by_the_caller(pipeline: Pipeline) -> None:
    expected = pipeline("red fox", seed=1)
    embeds = pipeline.encode("red fox", None, 3.0)
    noise = Noise(1).draw((1, 4, 8, 8))
    *_, (_, latents) = pipeline.steps(embeds, pipeline.schedule(), noise, 3.0)
    np.testing.assert_array_equal(pipeline.decode(latents), expected.picture)
