"""Stages run in order on a pipeline, and their result is an ordinary diffusers folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes import schema, stages
from recipes.quantized_layers import QuantizedModule
from recipes.schema import Recipe
from tests.conftest import make_tiny_pipeline


def recipe(*rules: dict[str, Any]) -> Recipe:
    settings = {"rules": [{"weights": "float32", "reason": "test", **rule} for rule in rules]}
    data = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}
    return schema.parse({**data, "stages": [{"quantize": settings}]})


def test_a_recipe_without_stages_leaves_the_pipeline_alone(tiny_pipeline: Any) -> None:
    plain = schema.parse({"name": "x", "source": {"model": "embedded"}, "resolution": 64})
    applied = stages.apply(tiny_pipeline, plain)
    assert (applied.pipeline, applied.records, applied.plans) == (tiny_pipeline, [], [])


def test_each_stage_is_told_and_leaves_a_json_record() -> None:
    told: list[str] = []
    applied = stages.apply(make_tiny_pipeline(), recipe(), progress=told.append)
    assert told == ["quantize"]
    assert [record["stage"] for record in applied.records] == ["quantize"]
    assert json.loads(json.dumps(applied.records)) == applied.records
    assert len(applied.plans) > 100


def test_a_record_tells_parameters_and_multiply_adds_before_and_after() -> None:
    pipeline = make_tiny_pipeline()
    parameters = sum(tensor.numel() for tensor in pipeline.unet.parameters())
    (record,) = stages.apply(pipeline, recipe()).records
    assert record["before"] == record["after"]
    assert record["before"]["unet"]["parameters"] == parameters
    assert all(figures["macs"] > 0 for figures in record["after"].values())


def test_a_pattern_that_matches_nothing_is_refused_before_anything_changes() -> None:
    pipeline = make_tiny_pipeline()
    with pytest.raises(UserError, match=r"stages\.0\.quantize: .*unet\.nothing"):
        stages.apply(pipeline, recipe({"layers": "unet.nothing"}))
    assert not any(isinstance(module, QuantizedModule) for module in pipeline.unet.modules())


def test_a_plan_is_what_running_decides() -> None:
    pipeline = make_tiny_pipeline()
    ruled = recipe({"layers": "unet.conv_*"})
    planned = stages.plan(stages.check(pipeline, ruled), ruled)
    assert stages.apply(pipeline, ruled).plans == planned


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Any]]:
    applied = stages.apply(make_tiny_pipeline(), recipe({"layers": "unet.conv_in"}))
    folder = tmp_path_factory.mktemp("stages") / "deep" / "result"
    stages.save(applied.pipeline, applied.plans, folder)
    return applied.pipeline, folder, applied.plans


def test_a_saved_result_opens_in_diffusers_and_computes_the_same(
    saved: tuple[Any, Path, list[Any]],
) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    pipeline, folder, _ = saved
    loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(loaded) is StableDiffusionPipeline
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 16, 32)
    ids = torch.arange(16)[None]
    assert torch.equal(loaded.unet.conv_out.weight, pipeline.unet.conv_out.weight)
    with torch.no_grad():
        for own, its in (
            (pipeline.unet(x, t, text).sample, loaded.unet(x, t, text).sample),
            (pipeline.vae.decode(x).sample, loaded.vae.decode(x).sample),
            (pipeline.text_encoder(ids)[0], loaded.text_encoder(ids)[0]),
        ):
            torch.testing.assert_close(own, its, rtol=1e-5, atol=1e-5)
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert torch.equal(loaded.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert loaded.tokenizer("a tent").input_ids == pipeline.tokenizer("a tent").input_ids


def test_the_plan_lies_beside_the_weights(saved: tuple[Any, Path, list[Any]]) -> None:
    _, folder, plans = saved
    stored = json.loads((folder / stages.PLAN).read_text())
    assert [LayerPlan.model_validate(entry) for entry in stored] == plans
    assert [path.name for path in folder.parent.iterdir()] == ["result"]


def test_a_saved_result_is_readable_by_whoever_reads_its_folder(
    saved: tuple[Any, Path, list[Any]],
) -> None:
    """safetensors and temporary folders are their owner's alone."""
    _, folder, _ = saved
    (folder.parent / "new").mkdir()
    (folder.parent / "new" / "file").touch()
    for made in (folder, *folder.rglob("*")):
        like = folder.parent / "new" if made.is_dir() else folder.parent / "new" / "file"
        assert made.stat().st_mode == like.stat().st_mode, made
    shutil.rmtree(folder.parent / "new")


def test_an_existing_folder_is_never_overwritten(saved: tuple[Any, Path, list[Any]]) -> None:
    pipeline, folder, plans = saved
    with pytest.raises(UserError, match="already exists"):
        stages.save(pipeline, plans, folder)


def test_a_save_that_fails_leaves_nothing_behind(
    tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_pipeline.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        stages.save(tiny_pipeline, [], tmp_path / "result")
    assert list(tmp_path.iterdir()) == []


def test_all_stages_compose_and_tell_what_each_changed(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny, DiffusionPipeline

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tent\na stone\n")
    training = {"iterations": 2, "batch": 2, "warmup": 0, "prompts": str(prompts)}
    asked = schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 64,
            "schedule": {"steps": 2, "guidance_scale": 0.0},
            "stages": [
                {"prune": {"blocks": "bk_small"}},
                {"distill": {"method": "output", "steps": 2, "feature_weight": 0.5, **training}},
                {"decoder": {"channels": 8, "blocks": 1, "pictures": 2, "held_out": 2, **training}},
                {"fold": {}},
                {"quantize": {}},
            ],
        }
    )
    pipeline = make_tiny_pipeline()
    outline = stages.check(pipeline, asked)
    applied = stages.apply(pipeline, asked, cache=tmp_path / "cache")
    names = ["prune", "distill", "decoder", "fold", "quantize"]
    assert [record["stage"] for record in applied.records] == names
    for earlier, later in zip(applied.records, applied.records[1:], strict=False):
        assert later["before"] == earlier["after"]
    for name, smaller in (("prune", "unet"), ("decoder", "vae_decoder"), ("fold", "unet")):
        record = applied.records[names.index(name)]
        assert record["after"][smaller]["parameters"] < record["before"][smaller]["parameters"]
    # And how far its outputs are from those before, component by component.
    told = {record["stage"]: record["snr_db"] for record in applied.records}
    for name, changed in (("prune", "unet"), ("distill", "unet"), ("decoder", "vae_decoder")):
        assert isinstance(told[name][changed], float)
        assert [part for part, figure in told[name].items() if figure != "equal"] == [changed]
    assert told["fold"]["unet"] == "equal" or told["fold"]["unet"] > 100
    assert all(10 < figure < 80 for figure in told["quantize"].values())
    # What `check` foretold has the shapes of what came.
    for part in ("unet", "vae"):
        foretold = {k: v.shape for k, v in getattr(outline, part).state_dict().items()}
        before_quantize = stages.apply(
            make_tiny_pipeline(), asked, asked.stages[:-1], cache=tmp_path / "cache"
        )
        came = getattr(before_quantize.pipeline, part).state_dict()
        assert {k: v.shape for k, v in came.items()} == foretold
    stages.save(applied.pipeline, applied.plans, tmp_path / "saved")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert type(loaded.vae) is AutoencoderTiny
    assert loaded.unet.mid_block is None
