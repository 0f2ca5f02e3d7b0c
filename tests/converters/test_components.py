"""Components: the same numbers as diffusers' own pipeline, under names that do not move."""

from typing import Any

import pytest
import torch

from converters import components
from mobile_runtime.errors import UserError
from recipes import int4_layers, measure
from recipes.int4_layers import Int4Module
from recipes.quantize import quantize
from recipes.settings import Int4Settings, QuantizeSettings
from tests.conftest import make_tiny_pipeline

NAMES = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]


def build(pipeline: Any, name: str, batch: int = 2) -> components.Component:
    return components.build(pipeline, name, height=64, width=64, batch=batch)


def run(component: components.Component, module: torch.nn.Module | None = None) -> torch.Tensor:
    with torch.no_grad():
        return (module or component.module)(*component.example_inputs().values())


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes_are_those_of_the_specs(tiny_pipeline: Any, name: str) -> None:
    component = build(tiny_pipeline, name)
    for spec, tensor in zip(component.inputs, component.example_inputs().values(), strict=True):
        assert tensor.shape == spec.shape
        assert str(tensor.dtype) == f"torch.{spec.dtype}"
    out = run(component)
    assert out.shape == component.outputs[0].shape
    assert out.dtype == torch.float32


def test_the_text_encoder_equals_transformers(tiny_pipeline: Any) -> None:
    component = build(tiny_pipeline, "text_encoder")
    ids = component.example_inputs()["input_ids"]
    expected = tiny_pipeline.text_encoder(ids.long())[0]
    torch.testing.assert_close(run(component), expected, rtol=1e-5, atol=1e-6)


def test_the_unet_equals_diffusers_with_the_timestep_of_the_batch(tiny_pipeline: Any) -> None:
    component = build(tiny_pipeline, "unet")
    inputs = component.example_inputs()
    expected = tiny_pipeline.unet(
        inputs["sample"], int(inputs["timestep"]), inputs["encoder_hidden_states"]
    ).sample
    torch.testing.assert_close(run(component), expected, rtol=1e-5, atol=1e-6)


def test_the_autoencoder_halves_equal_diffusers(tiny_pipeline: Any) -> None:
    decoder = build(tiny_pipeline, "vae_decoder")
    expected = tiny_pipeline.vae.decode(decoder.example_inputs()["latent_sample"]).sample
    torch.testing.assert_close(run(decoder), expected)
    encoder = build(tiny_pipeline, "vae_encoder")
    expected = tiny_pipeline.vae.encode(encoder.example_inputs()["sample"]).latent_dist.parameters
    torch.testing.assert_close(run(encoder), expected)


def test_module_paths_are_diffusers_paths_under_the_components_name(tiny_pipeline: Any) -> None:
    paths = {name: dict(build(tiny_pipeline, name).module.named_modules()) for name in NAMES}
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in paths["text_encoder"]
    assert "unet.down_blocks.0.resnets.0.conv1" in paths["unet"]
    assert "vae_decoder.post_quant_conv" in paths["vae_decoder"]
    assert "vae_decoder.decoder.conv_in" in paths["vae_decoder"]
    assert "vae_encoder.encoder.conv_in" in paths["vae_encoder"]


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_program_computes_the_module(tiny_pipeline: Any, name: str) -> None:
    component = build(tiny_pipeline, name)
    program = components.export(component)
    torch.testing.assert_close(run(component, program.module()), run(component))


def test_every_constant_of_the_text_encoder_is_finite_in_float16(tiny_pipeline: Any) -> None:
    program = components.export(build(tiny_pipeline, "text_encoder"))
    for tensor in [*program.state_dict.values(), *program.constants.values()]:
        assert tensor.to(torch.float16).isfinite().all()
    numbers = [
        argument
        for node in program.graph.nodes
        for argument in node.args
        if isinstance(argument, float)
    ]
    assert all(abs(number) < 65504 for number in numbers)


def test_example_inputs_depend_on_the_seed_alone(tiny_pipeline: Any) -> None:
    component = build(tiny_pipeline, "unet")
    first, again, other = (component.example_inputs(seed)["sample"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_shared_structure_can_change_without_its_original(tiny_pipeline: Any) -> None:
    component = build(tiny_pipeline, "vae_decoder")
    copy = measure.share_structure(component.module)
    copy.vae_decoder.decoder.conv_in = torch.nn.Identity()
    assert isinstance(component.module.vae_decoder.decoder.conv_in, torch.nn.Conv2d)
    original = component.module.vae_decoder.decoder.conv_out.weight
    assert copy.vae_decoder.decoder.conv_out.weight is original


def test_an_unknown_component_lists_the_choices(tiny_pipeline: Any) -> None:
    with pytest.raises(UserError, match="text_encoder, unet, vae_decoder, vae_encoder"):
        build(tiny_pipeline, "safety_checker")


@pytest.mark.parametrize(("width", "nearest"), [(84, "80 or 88"), (0, "8"), (-8, "8")])
def test_a_resolution_that_the_vae_cannot_take_names_the_nearest(
    tiny_pipeline: Any, width: int, nearest: str
) -> None:
    with pytest.raises(UserError, match=rf"width of {width} .*multiple of 8.*nearest is {nearest}"):
        components.build(tiny_pipeline, "unet", height=64, width=width, batch=1)


def test_branches_are_counted_as_the_layers_hold_and_compute_them(tiny_pipeline: Any) -> None:
    """By hand, and by torch's own count of the whole components."""
    settings = QuantizeSettings(
        weights="int4", int4=Int4Settings(rank=3, iterations=1), components=tuple(NAMES[:3])
    )
    pipeline, plans = quantize(make_tiny_pipeline(), settings)
    forms = {plan.layer: int4_layers.form_of(plan) for plan in plans if plan.weights == "int4"}
    for name in NAMES[:3]:
        plain, made = build(tiny_pipeline, name), build(pipeline, name)
        branches = {
            path: layer
            for path, layer in made.module.named_modules()
            if isinstance(layer, Int4Module) and layer.down is not None
        }
        calls: list[int] = []

        def count(layer: Any, inputs: Any, out: torch.Tensor, calls: list[int] = calls) -> None:
            calls.append(out.numel() * layer.weight[0].numel())

        for layer in branches.values():
            for part in (layer.down, layer.up):
                assert part is not None
                part.register_forward_hook(count)
        run(made)
        assert len(calls) == 2 * len(branches) > 10
        held = sum(
            tensor.numel()
            for layer in branches.values()
            for part in (layer.down, layer.up)
            if part is not None
            for tensor in part.parameters()
        )
        found = components.count_branches(plain, forms)
        assert found == (held, sum(calls))
        assert components.count_macs(made) == components.count_macs(plain) + found[1]


def test_without_a_branch_there_is_nothing_to_count(tiny_pipeline: Any) -> None:
    component = build(tiny_pipeline, "unet")
    path = "unet.down_blocks.0.resnets.0.conv1"
    assert components.count_branches(component, {}) == (0, 0)
    assert components.count_branches(component, {path: int4_layers.Form(16, 0)}) == (0, 0)
    weight = component.module.get_submodule(path).weight
    parameters, macs = components.count_branches(component, {path: int4_layers.Form(16, 1)})
    assert parameters == weight.shape[0] + weight[0].numel()
    assert macs == 2 * 8 * 8 * parameters  # two pictures of 8x8 latents


class SdTurbo:
    """SD-Turbo's architecture on the meta device: shapes without weights."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        with torch.device("meta"):
            self.unet = UNet2DConditionModel(
                sample_size=64,
                block_out_channels=(320, 640, 1280, 1280),
                cross_attention_dim=1024,
                attention_head_dim=[5, 10, 20, 20],
                use_linear_projection=True,
            )
            self.vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            )
            self.text_encoder = CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=23,
                    num_attention_heads=16,
                    hidden_act="gelu",
                )
            )
        self.scheduler = EulerDiscreteScheduler()


@pytest.mark.parametrize(
    ("name", "gmacs", "parameters"),
    [
        ("text_encoder", 22.6, 340_387_840),
        ("unet", 402, 865_910_724),
        ("vae_decoder", 1257, 49_490_199),  # the decoder's 49,490,179 and post_quant_conv's 20
    ],
)
def test_sd_turbo_counts_as_published(name: str, gmacs: float, parameters: int) -> None:
    component = components.build(SdTurbo(), name, height=512, width=512, batch=1)
    assert components.count_macs(component) / 1e9 == pytest.approx(gmacs, rel=0.005)
    assert components.count_parameters(component) == parameters
