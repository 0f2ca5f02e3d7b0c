"""Static activations: scales from the trajectory that runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver
from torch.nn import functional as F

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes import calibrate, drawn, stages
from recipes.calibrate import Observer
from recipes.measure import measure
from recipes.quantized_layers import (
    Affine,
    QuantizedConv2d,
    QuantizedModule,
    SkipConv2d,
    Static,
    dequantized,
    quantized,
)
from recipes.settings import CalibrationSettings
from tests.converters.small import make_small_pipeline
from tests.recipes.integers import inputs, recipe, snr_db


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red tent\na hat\nice\n")
    return path


ranges = st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)).filter(
    lambda pair: abs(pair[0]) > 1e-6 or abs(pair[1]) > 1e-6
)


@given(ranges)
def test_a_scale_covers_its_range_and_holds_zero_exactly(pair: tuple[float, float]) -> None:
    low, high = sorted(pair)
    affine = Affine.covering(low, high)
    bounds = torch.tensor([low, 0.0, high])
    rounded = affine(bounds)
    assert rounded[1] == 0
    assert bool(((rounded - bounds).abs() <= 0.51 * affine.scale).all())


def test_scales_are_those_of_torch_ao_rounded_up() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 1
    reference = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_affine)
    reference(x)
    scale, zero_point = reference.calculate_qparams()
    own = Affine.covering(float(x.min()), float(x.max()))
    assert float(scale) <= own.scale <= float(scale) * (1 + 2**-10)
    assert abs(own.zero_point - int(zero_point)) <= 1
    expected = torch.fake_quantize_per_tensor_affine(x, own.scale, own.zero_point, -128, 127)
    assert torch.equal(own(x), expected)


def seen(x: torch.Tensor) -> Observer:
    observer = Observer(counts=True)
    for part in x.chunk(5):
        observer.observe(part)
    return observer


@given(st.integers(0, 50), st.floats(0.01, 100), st.floats(-3, 3))
def test_a_growing_histogram_loses_no_value(seed: int, scale: float, offset: float) -> None:
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(seed)) + offset) * scale
    x = x * torch.linspace(0.01, 1, 1000)  # so that the range grows
    observer = seen(x)
    assert observer.counts is not None
    assert float(observer.counts.sum()) == observer.seen == 1000
    assert (observer.low, observer.high) == (min(0, float(x.min())), max(0, float(x.max())))
    mean = float((observer.values * observer.counts).sum() / 1000)
    assert mean == pytest.approx(float(x.mean()), abs=2 * observer.radius / 2**13)


def test_a_percentile_range_leaves_outliers_out() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 1000.0, -500.0
    settings = CalibrationSettings(observer="percentile", percentile=99.9)
    low, high = calibrate.percentile(seen(x), settings)
    expected = torch.quantile(x, torch.tensor([0.001, 0.999]))
    width = 2 * 1024 / 2**14
    assert low == pytest.approx(float(expected[0]), abs=2 * width)
    assert high == pytest.approx(float(expected[1]), abs=2 * width)
    everything = CalibrationSettings(observer="percentile", percentile=100)
    assert calibrate.percentile(seen(x), everything) == (-500.0, 1000.0)


def test_the_mse_range_rounds_better_than_the_whole_range() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) ** 3
    observer = seen(x)
    settings = CalibrationSettings()

    def error(low: float, high: float) -> float:
        return float((Affine.covering(low, high)(x) - x).square().mean())

    best = error(*calibrate.mse(observer, settings))
    assert best < 0.95 * error(*calibrate.minmax(observer, settings))
    shares = torch.linspace(0.05, 1, 60)
    least = min(error(observer.low * float(s), observer.high * float(s)) for s in shares)
    assert best <= 1.02 * least


def test_a_static_layer_computes_with_integers() -> None:
    """Against integer arithmetic written out in int64."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 4, 5, 5)
    static = Static(Affine.covering(-2.0, 3.0), Affine.covering(-1.5, 2.5))
    layer = quantized(conv, "int8_static", static)
    read, gave = static.input, static.output
    q = (x / read.scale).round().add(read.zero_point).clamp(-128, 127)
    step = layer.weight_scale.double() * read.scale
    assert layer.bias is not None
    bias = (layer.bias.double() / step).round()
    assert float((layer.bias - conv.bias).abs().max()) <= float(step.max())
    products = F.conv2d((q - read.zero_point).double(), layer.weight_int8.double(), bias, padding=1)
    sums = products * step.view(-1, 1, 1)
    integers = (sums / gave.scale).round().add(gave.zero_point).clamp(-128, 127)
    expected = (integers - gave.zero_point) * gave.scale
    torch.testing.assert_close(layer(x), expected.float(), rtol=0, atol=1e-6)


def test_a_tiny_channel_keeps_its_sums_within_an_integer_kernel() -> None:
    conv = nn.Conv2d(2, 2, 1).requires_grad_(False)
    conv.weight.data[0] = 1e-12
    conv.bias.data[:] = 3.0
    static = Static(Affine.covering(-1.0, 1.0), Affine.covering(-4.0, 4.0))
    layer = quantized(conv, "int8_static", static)
    step = layer.weight_scale.double() * static.input.scale
    assert bool((3.0 / step < 2**31).all())
    assert bool((step / static.output.scale >= 2.0**-32).all())


def test_a_convolution_of_a_concat_is_the_sum_of_its_halves() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(10, 6, 1), torch.randn(2, 10, 4, 4)
    split = SkipConv2d(conv, 7)
    torch.testing.assert_close(split(x), conv(x))
    whole = split.to_float()
    assert torch.equal(whole.weight, conv.weight)
    torch.testing.assert_close(whole(x), conv(x))


def multiply_adds(unet: Any) -> tuple[dict[str, int], int]:
    """Of one call for one picture: of each convolution and linear, and of attention's products."""
    from diffusers.models.attention_processor import Attention

    layers: dict[str, int] = {}
    products: list[int] = []

    def of_layer(name: str) -> Any:
        def count(layer: Any, args: Any, out: torch.Tensor) -> None:
            each = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            if isinstance(layer, nn.Conv2d):
                each *= layer.kernel_size[0] * layer.kernel_size[1]
            layers[name] = out.numel() * each

        return count

    def of_attention(layer: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        queries = args[0].shape[1]
        others = kwargs.get("encoder_hidden_states")
        keys = queries if others is None else others.shape[1]
        products.append(2 * queries * keys * layer.inner_dim)

    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(of_layer(name))
        elif isinstance(layer, Attention):
            layer.register_forward_hook(of_attention, with_kwargs=True)
    with torch.no_grad():
        unet(*inputs())
    assert len(products) > 3
    return layers, sum(products)


@pytest.fixture(scope="module")
def applied(prompts: Path) -> Any:
    asked = recipe(
        prompts,
        rules=[{"layers": "unet.conv_in", "weights": "float32", "reason": "first"}],
        keep={"min_snr_db": 30.0, "samples": 1},
    )
    return stages.apply(make_small_pipeline(), asked)


class TestStage:
    def test_every_layer_of_the_plan_has_the_scales_that_it_computes_with(
        self, applied: Any
    ) -> None:
        modules = dict(applied.pipeline.unet.named_modules())
        static = [plan for plan in applied.plans if plan.activations == "int8_static"]
        assert len(static) > 80
        for plan in static:
            if plan.layer.startswith("unet."):
                layer = modules[plan.layer.removeprefix("unet.")]
                assert layer.static == Static(
                    Affine(plan.activation_scale, plan.activation_zero_point),
                    Affine(plan.output_scale, plan.output_zero_point),
                )
        others = [plan for plan in applied.plans if plan.activations == "none"]
        assert all(plan.activation_scale is None for plan in others)

    def test_rules_are_above_the_budget_and_each_reason_tells_a_figure(self, applied: Any) -> None:
        plans = {plan.layer: plan for plan in applied.plans}
        assert plans["unet.conv_in"].weights == "float32"
        assert plans["unet.conv_in"].reason == "rule unet.conv_in: first"
        for plan in applied.plans:
            if plan.activations == "int8_static":
                assert float(plan.reason.split("sensitivity ")[1].split(" dB")[0]) >= 30.0
            elif "sensitivity" in plan.reason:
                assert plan.weights == "int8"
                assert float(plan.reason.split("sensitivity ")[1].split(" dB")[0]) < 30.0

    def test_the_record_is_json_and_tells_the_share_in_int8(self, applied: Any) -> None:
        (record,) = applied.records
        assert json.loads(json.dumps(record)) == record
        assert set(record["int8_macs"]) == {"text_encoder", "unet", "vae_decoder"}
        assert 0 < record["int8_macs"]["unet"] < 1  # conv_in stays float
        assert record["calibration"] == {"pictures": 2, "steps": [2], "observer": "mse"}

    def test_its_shares_are_of_all_multiply_adds_and_of_those_of_layers(self, applied: Any) -> None:
        """Counted by hand; `measure` counts with torch."""
        pipeline = make_small_pipeline()
        layers, attention = multiply_adds(pipeline.unet)
        figures = measure(pipeline, 16, 16, guided=False)["unet"]
        assert sum(layers.values()) + attention == figures["macs"]
        static = {
            plan.layer.removeprefix("unet.").removesuffix(".hidden").removesuffix(".skip")
            for plan in applied.plans
            if plan.activations == "int8_static" and plan.layer.startswith("unet.")
        }
        whole = {
            plan.layer.rpartition(".")[0]
            for plan in applied.plans
            if plan.layer.endswith((".hidden", ".skip")) and plan.activations == "none"
        }
        assert not whole
        mine = sum(layers[name] for name in static)
        (record,) = applied.records
        assert record["int8_macs"]["unet"] == round(mine / figures["macs"], 4)
        assert record["int8_macs_of_layers"]["unet"] == round(mine / sum(layers.values()), 4)
        assert 0 < record["int8_macs"]["unet"] < record["int8_macs_of_layers"]["unet"] < 1

    def test_the_halves_of_a_skip_concat_have_their_own_scales(self, applied: Any) -> None:
        block = applied.pipeline.unet.up_blocks[0].resnets[0].conv_shortcut
        assert isinstance(block, SkipConv2d)
        layers = {plan.layer for plan in applied.plans}
        name = "unet.up_blocks.0.resnets.0.conv_shortcut"
        assert {f"{name}.hidden", f"{name}.skip"} <= layers
        assert name not in layers

    def test_a_saved_pipeline_has_ordinary_layers(self, applied: Any, tmp_path: Path) -> None:
        from diffusers import UNet2DConditionModel

        dequantized(applied.pipeline.unet).save_pretrained(tmp_path)  # type: ignore[operator]
        loaded = UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)
        original = make_small_pipeline().unet
        assert not any(isinstance(m, QuantizedModule | SkipConv2d) for m in loaded.modules())
        with torch.no_grad():
            expected, found = original(*inputs()).sample, loaded(*inputs()).sample
        assert snr_db(expected, found) > 25

    def test_it_stays_close_to_the_float_pipeline(self, applied: Any) -> None:
        with torch.no_grad():
            expected = make_small_pipeline().unet(*inputs()).sample
            found = applied.pipeline.unet(*inputs()).sample
        assert 10 < snr_db(expected, found) < 60


def test_whole_inputs_have_one_scale_where_skips_are_not_split(prompts: Path) -> None:
    asked = recipe(prompts, split_skips=False, components=["unet"])
    applied = stages.apply(make_small_pipeline(), asked)
    shortcut = applied.pipeline.unet.up_blocks[0].resnets[0].conv_shortcut
    assert isinstance(shortcut, QuantizedConv2d)


def test_calibration_sees_every_timestep_of_the_schedule_and_both_prompts(prompts: Path) -> None:
    schedule = {"steps": 2, "other_steps": [3], "guidance_scale": 3.0}
    asked = recipe(prompts, schedule, components=["unet"], calibration={"samples": 3})
    pipeline = make_small_pipeline()
    calls: list[tuple[int, float]] = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args: calls.append((len(args[0]), float(args[1])))
    )
    settings = asked.stages[0].quantize
    assert settings is not None
    calibrate.run(pipeline, asked, settings.calibration, range(3), "test")
    expected = []
    for steps in (2, 3):
        pipeline.scheduler.set_timesteps(steps)
        expected += [float(t) for t in pipeline.scheduler.timesteps]
    assert [t for _, t in calls] == expected
    assert {batch for batch, _ in calls} == {6}  # three pictures, each with the empty prompt


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("scheduler", ["lcm", "euler_ancestral", "ddpm"])
def test_a_pictures_noise_is_its_own_whatever_is_drawn_beside_it(
    prompts: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a scheduler that adds noise at each step."""
    schedule = {"steps": 2, "guidance_scale": 1.0, "scheduler": scheduler}
    asked = recipe(prompts, schedule, calibration={"samples": 3})
    settings = asked.stages[0].quantize
    assert settings is not None
    sample = drawn.sample

    def latents(together: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def watched(*args: Any) -> torch.Tensor:
            seen.append(sample(*args))
            return seen[-1]

        monkeypatch.setattr(calibrate, "BATCH", together)
        monkeypatch.setattr(drawn, "sample", watched)
        calibrate.run(make_small_pipeline(), asked, settings.calibration, range(3), "test")
        assert len(seen) == -(-3 // together)
        return torch.cat(seen)

    alone = latents(1)
    torch.testing.assert_close(latents(4), alone, rtol=1e-3, atol=1e-3)
    assert not any(torch.allclose(alone[a], alone[b], atol=0.1) for a, b in ((0, 1), (1, 2)))


def test_the_same_seed_gives_the_same_scales(prompts: Path) -> None:
    def plans(seed: int) -> list[LayerPlan]:
        asked = recipe(prompts, components=["text_encoder", "unet"], calibration={"seed": seed})
        return stages.apply(make_small_pipeline(), asked).plans

    assert plans(0) == plans(0) != plans(1)


def test_a_layer_that_no_picture_reaches_is_named(prompts: Path) -> None:
    pipeline = make_small_pipeline()
    pipeline.unet.forgotten = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"calibration saw no data for unet\.forgotten"):
        stages.apply(pipeline, recipe(prompts, components=["unet"]))


@pytest.mark.parametrize("observer", sorted(calibrate.OBSERVERS))
@pytest.mark.parametrize(
    ("bias", "told"),
    [(0.0, "conv_out gave nothing but zeros"), (float("inf"), "that are not finite")],
)
def test_a_scale_that_cannot_be_is_refused(
    prompts: Path, bias: float, told: str, observer: str
) -> None:
    pipeline = make_small_pipeline()
    pipeline.unet.conv_out.weight.data.zero_()
    pipeline.unet.conv_out.bias.data[:] = bias
    asked = recipe(prompts, components=["unet"], calibration={"observer": observer})
    with pytest.raises(UserError, match=f"{told}.* keep it in float"):
        stages.apply(pipeline, asked)


def test_an_empty_prompt_file_is_refused_before_any_work(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    for path in (empty, tmp_path / "missing.txt"):
        with pytest.raises(UserError, match=r"stages\.0\.quantize: .*prompt"):
            stages.check(make_small_pipeline(), recipe(path))
