"""INT8 weights: the integers are torch.ao's, and the modules compute what they stand for."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.ao.quantization.observer import PerChannelMinMaxObserver
from torch.nn import functional as F

from mobile_runtime.errors import UserError
from recipes import quantize, quantized_layers
from recipes.quantized_layers import (
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantized,
    max_abs_scale,
    quantize_weight,
    weight_snr_db,
)
from recipes.settings import QuantizeSettings, Rule
from tests.conftest import make_tiny_pipeline

weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
).map(torch.from_numpy)


def as_rule(layers: str, weights: Any = "float32", **more: Any) -> Rule:
    return Rule(layers=layers, weights=weights, reason=f"because of {layers}", **more)


def test_integers_and_scales_are_those_of_torch_ao() -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    observer = PerChannelMinMaxObserver(
        ch_axis=0,
        qscheme=torch.per_channel_symmetric,
        dtype=torch.qint8,
        quant_min=-127,
        quant_max=127,
    )
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    integers, own_scale = quantize_weight(weight)
    torch.testing.assert_close(own_scale, scale, rtol=2**-10, atol=0)
    reference = torch.fake_quantize_per_channel_affine(
        weight, own_scale, zero_point.int(), 0, -127, 127
    )
    assert torch.equal(integers * own_scale.view(-1, 1, 1, 1), reference)


@given(weights)
def test_rounding_is_off_by_at_most_half_a_step(weight: torch.Tensor) -> None:
    integers, scale = quantize_weight(weight)
    error = (weight.double() - integers.double() * scale.double()[:, None]).abs()
    # Beside the half step, the float32 product with 1 / scale may round across a tie.
    assert bool((error <= scale.double()[:, None] * (0.5 + 1e-4)).all())


@given(weights)
def test_scales_are_finite_and_positive_and_integers_symmetric(weight: torch.Tensor) -> None:
    integers, scale = quantize_weight(weight)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert int(integers.min()) >= -127


@given(weights)
def test_the_largest_weight_of_a_channel_becomes_127(weight: torch.Tensor) -> None:
    integers, scale = quantize_weight(weight)
    peak = weight.abs().amax(1)
    normal = peak > 127 * torch.finfo(torch.float32).tiny
    assert bool((integers.abs().amax(1)[normal] == 127).all())
    exact = (peak / 127)[normal]
    assert bool((scale[normal] >= exact).all())
    torch.testing.assert_close(scale[normal], exact, rtol=2**-10, atol=0)


@given(weights)
def test_float16_holds_the_scales_exactly(weight: torch.Tensor) -> None:
    _, scale = quantize_weight(weight)
    in_range = (scale >= torch.finfo(torch.float16).smallest_normal) & (scale < 65504)
    assert torch.equal(scale.half().float()[in_range], scale[in_range])


@given(weights)
def test_quantizing_the_dequantized_weight_changes_nothing(weight: torch.Tensor) -> None:
    integers, scale = quantize_weight(weight)
    again, scale_again = quantize_weight(integers * scale[:, None])
    assert torch.equal(again, integers)
    normal = (scale > 1e-30) & (weight.abs().amax(1) > 0)
    torch.testing.assert_close(scale_again[normal], scale[normal], rtol=3e-7, atol=0)


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 4)
    weight[1, 0] = 127
    integers, scale = quantize_weight(weight)
    assert torch.equal(integers[0], torch.zeros(4, dtype=torch.int8))
    assert scale[0] == 1
    assert weight_snr_db(weight, integers, scale) is None


def test_the_snr_of_a_weight_is_signal_over_rounding_noise() -> None:
    weight = torch.randn(700, 9, generator=torch.Generator().manual_seed(1))
    integers, scale = quantize_weight(weight)
    noise = weight - integers * scale[:, None]
    expected = 10 * np.log10(float(weight.square().sum() / noise.square().sum()))
    assert weight_snr_db(weight, integers, scale) == pytest.approx(expected, abs=1e-3)


def make(layer: Any, activations: Any = "none") -> Any:
    return quantized_layers.quantized(layer, activations)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 0},
        {"kernel_size": (1, 3), "padding": (0, 2), "dilation": 2, "groups": 2, "bias": False},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_a_conv_computes_with_its_dequantized_weights(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, **options), torch.randn(2, 4, 9, 9)
    module = make(layer)
    weight = module.weight_int8.float() * module.weight_scale.view(-1, 1, 1, 1)
    expected = F.conv2d(
        x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    assert isinstance(module, QuantizedConv2d)
    assert torch.equal(module(x), expected)
    torch.testing.assert_close(module.to_float()(x), expected)


def test_a_linear_computes_with_its_dequantized_weights() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    module = make(layer)
    expected = F.linear(x, module.weight_int8.float() * module.weight_scale[:, None], layer.bias)
    assert isinstance(module, QuantizedLinear)
    assert torch.equal(module(x), expected)
    assert torch.equal(module.to_float()(x), expected)


def test_an_embedding_gives_its_dequantized_rows() -> None:
    torch.manual_seed(0)
    module = make(nn.Embedding(11, 4))
    ids = torch.tensor([[0, 10, 3]], dtype=torch.int32)
    expected = (module.weight_int8.float() * module.weight_scale[:, None])[ids.long()]
    assert isinstance(module, QuantizedEmbedding)
    assert torch.equal(module(ids), expected)
    assert torch.equal(module.to_float()(ids), expected)


def affine_round(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Asymmetric int8 rounding written out with numpy, one range over the given axes."""
    values = x.double().numpy()
    low = np.minimum(values.min(axis=axes, keepdims=True), 0)
    high = np.maximum(values.max(axis=axes, keepdims=True), 0)
    step = (high - low) / 255
    zero = np.round(-128 - low / step)
    rounded = np.clip(np.round(values / step) + zero, -128, 127)
    return torch.from_numpy(((rounded - zero) * step).astype(np.float32))


def test_dynamic_activations_of_a_conv_share_one_scale() -> None:
    torch.manual_seed(0)
    module, x = make(nn.Conv2d(4, 6, 3), "int8_dynamic"), torch.randn(1, 4, 8, 8)
    expected = F.conv2d(affine_round(x, (0, 1, 2, 3)), module.weight, module.bias)
    torch.testing.assert_close(module(x), expected, atol=2e-2, rtol=0)
    assert not torch.equal(module(x), F.conv2d(x, module.weight, module.bias))


def test_dynamic_activations_of_a_linear_have_a_scale_for_each_token() -> None:
    torch.manual_seed(0)
    module = make(nn.Linear(16, 6), "int8_dynamic")
    # Tokens of very different sizes: with one scale for all, the small one would be lost.
    x = torch.randn(1, 2, 16) * torch.tensor([1.0, 1e-4]).view(1, 2, 1)
    expected = F.linear(affine_round(x, (2,)), module.weight) + module.bias
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-2)


class TestPlan:
    def settings(self, *rules: Rule, **more: Any) -> QuantizeSettings:
        return QuantizeSettings(rules=rules, **more)

    def plan(self, pipeline: Any, *rules: Rule, **more: Any) -> dict[str, Any]:
        plans = quantize.make_plan(pipeline, self.settings(*rules, **more))
        return {plan.layer: plan for plan in plans}

    def test_every_conv_and_linear_of_the_components_is_planned(self, tiny_pipeline: Any) -> None:
        plan = self.plan(tiny_pipeline)
        expected = sum(
            isinstance(module, nn.Conv2d | nn.Linear)
            for root in (
                tiny_pipeline.unet,
                tiny_pipeline.text_encoder,
                tiny_pipeline.vae.decoder,
                tiny_pipeline.vae.post_quant_conv,
            )
            for module in root.modules()
        )
        matrices = [entry for name, entry in plan.items() if "embeddings." not in name]
        assert len(matrices) == expected
        assert all(entry.weights == "int8" for entry in matrices)
        for layer in (
            "unet.down_blocks.0.resnets.0.conv1",
            "vae_decoder.post_quant_conv",
            "vae_decoder.decoder.conv_in",
        ):
            assert layer in plan

    def test_the_vae_encoder_is_planned_on_request(self, tiny_pipeline: Any) -> None:
        plan = self.plan(tiny_pipeline, components=("vae_encoder",))
        assert "vae_encoder.quant_conv" in plan
        assert all(layer.startswith("vae_encoder.") for layer in plan)

    def test_the_last_rule_that_matches_wins_and_gives_the_reason(self, tiny_pipeline: Any) -> None:
        plan = self.plan(tiny_pipeline, as_rule("unet.*"), as_rule("unet.conv_in", "int8"))
        assert plan["unet.conv_in"].weights == "int8"
        assert "because of unet.conv_in" in plan["unet.conv_in"].reason
        assert plan["unet.conv_out"].weights == "float32"
        assert "because of unet.*" in plan["unet.conv_out"].reason
        assert plan["vae_decoder.decoder.conv_in"].weights == "int8"

    def test_a_pattern_that_matches_nothing_is_named_with_close_ones(
        self, tiny_pipeline: Any
    ) -> None:
        rules = as_rule("unet.conv_inn"), as_rule("unet.conv_norm_out"), as_rule("unet.*")
        with pytest.raises(UserError) as caught:
            self.plan(tiny_pipeline, *rules)
        assert "'unet.conv_inn'" in str(caught.value)
        assert "close: unet.conv_in" in str(caught.value)
        assert "'unet.conv_norm_out'" in str(caught.value)

    def test_dynamic_activations_go_with_int8_matrices_alone(self, tiny_pipeline: Any) -> None:
        rules = as_rule("unet.conv_in"), as_rule("unet.conv_out", "int8", activations="none")
        plan = self.plan(tiny_pipeline, *rules, activations="int8_dynamic")
        assert plan["unet.mid_block.resnets.0.conv1"].activations == "int8_dynamic"
        assert plan["unet.conv_in"].activations == "none"
        assert plan["unet.conv_out"].activations == "none"
        token_table = "text_encoder.text_model.embeddings.token_embedding"
        assert plan[token_table].weights == "int8"
        assert plan[token_table].activations == "none"

    def test_a_small_embedding_stays_float_and_says_why(self, tiny_pipeline: Any) -> None:
        plan = self.plan(tiny_pipeline, embedding_min_saving=0.1)
        positions = plan["text_encoder.text_model.embeddings.position_embedding"]
        assert positions.weights == "float32"
        assert "would save" in positions.reason
        assert plan["text_encoder.text_model.embeddings.token_embedding"].weights == "int8"


def test_each_layer_is_replaced_and_its_floats_are_freed() -> None:
    pipeline = make_tiny_pipeline()
    before = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    layers = quantize.quantizable_layers(pipeline, ("text_encoder", "unet", "vae_decoder"))
    settings = QuantizeSettings(rules=(as_rule("unet.conv_in"),))
    pipeline, plans, record = quantize.run(pipeline, settings)
    assert isinstance(pipeline.unet.conv_out, QuantizedConv2d)
    assert isinstance(pipeline.vae.post_quant_conv, QuantizedConv2d)
    assert type(pipeline.unet.conv_in) is nn.Conv2d
    assert type(pipeline.vae.quant_conv) is nn.Conv2d
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) < before / 20
    assert sum(module.weight is not None for module in layers.values()) == 1
    assert len(plans) == sum(record["layers"].values()) + record["layers_kept_float"]
    assert record["layers_kept_float"] == 1
    assert record["weight_bytes_after"] < 0.27 * record["weight_bytes_before"]
    assert 30 < record["weight_snr_db_min"] <= record["weight_snr_db_median"] < 60


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_damaged_weight_is_named(bad: float) -> None:
    pipeline = make_tiny_pipeline()
    pipeline.unet.conv_out.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(UserError, match=r"unet\.conv_out holds NaN or Inf"):
        quantize.quantize(pipeline, QuantizeSettings(components=("unet",)))


def test_a_quantized_unet_exports_with_its_integers() -> None:
    pipeline = make_tiny_pipeline()
    float_activations = as_rule("unet.up_blocks.*", "int8", activations="none")
    settings = QuantizeSettings(
        components=("unet",), activations="int8_dynamic", rules=(float_activations,)
    )
    pipeline, plans = quantize.quantize(pipeline, settings)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 16, 32))
    program = torch.export.export(pipeline.unet, inputs)
    targets = [str(node.target) for node in program.graph.nodes]
    int8_layers = sum(plan.weights == "int8" for plan in plans)
    dequantize = "quantized_decomposed.dequantize_per_channel.default"
    per_token = "quantized_decomposed.quantize_per_token.default"
    per_tensor = "quantized_decomposed.quantize_per_tensor.tensor"
    assert targets.count(dequantize) == int8_layers > 100
    dynamic = targets.count(per_token) + targets.count(per_tensor)
    assert dynamic == sum(plan.activations == "int8_dynamic" for plan in plans) > 50
    assert dynamic < int8_layers
    torch.testing.assert_close(
        program.module()(*inputs).sample, pipeline.unet(*inputs).sample, atol=1e-5, rtol=1e-5
    )


def test_a_dequantized_copy_computes_the_same_and_leaves_the_original() -> None:
    pipeline = make_tiny_pipeline()
    quantize.quantize(pipeline, QuantizeSettings())
    copy = dequantized(pipeline.unet)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 16, 32))
    assert torch.equal(copy(*inputs).sample, pipeline.unet(*inputs).sample)
    assert not any(isinstance(m, quantized_layers.QuantizedModule) for m in copy.modules())
    assert isinstance(pipeline.unet.conv_in, QuantizedConv2d)


def test_max_abs_scale_takes_the_larger_side() -> None:
    weight = torch.tensor([[-2.54, 1.0], [0.5, 1.27]])
    torch.testing.assert_close(
        max_abs_scale(weight), torch.tensor([0.02, 0.01]), rtol=2**-10, atol=0
    )
