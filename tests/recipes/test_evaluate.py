"""`python -m recipes.evaluate` runs a recipe's stages and measures the pictures along the way."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mobile_runtime.errors import UserError, run_cli
from recipes import drawn, evaluate, evaluation, features, quality, schema, stages
from recipes.measure import measure
from recipes.pocket.training import step_generator
from tests.conftest import make_tiny_pipeline, make_tiny_tokenizer

PROMPTS = ["a tent", "a stone", "ten hats on a red stone"]
STUDENT = {
    "method": "progressive",
    "steps": 1,
    "teacher_steps": 2,
    "guidance": 2.0,
    "iterations": 1,
    "batch": 2,
    "warmup": 0,
    "pictures": 2,
    "draw_steps": 1,
    "precision": "float32",
    "learning_rate": 1e-3,
}


def run(*argv: Any) -> int:
    return run_cli(evaluate.main, [str(word) for word in argv])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    stages.save(make_tiny_pipeline(), [], folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with seeded weights, its processor and its tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "tiny"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = {"vocab_size": 600, "max_position_embeddings": 16, "num_attention_heads": 2}
    tokens = {"bos_token_id": 598, "eos_token_id": 599, "pad_token_id": 599}
    vision = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=small | text | tokens, vision_config=small | vision, projection_dim=12
    )
    CLIPModel(config).eval().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    for index, side in enumerate((64, 48, 80, 64)):
        suffix = ("png", "JPG")[index % 2]
        picture = Image.fromarray(rng.integers(0, 256, (side, 64, 3), np.uint8))
        picture.save(folder / f"{index}.{suffix}", format={"png": "png", "JPG": "jpeg"}[suffix])
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["# a comment", *PROMPTS]))
    return path


def recipe_file(folder: Path, source: Path, *listed: dict[str, Any], **schedule: Any) -> Path:
    path = folder / "mine.yaml"
    data = {
        "name": "mine",
        "source": {"model": str(source)},
        "resolution": 64,
        "schedule": {"steps": 2, "guidance_scale": 2.0, **schedule},
        "stages": list(listed),
    }
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def finished(
    source: Path, clip_folder: Path, real: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """One whole run over a student and its quantization: its folder, and its JSON."""
    folder = tmp_path_factory.mktemp("finished")
    words = folder / "prompts.txt"
    words.write_text("\n".join(PROMPTS))
    listed = ({"distill": {**STUDENT, "prompts": str(words)}}, {"fold": {}}, {"quantize": {}})
    recipe = recipe_file(folder, source, *listed, steps=1, guidance_scale=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCKET_DIFFUSION_CACHE", str(folder / "cache"))
        assert (
            run(
                *("--recipe", recipe, "--prompts", words, "--reference-steps", 3, "--seed", 5),
                *("--clip", clip_folder, "--pictures", real, "--json", folder / "out.json"),
                *("--sheet", folder / "sheet.png", "--save-pictures", folder / "pictures"),
            )
            == 0
        )
    return folder, json.loads((folder / "out.json").read_text())


Finished = tuple[Path, dict[str, Any]]


def saved(folder: Path, row: str) -> np.ndarray:
    files = sorted((folder / "pictures" / row).iterdir())
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_there_is_a_row_for_the_source_each_changing_stage_and_the_end(finished: Finished) -> None:
    _, data = finished
    assert [row["stages"] for row in data["rows"]] == [
        [],
        ["distill"],
        ["distill", "fold", "quantize"],
    ]
    assert data["complete"] is True
    assert [record["stage"] for record in data["records"]] == ["distill", "fold", "quantize"]
    assert data["prompts"] == PROMPTS


def test_each_row_tells_the_schedule_it_was_drawn_by(finished: Finished) -> None:
    _, data = finished
    told = [(row["schedule"]["steps"], row["schedule"]["guidance_scale"]) for row in data["rows"]]
    assert told == [(3, 2.0), (1, 0.0), (1, 0.0)]
    assert [row["same_schedule"] for row in data["rows"]] == [True, False, False]


def test_psnr_and_ssim_are_of_the_saved_pictures(finished: Finished) -> None:
    folder, data = finished
    reference, made = saved(folder, "0-source"), saved(folder, "2-quantize")
    assert made.shape == (3, 64, 64, 3)
    error = np.mean((reference.astype(float) - made.astype(float)) ** 2)
    found = data["rows"][2]["figures"]
    assert found["psnr_db"]["value"] == pytest.approx(10 * math.log10(255**2 / error))
    assert found["ssim"]["value"] == quality.ssim(reference, made)
    assert data["rows"][0]["figures"]["psnr_db"] == {
        "value": None,
        "not_run": "this is the reference",
    }


def test_the_sources_pictures_are_diffusers_own(finished: Finished) -> None:
    folder, _ = finished
    made = saved(folder, "0-source")
    pipeline = make_tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for index, prompt in enumerate(PROMPTS):
        noise = torch.randn((1, 4, 8, 8), generator=step_generator(5, index, evaluation.NOISE))
        wanted = pipeline(
            prompt, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="np"
        ).images[0]
        assert np.abs(made[index] - 255 * wanted).max() < 1.5


def test_clip_score_is_that_of_the_models_own_logits(finished: Finished, clip_folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    folder, data = finished
    model: Any = CLIPModel.from_pretrained(clip_folder)
    processor: Any = CLIPImageProcessor.from_pretrained(clip_folder)
    made = saved(folder, "1-distill")
    tokens = make_tiny_tokenizer()(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(images=list(made), return_tensors="pt")
        out = model(**tokens, **pixels)
        cosines = (out.logits_per_image / model.logit_scale.exp()).diag().clamp(min=0)
    found = data["rows"][1]["figures"]["clip_score"]["value"]
    assert found == pytest.approx(100 * float(cosines.mean()), rel=1e-4)


def test_distances_are_of_the_clip_features_of_the_folder(
    finished: Finished, clip_folder: Path, real: Path
) -> None:
    folder, data = finished
    clip = features.open_clip(str(clip_folder))
    made = clip.pictures(saved(folder, "1-distill"), 3)
    wanted = clip.pictures(features.Folder(real), 4)
    found = data["rows"][1]["figures"]
    assert found["fid"]["value"] == pytest.approx(quality.fid(made, wanted))
    assert found["kid"]["value"] == pytest.approx(quality.kid(made, wanted).mean)
    assert found["cmmd"]["value"] == pytest.approx(quality.cmmd(made, wanted))
    assert (found["cmmd"]["against"], found["fid"]["n"]) == ("pictures", [3, 4])
    assert found["fid"]["features"] == "tiny"


def test_the_sheet_has_a_row_a_stage(finished: Finished) -> None:
    folder, _ = finished
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    made = saved(folder, "2-quantize")
    large = made[2].repeat(3, 0).repeat(3, 1)
    found = [
        (y, x)
        for y in range(sheet.shape[0] - 191)
        for x in range(sheet.shape[1] - 191)
        if (sheet[y, x] == large[0, 0]).all() and (sheet[y : y + 192, x : x + 192] == large).all()
    ]
    assert len(found) == 1
    assert found[0][0] > 2 * 192
    assert found[0][1] > 2 * 192


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
def test_a_preserving_recipe_is_compared_by_the_recipes_own_schedule(
    source: Path,
    prompt_file: Path,
    tmp_path: Path,
    clip_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = recipe_file(tmp_path, source, {"fold": {}}, scheduler="euler_ancestral")
    out = tmp_path / "out.json"
    options = ("--captions", 2, "--json", out, "--clip", clip_folder)
    assert run("--recipe", recipe, "--prompts", prompt_file, *options) == 0
    first, folded = json.loads(out.read_text())["rows"]
    assert folded["same_schedule"]
    assert folded["schedule"]["scheduler"] == "EulerAncestralDiscreteScheduler"
    assert folded["parameters"] < first["parameters"]
    found = folded["figures"]
    assert found["psnr_db"].get("equal") or found["psnr_db"]["value"] > 60
    assert found["cmmd"]["against"] == "reference"
    assert found["cmmd"]["value"] == pytest.approx(0, abs=1e-6)
    told = capsys.readouterr().out
    assert "not run: judged (only the embedded model's own captions have a judge)" in told
    assert "not run: FID, KID x1000 (give --pictures" in told


def test_before_a_resolution_stage_pictures_have_the_size_it_starts_from(
    source: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first row at each size is the reference of the others."""
    adapt = {"drawn_at": [64, 96], "iterations": 1, "pictures": 2, "draw_steps": 1, "batch": 2}
    adapt |= {"warmup": 0, "precision": "float32", "guidance": 2.0}
    listed = ({"prune": {"blocks": ["mid_block"]}}, {"resolution": adapt}, {"quantize": {}})
    recipe, out = recipe_file(tmp_path, source, *listed), tmp_path / "out.json"
    small = recipe.read_text().replace("resolution: 64", "resolution: [32, 48]")
    recipe.write_text(small)
    options = ("--prompts", prompt_file, "--captions", 1, "--json", out)
    options += ("--sheet", tmp_path / "sheet.png", "--save-pictures", tmp_path / "pictures")
    assert run("--recipe", recipe, *options) == 0
    rows = json.loads(out.read_text())["rows"]
    sizes = [(row["stage"], *row["size"]) for row in rows]
    assert sizes == [
        ("source", 64, 96),
        ("prune", 64, 96),
        ("resolution", 32, 48),
        ("quantize", 32, 48),
    ]
    for index, row in enumerate(rows):
        assert saved(tmp_path, f"{index}-{row['stage']}").shape[1:3] == tuple(row["size"])
    found = [row["figures"]["latent_snr_db"] for row in rows]
    assert [bool(figure.get("not_run")) for figure in found] == [True, False, True, False]
    assert found[3]["value"] > found[1]["value"]
    macs = measure(make_tiny_pipeline(), 64, 96, True)
    assert rows[0]["macs_per_picture"] == (
        2 * macs["text_encoder"]["macs"] + 2 * macs["unet"]["macs"] + macs["vae_decoder"]["macs"]
    )
    assert "against the first row of the same size" in capsys.readouterr().out


def test_equal_pictures_are_told_as_equal_and_fid_can_be_of_an_onnx_network(
    source: Path,
    prompt_file: Path,
    real: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After a quantization that leaves every layer as it is."""
    rule = {"layers": "*", "weights": "float32", "reason": "test"}
    recipe = recipe_file(tmp_path, source, {"quantize": {"rules": [rule]}})
    out, network = tmp_path / "out.json", tmp_path / "mean.onnx"
    write_mean_network(network, shape=(3, 64, 64))
    options = ("--pictures", real, "--features", network, "--json", out)
    assert run("--recipe", recipe, "--prompts", prompt_file, *options) == 0
    first, found = (row["figures"] for row in json.loads(out.read_text())["rows"])
    assert found["psnr_db"] == found["latent_snr_db"] == {"value": None, "equal": True}
    assert found["ssim"] == {"value": 1.0}
    assert found["fid"] == first["fid"]
    assert found["fid"]["value"] > 0
    assert (found["fid"]["features"], found["fid"]["dimensions"]) == ("mean.onnx", 3)
    told = capsys.readouterr().out
    assert told.count("equal") == 2
    assert "FID and KID on features of mean.onnx\n" in told


def test_macs_of_a_picture_are_its_calls(finished: Finished) -> None:
    _, data = finished
    pipeline = make_tiny_pipeline()
    rows = {row["stage"]: row["macs_per_picture"] for row in data["rows"]}
    for name, steps, guided in (("source", 3, True), ("distill", 1, False)):
        macs = {key: part["macs"] for key, part in measure(pipeline, 64, 64, guided).items()}
        texts = 2 if guided else 1
        expected = texts * macs["text_encoder"] + steps * macs["unet"] + macs["vae_decoder"]
        assert rows[name] == expected


def test_the_embedded_model_is_judged_as_its_own_command_judges_it(tmp_path: Path) -> None:
    from recipes.pocket.evaluate import main

    options = ["--steps", "2", "--captions", "4", "--seed", "2", "--json"]
    sheet = ["--guidance", "2.0", "--sheet", str(tmp_path / "own.png")]
    assert run_cli(main, [*options, str(tmp_path / "own.json"), *sheet]) == 0
    recipe = ("--recipe", "pocket_fp32", "--set", "schedule.other_steps=[]")
    pictures = ("--save-pictures", tmp_path / "pictures")
    assert run(*recipe, *options, tmp_path / "out.json", *pictures) == 0
    own = json.loads((tmp_path / "own.json").read_text())
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    judged = row["figures"]["judged"]
    assert judged["by"] == own["by"]
    assert judged["failed"] == own["failed"]
    assert judged["value"] == own["by"]["together"]["share"]
    assert judged["interval_95"] == own["by"]["together"]["interval_95"]
    whole = np.asarray(Image.open(tmp_path / "own.png")).astype(int)
    for index, picture in enumerate(saved(tmp_path, "0-source")):
        left = 2 + 66 * index
        assert np.abs(whole[2:66, left : left + 64] - picture).max() <= 1


def test_a_pictures_noise_is_its_own_whatever_is_drawn_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with a scheduler that adds noise at each step."""
    pipeline = make_tiny_pipeline()
    schedule = schema.Schedule(scheduler="ddpm", steps=3, guidance_scale=2.0)
    together, _ = evaluation.draw(pipeline, schedule, PROMPTS, (64, 64), 0, "x")
    monkeypatch.setattr(evaluation, "PIXELS", 1)
    alone, _ = evaluation.draw(pipeline, schedule, PROMPTS, (64, 64), 0, "x")
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_the_reference_of_a_student_has_its_teachers_schedule() -> None:
    def recipe(**settings: Any) -> schema.Recipe:
        student = {"steps": 4, "iterations": 1, "warmup": 0, **settings}
        data = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}
        schedule = {"steps": 4, "guidance_scale": 0.0}
        listed = [{"distill": student}, {"quantize": {}}]
        return schema.parse({**data, "schedule": schedule, "stages": listed})

    ranged = recipe(method="lcm", guidance=[1.0, 3.0])
    reference = evaluation.reference_schedule(ranged, None, None, None)
    assert (reference.steps, reference.guidance_scale) == (25, 3.0)
    after = evaluation.schedule_after(ranged, 0, reference)
    assert (after.steps, after.guidance_scale, after.scheduler) == (4, 0.0, "source")
    own = evaluation.reference_schedule(recipe(method="output", guidance=0.0), None, None, None)
    assert (own.steps, own.guidance_scale) == (4, 0.0)
    given = evaluation.reference_schedule(ranged, 7, 0.0, "euler")
    assert (given.steps, given.guidance_scale, given.scheduler) == (7, 0.0, "euler")


def test_the_reference_of_an_lcm_lora_draws_without_it() -> None:
    listed = [{"adapters": {"loras": [{"model": "lcm"}]}}, {"prune": {"blocks": ["mid_block"]}}]
    schedule = {"scheduler": "lcm", "steps": 4, "guidance_scale": 1.5}
    data = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}
    recipe = schema.parse({**data, "schedule": schedule, "stages": [*listed, {"quantize": {}}]})
    reference = evaluation.reference_schedule(recipe, None, None, None)
    assert reference == schema.Schedule()
    assert evaluation.schedule_after(recipe, -1, reference) == reference
    for index in range(3):
        assert evaluation.schedule_after(recipe, index, reference) == recipe.schedule
    given = evaluation.reference_schedule(recipe, 7, 0.0, "lcm")
    assert (given.steps, given.guidance_scale, given.scheduler) == (7, 0.0, "lcm")
    changed = recipe.schedule.model_copy(update={"scheduler": "euler"})
    other = recipe.model_copy(update={"schedule": changed})
    assert evaluation.reference_schedule(other, None, None, None) == other.schedule


def test_latents_that_are_not_finite_are_told(
    source: Path,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = drawn.sample
    calls: list[int] = []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return sample(*args) * (1 if len(calls) == 1 else math.nan)

    monkeypatch.setattr(drawn, "sample", broken)
    out = tmp_path / "out.json"
    recipe = recipe_file(tmp_path, source, {"fold": {}})
    assert run("--recipe", recipe, "--prompts", prompt_file, "--json", out) == 2
    assert "fold: the latents of prompt 1 " in capsys.readouterr().err
    kept = json.loads(out.read_text())  # the row that there was
    assert (kept["complete"], len(kept["rows"])) == (False, 1)


# ------------------------------------------------------------------------ the networks by name


@pytest.mark.parametrize("batch", ["n", 3])
def test_an_onnx_network_gives_features_of_resized_pictures(batch: Any, tmp_path: Path) -> None:
    """This one gives each channel's mean."""
    path = tmp_path / "mean.onnx"
    write_mean_network(path, batch)
    network = features.open_network(path)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (16, 24, 3), np.uint8) for _ in range(7)]
    found = network.pictures(pictures, 7)
    means = np.stack([picture.mean((0, 1)) for picture in pictures])
    np.testing.assert_allclose(found, means, rtol=1e-4)
    flat = [np.full((5, 9, 3), value, np.uint8) for value in (0, 77, 255)]
    np.testing.assert_allclose(network.pictures(flat, 3)[:, 0], [0, 77, 255], rtol=1e-5)


def write_mean_network(path: Path, batch: Any = "n", shape: tuple[Any, ...] = (3, 16, 24)) -> None:
    onnx = pytest.importorskip("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    graph = helper.make_graph(
        [node],
        "mean",
        [helper.make_tensor_value_info("x", float32, [batch, *shape])],
        [helper.make_tensor_value_info("y", float32, [batch, shape[0]])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)


def test_a_clip_model_without_all_its_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of .* visual_projection\.weight first"):
        features.open_clip(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("model.safetensors", None), "holds no model.safetensors"),
        (("model.safetensors", b"short"), "is damaged or cut short"),
        (("preprocessor_config.json", None), "has no preprocessor_config.json"),
        (("config.json", b'{"model_type": "siglip"}'), "of type 'siglip'"),
        (("config.json", b"{"), "cannot be read"),
        (("preprocessor_config.json", b'{"crop_size": 8, "size": 8}'), "does not work as a CLIP"),
    ],
)
def test_a_folder_that_is_no_clip_model_is_refused(
    change: tuple[str, bytes | None], told: str, clip_folder: Path, tmp_path: Path
) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name, content = change
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        features.open_clip(str(tmp_path))


# -------------------------------------------------------------------- what is refused before work


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--captions 0", "--captions 0 should be 1 or more"),
        ("--seed -1", "--seed -1 should be 0 to"),
        ("--reference-steps 0", "--reference-steps 0 should be 1 to 1000"),
        ("--reference-guidance -1", "--reference-guidance -1.0"),
        ("--pairs", "--pairs goes with the embedded model"),
        ("--prompts {empty}", "holds no prompt"),
        ("--prompts {nothing}", "there is no prompt file"),
        ("--clip {nothing}", "is no folder and no hub id"),
        ("--clip {here}", "has no config.json"),
        ("--pictures {here}", "give --clip or --features"),
        ("--features {empty}", "give --pictures, too"),
        ("--features {torchscript} --pictures {real}", "opening TorchScript may run code"),
        ("--features {damaged} --pictures {real}", "does not load"),
        ("--pictures {nothing} --clip {clip}", "is no folder"),
        ("--pictures {here} --clip {clip}", "holds 1 pictures"),
        ("--pictures {unreadable} --clip {clip}", "1.png cannot be read"),
        ("--json {nothing}/out.json", "there is no folder"),
        ("--json {here}", "is a folder"),
        ("--json {here}/0.png", "--json: {here}/0.png already exists; choose another, or add"),
        ("--sheet {here}/0.png", "--sheet: {here}/0.png already exists; choose another, or add"),
        ("--save-pictures {here} --force", "already exists"),
        ("--sheet {nothing}/out.png", "there is no folder"),
        ("--sheet {here}/out.jpg", "should end in .png"),
        ("--save-pictures {here}", "already exists"),
        ("--reference-steps 1000 --reference-scheduler lcm", "cannot make 1000 steps"),
        ("--set schedule.steps=none", "schedule.steps"),
        ("--set stages.0.quantize.rules=[{{layers:x,weights:int8,reason:x}}]", "no entry '0'"),
        ("--resolution 70", "no multiple of 8"),
    ],
)
def test_a_mistake_is_told_before_anything_is_drawn(
    options: str,
    told: str,
    source: Path,
    clip_folder: Path,
    real: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = tmp_path / "here"
    unreadable = here / "unreadable"
    unreadable.mkdir(parents=True)
    picture = Image.new("RGB", (64, 64))
    picture.save(here / "0.png")
    picture.save(unreadable / "0.png")
    (unreadable / "1.png").write_bytes((here / "0.png").read_bytes()[:60])
    (here / "empty").write_text("# nothing\n")
    (here / "damaged.onnx").write_bytes(b"damaged")
    (here / "inception.pt").write_bytes(b"PK")
    paths = {
        "empty": here / "empty",
        "nothing": here / "nothing",
        "here": here,
        "clip": clip_folder,
        "real": real,
        "unreadable": unreadable,
        "damaged": here / "damaged.onnx",
        "torchscript": here / "inception.pt",
    }
    monkeypatch.setattr(evaluation, "draw", None)
    argv = [word.format(**paths) for word in options.split()]
    assert run("--recipe", recipe_file(tmp_path, source), *argv) == 2
    assert told.replace("{here}", str(here)) in capsys.readouterr().err


def test_what_exists_is_replaced_by_force_alone(
    source: Path, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a cache that cannot be written to harms nobody who trains nothing."""
    table, sheet = tmp_path / "out.json", tmp_path / "sheet.png"
    for file in (table, sheet):
        file.write_text("mine")
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(table / "cache"))
    recipe = recipe_file(tmp_path, source, {"fold": {}})
    argv = ["--recipe", recipe, "--prompts", prompt_file, "--captions", 1]
    argv += ["--json", table, "--sheet", sheet]
    assert run(*argv) == 2
    assert table.read_text() == sheet.read_text() == "mine"
    assert run(*argv, "--force") == 0
    assert json.loads(table.read_text())["complete"]
    assert np.asarray(Image.open(sheet)).shape[0] > 64


def test_a_cache_that_cannot_be_written_to_is_told_before_the_first_row(
    source: Path,
    prompt_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(evaluation, "draw", None)
    listed = {"distill": {**STUDENT, "prompts": str(prompt_file)}}
    recipe = recipe_file(tmp_path, source, listed, steps=1, guidance_scale=0.0)
    assert run("--recipe", recipe, "--prompts", prompt_file) == 2
    told = capsys.readouterr().err
    assert "is no folder that can be written to" in told
    assert "choose another POCKET_DIFFUSION_CACHE" in told
