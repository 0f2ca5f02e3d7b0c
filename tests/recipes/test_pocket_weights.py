"""The shipped model: small, ordinary, and it draws what is asked."""

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from mobile_runtime.errors import run_cli
from recipes.pocket import WEIGHTS, evaluate
from recipes.pocket.evaluate import GUIDANCE, held_out_scenes, score
from recipes.pocket.folder import open_parts, write_folder
from recipes.pocket.sampling import generate
from recipes.pocket.train_vae import drawings, psnr_db
from recipes.pocket.training import to_tensor


@pytest.fixture(scope="module")
def parts():
    return open_parts(WEIGHTS)


def test_the_folder_opens_as_an_ordinary_pipeline_without_a_warning(recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = StableDiffusionPipeline.from_pretrained(
            WEIGHTS, torch_dtype=torch.float32, local_files_only=True
        )
    assert pipeline.safety_checker is None
    names = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(pipeline.unet.config.down_block_types) == names
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert pipeline.vae.config.scaling_factor != 1


def test_the_weights_are_fp16_safetensors_of_at_most_12_megabytes():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt")]
    for path in WEIGHTS.rglob("*.safetensors"):
        header = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")
        kinds = {value["dtype"] for key, value in header.items() if key != "__metadata__"}
        assert kinds == {"F16"}, path


def test_pictures_come_back_from_latents_that_are_normal(parts):
    pictures = drawings(np.random.default_rng(5), 48, "held_out")
    assert psnr_db(parts.vae, pictures) > 30
    with torch.no_grad():
        mean = parts.vae.encode(to_tensor(pictures)).latent_dist.mean
    flat = (mean * parts.vae.config.scaling_factor).permute(1, 0, 2, 3).flatten(1)
    # A picture is mostly its background, so 48 of them leave a standard error of 1 / sqrt(48).
    assert flat.mean(1).abs().max() < 3 / 48**0.5
    assert (flat.std(1) - 1).abs().max() < 3 / 48**0.5


def test_sixteen_held_out_captions_are_mostly_drawn_right(parts):
    cases = held_out_scenes(16, seed=1)
    pictures = generate(parts, [text for text, _ in cases], steps=25, guidance=GUIDANCE)
    result = score(pictures, [scene for _, scene in cases])
    assert result["by"]["together"]["right"] >= 13, result["by"]


def test_the_picture_equals_that_of_diffusers_own_pipeline(parts):
    text = "a small red star in the top left, on a navy background"
    ours = generate(parts, [text], steps=4, guidance=GUIDANCE, seed=3)
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    from recipes.pocket.training import step_generator

    noise = torch.randn((1, 4, 16, 16), generator=step_generator(3, 0, 7))
    theirs = pipeline(
        text, num_inference_steps=4, guidance_scale=GUIDANCE, latents=noise, output_type="np"
    ).images
    assert np.abs(theirs * 255 - ours).max() <= 1


def test_writing_keeps_other_files_and_leaves_no_scratch(parts, tmp_path):
    target = tmp_path / "weights"
    write_folder(parts, target)
    (target / "MODEL_CARD.md").write_text("kept")
    write_folder(parts, target)
    assert (target / "MODEL_CARD.md").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    again = open_parts(target)
    for name, value in parts.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], value)


def test_evaluate_prints_a_table_and_writes_what_it_found(tmp_path, capsys):
    found, sheet = tmp_path / "found.json", tmp_path / "sheet.png"
    arguments = ["--captions", "2", "--steps", "2", "--json", str(found), "--sheet", str(sheet)]
    assert run_cli(evaluate.main, arguments) == 0
    assert "together" in capsys.readouterr().out
    assert json.loads(found.read_text())["n"] == 2
    assert sheet.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "nowhere"], "nowhere is no diffusers folder"),
        (["--captions", "0"], "--captions 0 is too small"),
    ],
)
def test_a_wrong_request_to_evaluate_exits_with_2(arguments, told, capsys):
    assert run_cli(evaluate.main, arguments) == 2
    assert told in capsys.readouterr().err
