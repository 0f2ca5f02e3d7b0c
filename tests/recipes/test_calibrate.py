"""Static activations: scales from the trajectory that runs, and a budget for what they cost."""

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
from recipes import calibrate, drawn, schema, sensitivity, stages
from recipes.calibrate import Observer
from recipes.faults import RecipeError
from recipes.measure import measure
from recipes.quantize import quantizable_layers
from recipes.quantized_layers import (
    Affine,
    QuantizedConv2d,
    QuantizedModule,
    SkipConv2d,
    Static,
    dequantized,
    quantized,
)
from recipes.settings import CalibrationSettings, KeepSettings
from tests.converters.small import make_small_pipeline


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red tent\na hat\nice\n")
    return path


def recipe(prompts: Path | str, schedule: Any = None, **settings: Any) -> schema.Recipe:
    calibration = {"prompts": str(prompts), "samples": 2, **settings.pop("calibration", {})}
    quantize = {"activations": "int8_static", "calibration": calibration, **settings}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 16,
            "schedule": schedule or {"steps": 2, "guidance_scale": 1.0},
            "stages": [{"quantize": quantize}],
        }
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([999.0]),
        torch.randn(1, 16, 32, generator=generator),
    )


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
        assert sensitivity_db(expected, found) > 25

    def test_it_stays_close_to_the_float_pipeline(self, applied: Any) -> None:
        with torch.no_grad():
            expected = make_small_pipeline().unet(*inputs()).sample
            found = applied.pipeline.unet(*inputs()).sample
        assert 10 < sensitivity_db(expected, found) < 60


def sensitivity_db(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


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


@pytest.mark.parametrize(
    "keep",
    [
        {},
        {"min_snr_db": 40.0, "macs": 0.9},
        {"macs": 0.9, "bytes": 0.5},
        {"macs": 1.5},
        {"min_snr_db": 0},
        {"bytes": 0},
        {"bytes": 1.01},
    ],
)
def test_a_budget_is_one_of_three(keep: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="keep"):
        recipe("x", keep=keep)


def test_a_budget_of_multiply_adds_needs_static_activations() -> None:
    with pytest.raises(RecipeError, match=r"keep\.macs: goes with activations int8_static"):
        recipe("x", keep={"macs": 0.9}, activations="none")


def planned_bytes(plans: list[LayerPlan], name: str) -> tuple[int, int]:
    """A component's weights: in float32, and as planned, counted anew."""
    layers = quantizable_layers(make_small_pipeline(), [name])
    whole = taken = 0
    for plan in plans:
        if plan.layer in layers:
            weight = layers[plan.layer].weight
            whole += 4 * weight.numel()
            integers = int(weight.numel()) + 4 * len(weight)
            taken += {"float32": 4 * weight.numel(), "int8": integers}[plan.weights]
    return whole, taken


@pytest.mark.parametrize("activations", ["none", "int8_static"])
def test_a_budget_of_bytes_keeps_the_most_sensitive_weights(
    prompts: Path, activations: str
) -> None:
    def applied(**settings: Any) -> Any:
        asked = recipe(
            prompts, activations=activations, split_skips=False, components=["unet"], **settings
        )
        return stages.apply(make_small_pipeline(), asked)

    plain, made = applied(), applied(keep={"bytes": 0.5, "samples": 1})
    whole, taken = planned_bytes(made.plans, "unet")
    kept = [plan for plan in made.plans if plan.weights == "float32"]
    largest = max(
        4 * layer.weight.numel() for layer in quantizable_layers(made.pipeline, ["unet"]).values()
    )
    assert 0.5 * whole - largest < taken <= 0.5 * whole
    assert all(plan.activations == "none" for plan in kept)
    assert made.records[0]["layers_kept_by_sensitivity"] == len(kept) > 5
    assert kept[0].reason.endswith("and unet stays within 50% of its float bytes")
    figures = {plan.layer: sensitivity_of(plan) for plan in made.plans}
    lowest = min(figures, key=lambda layer: figures[layer])
    assert lowest in {plan.layer for plan in kept}
    with torch.no_grad():
        expected = make_small_pipeline().unet(*inputs()).sample
        found = [each.pipeline.unet(*inputs()).sample for each in (plain, made)]
    assert sensitivity_db(expected, found[1]) > sensitivity_db(expected, found[0]) + 1


def sensitivity_of(plan: LayerPlan) -> float:
    return float(plan.reason.split("sensitivity ")[1].split(" dB")[0])


def test_a_threshold_keeps_weights_where_activations_are_float(prompts: Path) -> None:
    keep = {"min_snr_db": 55.0, "samples": 1}
    asked = recipe(prompts, activations="none", keep=keep, components=["unet"])
    plans = stages.apply(make_small_pipeline(), asked).plans
    by_weights: dict[str, list[float]] = {"float32": [], "int8": []}
    for plan in plans:
        by_weights[plan.weights].append(sensitivity_of(plan))
    assert max(by_weights["float32"]) < 55.0 <= min(by_weights["int8"])


SHORTCUT = "unet.up_blocks.0.resnets.0.conv_shortcut"


def rule(layers: str, activations: str = "int8_static") -> dict[str, str]:
    return {"layers": layers, "weights": "int8", "activations": activations, "reason": "mine"}


@pytest.mark.parametrize("activations", ["int8_static", "none"])
def test_what_a_rule_names_stays_as_the_rule_says(prompts: Path, activations: str) -> None:
    """Both halves of a skip concat, too, where there are two."""
    rules = [rule(name, activations) for name in ("unet.conv_in", SHORTCUT)]
    keep = {"min_snr_db": 1000.0, "samples": 1}
    asked = recipe(prompts, activations=activations, components=["unet"], rules=rules, keep=keep)
    applied = stages.apply(make_small_pipeline(), asked)
    ruled, others = {}, []
    for plan in applied.plans:
        if plan.layer == "unet.conv_in" or plan.layer.startswith(SHORTCUT):
            ruled[plan.layer] = plan
        else:
            others.append(plan)
    halves = [f"{SHORTCUT}.hidden", f"{SHORTCUT}.skip"]
    static = activations == "int8_static"
    assert ruled.keys() == {"unet.conv_in", *(halves if static else [SHORTCUT])}
    for plan in ruled.values():
        assert (plan.weights, plan.activations) == ("int8", activations)
        assert plan.reason.startswith("rule unet.")
        assert "sensitivity" not in plan.reason
        assert (plan.activation_scale is not None) == static
    assert {plan.activations for plan in others} == {"none"}
    assert {plan.weights for plan in others} == {"int8" if static else "float32"}
    assert applied.records[0]["layers_kept_by_sensitivity"] == len(others) > 30


def test_a_rule_is_for_what_it_names_and_not_for_what_lies_in_it(prompts: Path) -> None:
    """`unet.*.0` names `to_out.0`; `resnets.0` is no layer."""
    keep = {"min_snr_db": 1000.0, "samples": 1}
    asked = recipe(prompts, components=["unet"], rules=[rule("unet.*.0")], keep=keep)
    plans = {plan.layer: plan for plan in stages.apply(make_small_pipeline(), asked).plans}
    to_out = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert plans[to_out].activations == "int8_static"
    assert plans["unet.down_blocks.0.resnets.0.conv1"].activations == "none"


def test_layers_that_a_rule_keeps_in_integers_count_for_a_budget_of_multiply_adds(
    prompts: Path,
) -> None:
    keep = {"macs": 0.9, "samples": 1}
    asked = recipe(prompts, components=["unet"], rules=[rule("unet.*resnets.*")], keep=keep)
    (record,) = stages.apply(make_small_pipeline(), asked).records
    plain = recipe(prompts, components=["unet"], keep=keep)
    (without,) = stages.apply(make_small_pipeline(), plain).records
    assert without["layers_kept_by_sensitivity"] > 0
    assert record["layers_kept_by_sensitivity"] > 0
    for told in (record, without):
        assert 0.9 <= told["int8_macs_of_layers"]["unet"] < 1


def test_a_budget_that_the_rules_make_unreachable_is_told(prompts: Path, capsys: Any) -> None:
    rules = [rule("unet.*", "none"), rule("unet.up_blocks.*")]
    asked = recipe(prompts, components=["unet"], rules=rules, keep={"macs": 0.9, "samples": 1})
    stages.apply(make_small_pipeline(), asked)
    told = capsys.readouterr()
    assert "keep.macs asks for 90.0% of the multiply-adds of unet's layers" in told.out + told.err


def test_a_budget_below_what_integers_take_is_refused_before_any_work(prompts: Path) -> None:
    asked = recipe(prompts, activations="none", keep={"bytes": 0.2}, components=["unet"])
    with pytest.raises(UserError, match=r"keep\.bytes: 0\.2 of unet's float bytes are fewer"):
        stages.check(make_small_pipeline(), asked)


sized = st.dictionaries(
    st.sampled_from([f"{part}.{k}" for part in ("unet", "vae") for k in range(6)]),
    st.tuples(st.integers(4, 1000), st.integers(1, 4), st.floats(5, 99)),
    min_size=1,
)


@given(sized, st.floats(0.05, 1))
def test_no_kept_weights_go_beyond_a_budget_of_bytes(
    table: dict[str, tuple[int, int, float]], most: float
) -> None:
    sizes = {name: sensitivity.Sizes(big, big // small) for name, (big, small, _) in table.items()}
    snr = {name: db for name, (*_, db) in table.items()}
    plans = [
        LayerPlan(layer=name, weights="int8", activations="none", reason="default")
        for name in table
    ]
    decided = sensitivity.kept(plans, snr, {}, sizes, KeepSettings(bytes=most))
    for part in ("unet", "vae"):
        mine = {plan.layer: plan for plan in decided if plan.layer.startswith(part)}
        whole = most * sum(sizes[name].float32 for name in mine)
        least = sum(sizes[name].planned for name in mine)
        kept = {name for name, plan in mine.items() if plan.weights == "float32"}
        taken = least + sum(sizes[name].float32 - sizes[name].planned for name in kept)
        assert not kept or taken <= whole + 1e-6
        for name in mine.keys() - kept:  # it would not have fitted beside the more sensitive ones
            before = {other for other in kept if snr[other] <= snr[name]}
            cost = sum(sizes[x].float32 - sizes[x].planned for x in before | {name})
            assert least + cost > whole - 1e-6


layers = st.dictionaries(
    st.sampled_from([f"unet.{k}" for k in range(9)]),
    st.tuples(st.integers(1, 1000), st.floats(5, 99)),
    min_size=1,
)


@given(layers, st.floats(0.05, 1))
def test_a_budget_of_multiply_adds_is_kept_and_used(
    table: dict[str, tuple[int, float]], share: float
) -> None:
    macs = {name: count for name, (count, _) in table.items()}
    snr = {name: db for name, (_, db) in table.items()}
    plans = [
        LayerPlan(layer=name, weights="int8", activations="int8_static", reason="default")
        for name in table
    ]
    decided = sensitivity.kept(plans, snr, macs, {}, KeepSettings(macs=share))
    integer = [plan.layer for plan in decided if plan.activations == "int8_static"]
    assert sensitivity.share(macs, "unet", integer) >= share
    kept = set(table) - set(integer)
    assert all(snr[name] <= snr[other] for name in kept for other in integer)
    if integer:
        # The next one does not fit.
        worst = min(snr[name] for name in integer)
        shorter = [[n for n in integer if n != name] for name in integer if snr[name] == worst]
        assert any(sensitivity.share(macs, "unet", left) < share for left in shorter)
