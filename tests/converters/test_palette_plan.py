"""Which layers get a palette and of how many bits; what is refused before any work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import palette_plan
from converters.convert import Request, check, convert, dry_run
from converters.palette_bits import Choice, allot
from converters.progress import Progress
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from mobile_runtime.validate import validate
from recipes import quantize, schema
from recipes.faults import RecipeError
from recipes.measure import outline
from recipes.palette_settings import PaletteSettings
from recipes.settings import QuantizeSettings
from tests.converters.small import make_small_pipeline


def recipe(palettes: dict[str, Any], model: str = "embedded", **parts: Any) -> schema.Recipe:
    coreml = {"palettes": palettes, **parts.pop("coreml", {})}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": model},
            "resolution": 16,
            "schedule": {"steps": 2, "guidance_scale": 1.0},
            "targets": {"coreml": coreml},
            **parts,
        }
    )


def settings_of(palettes: dict[str, Any], **coreml: Any) -> PaletteSettings:
    found = recipe(palettes, coreml=coreml).targets.coreml.palettes
    assert found is not None
    return found


def applied(palettes: dict[str, Any], pipeline: Any = None, plans: Any = (), **coreml: Any) -> Any:
    made = recipe(palettes, coreml=coreml)
    pipeline = pipeline or make_small_pipeline()
    chosen = made.targets.coreml.palettes
    assert chosen is not None
    return palette_plan.apply(pipeline, plans, made, chosen, "float16")


def by_layer(plans: list[LayerPlan]) -> dict[str, LayerPlan]:
    return {plan.layer: plan for plan in plans}


@pytest.mark.parametrize(
    ("palettes", "coreml", "told"),
    [
        ({}, {}, "palettes.bits: give bits or mixed"),
        ({"bits": 4, "mixed": {"average_bits": 4}}, {}, "palettes.bits: give bits or mixed"),
        ({"mixed": {}}, {}, "palettes.mixed: give average_bits or snr_db"),
        ({"mixed": {"snr_db": 40, "widths": [4, 4]}}, {}, "widths: repeats a number"),
        ({"bits": 5}, {}, "palettes.bits: 5 is not one of: 1, 2, 3, 4, 6 or 8"),
        ({"bits": 3}, {}, "palettes.bits: 3 need iOS18, and deployment_target is iOS17"),
        ({"bits": 4, "group_size": 8}, {"deployment_target": "iOS16"}, "group_size: needs iOS18"),
        ({"bits": 4, "components": ["vae_encoder"]}, {}, "vae_encoder is not among"),
        (
            {"bits": 4, "rules": [{"layers": "unett.conv_in", "bits": 8, "reason": "x"}]},
            {},
            "'unett.conv_in' begins with 'unett'",
        ),
        (
            {"bits": 4, "rules": [{"layers": "unet.*", "bits": 5, "reason": "x"}]},
            {},
            "rules.0.bits: 5 is not one of",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(
    palettes: dict[str, Any], coreml: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(palettes, coreml=coreml)
    (fault,) = caught.value.faults
    assert fault.startswith("targets.coreml.palettes")
    assert told in fault


def test_all_float_layers_get_palettes_of_the_bits_and_the_weights_these_make() -> None:
    pipeline = make_small_pipeline()
    layers = quantize.quantizable_layers(pipeline, ("text_encoder", "unet", "vae_decoder"))
    before = {path: layer.weight for path, layer in layers.items()}
    made = applied({"bits": 4}, pipeline)
    plans = by_layer(made.plans)
    assert list(plans) == list(layers)
    for path, layer in layers.items():
        plan = plans[path]
        if plan.weights == "palette":
            assert (plan.bits, plan.tables) == (4, 1)
            assert len(layer.weight.unique()) <= 16
            assert made.palettes[path].bits == 4
        else:
            assert "more than the float weight" in plan.reason
            # 16 weights of 4 bits and a table of 16 float16 values.
            assert layer.weight is before[path]
            assert layer.weight.numel() * 4 + 256 >= layer.weight.numel() * 16
    assert {plan.weights for plan in made.plans} == {"palette", "float16"}
    assert made.record["layers"] == {"4": len(made.palettes), "float": 1}
    assert 4 < made.record["bits_a_weight"]["unet"] < 4.5


def test_rules_name_layers_and_the_last_one_wins() -> None:
    rules = [
        {"layers": "unet.conv_*", "bits": 8, "reason": "ends"},
        {"layers": "unet.conv_out", "bits": "float", "reason": "the very end"},
    ]
    plans = by_layer(applied({"bits": 2, "components": ["unet"], "rules": rules}).plans)
    assert plans["unet.conv_in"].bits == 8
    assert plans["unet.conv_out"].weights == "float16"
    assert "the very end" in plans["unet.conv_out"].reason
    assert plans["unet.time_embedding.linear_1"].bits == 2
    assert {path.split(".")[0] for path in plans} == {"unet"}


def test_groups_of_channels_have_their_own_tables_where_they_divide() -> None:
    made = applied(
        {"bits": 2, "group_size": 16, "components": ["text_encoder", "unet"]},
        deployment_target="iOS18",
    )
    plans = by_layer(made.plans)
    assert plans["unet.conv_in"].tables == 32 // 16
    assert plans["unet.conv_out"].tables == 1
    assert "no groups of 16 in 4 channels" in plans["unet.conv_out"].reason
    assert plans["text_encoder.text_model.embeddings.token_embedding"].tables == 1


def test_layers_of_integers_keep_them_and_the_plan_says_so() -> None:
    pipeline = make_small_pipeline()
    rule = {"layers": "*.attentions.*", "weights": "float32", "reason": "test"}
    asked = QuantizeSettings.model_validate({"components": ["unet"], "rules": [rule]})
    pipeline, plans = quantize.quantize(pipeline, asked)
    made = applied({"bits": 6, "components": ["unet"]}, pipeline, plans)
    found = by_layer(made.plans)
    assert len(found) == len(made.plans) == len(plans)
    for plan in plans:
        told = found[plan.layer]
        if plan.weights == "int8":
            assert told.weights == "int8"
            assert "keeps its integers" in told.reason
        else:
            assert ".attentions." in plan.layer
            assert (told.weights, told.bits) == ("palette", 6)
    assert set(made.palettes) == {plan.layer for plan in plans if plan.weights == "float32"}


def test_palettes_that_no_layer_would_get_are_refused() -> None:
    pipeline = outline(make_small_pipeline())
    asked = QuantizeSettings(components=("unet",))
    plans = quantize.make_plan(pipeline, asked)
    chosen = settings_of({"bits": 4, "components": ["unet"]})
    with pytest.raises(UserError, match=r"targets\.coreml\.palettes: no layer of unet is left"):
        palette_plan.check(pipeline, plans, chosen, "float16")
    rules = [{"layers": "unet.*", "bits": "float", "reason": "test"}]
    chosen = settings_of({"bits": 4, "components": ["unet"], "rules": rules})
    with pytest.raises(UserError, match="no layer of unet would get one"):
        palette_plan.check(pipeline, [], chosen, "float16")


def test_a_rule_for_no_layer_and_a_budget_that_nothing_fits_are_told_at_once() -> None:
    chosen = settings_of(
        {
            "mixed": {"average_bits": 1.5, "prompts": "none.txt"},
            "components": ["unet"],
            "rules": [{"layers": "unet.conv_inn", "bits": 8, "reason": "x"}],
        }
    )
    with pytest.raises(UserError) as caught:
        palette_plan.check(outline(make_small_pipeline()), [], chosen, "float16")
    told = str(caught.value)
    assert "'unet.conv_inn' matches no float layer of unet; did you mean unet.conv_in" in told
    assert "there is no prompt file none.txt" in told
    assert "average_bits is 1.5, and unet takes at least 2." in told


def test_a_weight_that_is_not_finite_is_refused_and_one_beyond_float16_stays_float() -> None:
    pipeline = make_small_pipeline()
    pipeline.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    plans = by_layer(applied({"bits": 4, "components": ["unet"]}, pipeline).plans)
    assert plans["unet.conv_in"].weights == "float16"
    assert "does not fit float16" in plans["unet.conv_in"].reason
    pipeline.unet.conv_in.weight.data[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"unet\.conv_in holds NaN or Inf"):
        applied({"bits": 4, "components": ["unet"]}, pipeline)


WIDTHS = (2, 4, 6, None)


@st.composite
def layers_to_plan(draw: Any) -> tuple[dict[str, list[Choice]], dict[str, dict[Any, float]]]:
    options, noise = {}, {}
    for index in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 50))
        options[f"{index}"] = [Choice(bits, size * (bits or 16)) for bits in WIDTHS]
        powers = draw(st.lists(st.floats(1e-6, 1), min_size=3, max_size=3))
        noise[f"{index}"] = dict(zip(WIDTHS, [*powers, 0.0], strict=True))
    return options, noise


@given(planned=layers_to_plan(), share=st.floats(0, 1))
def test_a_plan_keeps_its_budget_and_leaves_no_step_that_it_could_pay(
    planned: Any, share: float
) -> None:
    options, noise = planned
    least, most = (sum(pick(c.stored for c in o) for o in options.values()) for pick in (min, max))
    budget = least + share * (most - least)
    taken = allot(options, noise, budget, None)
    spent = sum(choice.stored for choice in taken.values())
    assert spent <= budget
    for path, now in taken.items():
        for other in options[path]:
            better = noise[path][other.bits] < noise[path][now.bits]
            extra = other.stored - now.stored
            assert not (better and 0 < extra <= budget - spent)


@given(planned=layers_to_plan(), loudest=st.floats(1e-5, 2))
def test_a_plan_for_an_snr_reaches_it(planned: Any, loudest: float) -> None:
    options, noise = planned
    taken = allot(options, noise, None, loudest)
    assert sum(noise[path][choice.bits] for path, choice in taken.items()) <= loudest


def test_bits_go_where_they_pay_and_a_useless_width_bars_no_better_one() -> None:
    options = {name: [Choice(bits, 100 * (bits or 16)) for bits in WIDTHS] for name in "ab"}
    noise = {"a": {2: 0.5, 4: 0.5, 6: 0.001, None: 0.0}, "b": {2: 0.1, 4: 0.02, 6: 0.01, None: 0}}
    taken = allot(options, noise, 800, None)
    assert {name: choice.bits for name, choice in taken.items()} == {"a": 6, "b": 2}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red tent\na hat\n")
    return str(path)


def test_mixed_bits_are_measured_planned_within_the_average_and_told(prompts: str) -> None:
    mixed = {"average_bits": 4.0, "prompts": prompts, "samples": 2, "widths": [2, 4, 8]}
    made = applied({"mixed": mixed, "components": ["vae_decoder"]})
    record = made.record
    assert 3.5 < record["bits_a_weight"]["vae_decoder"] <= 4.0
    assert len({palette.bits for palette in made.palettes.values()}) > 1
    predicted, measured = (
        record[f"{kind}_snr_db"]["vae_decoder"] for kind in ("predicted", "measured")
    )
    assert abs(predicted - measured) < 4
    assert all("alone: " in plan.reason for plan in made.plans if plan.weights == "palette")
    same = applied({"bits": 4, "components": ["vae_decoder"]})
    assert same.record["bits_a_weight"]["vae_decoder"] > record["bits_a_weight"]["vae_decoder"]


def test_mixed_bits_for_an_snr_predict_it_and_use_fewer_bits_for_a_lower_one(prompts: str) -> None:
    found = []
    for snr_db in (15.0, 30.0):
        mixed = {"snr_db": snr_db, "prompts": prompts, "samples": 2, "widths": [2, 6]}
        record = applied({"mixed": mixed, "components": ["text_encoder"]}).record
        assert record["predicted_snr_db"]["text_encoder"] >= snr_db - 0.01
        found.append(record["bits_a_weight"]["text_encoder"])
    assert found[0] < found[1]


def make_smallest_pipeline() -> Any:
    """The small pipeline with a UNet of one level, which converts in seconds."""
    from diffusers import UNet2DConditionModel

    pipeline = make_small_pipeline()
    pipeline.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return pipeline


def test_a_bundle_of_palettes_passes_and_tells_what_it_holds(tmp_path: Path) -> None:
    pipeline = make_smallest_pipeline()
    pipeline.save_pretrained(tmp_path / "source")
    rule = {"layers": "*", "weights": "float32", "reason": "test"}
    int8 = {"layers": "unet.conv_out", "weights": "int8", "reason": "test"}
    asked = recipe(
        {"bits": 6},
        str(tmp_path / "source"),
        golden_prompts=["a hat"],
        stages=[{"quantize": {"rules": [rule, int8]}}],
    )
    request = Request(asked, "coreml", tmp_path / "bundle")
    told = dry_run(request)
    assert "palettes for" in told
    with Progress(quiet=True) as progress:
        bundle = convert(request, progress)
    manifest = bundle.manifest
    assert {entry.name: entry.scheme for entry in manifest.components} == {
        "text_encoder": "palettes",
        "unet": "w8+palettes",
        "vae_decoder": "palettes",
    }
    plans = by_layer(list(manifest.quantization))
    assert plans["unet.conv_out"].weights == "int8"
    palettes = [plan for plan in plans.values() if plan.weights == "palette"]
    assert {plan.bits for plan in palettes} == {6}
    stored = [entry.details["palettized_weights"] for entry in manifest.components]
    assert sum(stored) == len(palettes)
    assert manifest.stages[-1]["stage"] == "palettes"
    report = validate(bundle)
    assert report.verdict == "pass"
    # What palettes are no part of takes no notice of them.
    check(Request(asked, "onnx", tmp_path / "other"))
