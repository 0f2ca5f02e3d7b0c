"""Pictures whose latents do not halve evenly, 5x11 say: every target computes what torch does.

The UNet of three levels halves 5x11 latents to 3x6 and 2x3, and doubles them to the same sizes.
"""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from converters import cli, components, executorch, rewrites
from converters.components import Component
from converters.coreml import CoreMLOptions
from mobile_runtime.bundle import Bundle
from mobile_runtime.manifest import Target
from mobile_runtime.report import read_report
from recipes import fold, measure, quantize, schema
from recipes.settings import QuantizeSettings
from tests.converters.small import make_small_pipeline
from tests.converters.test_executorch import figures
from tests.converters.test_rewrites import snr_db

HEIGHT, WIDTH = 10, 22
LATENTS = (5, 11)
LEVELS = 3
TARGETS: tuple[Target, ...] = ("onnx", "coreml", "executorch")
EXACT_DB = 100.0
# Integer kernels round a few outputs to a neighbouring step.
LAYER_DB = 45.0


def make_pipeline() -> Any:
    """The small pipeline, of twofold reduction, with a UNet of three levels."""
    pipeline = make_small_pipeline()
    torch.manual_seed(1)
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipeline.unet = unet.eval().requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """For tests that only read it."""
    return make_pipeline()


def unet_of(pipeline: Any, height: int = HEIGHT, width: int = WIDTH) -> Component:
    return components.build(pipeline, "unet", height=height, width=width, batch=1)


@pytest.mark.parametrize("n", range(1, 65))
def test_nearest_neighbours_of_an_odd_size_are_the_doubled_picture_cropped(n: int) -> None:
    x = torch.randn(1, 2, n, n)
    for size in ([2 * n - 1, 2 * n - 1], [2 * n - 1, 2 * n], [2 * n, 2 * n - 1]):
        wanted = F.interpolate(x, size=size, mode="nearest")
        assert torch.equal(rewrites.double(x, size), wanted)
        whole = F.interpolate(x, scale_factor=2.0, mode="nearest")
        assert torch.equal(whole[:, :, : size[0], : size[1]], wanted)


def test_the_cropped_upsampling_equals_diffusers_to_the_bit(pipeline: Any) -> None:
    component = unet_of(pipeline)
    sample, *others = component.example_inputs().values()
    assert tuple(sample.shape[2:]) == LATENTS
    expected = pipeline.unet(sample, *others).sample
    cropped = rewrites.apply(component.module, ["cropped_upsample"])
    assert torch.equal(cropped(sample, *others), expected)
    joined = rewrites.apply(component.module, ["upsample_by_concat"])
    assert snr_db(expected, joined(sample, *others)) > EXACT_DB


def test_a_size_that_halves_evenly_keeps_its_graph(pipeline: Any) -> None:
    component = unet_of(pipeline, 8, 24)
    rewritten = replace(component, module=rewrites.apply(component.module, ["cropped_upsample"]))
    before, after = (
        [str(node.target) for node in components.export(each).graph.nodes]
        for each in (component, rewritten)
    )
    assert before == after


def test_a_crop_by_more_than_a_row_is_a_bug_that_is_told() -> None:
    from diffusers.models.upsampling import Upsample2D

    upsample = rewrites.CroppedUpsample(Upsample2D(4, use_conv=True))
    for size in ((4, 6), (6, 7)):
        with pytest.raises(ValueError, match=r"doubling gives \[6, 6\]"):
            upsample(torch.zeros(1, 4, 3, 3), size)


def test_the_multiply_adds_of_an_odd_size_are_counted(pipeline: Any) -> None:
    component = unet_of(pipeline)
    told = measure.measure(pipeline, HEIGHT, WIDTH, guided=False)["unet"]["macs"]
    assert told == components.count_macs(component)
    # Counted from the shapes of the exported graph, attention written as products.
    explicit = rewrites.apply(component.module, ["explicit_attention", "cropped_upsample"])
    graph = components.export(replace(component, module=explicit)).graph_module
    assert executorch.count_macs(graph) == told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pipeline lies, in `source`, and where bundles go."""
    folder = tmp_path_factory.mktemp("odd")
    make_pipeline().save_pretrained(folder / "source")
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_a_conversion_at_an_odd_size_is_validated(target: Target, folder: Path) -> None:
    recipe = folder / f"{target}.yaml"
    data = {
        "name": "odd",
        "source": {"model": str(folder / "source")},
        "resolution": [HEIGHT, WIDTH],
        "schedule": {"steps": 2, "guidance_scale": 0.0},
        "stages": [{"fold": {}}, {"quantize": {"weights": "int8"}}],
        "golden_prompts": ["a red tent"],
    }
    recipe.write_text(json.dumps(data))
    argv = ["--recipe", str(recipe), "--output", str(folder / target)]
    assert cli.main(target, argv) == 0
    bundle = Bundle.open(folder / target)
    assert read_report(bundle).verdict == "pass"
    assert bundle.component("unet").inputs[0].shape == (1, 4, *LATENTS)


@pytest.fixture(scope="module")
def static_unet(folder: Path) -> Component:
    """The UNet with static INT8 activations, calibrated at the odd size."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red tent\n")
    calibration = {"prompts": str(prompts), "samples": 1, "observer": "minmax"}
    recipe = schema.parse(
        {
            "name": "static",
            "source": {"model": "embedded"},
            "resolution": [HEIGHT, WIDTH],
            "schedule": {"steps": 1, "guidance_scale": 0.0},
            "stages": [{"quantize": {"activations": "int8_static", "calibration": calibration}}],
        }
    )
    settings = recipe.stages[0].settings
    pipeline, _ = quantize.quantize(make_pipeline(), settings, recipe)
    return unet_of(pipeline)


@pytest.mark.parametrize("target", TARGETS)
def test_static_convolutions_that_halve_odd_sizes_are_right(
    target: Target, static_unet: Component
) -> None:
    halving = [f"unet.down_blocks.{level}.downsamplers.0.conv" for level in range(LEVELS - 1)]
    doubling = [f"unet.up_blocks.{level}.upsamplers.0.conv" for level in range(LEVELS - 1)]
    module = importlib.import_module(f"converters.{target}")
    # Core ML computes static activations in float32 alone (converters/support.py).
    options = CoreMLOptions(compute_precision="float32") if target == "coreml" else None
    inputs = {name: tensor.numpy() for name, tensor in static_unet.example_inputs().items()}
    found = module.layer_check(static_unet, inputs, options, layers=[*halving, *doubling])
    assert set(found) == {*halving, *doubling}
    assert all(db >= LAYER_DB for db in found.values()), found


@pytest.mark.parametrize("activations", ["none", "int8_static"])
def test_an_int8_unet_of_an_odd_size_is_one_delegate(
    activations: str, pipeline: Any, static_unet: Component, tmp_path: Path
) -> None:
    component = static_unet
    if activations == "none":
        component = unet_of(quantize.quantize(pipeline, QuantizeSettings())[0])
    snr, lowered = figures(component, tmp_path)
    assert lowered.details["delegate_calls"] == 1
    assert lowered.details["nondelegated"] == {}
    assert lowered.details["macs_delegated_fraction"] == 1.0
    assert activations == "int8_static" or snr > EXACT_DB


def test_a_unet_folded_at_an_odd_size_computes_the_same(pipeline: Any) -> None:
    sample, _, states = unet_of(pipeline).example_inputs().values()
    folded = fold.fold(pipeline.unet, (999.0, 499.0))
    for timestep in (499.0, 999.0):
        expected = pipeline.unet(sample, timestep, states).sample
        assert snr_db(expected, folded(sample, timestep, states).sample) > EXACT_DB
