"""What training made is kept, found again, and refused where it is damaged or another's."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mobile_runtime.errors import UserError, run_cli
from recipes import distill, evaluation, schema, stages, trainer, work
from recipes.pocket import ship
from recipes.pocket.evaluate import held_out_scenes, score
from tests.conftest import make_tiny_pipeline
from tests.recipes.students import SMALL, listed, recipe, student


def test_other_settings_other_prompts_and_other_weights_are_another_training(
    prompts: Path, tmp_path: Path
) -> None:
    def key(asked: schema.Recipe, pipeline: Any) -> str:
        done = work.Done.before(pipeline, asked, tmp_path, keeps=True)
        with done.work(asked.stages[0], ("unet",), pipeline.unet) as found:
            return found.key

    pipeline = make_tiny_pipeline()
    asked = recipe(prompts, method="lcm")
    first = key(asked, pipeline)
    assert key(asked, make_tiny_pipeline()) == first
    keys = {first, key(recipe(prompts, method="lcm", seed=1), pipeline)}
    prompts.write_text("something else\n")
    keys.add(key(asked, pipeline))
    pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    keys.add(key(asked, pipeline))
    assert len(keys) == 4


def test_what_a_training_draws_by_is_a_part_of_its_key(prompts: Path, tmp_path: Path) -> None:
    """A decoder learns from what the schedule draws, and no prompts mean the source's own."""

    def key(**changes: Any) -> str:
        data = {"steps": 2, "model": "embedded", "prompts": str(prompts), **changes}
        stage = {"decoder": {"iterations": 1, "prompts": data["prompts"]}}
        asked = schema.parse(
            {
                "name": "x",
                "source": {"model": data["model"]},
                "resolution": 64,
                "schedule": {"steps": data["steps"], "guidance_scale": 0.0},
                "stages": [stage],
            }
        )
        return work.Done(asked, tmp_path, []).add(asked.stages[0])[0]

    assert key() == key()
    assert key() != key(steps=4)
    assert key() == key(model="somewhere/else")
    assert key(prompts=None) != key(prompts=None, model="somewhere/else")


def test_two_processes_do_not_train_the_same_thing(prompts: Path, tmp_path: Path) -> None:
    asked = recipe(prompts, method="lcm")
    pipeline = make_tiny_pipeline()
    first, second = (work.Done.before(pipeline, asked, tmp_path, keeps=True) for _ in range(2))
    with (
        first.work(asked.stages[0], ("unet",), None),
        pytest.raises(UserError, match="another process is at this training"),
        second.work(asked.stages[0], ("unet",), None),
    ):
        pass


def found(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it is told where the result was kept and the stages before it were skipped."""
    assert record["snr_db"]
    return {**record, "trained": "earlier, found in the cache"}


def test_a_result_that_only_led_to_a_kept_one_is_not_needed(prompts: Path, tmp_path: Path) -> None:
    first = {"method": "progressive", "steps": 2, "teacher_steps": 4, **SMALL}
    second = {"method": "progressive", "steps": 1, "teacher_steps": 2, **SMALL}
    data = recipe(prompts, method="lcm").resolved()
    data["stages"] = [{"distill": {**one, "prompts": str(prompts)}} for one in (first, second)]
    asked = schema.parse(data)
    cache = tmp_path / "cache"
    whole = stages.apply(make_tiny_pipeline(), asked, cache=cache)
    for folder in cache.iterdir():
        if folder.name == whole.records[0]["result"]:
            shutil.rmtree(folder)
    again = stages.apply(make_tiny_pipeline(), asked, cache=cache)
    assert again.records[0] == {**whole.records[0], "trained": stages.SUPERSEDED}
    assert again.records[1] == found(whole.records[1])
    assert [folder.name for folder in cache.iterdir()] == [whole.records[1]["result"]]
    for name, value in again.pipeline.unet.state_dict().items():
        assert torch.equal(value, whole.pipeline.unet.state_dict()[name])


def test_the_records_of_stages_that_are_not_needed_are_those_of_the_first_run(
    prompts: Path, tmp_path: Path
) -> None:
    narrow = {"channels": {"macs": 0.2, "importance": "magnitude"}}
    those = ({"prune": {"blocks": "bk_small"}}, {"prune": narrow}, student(prompts))
    asked = listed(prompts, *those, {"fold": {}})
    first = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    assert first.records[0]["blocks_removed"]
    again = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    assert again.records[:2] == [
        {**record, "trained": stages.SUPERSEDED} for record in first.records[:2]
    ]
    assert again.records[2] == found(first.records[2])
    assert again.records[2]["before"]["unet"] != again.records[0]["before"]["unet"]
    assert again.records[3] == first.records[3]


def test_a_stage_that_runs_between_is_measured_as_in_the_first_run(
    prompts: Path, tmp_path: Path
) -> None:
    """A decoder that is opened: it replaces nothing that the distillation brings."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny: Any = AutoencoderTiny(
        encoder_block_out_channels=(1,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    opened = {"decoder": {"model": str(tmp_path / "tiny"), "held_out": 0}}
    asked = listed(prompts, {"prune": {"blocks": "bk_small"}}, opened, student(prompts))
    runs = [stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "c") for _ in range(2)]
    sizes = [[(r["before"], r["after"]) for r in run.records] for run in runs]
    assert runs[1].records[0]["trained"] == stages.SUPERSEDED
    assert sizes[1] == sizes[0]


def test_a_result_that_was_kept_without_records_of_what_led_to_it_is_still_found(
    prompts: Path, tmp_path: Path
) -> None:
    asked = listed(prompts, {"prune": {"blocks": "bk_small"}}, student(prompts))
    first = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    file = tmp_path / first.records[1]["result"] / work.RECORD
    kept = json.loads(file.read_text())
    del kept["earlier"]
    file.write_text(json.dumps(kept))
    del kept["record"]["snr_db"]
    file.write_text(json.dumps(kept))
    again = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    # Nothing is there to hold the student against but what came before the stage that is skipped.
    assert again.records[1]["snr_db"].keys() == first.records[1]["snr_db"].keys()
    assert again.records[1]["snr_db_against"] == "source"
    assert again.records[0] == {"stage": "prune", "trained": stages.SUPERSEDED}
    assert again.records[1]["after"] == first.records[1]["after"]


def test_a_lora_of_a_stage_that_is_not_needed_may_be_gone(
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    stages.save(make_tiny_pipeline(), [], tmp_path / "source")
    data = listed(prompts, *(student(prompts, lora_rank=2, seed=seed) for seed in (0, 1)))
    data = schema.parse({**data.resolved(), "source": {"model": str(tmp_path / "source")}})
    (tmp_path / "mine.yaml").write_text(data.to_yaml())

    def run(output: str) -> set[str]:
        argv = ["--recipe", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / output)]
        assert run_cli(distill.main, argv) == 0, capsys.readouterr().err
        return {path.name for path in (tmp_path / output).glob("*.safetensors")}

    assert len(run("first")) == 2
    told = json.loads((tmp_path / "first" / stages.RECORDS).read_text())
    assert [record["stage"] for record in told] == ["distill", "distill"]
    assert all({"before", "after", "optimizer_steps"} <= record.keys() for record in told[1:])
    (gone,) = [
        folder
        for folder in (tmp_path / "cache").iterdir()
        if not json.loads((folder / work.RECORD).read_text())["earlier"]
    ]
    shutil.rmtree(gone)
    assert len(run("second")) == 1


def test_a_training_that_broke_the_weights_is_not_kept(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(job: trainer.Job) -> Any:
        job.module.conv_in.bias.data[0] = torch.inf
        return job.module

    monkeypatch.setattr(distill, "train", train)
    asked = recipe(prompts, method="output", iterations=1)
    with pytest.raises(UserError, match=r"the training left NaN or Inf in unet\.conv_in\.bias"):
        stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/record.json"))


def test_a_kept_result_that_is_damaged_is_told_with_its_folder(
    prompts: Path, tmp_path: Path
) -> None:
    asked = recipe(prompts, method="output", iterations=1)
    cache = tmp_path / "cache"
    stages.apply(make_tiny_pipeline(), asked, cache=cache)
    (kept,) = cache.iterdir()
    weights = kept / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{kept.name} has changed since it was made; delete it"):
        stages.apply(make_tiny_pipeline(), asked, cache=cache)
    # One that was kept before there were hashes.
    record = json.loads((kept / work.RECORD).read_text())
    del record["sha256"]
    (kept / work.RECORD).write_text(json.dumps(record))
    weights.write_bytes(content[:-1000])
    with pytest.raises(UserError, match=rf"{kept.name}/unet cannot be read .* delete it"):
        stages.apply(make_tiny_pipeline(), asked, cache=cache)


def test_a_damaged_record_of_a_kept_result_is_told(prompts: Path, tmp_path: Path) -> None:
    asked = recipe(prompts, method="output", iterations=1)
    cache = tmp_path / "cache"
    stages.apply(make_tiny_pipeline(), asked, cache=cache)
    (kept,) = cache.iterdir()
    for damage in ("{", "[]", '{"key": "another", "record": {}}'):
        (kept / work.RECORD).write_text(damage)
        with pytest.raises(UserError, match=r"is damaged, or the result of other inputs .* delete"):
            stages.apply(make_tiny_pipeline(), asked, cache=cache)
    (kept / work.RECORD).unlink()  # as if somebody had begun to delete it: trained again
    stages.apply(make_tiny_pipeline(), asked, cache=cache)
    assert (kept / work.RECORD).is_file()


@pytest.mark.parametrize("name", [name for name in schema.names() if name.startswith("pocket")])
def test_what_the_shipped_recipes_train_is_in_the_package(name: str, tmp_path: Path) -> None:
    """A change of a setting or of the source's weights needs `recipes.pocket.ship` again."""
    from recipes.sources import open_source

    asked = schema.load(name)
    pipeline = open_source("embedded").pipeline
    applied = stages.apply(pipeline, asked, stages.changing(asked), cache=tmp_path / "cache")
    trained = [record for record in applied.records if stages.STAGES[record["stage"]].trained]
    told = {"earlier, found in the package", stages.SUPERSEDED}
    assert all(record["trained"] in told for record in trained)
    assert not (tmp_path / "cache").exists()


def test_the_shipped_few_step_model_draws_what_captions_say(tmp_path: Path) -> None:
    from recipes.sources import open_source

    asked = schema.load("pocket_turbo")
    applied = stages.apply(open_source("embedded").pipeline, asked, cache=tmp_path)
    assert applied.records[-1]["trained"] == "earlier, found in the package"
    cases = held_out_scenes(16, seed=1)
    words, scenes = [text for text, _ in cases], [scene for _, scene in cases]
    _, pictures = evaluation.draw(applied.pipeline, asked.schedule, words, (64, 64), 0, "test")
    result = score(pictures, scenes)
    assert result["by"]["together"]["right"] >= 13, result["failed"]


def test_what_is_shipped_is_found_again_and_held_to_its_hashes(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are halved, and are not those that the training left."""
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(work, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(
        ship, "open_source", lambda name: SimpleNamespace(pipeline=make_tiny_pipeline())
    )
    asked = recipe(prompts, method="output", iterations=1)
    (tmp_path / "mine.yaml").write_text(asked.to_yaml())
    assert ship.main([str(tmp_path / "mine.yaml")]) == 0
    shutil.rmtree(tmp_path / "cache")
    (record,) = stages.apply(make_tiny_pipeline(), asked).records
    assert record["trained"] == "earlier, found in the package"
    (kept,) = (tmp_path / "shipped").iterdir()
    (weights,) = kept.glob("unet/*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="has changed since it was made"):
        stages.apply(make_tiny_pipeline(), asked)
