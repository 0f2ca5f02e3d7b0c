"""4-bit weights: blocks that lose little, a branch that takes the rest, and a plan that says so."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

from mobile_runtime.errors import UserError
from recipes import int4_layers, quantize, stages
from recipes.faults import RecipeError
from recipes.int4_layers import Form, Int4Conv2d, Int4Linear, quantize_blocks, weight_bytes
from recipes.quantized_layers import dequantized
from recipes.schema import Recipe, parse
from recipes.settings import Int4Settings, QuantizeSettings, Rule
from tests.conftest import make_tiny_pipeline

INT4 = Int4Settings(rank=4)

# Two blocks of 16 inputs, for two output channels and three taps.
weights = hnp.arrays(np.float32, (2, 32, 3), elements=st.floats(-(2.0**12), 2.0**12, width=32)).map(
    torch.from_numpy
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_blocks(weight: torch.Tensor, block: int) -> np.ndarray:
    """(out, in, ...) as (out, blocks, block, ...) in float64."""
    array = weight.double().numpy()
    return array.reshape(len(array), -1, block, *array.shape[2:])


def noise(weight: torch.Tensor, integers: Any, scale: Any, block: int) -> np.ndarray:
    """The squared error of each block."""
    exact, found = as_blocks(weight, block), np.asarray(integers, np.float64)
    found = found.reshape(exact.shape) * np.asarray(scale, np.float64)[:, :, None]
    return np.square(found - exact).sum(2)


@given(weights)
@settings(deadline=None, max_examples=30)
def test_integers_fit_four_bits_and_steps_fit_float16(weight: torch.Tensor) -> None:
    integers, scale = quantize_blocks(weight, 16)
    assert integers.dtype == torch.int8
    assert integers.shape == weight.shape
    assert -8 <= int(integers.min()) <= int(integers.max()) <= 7
    assert scale.shape == (2, 2, 3)
    assert bool((scale > 0).all())
    assert torch.equal(scale.half().float(), scale)


@given(weights)
@settings(deadline=None, max_examples=30)
def test_a_block_loses_no_more_than_with_the_step_that_its_peak_asks_for(
    weight: torch.Tensor,
) -> None:
    integers, scale = quantize_blocks(weight, 16)
    grouped = as_blocks(weight, 16)
    wanted = np.maximum(np.abs(grouped).max(2).astype(np.float32) * np.float32(1 / 7), 2.0**-24)
    half = wanted.astype(np.float16)
    step = np.where(half < wanted, np.nextafter(half, np.float16(np.inf)), half).astype(np.float64)
    plain = np.clip(np.round(grouped / step[:, :, None]), -8, 7)
    bound = noise(weight, plain, step, 16)
    assert (noise(weight, integers, scale, 16) <= bound * (1 + 1e-3)).all()
    assert (bound <= np.square(step) * 16 / 4 * (1 + 1e-6)).all()


def test_the_search_for_a_step_gains_a_decibel_on_bell_shaped_weights() -> None:
    weight = normal(64, 320)
    integers, scale = quantize_blocks(weight, 32)
    step = np.abs(as_blocks(weight, 32)).max(2) / 7
    plain = np.round(as_blocks(weight, 32) / step[:, :, None])
    gain = noise(weight, plain, step, 32).sum() / noise(weight, integers, scale, 32).sum()
    assert 10 * np.log10(gain) > 0.7


def test_the_operator_computes_what_torch_ao_computes_in_groups() -> None:
    integers = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scale = normal(6, 4).abs()
    expected = torch.ops.quantized_decomposed.dequantize_per_channel_group(
        integers,
        scale,
        torch.zeros(6, 4, dtype=torch.int32),
        -8,
        7,
        torch.int8,
        16,
        torch.float32,
    )
    assert torch.equal(int4_layers.dequantize_blockwise(integers, scale), expected)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(64, 48),
        nn.Linear(64, 48, bias=False),
        nn.Conv2d(32, 16, 3, padding=1),
        nn.Conv2d(32, 16, (1, 3), stride=2, padding=(0, 2), dilation=2, bias=False),
        nn.Conv2d(32, 16, 3, padding="same"),
        nn.Conv2d(32, 16, 1),
    ],
)
def test_a_layer_computes_with_its_integers_and_its_branch(layer: Any, rank: int) -> None:
    made: Any = int4_layers.quantized(layer, Form(16, rank))
    weight = made.weight_int4 * made.weight_scale.repeat_interleave(16, 1)
    if rank:
        down, up = made.down.weight, made.up.weight
        assert torch.equal(down.half().float(), down)
        product = up.flatten(1) @ down.flatten(1)
        assert torch.linalg.matrix_rank(product) == rank
        weight = weight + product.view(weight.shape)
    else:
        assert made.down is None
    x = normal(2, 5, 64) if isinstance(layer, nn.Linear) else normal(2, 32, 9, 9)
    if isinstance(layer, nn.Linear):
        expected = F.linear(x, weight, layer.bias)
    else:
        convolve = layer.stride, layer.padding, layer.dilation
        expected = F.conv2d(x, weight, layer.bias, *convolve)
    torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=1e-5)
    plain = made.to_float()
    assert type(plain) is type(layer)
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)
    assert made.bytes == weight_bytes(tuple(layer.weight.shape), Form(16, rank))


def test_the_bytes_are_those_of_packed_integers_steps_and_branch() -> None:
    made = int4_layers.quantized(nn.Conv2d(64, 96, 3), Form(32, 5))
    held = made.weight_int4.numel() / 2 + 2 * made.weight_scale.numel()
    held += 2 * sum(tensor.numel() for name, tensor in made.named_parameters() if name != "bias")
    assert made.bytes == held


def test_a_branch_takes_out_what_stands_out() -> None:
    layer = nn.Linear(256, 128, bias=False)
    outliers = 20 * normal(128, 1, seed=1) @ normal(1, 256, seed=2)
    layer.weight.data = normal(128, 256) + outliers
    small = normal(128, 256)

    def error(rank: int) -> float:
        made = int4_layers.quantized(layer, Form(32, rank))
        return float((made.weight - layer.weight.detach()).norm())

    plain = nn.Linear(256, 128, bias=False)
    plain.weight.data = small
    without_outliers = int4_layers.quantized(plain, Form(32, 0))
    bound = float((without_outliers.weight - small).norm())
    assert error(0) > 5 * bound
    assert error(2) < 1.1 * bound
    assert error(16) < error(4) < error(2)


@pytest.mark.parametrize("shape", [(96, 200), (180, 200)])
def test_a_product_of_low_rank_is_nearly_the_best_there_is(shape: tuple[int, int]) -> None:
    weight = normal(*shape) @ torch.diag(0.97 ** torch.arange(float(shape[1])))
    u, s, v = torch.linalg.svd(weight)
    best = float((weight - u[:, :8] * s[:8] @ v[:8]).norm())
    down, up = int4_layers.low_rank(weight, 8)
    assert float((weight - up @ down).norm()) < 1.01 * best


def test_more_iterations_never_lose() -> None:
    layer = nn.Linear(128, 128, bias=False)
    layer.weight.data = normal(128, 128)
    errors = [
        float((Int4Linear(layer, Form(32, 8), count).weight - layer.weight.detach()).norm())
        for count in (1, 2, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]


def test_the_same_weight_gives_the_same_layer_and_leaves_torchs_random_numbers_alone() -> None:
    layer = nn.Conv2d(32, 160, 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = int4_layers.quantized(layer, Form(32, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = int4_layers.quantized(layer, Form(32, 4))
    states = first.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_block_and_a_rank_are_what_the_layer_has_room_for() -> None:
    wide, narrow = nn.Linear(320, 320), nn.Linear(80, 64)
    assert int4_layers.form(wide, Int4Settings(rank=8)) == Form(32, 8)
    assert int4_layers.form(wide, Int4Settings(block=128, rank=0)) == Form(64, 0)
    small = int4_layers.form(narrow, Int4Settings())
    assert small.block == 16
    assert 0 < 2 * small.rank * (80 + 64) <= 80 * 64 / 2 * 0.5
    assert 2 * (small.rank + 1) * (80 + 64) > 80 * 64 / 2 * 0.5
    everything = Int4Settings(branch_share=16.0, rank=512)
    assert int4_layers.form(nn.Linear(16, 512), everything).rank <= 16


class TestPlan:
    def plan(self, *rules: Rule, **more: Any) -> dict[str, Any]:
        settings = QuantizeSettings(**{"weights": "int4", "int4": INT4, **more}, rules=rules)
        return {plan.layer: plan for plan in quantize.make_plan(make_tiny_pipeline(), settings)}

    def test_the_layers_that_stay_int8_say_why(self) -> None:
        plan = self.plan()
        assert plan["unet.mid_block.resnets.0.conv1"].weights == "int4"
        assert (plan["unet.mid_block.resnets.0.conv1"].block) == 32
        assert plan["unet.mid_block.resnets.0.conv1"].rank == 4
        shrunk = plan["unet.down_blocks.0.attentions.0.proj_in"]
        assert (shrunk.weights, shrunk.block, shrunk.rank) == ("int4", 32, 2)
        assert "rank 2" in shrunk.reason
        for layer in ("unet.conv_in", "unet.conv_out", "vae_decoder.decoder.conv_out"):
            assert (plan[layer].weights, plan[layer].rank) == ("int8", None)
            assert "sensitive" in plan[layer].reason
        assert plan["vae_decoder.post_quant_conv"].weights == "int8"
        assert "4 inputs" in plan["vae_decoder.post_quant_conv"].reason
        tokens = plan["text_encoder.text_model.embeddings.token_embedding"]
        assert tokens.weights == "int8"

    def test_a_rule_may_ask_for_each_kind_of_weight(self) -> None:
        def rule(layers: str, weights: Any) -> Rule:
            return Rule(layers=layers, weights=weights, reason=f"{weights} here")

        plan = self.plan(
            rule("unet.conv_*", "int4"),
            rule("unet.mid_block.*", "int8"),
            rule("vae_decoder.*", "float32"),
        )
        assert plan["unet.conv_out"].weights == "int4"
        assert plan["unet.conv_in"].weights == "int8"
        assert "int4 here" in plan["unet.conv_in"].reason
        assert "4 inputs" in plan["unet.conv_in"].reason
        assert plan["unet.mid_block.resnets.0.conv1"].weights == "int8"
        assert plan["vae_decoder.decoder.conv_in"].weights == "float32"
        some = self.plan(rule("unet.mid_block.*", "int4"), weights="int8")
        assert some["unet.mid_block.resnets.0.conv1"].weights == "int4"
        assert some["unet.up_blocks.0.resnets.0.conv1"].weights == "int8"

    def test_no_rule_makes_integers_of_a_padding_that_they_would_not_compute(self) -> None:
        pipeline = make_tiny_pipeline()
        conv = pipeline.unet.mid_block.resnets[0].conv1
        conv.padding_mode = "circular"
        rule = Rule(layers="unet.mid_block.*", weights="int4", reason="test")
        plans = quantize.make_plan(pipeline, QuantizeSettings(rules=(rule,)))
        (plan,) = (p for p in plans if p.layer == "unet.mid_block.resnets.0.conv1")
        assert (plan.weights, plan.block) == ("float32", None)
        assert "circular" in plan.reason

    def test_settings_that_do_not_fit_together_are_faults(self) -> None:
        with pytest.raises(RecipeError, match="int4 goes with float activations"):
            recipe(weights="int4", activations="int8_static")
        rule = {"layers": "unet.*", "weights": "int4", "reason": "test"}
        with pytest.raises(RecipeError, match="int4 goes with float activations"):
            recipe(activations="int8_dynamic", rules=[rule])
        with pytest.raises(RecipeError, match="int4: goes with weights int4"):
            recipe(int4={"rank": 4})
        with pytest.raises(RecipeError, match="block"):
            recipe(weights="int4", int4={"block": 24})


def recipe(**quantized: Any) -> Recipe:
    return parse(
        {
            "name": "test",
            "source": {"model": "embedded"},
            "resolution": 64,
            "stages": [{"quantize": quantized}],
        }
    )


def inputs() -> tuple[torch.Tensor, ...]:
    return normal(1, 4, 8, 8), torch.tensor([5.0]), normal(1, 16, 32, seed=1)


@pytest.fixture(scope="module")
def applied() -> Any:
    return stages.apply(
        make_tiny_pipeline(), recipe(weights="int4", int4={"rank": 4, "iterations": 2})
    )


def test_the_plan_before_the_work_is_the_plan_of_the_work(applied: Any) -> None:
    asked = recipe(weights="int4", int4={"rank": 4, "iterations": 2})
    assert stages.plan(stages.check(make_tiny_pipeline(), asked), asked) == applied.plans


def test_the_unet_keeps_its_function(applied: Any) -> None:
    expected = make_tiny_pipeline().unet(*inputs()).sample
    out = applied.pipeline.unet(*inputs()).sample
    error = (out - expected).square().mean() / expected.square().mean()
    assert 1e-5 < float(error) < 0.05


def test_the_record_tells_the_bytes_and_the_figures_of_the_4_bit_layers(applied: Any) -> None:
    (record,) = applied.records
    in_4_bits = [plan for plan in applied.plans if plan.weights == "int4"]
    assert record["int4"]["layers"] == len(in_4_bits) > 100
    assert record["int4"]["ranks"] == sorted({plan.rank for plan in in_4_bits})
    assert 18 < record["int4"]["weight_snr_db_min"] < record["int4"]["weight_snr_db_median"] < 35
    assert record["weight_bytes_after"] < 0.21 * record["weight_bytes_before"]
    # The branches are parameters beside the integers.
    before, after = record["before"]["unet"], record["after"]["unet"]
    assert 1 < after["parameters"] / before["parameters"] < 1.2
    assert 1 < after["macs"] / before["macs"] < 1.2


def test_a_saved_pipeline_holds_ordinary_layers_with_the_summed_weights(
    applied: Any, tmp_path: Any
) -> None:
    from diffusers import UNet2DConditionModel

    expected = applied.pipeline.unet(*inputs()).sample
    plain: Any = dequantized(applied.pipeline.unet)
    assert not any(isinstance(m, Int4Linear | Int4Conv2d) for m in plain.modules())
    torch.testing.assert_close(plain(*inputs()).sample, expected, atol=1e-5, rtol=1e-4)
    stages.save(applied.pipeline, applied.plans, tmp_path / "saved")
    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path / "saved" / "unet")
    torch.testing.assert_close(loaded(*inputs()).sample, expected, atol=1e-5, rtol=1e-4)


def test_an_exported_layer_names_our_operator() -> None:
    layer, x = nn.Linear(64, 48), normal(2, 64)
    program = torch.export.export(int4_layers.quantized(layer, Form(16, 2)), (x,))
    assert sum(node.target is int4_layers.OPERATOR for node in program.graph.nodes) == 1
    assert int4_layers.is_int4(program)
    assert not int4_layers.is_int4(torch.export.export(layer, (x,)))


@pytest.mark.parametrize(
    ("value", "message"), [(1e5, "goes beyond 65504"), (float("nan"), "holds NaN or Inf")]
)
def test_a_weight_that_has_no_4_bit_form_is_named_before_the_work(
    value: float, message: str
) -> None:
    pipeline = make_tiny_pipeline()
    pipeline.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = value
    untouched = pipeline.unet.conv_in
    with pytest.raises(UserError, match=rf"unet\.mid_block\.resnets\.0\.conv1 {message}"):
        quantize.quantize(pipeline, QuantizeSettings(weights="int4"))
    assert pipeline.unet.conv_in is untouched
