"""A pipeline learns to draw smaller pictures from those that it draws at its own size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, LCMScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mobile_runtime.errors import UserError
from recipes import distill, resolution, schema, stages
from recipes.faults import RecipeError
from recipes.losses import Noise
from recipes.measure import with_modules
from recipes.schema import Recipe
from tests.converters.small import make_small_pipeline

SETTINGS = {
    "drawn_at": 32,
    "iterations": 4,
    "decoder_iterations": 8,
    "batch": 2,
    "warmup": 0,
    "pictures": 6,
    "draw_steps": 2,
    "watch_every": 4,
    "learning_rate": 2e-3,
    "precision": "float32",
    "average_decay": 0.0,
}
STUDENT = {
    "method": "progressive",
    "steps": 1,
    "teacher_steps": 2,
    "pictures": 2,
    "draw_steps": 1,
    "iterations": 1,
    "batch": 2,
    "warmup": 0,
    "precision": "float32",
}


def recipe(prompts: Path, *more: dict[str, Any], side: Any = 16, **settings: Any) -> Recipe:
    asked = {**SETTINGS, "prompts": str(prompts), **settings}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": side,
            "schedule": {"steps": 1, "guidance_scale": 0.0},
            "stages": [{"resolution": asked}, *more],
        }
    )


def refused(pipeline: Any, asked: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        stages.check(pipeline, asked)
    return str(caught.value)


def test_pictures_are_not_squeezed(prompts: Path) -> None:
    told = refused(make_small_pipeline(), recipe(prompts, drawn_at=[16, 32]))
    assert "pictures of 16x32 pixels would be squeezed to 16x16 pixels" in told


def test_steps_that_the_scheduler_cannot_draw_in_are_told_before_any_work(prompts: Path) -> None:
    pipeline = make_small_pipeline()
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    assert "LCMScheduler cannot make 60 steps" in refused(pipeline, recipe(prompts, draw_steps=60))


def test_the_unet_and_the_decoder_are_trained_kept_and_found_again(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_small_pipeline()
    before = {name: value.clone() for name, value in pipeline.vae.state_dict().items()}
    asked = recipe(prompts)
    applied = stages.apply(pipeline, asked, cache=tmp_path / "cache")
    after = applied.pipeline.vae.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}
    assert all(torch.equal(before[name], pipeline.vae.state_dict()[name]) for name in before)
    record = applied.records[0]
    assert record["vae_psnr_db"] > record["vae_psnr_db_before"]
    assert not torch.equal(
        applied.pipeline.unet.conv_in.weight, make_small_pipeline().unet.conv_in.weight
    )
    (kept,) = (tmp_path / "cache").iterdir()
    with Image.open(kept / "training" / "resolution-000004.png") as sheet:
        assert sheet.size == (6 * 16, 2 * 16)  # the student's above, what it learns below

    monkeypatch.setattr(resolution, "train", None)  # not needed any more
    again = stages.apply(make_small_pipeline(), asked, cache=tmp_path / "cache")
    assert torch.equal(again.pipeline.unet.conv_in.weight, applied.pipeline.unet.conv_in.weight)
    assert torch.equal(
        again.pipeline.vae.decoder.conv_in.weight, applied.pipeline.vae.decoder.conv_in.weight
    )


def test_the_adapted_unet_teaches_the_distillation_after_it(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = []
    monkeypatch.setattr(distill, "check_fit", lambda teacher, student: teachers.append(teacher))
    asked = recipe(prompts, {"distill": {**STUDENT, "prompts": str(prompts)}}, decoder_iterations=0)
    adapted = []
    stages.apply(
        make_small_pipeline(),
        asked,
        cache=tmp_path / "cache",
        seen=lambda applied: adapted.append(applied.pipeline.unet.conv_in.weight.clone()),
    )
    assert torch.equal(teachers[0].conv_in.weight, adapted[0])


def test_what_it_cannot_learn_from_is_refused_before_any_work(prompts: Path) -> None:
    pipeline = make_small_pipeline()
    assert "is the recipe's resolution, so there is nothing to adapt" in refused(
        pipeline, recipe(prompts, side=32)
    )
    assert "have no detail to learn 16x48 pixels from" in refused(
        pipeline, recipe(prompts, side=[16, 48])
    )
    assert "[33, 33]" in refused(pipeline, recipe(prompts, drawn_at=33)).replace("(", "[").replace(
        ")", "]"
    )
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    assert "AutoencoderTiny cannot encode the shrunk pictures" in refused(
        with_modules(pipeline, {"vae": tiny}), recipe(prompts)
    )


def test_a_distillation_or_a_tiny_decoder_before_it_is_refused(prompts: Path) -> None:
    later = {"resolution": {**SETTINGS, "prompts": str(prompts)}}
    for name, settings in (("distill", STUDENT), ("decoder", {"model": "a/b"})):
        with pytest.raises(RecipeError, match=f"would undo {name}; list it before that"):
            schema.parse(
                {
                    "name": "x",
                    "source": {"model": "embedded"},
                    "resolution": 16,
                    "schedule": {"steps": 1, "guidance_scale": 0.0},
                    "stages": [{name: settings}, later],
                }
            )


def test_pictures_are_shrunk_as_pillow_shrinks_them() -> None:
    pictures = np.random.default_rng(0).integers(64, 192, size=(3, 64, 48, 3), dtype=np.uint8)
    made = resolution.shrunk(torch.from_numpy(pictures), (40, 28)).numpy()
    for picture, ours in zip(pictures, made, strict=True):
        theirs = Image.fromarray(picture).resize((28, 40), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(theirs).astype(int) - ours).max() <= 1


@given(
    kind=st.sampled_from(["v_prediction", "epsilon", "sample"]),
    t=st.integers(0, 989),
)
def test_the_wanted_output_leads_back_to_the_latents(kind: str, t: int) -> None:
    scheduler = DDIMScheduler(prediction_type=kind)
    noise = Noise.of(scheduler, torch.device("cpu"))
    generator = torch.Generator().manual_seed(t)
    x0, eps = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
    times = torch.full((2,), t)
    out = noise.output(x0, eps, times)
    found = noise.x0(noise.add(x0, eps, times), out, times)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)
