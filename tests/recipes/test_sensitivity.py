"""Which layers stay in float: budgets, thresholds, and the rules on top of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes import sensitivity, stages
from recipes.faults import RecipeError
from recipes.quantize import quantizable_layers
from recipes.settings import KeepSettings
from tests.converters.small import make_small_pipeline
from tests.recipes.integers import inputs, recipe, snr_db


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
    assert snr_db(expected, found[1]) > snr_db(expected, found[0]) + 1


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
