"""Requests of the desktop pipeline that go wrong, or would spoil what is there or comes after."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle, sha256
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.latency import Timing, environment, summary
from mobile_runtime.reference import Parts, ReferencePipeline, models, stored, tables
from mobile_runtime.reference import bench as benching
from mobile_runtime.reference import rows as planning
from mobile_runtime.reference.switches import Machine, Settings
from tests.bundles import make_bundle

CPU = Machine("cpu", "a test")


def precisions() -> list[Any]:
    """All names that PyTorch has for what float32 products are computed in."""
    backends: Any = torch.backends
    newer = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    older = [torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32]
    return [*older, *(one.fp32_precision for one in newer)]


@pytest.mark.parametrize("tf32", [False, True])
def test_the_older_and_the_newer_names_of_tf32_agree(tf32: bool) -> None:
    """Inductor reads the older one where it chooses kernels, and stops where they do not."""
    before = precisions()
    with models.arithmetic(Settings(tf32=tf32), CPU):
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert precisions()[2:] == ["tf32" if tf32 else "ieee"] * 4
    assert precisions() == before


@pytest.mark.filterwarnings("ignore")
def test_kernels_can_be_chosen_with_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they always are; on a CPU where the weights are frozen."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, x = torch.nn.Linear(256, 512).eval(), torch.randn(64, 256)
    options = torch._inductor.config.patch(freezing=True, fx_graph_cache=False)
    with options, models.arithmetic(Settings(tf32=True, attention="auto"), CPU):
        made = torch.compile(layer, mode="max-autotune", dynamic=False, fullgraph=True)(x)
        assert torch.allclose(made, layer(x), atol=1e-5)


def test_int8_leaves_the_compilers_options_and_the_layers_of_the_time(small: Parts) -> None:
    options = torch._inductor.config
    before = options.get_config_copy()
    made = ReferencePipeline(small, Settings(int8=True))
    assert options.get_config_copy() == before
    unet = made.models.modules["unet"]
    weights = {name: type(weight) for name, weight in unet.named_parameters() if ".to_" in name}
    assert any(kind is not torch.nn.Parameter for kind in weights.values())
    assert type(unet.time_embedding.linear_1.weight) is torch.nn.Parameter


def test_noise_that_is_given_is_not_drawn_too(small: Parts, monkeypatch: Any) -> None:
    own = small.generation
    shape = (1, own.latent_channels, own.latent_height, own.latent_width)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    fresh = np.repeat(noise[None], own.default_steps, axis=0)
    pipeline = ReferencePipeline(small)
    monkeypatch.setattr("mobile_runtime.reference.pipeline.noise_of", None)
    pipeline("a tent", noise=noise)
    pipeline("a tent", noise=noise, fresh_noise=fresh, scheduler="ddpm")
    # A schedule that adds none takes no notice, as before.
    pipeline("a tent", noise=noise, fresh_noise=fresh)


def test_a_row_that_this_machine_lacks_is_told_and_the_others_run(small: Parts) -> None:
    plan = planning.plan(small, CPU, steps=4, only=["exact", "tensorrt", "half", "+ tiny_decoder"])
    assert [row.name for row in plan.rows] == ["exact", "half"]
    assert "CUDA" in plan.left_out["tensorrt"]
    with pytest.raises(UserError, match=r"no row of tensorrt can run here .*needs a CUDA device"):
        planning.plan(small, CPU, steps=4, only=["tensorrt"])


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ({"prompts": [5]}, "a prompt is text, and 5 is none"),
        ({"prompts": "x", "seed": "5"}, "seed '5' is no whole number"),
        ({"prompts": "x", "seed": 1.5}, "seed 1.5 is no whole number"),
        ({"prompts": "x", "steps": 1.5}, "steps 1.5 is no whole number"),
        ({"prompts": "x", "seed": [1.5]}, "seed 1.5 is no whole number"),
        ({"prompts": "x", "seed": ["a"]}, "seed 'a' is no whole number"),
        ({"prompts": "x", "guidance_scale": "2"}, "guidance scale of '2' is no number"),
        ({"prompts": "x", "guidance_scale": float("nan")}, "guidance scale of nan is no number"),
        ({"prompts": "x", "negative_prompt": ["a"]}, "the negative prompt is one text for all"),
        ({"prompts": "x", "image": np.zeros((16, 16, 3), np.uint8), "strength": None}, "strength"),
        ({"prompts": "x", "image": "a.png"}, "the image has shape"),
    ],
)
def test_what_is_of_another_kind_is_told(small: Parts, what: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ReferencePipeline(small)(**what)


def test_inputs_that_are_no_numbers_are_told_as_the_inputs(small: Parts) -> None:
    pipeline, own = ReferencePipeline(small), small.generation
    shape = (1, own.latent_channels, own.latent_height, own.latent_width)
    with pytest.raises(UserError, match="noise holds values that are not finite"):
        pipeline("x", noise=np.full(shape, np.nan, np.float32))
    width = small.unet.config.cross_attention_dim
    with pytest.raises(UserError, match="prompt_embeds holds values that are not finite"):
        pipeline("x", prompt_embeds=np.full((2, 8, width), np.inf, np.float32))


def test_what_pytorch_does_not_take_as_it_is_is_taken(small: Parts) -> None:
    """Arrays that are read backwards, PIL's pictures, and the pipeline's own embeddings."""
    pipeline, own = ReferencePipeline(small), small.generation
    shape = (1, own.latent_channels, own.latent_height, own.latent_width)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    turned = np.ascontiguousarray(noise[:, ::-1])[:, ::-1]
    assert np.array_equal(pipeline("x", noise=noise).latents, pipeline("x", noise=turned).latents)
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    images = (picture, np.ascontiguousarray(picture[::-1])[::-1], Image.fromarray(picture))
    one, *others = (pipeline("x", image=image, noise=noise).latents for image in images)
    assert all(np.array_equal(one, other) for other in others)
    embeds = pipeline.encode([own.negative_prompt, "a red tent"])
    made = pipeline("x", prompt_embeds=embeds, seed=3).latents
    assert np.array_equal(made, pipeline("a red tent", seed=3).latents)


@pytest.mark.parametrize(
    "settings", [Settings(attention="xformers"), Settings(tensorrt=True), Settings(tf32=True)]
)
def test_settings_that_this_machine_lacks_are_one_sentence(small: Parts, settings: Any) -> None:
    with pytest.raises(UserError, match="needs a CUDA device; there is none here, or leave it out"):
        ReferencePipeline(small, settings, "cpu")


def test_what_fast_lacks_is_told(
    small_recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    argv = ["generate", "x", "--recipe", small_recipe, "--device", "cpu", "-o", tmp_path / "x.png"]
    assert run(*argv, "--fast") == 0
    told = capsys.readouterr().err
    assert [line for line in told.splitlines() if line.startswith("left out")] == [
        "left out: compile: needs a C++ compiler (g++ or clang++) on the path; install one"
    ]
    with pytest.warns(UserWarning, match=r"left out: compile: needs a C\+\+ compiler"):
        pipeline = ReferencePipeline.open(str(small_recipe), fast=True, device="cpu")
    assert pipeline.settings.precision == "bfloat16"
    assert not pipeline.settings.compile


def test_int8_alone_is_compiled_on_a_gpu() -> None:
    names = ("half", "compile", "int8")
    here = {row.name: row.switches for row in planning._rows(names, cuda=False)}
    there = {row.name: row.switches for row in planning._rows(names, cuda=True)}
    assert here["int8"] == ("int8",)
    assert there["int8, compiled"] == ("compile", "int8")
    assert "int8" not in there


def test_places_of_merged_tokens_are_made_once(small: Parts) -> None:
    pipeline = ReferencePipeline(small, Settings(merged_tokens=0.5), "cpu")
    made = [
        module.processor.partners
        for module in pipeline.models.modules["unet"].modules()
        if hasattr(getattr(module, "processor", None), "partners")
    ]
    assert len(made) > 1
    assert all(one is made[0] for one in made)


def run(*argv: str | Path) -> int:
    return run_cli(main, ["reference", *map(str, argv)])


def test_a_damaged_or_a_huge_picture_is_one_sentence(
    small_recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(whole)
    cut.write_bytes(whole.read_bytes()[:300])
    argv = ["generate", "x", "--recipe", small_recipe, "--device", "cpu", "-o", tmp_path / "x.png"]
    assert run(*argv, "--image", cut) == 2
    assert "cut.png is no picture that can be read" in capsys.readouterr().err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert run(*argv, "--image", whole) == 2
    assert "exceeds limit" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*argv, "--strength", "0.3") == 2
    assert "--strength goes with --image" in capsys.readouterr().err
    assert run(*argv, "--image", whole) == 0


def test_nothing_of_the_users_is_replaced(small_recipe: Path, tmp_path: Path, capsys: Any) -> None:
    opened = ["--recipe", small_recipe, "--device", "cpu"]
    for argv, name in (
        (["generate", "a", "b", *opened], "contact_sheet.png"),
        (["bench", "--with", "half", *opened], "ablation.html"),
        (["bench", "--with", "half", *opened], "ablation.md"),
        (["bench", "--bundle", "none", "--device", "cpu"], "reference.safetensors"),
    ):
        mine = tmp_path / name.replace(".", "-") / name
        mine.parent.mkdir()
        mine.write_text("mine")
        assert run(*argv, "-o", mine.parent) == 2
        assert f"{mine} already exists" in capsys.readouterr().err
        assert [(path, path.read_text()) for path in mine.parent.iterdir()] == [(mine, "mine")]


def test_a_trace_lies_where_it_is_said(small_recipe: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["profile", "--recipe", small_recipe, "--device", "cpu", "--rows", "2"]
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert run(*argv, "--force", "-o", folder) == 2
    assert "no file that can be replaced" in capsys.readouterr().err
    trace = tmp_path / "new" / "trace.json"
    assert run(*argv, "-o", trace) == 0
    assert json.loads(trace.read_text())["traceEvents"]
    assert [path.name for path in trace.parent.iterdir()] == ["trace.json"]


def test_a_decoder_that_cannot_be_opened_is_told_before_any_row(
    small_recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching.Bench, "measure", None)
    argv = ["bench", "--ablation", "--rows", "exact", "--recipe", small_recipe, "--device", "cpu"]
    assert run(*argv, "--tiny-decoder", "/etc/passwd") == 2
    assert "/etc/passwd" in capsys.readouterr().err


def test_a_bundles_own_recipe_is_not_changed(tmp_path: Path, capsys: Any) -> None:
    bundle = make_bundle(tmp_path / "bundle").path
    argv = ["bench", "--bundle", bundle, "-o", tmp_path / "kept"]
    for more in (["--steps", "9"], ["--recipe", "pocket_fp32"], ["--judged", "4"]):
        assert run(*argv, *more) == 2
        assert "its own recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "shape", "sentence"),
    [(0, (16, 16, 3), "at least 1 item"), (1, (16, 3), "is uint8"), (1, (8, 8, 3), "is uint8")],
)
def test_a_reference_that_does_not_fit_is_one_sentence(
    tmp_path: Path, runs: int, shape: tuple[int, ...], sentence: str
) -> None:
    bundle: Bundle = make_bundle(tmp_path / "bundle")
    pictures = {f"exact/{k}": np.zeros(shape, np.uint8) for k in range(2)}
    save_file(pictures, tmp_path / stored.PICTURES)
    timing = Timing(load_ms=1, first_ms=1, warm_up=1, times_ms=(1.0,))
    run_of = stored.StoredRun(
        name="exact", switches=(), latency=summary("pipeline", "desktop", timing)
    )
    made = {
        "manifest_sha256": bundle.manifest_sha256,
        "machine": "x",
        "environment": environment().model_dump(),
        "runs": [run_of.model_dump()] * runs,
        "pictures_sha256": sha256(tmp_path / stored.PICTURES),
    }
    (tmp_path / stored.REFERENCE).write_text(json.dumps(made, default=dict))
    with pytest.raises(UserError, match=sentence):
        stored.read(tmp_path, bundle)


def test_a_row_that_fails_late_is_told(small: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    work = benching.Bench(small, CPU, steps=2, rounds=2, compared=1)

    def broken(*_: Any) -> None:
        raise RuntimeError("judge")

    work.judged = 1
    monkeypatch.setattr(work, "_judge", broken)
    found = work.measure(planning.Row("yardstick", "exact"))
    assert found.seconds is not None
    assert "failed: RuntimeError: judge" in tables._cells(found.as_dict())[2]
