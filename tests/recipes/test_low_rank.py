"""A student may be a LoRA: it alone is trained, and its file gives the same weights elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recipes import distill, low_rank, schema, stages, trainer, work
from recipes.measure import with_modules
from tests.conftest import make_tiny_pipeline

RANK = 2
METHODS: dict[str, dict[str, Any]] = {
    "progressive": {"teacher_steps": 4, "guidance": 2.0, "steps": 1},  # two rounds
    "lcm": {"guidance": [1.0, 3.0], "steps": 2},
    "output": {"guidance": 2.0, "steps": 1},
}


def make_pipeline() -> Any:
    """The tiny pipeline with a UNet of two levels, and SD 1.5's convolutions around attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return with_modules(make_tiny_pipeline(), {"unet": unet.eval().requires_grad_(False)})


@pytest.fixture(autouse=True)
def _little_is_watched_and_nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes most of the time that these trainings take."""
    monkeypatch.setattr(distill, "WATCHED", 1)
    monkeypatch.setattr(stages, "_measure", lambda *_: {})


def recipe(prompts: Path, *before: Any, **settings: Any) -> schema.Recipe:
    asked = {
        "iterations": 2,
        "batch": 2,
        "warmup": 0,
        "pictures": 2,
        "draw_steps": 2,
        "precision": "float32",
        "learning_rate": 1e-2,
        "lora_rank": RANK,
        "prompts": str(prompts),
        **settings,
    }
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 64,
            "schedule": {"steps": asked["steps"], "guidance_scale": 0.0},
            "stages": [*before, {"distill": asked}],
        }
    )


def with_file(pipeline: Any, file: Path) -> Any:
    """What the `adapters` stage makes of a pipeline."""
    data = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}
    stage = {"adapters": {"loras": [{"model": str(file)}]}}
    return stages.apply(pipeline, schema.parse({**data, "stages": [stage]})).pipeline


def train(cache: Path, asked: schema.Recipe) -> tuple[stages.Applied, Path]:
    """What the stages leave, and the file of the LoRA."""
    applied = stages.apply(make_pipeline(), asked, cache=cache)
    return applied, cache / applied.records[-1]["result"] / "training" / low_rank.FILE


def assert_same_weights(mine: Any, theirs: Any) -> None:
    state = theirs.state_dict()
    assert mine.state_dict().keys() == state.keys()
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_alone_makes_the_student_of_the_source(
    method: str, prompts: Path, tmp_path: Path
) -> None:
    applied, file = train(tmp_path / "cache", recipe(prompts, method=method, **METHODS[method]))
    source, student = make_pipeline().unet, applied.pipeline.unet
    assert_same_weights(student, with_file(make_pipeline(), file).unet)
    changed = set()
    for name, value in source.state_dict().items():
        change = student.state_dict()[name] - value
        if change.any():
            changed.add(name.removesuffix(".weight"))
            assert torch.linalg.matrix_rank(change.flatten(1).double(), rtol=1e-4) <= RANK
    assert changed == set(low_rank.layers(low_rank.added(source, RANK, seed=0)))
    assert applied.records[0]["lora"] == {"rank": RANK, "layers": len(changed)}
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert not low_rank.layers(student)


def test_diffusers_fuses_the_file_to_the_same_weights(prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    applied, file = train(tmp_path / "cache", recipe(prompts, method="output", **METHODS["output"]))
    theirs = make_pipeline()
    theirs.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    assert_same_weights(applied.pipeline.unet, theirs.unet)


def test_peft_finds_the_same_layers_for_lcm_lora() -> None:
    peft = pytest.importorskip("peft")
    unet = make_pipeline().unet
    mine = set(low_rank.layers(low_rank.added(unet, RANK, seed=0)))
    unet.add_adapter(peft.LoraConfig(r=RANK, target_modules=list(low_rank.TARGETS)))
    theirs = {
        name.removesuffix(".lora_A") for name, _ in unet.named_modules() if name.endswith(".lora_A")
    }
    assert mine == theirs


def test_the_lora_of_sd15_has_as_many_weights_as_lcm_lora() -> None:
    """About 67.5 M at rank 64 (arXiv:2311.05556, of 860 M)."""
    from recipes.sources import open_source

    unet = open_source("random:sd15", weights=False).pipeline.unet
    parameters = low_rank.added(unet, 64, seed=0).named_parameters()
    count = sum(weight.numel() for name, weight in parameters if low_rank.is_trained(name))
    assert count == pytest.approx(67.5e6, rel=0.005)


def test_a_lora_begins_with_what_the_unet_computes_and_shares_its_weights() -> None:
    unet = make_pipeline().unet
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    student = low_rank.added(unet, RANK, seed=0)
    own = {name: value for name, value in student.named_parameters() if low_rank.is_trained(name)}
    assert len(own) == 2 * len(low_rank.layers(student))
    with torch.no_grad():
        before = unet(x, 5, text).sample
        assert torch.equal(student(x, 5, text).sample, before)
        for layer in low_rank.layers(student).values():
            nn.init.normal_(layer.up.weight, std=0.1)
        after = student(x, 5, text).sample
        assert not torch.allclose(after, before, rtol=0.1)
        torch.testing.assert_close(
            low_rank.fused(student, unet)(x, 5, text).sample, after, rtol=1e-4, atol=1e-5
        )
        assert torch.equal(unet(x, 5, text).sample, before)
    shared = {id(value) for value in unet.parameters()}
    assert {id(v) for v in student.parameters()} == shared | {id(v) for v in own.values()}
    again, other = (low_rank.added(unet, RANK, seed=seed) for seed in (0, 1))
    downs = [low_rank.layers(one)["mid_block.resnets.0.conv1"] for one in (student, again, other)]
    first, same, different = (layer.matrices()[0] for layer in downs)
    assert torch.equal(first, same)
    assert not torch.equal(first, different)


def test_a_killed_training_ends_where_an_uninterrupted_one_does(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its checkpoint is small: the LoRA, its average and its optimizer's state."""
    asked = recipe(prompts, method="lcm", steps=1, iterations=3, save_every=1)
    whole, _ = train(tmp_path / "whole", asked)
    save = trainer._save

    def save_and_die(*args: Any) -> None:
        save(*args)
        if args[5] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", asked)
    (checkpoint,) = (tmp_path / "killed").glob("*/lcm.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert all(low_rank.is_trained(name) for name in (*state["module"], *state["average"]))
    assert len(state["optimizer"]["state"]) == len(state["module"]) == len(state["average"])
    monkeypatch.setattr(trainer, "_save", save)
    resumed, _ = train(tmp_path / "killed", asked)
    assert_same_weights(resumed.pipeline.unet, whole.pipeline.unet)


def test_the_target_of_latent_consistency_is_the_average_of_the_lora(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ups = []

    def calls(unet: Any, states: Any) -> Any:
        ups.append(
            {
                path: layer.up.weight.detach().clone()
                for path, layer in low_rank.layers(unet).items()
            }
        )
        return lambda x, t: unet(x, t, states).sample

    monkeypatch.setattr(distill, "_calls", calls)
    asked = recipe(prompts, method="lcm", steps=1, iterations=3, average_decay=0.999)
    train(tmp_path / "cache", asked)
    students, targets = ups[0::2], ups[1::2]
    path = "mid_block.resnets.0.conv1"
    expected = torch.zeros_like(students[0][path])
    for step, (student, target) in enumerate(zip(students, targets, strict=True)):
        if step:  # the average follows faster at first
            decay = min(0.999, step / (9 + step))
            expected = decay * expected + (1 - decay) * student[path]
        torch.testing.assert_close(target[path], expected)
    assert targets[2][path].any()
    assert not torch.equal(targets[2][path], students[2][path])


def test_what_is_not_trained_is_held_once(tmp_path: Path, prompts: Path) -> None:
    settings = recipe(prompts, method="output", **METHODS["output"]).stages[0].distill
    assert settings is not None
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    frozen = module[0].weight.clone()

    def loss(module: nn.Module, batch: trainer.Batch) -> torch.Tensor:
        mine, mean = (dict(one.named_parameters()) for one in (module, batch.average))
        assert all((mine[name] is mean[name]) == name.startswith("0.") for name in mine)
        return module(torch.ones(1, 2)).square().mean()

    def trainable(name: str) -> bool:
        return name.startswith("1.")

    job = trainer.Job("job", module, loss, settings, tmp_path, "k", None, trainable)
    average = trainer.train(job)
    assert torch.equal(average[0].weight, frozen)
    assert average[0].weight is module[0].weight
    assert not torch.equal(average[1].weight, module[1].weight)


def test_gradient_checkpointing_trains_the_same(prompts: Path, tmp_path: Path) -> None:
    plain, frugal = (
        train(
            tmp_path / str(on),
            recipe(prompts, method="output", **METHODS["output"], gradient_checkpointing=on),
        )[0].pipeline.unet
        for on in (False, True)
    )
    assert_same_weights(plain, frugal)
    assert not frugal.is_gradient_checkpointing


def test_a_lora_of_a_pruned_student_fits_the_pruned_one(prompts: Path, tmp_path: Path) -> None:
    prune = {"prune": {"blocks": ["mid_block"]}}
    asked = recipe(prompts, prune, method="output", steps=1, feature_weight=1.0)
    applied, file = train(tmp_path / "cache", asked)
    alone = asked.model_copy(update={"stages": asked.stages[:1]})
    pruned = stages.apply(make_pipeline(), alone).pipeline
    assert_same_weights(applied.pipeline.unet, with_file(pruned, file).unet)


def test_a_rank_is_another_training_and_none_is_the_one_before(
    prompts: Path, tmp_path: Path
) -> None:
    def key(rank: int | None) -> str:
        asked = recipe(prompts, method="lcm", steps=1, lora_rank=rank)
        return work.Done(asked, tmp_path, []).add(asked.stages[0])[0]

    assert len({key(None), key(1), key(2)}) == 3


def test_the_command_puts_the_lora_beside_the_pipeline(
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    stages.save(make_pipeline(), [], folder)
    asked = recipe(prompts, method="output", **METHODS["output"]).resolved()
    asked["source"]["model"] = str(folder)
    again = {**asked["stages"][0]["distill"], "seed": 1}
    asked["stages"].append({"distill": again})
    path = tmp_path / "mine.yaml"
    path.write_text(schema.parse(asked).to_yaml())
    output = tmp_path / "small"
    assert distill.main(["--recipe", str(path), "--output", str(output)]) == 0
    files = [output / low_rank.FILE, output / "pytorch_lora_weights_2.safetensors"]
    told = capsys.readouterr().out
    assert all(
        f"the LoRA that was trained, already in these weights, is in {f}\n" in told for f in files
    )
    student = make_pipeline()
    for file in files:
        student = with_file(student, file)
    saved = type(student.unet).from_pretrained(output / "unet")
    assert_same_weights(saved, student.unet)
