"""Channel pruning: the same share of every group goes, and what matters least of each."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_runtime.errors import UserError
from recipes import component_folder, drawn, importance, schema, stages, widths
from recipes.faults import RecipeError
from recipes.fold import FoldedUNet
from recipes.losses import snr_db
from recipes.measure import count_macs, on_meta, outline, share_structure
from recipes.schema import Recipe
from recipes.sources import open_source
from tests.conftest import make_tiny_pipeline

ALL = ("resnets", "feed_forward", "heads")
MAGNITUDE = {"importance": "magnitude"}
OUTPUT = {"method": "output", "steps": 2, "iterations": 2, "warmup": 0, "batch": 1}
FEED_FORWARD = "down_blocks.1.attentions.0.transformer_blocks.0.ff"


def recipe(*listed: dict[str, Any], **more: Any) -> Recipe:
    """A recipe of these stages, two steps without guidance."""
    data = {"name": "x", "source": {"model": "random:sd15"}, "resolution": 64}
    data["schedule"] = {"steps": 2, "guidance_scale": 0}
    return schema.parse({**data, "stages": list(listed), **more})


def channels(**given: Any) -> dict[str, Any]:
    """A prune stage."""
    return {"prune": {"channels": given}}


def pruned(pipeline: Any, **given: Any) -> Any:
    return stages.apply(pipeline, recipe(channels(**given))).pipeline.unet


def shapes(unet: Any) -> dict[str, Any]:
    return {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    return x, torch.tensor(300), torch.randn(1, 16, 32, generator=generator)


def output(unet: Any) -> torch.Tensor:
    with torch.no_grad():
        return unet(*inputs()).sample


def assert_same(unet: Any, other: Any) -> None:
    """The same weights, to the bit, in modules that compute the same."""
    weights, others = unet.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in others.items())
    torch.testing.assert_close(output(unet), output(other), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make_tiny_pipeline()


@pytest.fixture(scope="module")
def narrowed(pipeline: Any) -> Any:
    """Applied: a third of the multiply-adds is gone."""
    return stages.apply(pipeline, recipe(channels(macs=1 / 3, **MAGNITUDE)))


# What goes.


def kill_half(unet: Any, parts: Sequence[str]) -> None:
    """Make half of each group's channels contribute nothing, and next to nothing in weights.

    In a residual block each dead channel is the twin of a living one in its GroupNorm group, so
    that mean and variance are the same without it.
    """
    weights = unet.state_dict()
    for path, group in widths.groups(unet).items():
        if group.kind not in parts:
            continue
        if group.kind == "resnets":
            dead = torch.arange(group.width) % 2 == 1
            for name in ("conv1", "time_emb_proj"):
                for kind in ("weight", "bias"):
                    tensor = weights[f"{path}.{name}.{kind}"]
                    tensor.mul_(1e-3)
                    tensor[dead] = tensor[~dead]
            weights[f"{path}.norm2.weight"][dead] = 0
            weights[f"{path}.norm2.bias"][dead] = 0
            weights[f"{path}.conv2.weight"][:, dead] = 0
        else:
            dead = torch.arange(group.width) % (2 * max(group.block, 8)) < max(group.block, 8)
            for part in group.parts:
                for copy in range(part.copies):
                    index = torch.nonzero(dead).flatten() + copy * group.width
                    weights[part.key].index_fill_(part.axis, index, 0)


def share_of_halves(unet: Any, parts: Sequence[str]) -> float:
    """Of the multiply-adds, what goes with half of every group; by torch's own count."""
    halves = {
        path: range(group.width // 2)
        for path, group in widths.groups(unet).items()
        if group.kind in parts
    }
    narrow = widths.narrow(on_meta(unet), halves)
    return 1 - count_macs(narrow, *inputs()) / count_macs(unet, *inputs())


@pytest.mark.parametrize(
    ("parts", "importance"),
    [(ALL, "magnitude"), (("feed_forward", "heads"), "taylor")],
)
def test_what_contributes_nothing_goes_and_the_output_stays(
    parts: tuple[str, ...], importance: str
) -> None:
    own = make_tiny_pipeline()
    kill_half(own.unet, parts)
    share = 0.9999 * share_of_halves(own.unet, parts)
    more = {"samples": 2} if importance == "taylor" else {}
    after = pruned(own, macs=share, parts=list(parts), importance=importance, **more)
    torch.testing.assert_close(output(after), output(own.unet), rtol=1e-4, atol=1e-5)
    before = widths.groups(own.unet)
    for path, group in widths.groups(after).items():
        assert group.width * (2 if group.kind in parts else 1) == before[path].width


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_weights_that_overflow_choose_nothing(importance: str) -> None:
    """They are finite; their squares, and what they give, are not."""
    own = make_tiny_pipeline()
    with torch.no_grad():
        own.unet.conv_in.weight.mul_(1e38)
        own.unet.get_submodule(FEED_FORWARD).net[2].weight.fill_(1e38)
    more = {"samples": 1} if importance == "taylor" else {}
    with pytest.raises(UserError, match=r"channels\.importance: that of .* is not finite"):
        pruned(own, macs=0.1, importance=importance, **more)


def test_taylor_tells_how_far_the_output_moves_without_each_head(pipeline: Any) -> None:
    """As it moves where that head is switched off, in the same calls."""
    asked = recipe(channels(macs=0.1, samples=10))
    calls: list[Any] = []
    unet = share_structure(pipeline.unet)
    hook = unet.register_forward_pre_hook(lambda module, args: calls.append(args))
    said = importance.taylor(unet, pipeline, asked.stages[0].prune.channels, asked)
    hook.remove()
    timesteps = [float(t) for _, t, _ in calls]
    assert timesteps == [999, 499] * 10
    told, found = [], []
    for path, group in widths.groups(unet).items():
        if group.kind == "heads":
            without = share_structure(pipeline.unet)
            reads = without.get_submodule(path).to_out[0]
            reads.weight = torch.nn.Parameter(reads.weight.clone(), requires_grad=False)
            reads.weight[:, : group.block] = 0
            with torch.no_grad():
                moved = [without(*args).sample - unet(*args).sample for args in calls[:4]]
            found.append(float(torch.stack(moved).square().sum()))
            told.append(float(said[path][0]))
    assert len(told) == 20
    assert np.corrcoef(np.log(told), np.log(found))[0, 1] > 0.8


@pytest.mark.parametrize("raises", [False, True])
def test_what_was_moved_to_be_watched_is_moved_back(
    raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    own, places = make_tiny_pipeline(), dict[int, list[str]]()
    asked = recipe(channels(macs=0.1, samples=1))
    settings = asked.stages[0].prune
    assert settings is not None
    assert settings.channels is not None

    def to(self: Any, device: Any) -> Any:
        for part in (self.unet, self.vae, self.text_encoder):
            places.setdefault(id(part), []).append(str(device))
        return self

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    class Elsewhere:
        device = torch.device("cpu:0")

    monkeypatch.setattr(DiffusionPipeline, "to", to)
    monkeypatch.setattr(importance, "accelerator", Elsewhere)
    expected: Any = contextlib.nullcontext()
    if raises:
        monkeypatch.setattr(drawn, "sample", broken)
        expected = pytest.raises(RuntimeError)
    with expected:
        importance.taylor(own.unet, own, settings.channels, asked)
    assert places.keys() >= {id(own.vae), id(own.text_encoder)}
    assert {tuple(moves) for moves in places.values()} == {("cpu:0", "cpu")}


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_the_share_of_multiply_adds_that_was_asked_for_goes_and_check_foretells_it(
    pipeline: Any, share: float
) -> None:
    asked = recipe(channels(macs=share, **MAGNITUDE))
    applied = stages.apply(pipeline, asked)
    (record,) = applied.records
    gone = 1 - record["after"]["unet"]["macs"] / record["before"]["unet"]["macs"]
    assert share <= gone < share + 0.03
    assert shapes(stages.check(pipeline, asked).unet) == shapes(applied.pipeline.unet)
    before = widths.groups(pipeline.unet)
    for path, (whole, left) in record["channels"].items():
        assert before[path].width == whole > left >= before[path].least
        assert left % before[path].multiple == 0
    assert json.loads(json.dumps(record)) == record


def block_shapes(unet: Any) -> list[Any]:
    """Of what the layers give on to the next."""
    seen: list[Any] = []
    hooks = [
        part.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
        for path, part in unet.named_modules()
        if path.split(".")[-2:-1] in (["resnets"], ["attentions"])
    ]
    output(unet)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_residual_stream_keeps_its_width_and_no_norm_has_one_channel_a_group(
    pipeline: Any,
) -> None:
    after = pruned(pipeline, macs=0.5, **MAGNITUDE)
    assert block_shapes(after) == block_shapes(pipeline.unet)
    norms = [part for part in after.modules() if isinstance(part, torch.nn.GroupNorm)]
    assert min(norm.num_channels // norm.num_groups for norm in norms) == 2
    assert output(after.train()).isfinite().all()
    after.eval()


def test_what_is_kept_stays_whole_and_the_rest_makes_up_for_it(pipeline: Any) -> None:
    kept = pruned(pipeline, macs=0.2, keep=["up_blocks.3.*", "*.attn2"], **MAGNITUDE)
    before, after = widths.groups(pipeline.unet), widths.groups(kept)
    whole = [path for path in before if path.startswith("up_blocks.3.") or path.endswith("attn2")]
    assert whole
    assert all(after[path].width == before[path].width for path in whole)
    gone = 1 - count_macs(kept, *inputs()) / count_macs(pipeline.unet, *inputs())
    assert 0.2 <= gone < 0.23


def test_the_given_unet_stays_whole_and_shares_what_does_not_change(pipeline: Any) -> None:
    before = {key: tensor.clone() for key, tensor in pipeline.unet.state_dict().items()}
    after = pruned(pipeline, macs=0.2, samples=1)
    assert after.conv_in.weight.data_ptr() == pipeline.unet.conv_in.weight.data_ptr()
    now = pipeline.unet.state_dict()
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())
    assert not any(p.requires_grad for unet in (after, pipeline.unet) for p in unet.parameters())


def test_where_groups_compete_those_that_matter_least_lose_most(pipeline: Any) -> None:
    """Half of the layers get outputs of a hundredth, so they matter less, and lose all they can."""
    own = make_tiny_pipeline()
    groups = widths.groups(own.unet)
    feed_forwards = [path for path, group in groups.items() if group.kind == "feed_forward"]
    quiet = feed_forwards[::2]
    for path in quiet:
        own.unet.get_submodule(path).net[2].weight.mul_(0.01)
    left = pruned(own, macs=0.05, parts=["feed_forward"], spread="importance", samples=2)
    after = widths.groups(left)
    lost = {path: 1 - after[path].width / groups[path].width for path in feed_forwards}
    assert min(lost[path] for path in quiet) > max(lost[p] for p in lost if p not in quiet)
    gone = 1 - count_macs(left, *inputs()) / count_macs(own.unet, *inputs())
    assert 0.05 <= gone < 0.07


def test_blocks_and_channels_go_together_and_again(narrowed: Any) -> None:
    """Of a narrowed UNet blocks can go, and more channels."""
    listed = {"blocks": ["mid_block"], "channels": {"macs": 0.1, **MAGNITUDE}}
    applied = stages.apply(narrowed.pipeline, recipe({"prune": listed}))
    before, after = widths.groups(narrowed.pipeline.unet), widths.groups(applied.pipeline.unet)
    assert after.keys() == {path for path in before if not path.startswith("mid_block")}
    assert all(after[path].width <= before[path].width for path in after)
    assert output(applied.pipeline.unet).isfinite().all()


# What is refused.


def test_a_target_out_of_reach_is_refused_with_the_largest_that_is_not(pipeline: Any) -> None:
    given = {"parts": ["heads"], **MAGNITUDE}
    with pytest.raises(UserError, match=r"channels\.macs: 0\.95 .*heads") as refusal:
        stages.check(pipeline, recipe(channels(macs=0.95, **given)))
    largest = float(str(refusal.value).split("can lose ")[1].split(" ")[0])
    assert 0.01 < largest < 0.5
    stages.check(pipeline, recipe(channels(macs=largest, **given)))
    with pytest.raises(UserError, match="can lose"):
        stages.check(pipeline, recipe(channels(macs=largest + 0.001, **given)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompts": "nowhere.txt"}, r"no prompt file nowhere\.txt"),
        ({"keep": ["up_block.3.*"]}, r"keep: no module .* matches 'up_block\.3\.\*'"),
        ({"keep": ["*"]}, "can lose 0.0 at most; lower it, keep less"),
    ],
)
def test_what_cannot_be_narrowed_is_refused_before_anything_runs(
    pipeline: Any, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=rf"stages\.0\.prune: .*{told}"):
        stages.check(pipeline, recipe(channels(macs=0.1, **given)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"macs": 1.0}, r"channels\.macs"),
        ({"macs": 0.1, "parts": ["time"]}, r"channels\.parts"),
        ({"macs": 0.1, "prompts": "x", **MAGNITUDE}, r"channels\.prompts: goes with"),
        ({"macs": 0.1, "spread": "importance", **MAGNITUDE}, r"channels\.spread: importance goes"),
        ({"macs": 0.1, "ratio": 2}, "ratio"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(channels(**given))
    assert schema.parse(recipe(channels(macs=0.1)).resolved()) == recipe(channels(macs=0.1))


# Where it goes on.


def test_a_narrowed_unet_is_saved_with_its_widths_and_opens_again(
    narrowed: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "result"
    stages.save(narrowed.pipeline, narrowed.plans, folder)
    unet = narrowed.pipeline.unet
    opened = open_source(str(folder)).pipeline
    for again in (opened.unet, component_folder.load(folder / "unet")):
        assert_same(again, unet)
    outlined = open_source(str(folder), weights=False).pipeline.unet
    assert shapes(outlined) == shapes(opened.unet)
    assert widths.groups(outlined) == widths.groups(opened.unet)


def test_plain_diffusers_cannot_open_it_and_the_user_is_told_why(
    narrowed: Any, tmp_path: Path
) -> None:
    component_folder.save(narrowed.pipeline.unet, tmp_path / "unet")
    with pytest.raises(ValueError, match="shape"):
        UNet2DConditionModel.from_pretrained(tmp_path / "unet", local_files_only=True)
    (record,) = narrowed.records
    told = json.loads((tmp_path / "unet" / widths.FILE).read_text())["note"]
    assert record["plain_diffusers"] == told
    assert "plain diffusers does not open" in told


def test_a_narrowed_student_learns_from_the_whole_unet_and_is_found_again(
    pipeline: Any, tmp_path: Path
) -> None:
    listed = [channels(macs=0.4, samples=1), {"distill": {**OUTPUT, "feature_weight": 1.0}}]
    applied = stages.apply(pipeline, recipe(*listed), cache=tmp_path)
    first, second = applied.records
    assert second["after"]["unet"] == first["after"]["unet"]
    assert second["plain_diffusers"] == widths.NOTE
    again = stages.apply(pipeline, recipe(*listed), cache=tmp_path)
    assert "not needed" in again.records[0]["trained"]
    assert "found in the cache" in again.records[1]["trained"]
    unet = applied.pipeline.unet
    assert shapes(unet) != shapes(pipeline.unet)
    assert_same(again.pipeline.unet, unet)
    # Other prompts, other channels, another training.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tent\n")
    other = [channels(macs=0.4, samples=1, prompts=str(prompts)), listed[1]]
    anew = stages.apply(pipeline, recipe(*other), cache=tmp_path)
    assert "trained" not in anew.records[1]


@pytest.mark.parametrize("activations", ["none", "int8_static"])
def test_a_narrowed_unet_is_folded_and_quantized_as_planned(
    activations: str, tmp_path: Path
) -> None:
    quantize = {"components": ["unet"], "activations": activations, "split_skips": False}
    quantize["calibration"] = {"samples": 1}
    asked = recipe(channels(macs=0.4, **MAGNITUDE), {"fold": {}}, {"quantize": quantize})
    own = make_tiny_pipeline()
    planned = stages.check(outline(own), asked)
    float_unet = pruned(make_tiny_pipeline(), macs=0.4, **MAGNITUDE)
    applied = stages.apply(own, asked)
    unet = applied.pipeline.unet
    assert isinstance(unet, FoldedUNet)
    assert {entry.layer for entry in applied.plans} == {
        entry.layer for entry in stages.plan(planned, asked)
    }
    timestep = torch.tensor(999)
    x, _, states = inputs()
    with torch.no_grad():
        out, expected = (net(x, timestep, states).sample for net in (unet, float_unet))
    assert snr_db(expected, out) > (30 if activations == "none" else 10)
    stages.save(applied.pipeline, applied.plans, tmp_path / "result")
    loaded = open_source(str(tmp_path / "result")).pipeline.unet
    assert shapes(loaded) == shapes(float_unet)


def test_a_narrowed_unet_converts_to_onnx(narrowed: Any, tmp_path: Path) -> None:
    import onnxruntime

    from converters import components
    from converters import onnx as converter

    component = components.build(narrowed.pipeline, "unet", height=64, width=64, batch=1)
    program = components.export(component)
    converter.lower(component, program, tmp_path, converter.OnnxOptions())
    fed = component.example_inputs(seed=3)
    (path,) = tmp_path.rglob("*.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {name: x.numpy() for name, x in fed.items()})
    with torch.no_grad():
        expected = component.module(*fed.values()).numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)


# The table of widths.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot be read"),
        ("[]", '"widths"'),
        ('{"widths": {}}', '"widths"'),
        ('{"widths": {"nowhere": 8}}', "'nowhere' has no inner width"),
        (f'{{"widths": {{"{FEED_FORWARD}": 8, "{FEED_FORWARD}": 16}}}}', "twice"),
        (f'{{"widths": {{"{FEED_FORWARD}": "8"}}}}', "multiple of 1 .* 128, and it has '8'"),
        (f'{{"widths": {{"{FEED_FORWARD}": true}}}}', "has True"),
        (f'{{"widths": {{"{FEED_FORWARD}": 0}}}}', "has 0"),
        (f'{{"widths": {{"{FEED_FORWARD}": 128}}}}', "has 128"),
        ('{"widths": {"down_blocks.0.resnets.0": 20}}', "multiple of 8 from 16 to below 32"),
        ('{"widths": {"down_blocks.0.resnets.0": 8}}', "multiple of 8 from 16 to below 32"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    pipeline: Any, tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / widths.FILE).write_text(text)
    with pytest.raises(UserError, match=rf"widths\.json.*{told}"):
        widths.read(widths.empty(pipeline.unet.config), tmp_path)


def test_weights_that_the_table_does_not_tell_of_are_refused(narrowed: Any, tmp_path: Path) -> None:
    component_folder.save(narrowed.pipeline.unet, tmp_path / "unet")
    file = tmp_path / "unet" / widths.FILE
    contents = json.loads(file.read_text())
    contents["widths"].popitem()
    file.write_text(json.dumps(contents))
    with pytest.raises(UserError, match="do not fit"):
        component_folder.load(tmp_path / "unet")


@pytest.fixture(scope="module")
def empty(pipeline: Any) -> Any:
    return widths.empty(pipeline.unet.config)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_table_that_is_written_is_read_again(
    empty: Any, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    every = {path: g for path, g in widths.groups(empty).items() if g.least < g.width}
    chosen = data.draw(st.lists(st.sampled_from(sorted(every)), min_size=1, unique=True))
    kept = {
        path: data.draw(
            st.integers(
                every[path].least // every[path].multiple,
                every[path].width // every[path].multiple - 1,
            )
        )
        * every[path].multiple
        for path in chosen
    }
    folder = tmp_path_factory.mktemp("table")
    narrow = widths.narrow(empty, {path: range(width) for path, width in kept.items()})
    widths.write(narrow, folder)
    again = widths.read(widths.empty(empty.config), folder)
    assert widths.table(again) == kept
    assert widths.groups(again) == widths.groups(narrow)
