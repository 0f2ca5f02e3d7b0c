"""Quantization-aware fine-tuning: what it rounds, what it learns, and what it refuses."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobile_runtime.errors import UserError
from recipes import drawn, prompts, quantized_layers, schema, stages, trainer, work
from recipes.faults import RecipeError
from recipes.losses import snr_db
from recipes.measure import with_modules
from recipes.quantized_layers import Affine, SkipConv2d, Static
from recipes.schedulers import choose_scheduler, with_steps
from recipes.straight_through import plain, round_as
from recipes.trainer import Batch
from recipes.trajectory import Trajectory
from tests.conftest import make_tiny_pipeline

CPU = torch.device("cpu")
STATIC = Static(Affine(0.03, -20), Affine(0.01, 10))
SMALL = {
    "iterations": 2,
    "batch": 2,
    "warmup": 0,
    "save_every": 1,
    "precision": "float32",
    "learning_rate": 1e-4,
}
# Ranges that cut a quarter of the values off at either end: an error that training can undo.
CLIPPED: dict[str, Any] = {
    "calibration": {"samples": 2, "observer": "percentile", "percentile": 75.0},
    "rules": [
        {
            "layers": "unet.up_blocks.3.*",
            "weights": "int8",
            "activations": "int8_static",
            "reason": "the last level",
        }
    ],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "prompts.txt"
    path.write_text("a tent\na stone\n")
    return path


def recipe(words: Path, quantize: dict[str, Any] | None = None, **changes: Any) -> schema.Recipe:
    asked = {**(quantize or {})}
    asked["calibration"] = {"samples": 2, "prompts": str(words), **asked.get("calibration", {})}
    settings = {**SMALL, "prompts": str(words), **changes.pop("finetune", {})}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 64,
            "schedule": {"steps": 1, "guidance_scale": 0.0},
            "stages": [{"finetune": settings}, {"quantize": asked}],
            **changes,
        }
    )


@dataclass
class Tuned:
    """A training that was run once for several tests."""

    asked: schema.Recipe
    cache: Path
    applied: stages.Applied
    record: dict[str, Any]


@pytest.fixture(scope="module")
def tuned(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    training = {"iterations": 12, "batch": 4, "learning_rate": 1e-3, "average_decay": 0.0}
    asked = recipe(words, CLIPPED, finetune=training)
    cache = tmp_path_factory.mktemp("cache")
    applied = stages.apply(make_tiny_pipeline(), asked, stages.changing(asked), cache=cache)
    return Tuned(asked, cache, applied, applied.records[0])


def layer_pairs() -> dict[str, tuple[Any, Any, torch.Tensor]]:
    """For each kind a float layer, its quantized form, and what it reads."""
    torch.manual_seed(0)
    picture, tokens = torch.randn(2, 4, 6, 6) * 2, torch.randn(2, 5, 4) * 2
    conv, pointwise = nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 6, 1)
    linear, embedding = nn.Linear(4, 6), nn.Embedding(7, 4)
    skip = SkipConv2d(pointwise, 3)
    skip.hidden = quantized_layers.quantized(skip.hidden, "int8_static", STATIC)  # type: ignore[assignment]
    skip.skip = quantized_layers.quantized(skip.skip)  # type: ignore[assignment]
    made = quantized_layers.quantized
    return {
        "conv, static": (conv, made(conv, "int8_static", STATIC), picture),
        "conv, dynamic": (conv, made(conv, "int8_dynamic"), picture),
        "pointwise conv, dynamic": (pointwise, made(pointwise, "int8_dynamic"), picture),
        "linear, static": (linear, made(linear, "int8_static", STATIC), tokens),
        "linear, dynamic": (linear, made(linear, "int8_dynamic"), tokens),
        "linear, weights": (linear, made(linear), tokens),
        "embedding": (embedding, made(embedding), torch.tensor([[0, 6, 3]])),
        "skip concat": (pointwise, skip, picture),
    }


@pytest.mark.parametrize("kind", layer_pairs())
def test_a_rounded_layer_computes_what_its_integers_do(kind: str) -> None:
    layer, quantized, x = layer_pairs()[kind]
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    tree = nn.Sequential(layer)
    expected = tree(x)
    assert round_as(tree, nn.Sequential(quantized)) == 1
    assert torch.equal(tree(x), quantized(x))
    assert not torch.equal(tree(x), expected)
    tree(x).square().sum().backward()
    assert all(bool(tensor.grad.abs().sum() > 0) for tensor in tree.parameters())

    plain(tree)
    assert torch.equal(tree(x), expected)
    assert type(tree[0]) in (nn.Conv2d, nn.Linear, nn.Embedding)
    assert not {"roundings", "hidden_channels"} & set(vars(tree[0]))
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in kept.items())


def test_the_scales_of_the_weights_are_those_of_the_current_ones() -> None:
    layer, quantized, x = layer_pairs()["linear, static"]
    tree = nn.Sequential(layer)
    round_as(tree, nn.Sequential(quantized))
    with torch.no_grad():
        layer.weight.mul_(3)
    twin = nn.Linear(4, 6)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(tree(x), quantized_layers.quantized(twin, "int8_static", STATIC)(x))


def test_the_gradient_ends_where_the_range_does() -> None:
    """Held against one written by hand: 1 where a value is rounded, 0 where it is cut off."""
    layer, quantized, _ = layer_pairs()["linear, static"]
    x = (torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 4).requires_grad_()
    tree = nn.Sequential(layer)
    round_as(tree, nn.Sequential(quantized))
    given = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    tree(x).backward(given)

    def within(values: torch.Tensor, affine: Affine) -> torch.Tensor:
        integers = (values.detach() / affine.scale).round() + affine.zero_point
        return (integers >= -128) & (integers <= 127)

    weight, read = quantized.weight, STATIC.input(x.detach())
    arriving = given * within(nn.functional.linear(read, weight, quantized.bias), STATIC.output)
    reaching = (arriving @ weight) * within(x, STATIC.input)
    assert 0 < int((arriving == 0).sum()) < arriving.numel()
    assert 0 < int((reaching == 0).sum()) < reaching.numel()
    torch.testing.assert_close(layer.weight.grad, arriving.T @ read)
    torch.testing.assert_close(layer.bias.grad, arriving.sum(0))
    torch.testing.assert_close(x.grad, reaching)


def test_a_quantized_layer_without_a_gradient_is_told() -> None:
    class Other(quantized_layers.QuantizedLinear):
        """Rounds in a way of its own."""

    layer, quantized, _ = layer_pairs()["linear, weights"]
    quantized.__class__ = Other
    with pytest.raises(ValueError, match="0: there is no gradient for a Other"):
        round_as(nn.Sequential(layer), nn.Sequential(quantized))


def trajectory(
    pipeline: Any, words: Path, steps: tuple[int, ...], guidance: float = 0.0
) -> Trajectory:
    return Trajectory(
        pipeline=pipeline,
        teacher=pipeline.unet,
        scheduler=pipeline.scheduler,
        steps=steps,
        size=(8, 8),
        draw_prompts=prompts.drawer(str(words), recipe(words)),
        teacher_guidance=guidance,
        student_guidance=guidance,
    )


def batch(step: int) -> Batch:
    return Batch(3, step, 0, 0, 2, CPU, nn.Identity())


@torch.no_grad()
def test_the_calls_are_those_of_the_pipeline_when_it_draws(tiny_pipeline: Any, words: Path) -> None:
    way = trajectory(tiny_pipeline, words, (2,), guidance=3.0)
    calls = [way.call(batch(step)) for step in range(6)]
    times = with_steps(tiny_pipeline.scheduler, 2).timesteps
    assert {int(call.t) for call in calls} == set(times.tolist())
    last = next(step for step, call in enumerate(calls) if call.t == times[-1])
    mine = with_steps(tiny_pipeline.scheduler, 2).step(calls[last].out, times[-1], calls[last].x)
    said = way.draw_prompts(batch(last).rng(), 2)
    noise = torch.randn(2, 4, 8, 8, generator=batch(last).generator())
    theirs = drawn.sample(tiny_pipeline, tiny_pipeline.unet, said, noise, 2, 3.0)
    torch.testing.assert_close(mine.prev_sample, theirs)
    assert float(way.loss(tiny_pipeline.unet, batch(last), 1.0)) == 0


@torch.no_grad()
def test_every_number_of_steps_is_walked_and_fresh_noise_is_seeded(words: Path) -> None:
    pipeline = make_tiny_pipeline()
    pipeline.scheduler = choose_scheduler(pipeline.scheduler, "lcm")
    way = trajectory(pipeline, words, (1, 2))
    seen = {float(way.call(batch(step)).t) for step in range(8)}
    expected = [with_steps(pipeline.scheduler, steps).timesteps.tolist() for steps in (1, 2)]
    assert seen == {time for times in expected for time in times}
    late = next(step for step in range(8) if float(way.call(batch(step)).t) == min(seen))
    assert torch.equal(way.call(batch(late)).x, way.call(batch(late)).x)


def test_what_comes_out_of_the_quantization_is_nearer_to_the_float_pipeline(
    tuned: Tuned, words: Path
) -> None:
    """Held against the recipe without the stage; each calibrates anew."""
    without = tuned.asked.model_copy(update={"stages": stages.preserving(tuned.asked)})
    teacher = make_tiny_pipeline()
    before = stages.apply(make_tiny_pipeline(), without).pipeline
    unet = copy.deepcopy(tuned.applied.pipeline.unet)
    tuned_one = with_modules(make_tiny_pipeline(), {"unet": unet})
    after = stages.apply(tuned_one, tuned.asked, stages.preserving(tuned.asked)).pipeline
    way = trajectory(teacher, words, (1,))
    with torch.no_grad():
        calls = [way.call(batch(step)) for step in range(4)]
        wanted = torch.cat([call.out for call in calls])
        figures = [
            snr_db(wanted, torch.cat([way.answer(made.unet, call) for call in calls]))
            for made in (before, after)
        ]
    assert figures[1] > figures[0] + 0.5
    told = tuned.record["output_snr_db_before"], tuned.record["output_snr_db_after"]
    assert told[1] > told[0] + 0.5


def test_it_is_kept_and_found_again(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "train", None)  # not needed any more
    again = stages.apply(make_tiny_pipeline(), tuned.asked, cache=tuned.cache)
    assert again.records[0]["trained"] == "earlier, found in the cache"
    assert again.records[0]["result"] == tuned.record["result"]
    (kept,) = tuned.cache.iterdir()  # what served to resume is gone
    names = {path.name for path in (kept / "training").iterdir()}
    assert names == {"finetune-000012.png", "finetune-loss.csv", "finetune-loss.png"}


def test_what_it_leaves_is_an_ordinary_pipeline_and_the_teacher_stays(
    tuned: Tuned, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    source = make_tiny_pipeline().unet
    made = tuned.applied.pipeline.unet
    for ours, theirs in zip(made.modules(), source.modules(), strict=True):
        assert type(ours) is type(theirs)
    changed = [
        name
        for name, value in made.state_dict().items()
        if not torch.equal(value, source.state_dict()[name])
    ]
    assert "up_blocks.3.resnets.0.conv1.weight" in changed
    stages.save(tuned.applied.pipeline, [], tmp_path / "pipeline")
    opened = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(opened.unet(x, 9, text).sample, made(x, 9, text).sample)


@pytest.fixture
def killed_after_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    save = trainer._save

    def save_and_die(*args: Any) -> None:
        save(*args)
        monkeypatch.setattr(trainer, "_save", save)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", save_and_die)


def test_weights_alone_train_without_a_calibration_and_resume(
    words: Path, tmp_path: Path, killed_after_one_step: None
) -> None:
    asked = recipe(words, finetune={"gradient_checkpointing": True})
    source = make_tiny_pipeline()
    before = {name: value.clone() for name, value in source.unet.state_dict().items()}

    def apply(cache: str) -> Any:
        return stages.apply(source, asked, stages.changing(asked), cache=tmp_path / cache)

    with pytest.raises(KeyboardInterrupt):
        apply("killed")
    resumed, whole = apply("killed").pipeline.unet, apply("whole").pipeline.unet
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(before[name], source.unet.state_dict()[name])
    assert any(not torch.equal(before[name], whole.state_dict()[name]) for name in before)


def test_a_time_path_that_will_be_folded_stays_float(words: Path, tmp_path: Path) -> None:
    first, last = ({one.name: one.settings.model_dump()} for one in recipe(words).stages)
    first["finetune"]["iterations"] = 1
    asked = recipe(words, stages=[first, {"fold": {}}, last])
    applied = stages.apply(make_tiny_pipeline(), asked, stages.changing(asked), cache=tmp_path)
    parts = make_tiny_pipeline().unet.named_modules()
    layers = [name for name, part in parts if type(part) in (nn.Conv2d, nn.Linear)]
    timeless = [name for name in layers if "time_emb" not in name]
    assert applied.records[0]["layers"] == len(timeless) < len(layers)
    assert type(applied.pipeline.unet).__name__ == "UNet2DConditionModel"


def test_what_it_trains_for_is_a_part_of_its_key(words: Path, tmp_path: Path) -> None:
    def key(asked: schema.Recipe) -> str:
        return work.Done(asked, tmp_path, []).add(asked.stages[0])[0]

    static = {"activations": "int8_static"}
    base = recipe(words, static)
    first, last = ({stage.name: stage.settings.model_dump()} for stage in base.stages)
    other = words.with_name("other.txt")
    other.write_text("a lamp\n")
    different = [
        recipe(words),
        recipe(words, {**static, "split_skips": False}),
        recipe(words, {**static, "calibration": {"observer": "minmax"}}),
        recipe(words, {**static, "calibration": {"prompts": str(other)}}),
        recipe(words, {**static, "calibration": {"prompts": None}}),
        recipe(
            words, {**static, "calibration": {"prompts": None}}, source={"model": "another/model"}
        ),
        recipe(words, static, schedule={"steps": 2, "guidance_scale": 0.0}),
        recipe(words, static, stages=[first, {"fold": {}}, last]),
        recipe(words, static, finetune={"feature_weight": 0.5}),
    ]
    assert len({key(asked) for asked in (base, *different)}) == 1 + len(different)
    same = recipe(words, {**static, "components": ["unet"]})
    assert key(same) == key(recipe(words, static)) == key(base)


def test_a_stage_that_comes_before_it_changes_nothing_for_later_keys(words: Path) -> None:
    """A distillation's key stays what it was: it knows nothing of a quantization to come."""
    distill = {"distill": {"method": "output", "steps": 1, **SMALL, "prompts": str(words)}}
    first, last = ({s.name: s.settings.model_dump()} for s in recipe(words).stages)
    keys = set()
    for more in ([], [first, last]):
        asked = recipe(words, stages=[distill, *more])
        keys.add(work.Done(asked, words.parent, []).add(asked.stages[0])[0])
    assert len(keys) == 1


ALONE = {"finetune": {"iterations": 1, "warmup": 0}}
PRUNE = {"prune": {"blocks": ["mid_block"]}}
QUANTIZE: dict[str, Any] = {"quantize": {}}
FOLD: dict[str, Any] = {"fold": {}}


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ([ALONE], "list quantize right after it, with at most fold between"),
        ([ALONE, FOLD], "list quantize right after it"),
        ([ALONE, PRUNE, QUANTIZE], "list quantize right after it"),
        ([QUANTIZE, ALONE], "finetune changes weights, so it cannot follow quantize"),
        ([FOLD, ALONE, QUANTIZE], "finetune changes weights, so it cannot follow fold"),
        ([ALONE, ALONE, QUANTIZE], "finetune is listed twice"),
    ],
)
def test_an_order_that_makes_no_sense_is_told(
    order: list[dict[str, Any]], told: str, words: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(words, stages=order)


@pytest.mark.parametrize(
    ("quantize", "finetune", "told"),
    [
        ({"components": ["text_encoder"]}, {}, "the components of the quantize stage leave out"),
        (
            {"rules": [{"layers": "unet.*", "weights": "float32", "reason": "no"}]},
            {},
            "keep every layer in float",
        ),
        ({"weights": "int4"}, {}, "asks for int4; leave finetune out"),
        ({}, {"prompts": "nowhere.txt"}, "there is no prompt file"),
    ],
)
def test_a_quantization_that_it_cannot_train_for_is_told_before_any_work(
    quantize: dict[str, Any], finetune: dict[str, Any], told: str, words: Path
) -> None:
    asked = recipe(words, quantize, finetune=finetune)
    with pytest.raises(UserError, match=rf"stages\.0\.finetune: .*{told}"):
        stages.check(make_tiny_pipeline(), asked)
