"""Pruning: what goes is what was named or matters least, and what stays computes as before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from mobile_runtime.errors import UserError
from recipes import blocks, schema, stages
from recipes.faults import RecipeError
from recipes.measure import count_macs, count_parameters
from recipes.schema import Recipe
from recipes.sources import open_source
from tests.conftest import make_tiny_pipeline

LEVELS = 4


def recipe(*settings: dict[str, Any], model: str = "random:sd15", **more: Any) -> Recipe:
    data = {"name": "x", "source": {"model": model}, "resolution": 64}
    data["schedule"] = {"steps": 2, "guidance_scale": 0}
    return schema.parse({**data, "stages": [{"prune": each} for each in settings], **more})


def pruned(pipeline: Any, **settings: Any) -> Any:
    return stages.apply(pipeline, recipe(settings)).pipeline.unet


def make_pipeline(**config: Any) -> Any:
    """The tiny pipeline, its UNet with two layers a level as Stable Diffusion's."""
    pipeline = make_tiny_pipeline()
    torch.manual_seed(1)
    plain = {"layers_per_block": 2, "attention_head_dim": [2, 4, 4, 4], **config}
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **plain})
    pipeline.unet.eval().requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make_pipeline()


def output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        return unet(x, 300, states).sample


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def sd_turbo() -> Any:
    return open_source("random:sd_turbo", weights=False).pipeline


@pytest.mark.parametrize(
    ("preset", "parameters", "gmacs"),
    [
        ("bk_base", 583_480_964, 262),
        ("bk_small", 485_787_524, 256),
        ("bk_tiny", 326_825_604, 243),
    ],
)
def test_bk_sdm_has_the_published_number_of_parameters(
    sd_turbo: Any, preset: str, parameters: int, gmacs: int
) -> None:
    after = stages.check(sd_turbo, recipe({"blocks": preset}, resolution=512)).unet
    assert count_parameters(after) == parameters
    inputs = (torch.empty(1, 4, 64, 64), torch.empty(()), torch.empty(1, 77, 1024))
    assert round(count_macs(after, *inputs) / 1e9) == gmacs


def test_removing_nothing_gives_an_equal_unet(pipeline: Any) -> None:
    same = blocks.remove(pipeline.unet, ())
    assert same is not pipeline.unet
    assert torch.equal(output(same), output(pipeline.unet))
    assert plain_config(same) == plain_config(pipeline.unet)


def plain_config(unet: Any) -> Any:
    """As it stands in config.json, without the notes that diffusers makes for itself."""
    return json.loads(json.dumps({k: v for k, v in unet.config.items() if k[0] != "_"}))


def test_bk_base_is_the_one_layer_unet_with_the_weights_of_the_layers_that_stay(
    pipeline: Any,
) -> None:
    expected = make_pipeline(layers_per_block=1).unet
    weights = pipeline.unet.state_dict()
    for key in expected.state_dict():
        expected.state_dict()[key].copy_(weights[_before_bk_base(key)])
    assert torch.equal(output(pruned(pipeline, blocks="bk_base")), output(expected))


def _before_bk_base(key: str) -> str:
    """On the way up the last of three layers becomes the second of two."""
    parts = key.split(".")
    if parts[0] == "up_blocks" and parts[2] in ("resnets", "attentions") and parts[3] == "1":
        parts[3] = "2"
    return ".".join(parts)


PLAIN_RESULTS: dict[str, dict[str, Any]] = {
    "base": {"blocks": "bk_base"},
    "small": {"blocks": "bk_small"},
    "tiny": {"blocks": "bk_tiny"},
    "a list": {"blocks": ["down_blocks.0.resnets.1", "up_blocks.3.resnets.1", "mid_block"]},
    "attention": {"attention_levels": [0, 2]},
    "both": {"blocks": ["down_blocks.3", "up_blocks.0"], "attention_levels": [0]},
}


@pytest.mark.parametrize("settings", PLAIN_RESULTS.values(), ids=PLAIN_RESULTS.keys())
def test_diffusers_opens_a_result_without_blocks_or_attention(
    pipeline: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    applied = stages.apply(pipeline, recipe(settings))
    (record,) = applied.records
    assert record["after"]["unet"]["parameters"] < record["before"]["unet"]["parameters"]
    assert record["after"]["unet"]["macs"] < record["before"]["unet"]["macs"]
    assert json.loads(json.dumps(record)) == record
    stages.save(applied.pipeline, applied.plans, tmp_path / "result")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "result", local_files_only=True)
    assert_close(output(loaded.unet), output(applied.pipeline.unet))


def test_what_stays_is_shared_and_the_given_unet_stays_whole(pipeline: Any) -> None:
    before = {key: tensor.clone() for key, tensor in pipeline.unet.state_dict().items()}
    config = dict(pipeline.unet.config)
    after = pruned(pipeline, blocks="bk_small", attention_levels=[0])
    assert after.conv_in.weight.data_ptr() == pipeline.unet.conv_in.weight.data_ptr()
    now = pipeline.unet.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())
    assert dict(pipeline.unet.config) == config
    assert not any(parameter.requires_grad for parameter in after.parameters())


def test_attention_goes_at_the_levels_named_and_the_rest_computes_on(pipeline: Any) -> None:
    """The same UNet with its attention outputs switched off, which leaves the residual alone."""
    after = pruned(pipeline, attention_levels=[0, 1])
    off = make_pipeline().unet
    for level, block in [*enumerate(off.down_blocks), *enumerate(reversed(off.up_blocks))]:
        for attention in getattr(block, "attentions", ()) if level < 2 else ():
            attention.proj_out.weight.zero_()
            attention.proj_out.bias.zero_()
    assert_close(output(after), output(off))
    assert not hasattr(after.down_blocks[1], "attentions")
    assert hasattr(after.down_blocks[2], "attentions")


def level(index: int) -> list[str]:
    return [f"down_blocks.{index}", f"up_blocks.{LEVELS - 1 - index}"]


REFUSED: dict[str, tuple[list[str], str]] = {
    "an unknown name": (["mid_blok"], "no block 'mid_blok'.*mid_block"),
    "an upsampler": (["up_blocks.0.upsamplers.0"], "goes with its level"),
    "an attention": (["down_blocks.0.attentions.1"], "with its layer"),
    "a skip nobody takes": (
        ["up_blocks.1.resnets.1"],
        r"name 1 more of down_blocks\.2\.resnets, or 1 fewer of up_blocks\.1\.resnets",
    ),
    "a skip nobody makes": (["down_blocks.1.resnets.1"], r"name 1 more of up_blocks\.2\.resnets"),
    "the layer that widens": (
        ["down_blocks.2.resnets.0", "up_blocks.1.resnets.1"],
        r"down_blocks\.2\.resnets\.1 takes 64 channels .* 32, so down_blocks\.2\.resnets\.0 must",
    ),
    "the skip of other channels": (
        ["down_blocks.2.resnets.1", "up_blocks.1.resnets.2"],
        r"up_blocks\.1\.resnets\.1 takes 128 .* 96, so up_blocks\.1\.resnets\.2 must stay",
    ),
    "half a level": (["down_blocks.3"], r"up_blocks\.0 stay.*both or neither"),
    "the other half": (["up_blocks.0"], r"down_blocks\.3 stay.*both or neither"),
    "a middle level": (level(1), r"down_blocks\.1 and up_blocks\.2 are not the innermost"),
    "levels of other widths": (
        [*level(3), *level(2), "mid_block"],
        r"up_blocks\.2\.resnets\.0 takes 96 .* 64",
    ),
    "everything": ([name for i in range(LEVELS) for name in level(i)], "every level would go"),
    "all layers of a level": (
        ["down_blocks.1.resnets.0", "down_blocks.1.resnets.1"],
        r"down_blocks\.1 would have no layer",
    ),
}


@pytest.mark.parametrize(("names", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_a_list_that_leaves_the_unet_unconnected_is_refused(
    pipeline: Any, names: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=rf"stages\.0\.prune: blocks: .*{told}"):
        stages.check(pipeline, recipe({"blocks": names}))


def test_a_mid_block_with_other_heads_than_its_new_level_is_refused() -> None:
    """Its weights would fit, and compute something else."""
    other = make_pipeline(attention_head_dim=[2, 2, 4, 8])
    with pytest.raises(UserError, match="mid_block fits only"):
        stages.check(other, recipe({"blocks": level(3)}))
    stages.check(other, recipe({"blocks": [*level(3), "mid_block"]}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attention_levels": [3]}, "level 3 has no attention"),
        ({"attention_levels": [4]}, "no level 4.*0 to 3"),
        ({"attention_levels": [0, 1, 2], "blocks": ["mid_block"]}, "the prompt would have no"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_runs(
    pipeline: Any, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        stages.check(pipeline, recipe(settings))


def test_bk_base_of_a_unet_with_one_layer_a_level_is_refused(tiny_pipeline: Any) -> None:
    with pytest.raises(UserError, match="bk_base takes nothing"):
        stages.check(tiny_pipeline, recipe({"blocks": "bk_base"}))
    stages.check(tiny_pipeline, recipe({"blocks": "bk_small"}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "nothing is named to prune"),
        ({"blocks": "bk_huge"}, "bk_base"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(settings)


def test_pruning_twice_is_pruning_once(pipeline: Any) -> None:
    once = pruned(pipeline, blocks="bk_tiny", attention_levels=[0])
    small = {"blocks": "bk_small"}
    rest = {"blocks": ["down_blocks.3", "up_blocks.0"], "attention_levels": [0]}
    twice = stages.apply(pipeline, recipe(small, rest)).pipeline.unet
    assert torch.equal(output(twice), output(once))


def test_quantization_finds_every_layer_of_a_pruned_unet() -> None:
    own = make_pipeline()
    both = schema.parse(
        {
            **recipe({"blocks": "bk_small"}).resolved(),
            "stages": [{"prune": {"blocks": "bk_small"}}, {"quantize": {"components": ["unet"]}}],
        }
    )
    planned = stages.plan(stages.check(own, both), both)
    applied = stages.apply(own, both)
    assert applied.plans == planned
    assert all(entry.weights == "int8" for entry in planned)
    assert torch.isfinite(output(applied.pipeline.unet)).all()


def test_a_pruned_unet_converts_to_onnx(pipeline: Any, tmp_path: Path) -> None:
    import onnxruntime

    from converters import components
    from converters import onnx as converter

    settings = {"blocks": "bk_tiny", "attention_levels": [0]}
    left = stages.apply(pipeline, recipe(settings)).pipeline
    component = components.build(left, "unet", height=64, width=64, batch=1)
    program = components.export(component)
    converter.lower(component, program, tmp_path, converter.OnnxOptions())
    inputs = component.example_inputs(seed=3)
    (path,) = tmp_path.rglob("*.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    with torch.no_grad():
        expected = component.module(*inputs.values()).numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-4)
