"""What a kept result hangs on, and what a training needs before it begins."""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from transformers import CLIPTokenizer

from mobile_runtime.errors import UserError
from recipes import drawn, schema, stages, work
from tests.conftest import make_tiny_pipeline


def scheduler(pipeline: Any, kind: Any = DDIMScheduler, **changes: Any) -> Any:
    """The pipeline's own, with some settings changed."""
    return kind.from_config(pipeline.scheduler.config, **changes)


@pytest.fixture
def pipeline() -> Any:
    return make_tiny_pipeline()


@pytest.mark.parametrize(
    "change",
    [
        {"steps_offset": 2},
        {"timestep_spacing": "leading"},
        {"beta_end": 0.013},
        {"prediction_type": "epsilon"},
        {"set_alpha_to_one": False},
        {"thresholding": True},
    ],
)
def test_a_setting_of_the_scheduler_is_a_part_of_the_fingerprint(
    pipeline: Any, change: dict[str, Any]
) -> None:
    before = work.fingerprint(pipeline)
    (key,) = change
    assert dict(pipeline.scheduler.config)[key] != change[key]
    pipeline.scheduler = scheduler(pipeline, **change)
    assert work.fingerprint(pipeline) != before


def test_the_sigmas_of_another_scheduler_and_its_class_are_parts_of_it(pipeline: Any) -> None:
    found = {work.fingerprint(pipeline)}
    for change in ({}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}):
        pipeline.scheduler = scheduler(make_tiny_pipeline(), EulerDiscreteScheduler, **change)
        found.add(work.fingerprint(pipeline))
    assert len(found) == 4


def test_a_default_that_is_written_out_changes_nothing(pipeline: Any) -> None:
    """As a newer diffusers does with the keys that it brings."""
    config = json.loads(pipeline.scheduler.to_json_string())
    assert (config["thresholding"], config["clip_sample_range"]) == (False, 1.0)
    short = {k: v for k, v in config.items() if k not in ("thresholding", "clip_sample_range")}
    found = set()
    for written in (config, short, {**config, "_diffusers_version": "9.9", "unheard_of": 3}):
        pipeline.scheduler = DDIMScheduler.from_config(written)
        found.add(work.fingerprint(pipeline))
    assert len(found) == 1


def tokenizer(own: Any, vocabulary: Any = None, **changes: Any) -> Any:
    """The pipeline's own with another vocabulary or other settings."""
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        if vocabulary is not None:
            file = Path(folder, "vocab.json")
            file.write_text(vocabulary(file.read_text()))
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, **changes)


def swapped(vocabulary: str) -> str:
    """Two letters have each other's number."""
    table = json.loads(vocabulary)
    table["t"], table["s"] = table["s"], table["t"]
    return json.dumps(table)


def test_the_same_tokenizer_is_the_same(pipeline: Any) -> None:
    before = work.fingerprint(pipeline)
    pipeline.tokenizer = tokenizer(pipeline.tokenizer)
    assert work.fingerprint(pipeline) == before


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": swapped},
        {"model_max_length": 12},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tokenizer_that_gives_other_tokens_is_another(
    pipeline: Any, change: dict[str, Any]
) -> None:
    before, own = work.fingerprint(pipeline), pipeline.tokenizer
    pipeline.tokenizer = tokenizer(own, **change)
    words = ["the stones are on the hat", "tent"]
    tokens = [
        each(words, padding="max_length", max_length=each.model_max_length).input_ids
        for each in (own, pipeline.tokenizer)
    ]
    assert tokens[0] != tokens[1]
    assert work.fingerprint(pipeline) != before


def test_weights_of_every_part_are_in_it(pipeline: Any) -> None:
    found = {work.fingerprint(pipeline)}
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        next(part.parameters()).data.view(-1)[0] += 1
        found.add(work.fingerprint(pipeline))
    assert len(found) == 4


EMPHASIS = {"emphasis": {"matching": "star", "share": 0.5}}


@pytest.mark.parametrize(
    ("stage", "settings", "later"),
    [
        ("distill", {"method": "output", "steps": 1, "iterations": 1}, {"lora_rank": 2}),
        ("distill", {"method": "output", "steps": 1, "iterations": 1}, EMPHASIS),
        ("decoder", {"iterations": 1}, {"detail_balance": 1.0}),
        ("decoder", {"iterations": 1}, EMPHASIS),
        ("resolution", {"drawn_at": 72, "iterations": 1}, EMPHASIS),
        ("finetune", {"iterations": 1}, EMPHASIS),
    ],
)
def test_a_setting_that_came_later_changes_no_key_by_default(
    stage: str, settings: dict[str, Any], later: dict[str, Any], tmp_path: Path
) -> None:
    """Else the results that people have kept would be trained anew."""

    after = [{"quantize": {"activations": "int8_static"}}] if stage == "finetune" else []

    def told(**more: Any) -> Any:
        data = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}
        data |= {
            "schedule": {"steps": 1, "guidance_scale": 0.0},
            "stages": [{stage: {"warmup": 0, **settings, **more}}, *after],
        }
        done = work.Done(schema.parse(data), tmp_path, [])
        key, _ = done.add(done.recipe.stages[0])
        return key, done.inputs[0][1]

    key, contents = told()
    assert not set(work.ADDED_LATER[stage]) & contents.keys()
    assert told(**later)[0] != key


def recipe(prompts: Path, seed: int = 0) -> schema.Recipe:
    settings = {"method": "lcm", "steps": 1, "iterations": 1, "warmup": 0, "batch": 1}
    settings |= {"pictures": 1, "draw_steps": 1, "prompts": str(prompts), "seed": seed}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 64,
            "schedule": {"steps": 1, "guidance_scale": 0.0},
            "stages": [{"distill": settings}],
        }
    )


def test_without_matplotlib_a_training_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tent\n")
    cache = tmp_path / "cache"
    stages.apply(make_tiny_pipeline(), recipe(prompts), cache=cache)
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    monkeypatch.setattr(drawn, "draw", None)
    monkeypatch.setattr(drawn, "sample", None)
    begun: list[str] = []
    anew = recipe(prompts, seed=1)
    pruned = schema.parse({**anew.resolved(), "stages": [{"prune": {"attention_levels": [0]}}]})
    both = anew.model_copy(update={"stages": (*pruned.stages, *anew.stages)})
    for asked in (anew, both):
        with pytest.raises(UserError, match=r"training needs matplotlib.*diffusion\[train\]"):
            stages.apply(make_tiny_pipeline(), asked, cache=cache, progress=begun.append)
    assert begun == []
    (kept,) = cache.iterdir()
    again = stages.apply(make_tiny_pipeline(), recipe(prompts), cache=cache)  # nothing to train
    assert again.records[0]["result"] == kept.name
