"""Recipes are read strictly: every fault is found, and all are told at once."""

import contextlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import Gates
from recipes import schema, stages
from recipes.faults import RecipeError
from recipes.strict_yaml import parse_yaml

SMALLEST: dict[str, Any] = {"name": "x", "source": {"model": "embedded"}, "resolution": 64}


def faults(data: Any, overrides: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        schema.parse(data, overrides)
    return caught.value.faults


def with_stage(**settings: Any) -> dict[str, Any]:
    return {**SMALLEST, "stages": [{"quantize": settings}]}


@pytest.mark.parametrize("name", schema.names())
def test_a_shipped_recipe_loads_and_round_trips_through_yaml(name: str) -> None:
    recipe = schema.load(name)
    assert recipe.name == name
    assert schema.parse(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", schema.names())
def test_a_shipped_recipe_opens_with_its_purpose_and_its_command(name: str) -> None:
    path = schema.find(name)
    assert len(schema.purpose(path)) > 20
    header = re.match(r"(?:#.*\n)+", path.read_text())
    assert header is not None
    commands = [line[1:].strip() for line in header[0].splitlines() if "python -m" in line]
    words = shlex.split(commands[0])
    assert words[:2] == ["python", "-m"]
    assert words[words.index("--recipe") + 1] == name


def test_the_recipes_that_the_readme_names_are_shipped() -> None:
    expected = {"pocket_fp32", "pocket_int8", "sd_turbo_int8", "sd_turbo_fp16"}
    assert expected | {"sd21_int8", "sd15_int8", "sd15_lcm_int8"} <= set(schema.names())


def test_an_unknown_recipe_lists_the_choices_and_the_close_one() -> None:
    with pytest.raises(UserError, match="did you mean pocket_int8") as caught:
        schema.load("pocket_int9")
    assert all(name in str(caught.value) for name in schema.names())


def test_a_missing_file_is_told_as_a_file() -> None:
    with pytest.raises(UserError, match=r"no recipe file .*mine\.yaml"):
        schema.load("mine.yaml")


def test_a_misspelt_key_is_told_with_its_place_and_the_right_one() -> None:
    data = {**SMALLEST, "schedule": {"step": 3}}
    assert faults(data) == ["schedule.step: unknown key; did you mean steps?"]


def test_faults_of_every_kind_are_told_together() -> None:
    told = faults(
        {
            "name": "x",
            "source": {"model": "embedded", "revision": "main"},
            "resolution": "big",
            "schedule": {"scheduler": "eular", "steps": 0, "other_steps": [4, 4]},
            "stages": [{"quantize": {"components": ["vae_encoder"]}}],
            "precison": "float16",
        }
    )
    keys = [fault.split(":")[0] for fault in told]
    assert sorted(keys) == [
        "precison",
        "resolution",
        "schedule.other_steps",
        "schedule.scheduler",
        "schedule.steps",
        "source.revision",
        "stages.0.quantize.components",
    ]


def test_a_missing_key_does_not_hide_the_other_faults() -> None:
    told = faults({"schedule": {"stepz": 3}})
    assert {fault.split(":")[0] for fault in told} == {
        "name",
        "source",
        "resolution",
        "schedule.stepz",
    }


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"resolution": True}, "resolution"),
        ({"resolution": 64.0}, "resolution"),
        ({"resolution": [64, 64, 64]}, "resolution"),
        ({"name": "../x"}, "name"),
        ({"source": {"model": "random:sdxl"}}, "source.model"),
        ({"source": {"model": ""}}, "source.model"),
        ({"schedule": {"steps": "4"}}, "schedule.steps"),
        ({"schedule": {"guidance_scale": float("nan")}}, "schedule.guidance_scale"),
        ({"schedule": None}, "schedule"),
        ({"components": []}, "components"),
        ({"components": ["text_encoder", "unet", "vae_decoder", "unet"]}, "components"),
        ({"components": "unet"}, "components"),
        ({"stages": ["quantize"]}, "stages.0"),
        ({"stages": [{}]}, "stages.0"),
        ({"stages": [{"quantize": None}]}, "stages.0"),
        ({"stages": [{"quantize": {}}, {"quantize": {}}]}, "stages"),
        ({"stages": [{"quantize": {"weights": "int3"}}]}, "stages.0.quantize.weights"),
        ({"gates": {"component_snr": 60.0}}, "gates.component_snr"),
        ({"targets": {"onnx": {"opset": 12}}}, "targets.onnx.opset"),
        ({"targets": {"onnx": {"opset": 24}}}, "targets.onnx.opset"),
        ({"golden_prompts": []}, "golden_prompts"),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_a_wrong_value_is_told_at_its_key(change: dict[str, Any], key: str) -> None:
    assert [fault.split(":")[0] for fault in faults({**SMALLEST, **change})] == [key]


def test_a_pipeline_without_a_component_that_it_needs_is_told_once() -> None:
    data = {**with_stage(), "components": ["unet"]}
    assert faults(data) == [
        "components: needs text_encoder, unet and vae_decoder; missing: text_encoder, vae_decoder"
    ]


def test_an_empty_list_is_told_in_plain_words() -> None:
    told = faults({**SMALLEST, "golden_prompts": []})
    assert told == ["golden_prompts: [] should have at least one item"]


def test_a_rule_for_a_component_that_the_stage_leaves_alone_is_a_fault() -> None:
    rule = {"layers": "unett.conv_in", "weights": "float32", "reason": "sensitive"}
    assert "did you mean unet" in faults(with_stage(rules=[rule]))[0]


def test_a_float_layer_with_integer_activations_is_an_impossible_pair() -> None:
    rule = {
        "layers": "unet.*",
        "weights": "float32",
        "activations": "int8_dynamic",
        "reason": "sensitive",
    }
    assert faults(with_stage(rules=[rule]))[0].startswith("stages.0.quantize.rules.0.activations")


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_recipe_that_is_no_mapping_is_told(data: Any) -> None:
    assert "mapping" in faults(data)[0]


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("name: a\nname: b", "'name' appears twice (line 2"),
            ("schedule:\n  steps: 1\n  steps: 2", "'steps' appears twice (line 3"),
            ("a: &big [1]\nb: *big", "aliases"),
            ("a: [1", "line 1"),
            ("1: 2", "not text"),
            ("a: !!python/object:os.system {}", "not valid YAML"),
            ("[" * 400, "not valid YAML"),
        ],
    )
    def test_unsafe_or_ambiguous_yaml_is_refused_with_its_line(self, text: str, said: str) -> None:
        with pytest.raises(RecipeError) as caught:
            parse_yaml(text, "mine.yaml")
        assert said in str(caught.value)

    @given(st.text(max_size=60))
    def test_any_text_gives_data_or_a_recipe_error(self, text: str) -> None:
        with contextlib.suppress(RecipeError):
            schema.parse(parse_yaml(text, "mine.yaml"))

    def test_a_file_that_is_not_text_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RecipeError, match="UTF-8"):
            schema.load(str(path))


class TestOverrides:
    def test_a_dotted_key_replaces_one_value(self) -> None:
        recipe = schema.load("pocket_int8", {"schedule.steps": 4, "resolution": [64, 128]})
        assert (recipe.schedule.steps, recipe.height, recipe.width) == (4, 64, 128)

    def test_a_stage_is_reached_by_its_name_or_its_index(self) -> None:
        for key in ("stages.quantize.activations", "stages.0.quantize.activations"):
            recipe = schema.load("pocket_int8", {key: "int8_dynamic"})
            assert recipe.stages[0].settings.activations == "int8_dynamic"

    def test_another_model_drops_the_revision_of_the_first(self) -> None:
        data = {**SMALLEST, "source": {"model": "a/b", "revision": "abc"}}
        assert schema.parse(data, {"source.model": "embedded"}).source.revision is None

    def test_an_override_is_checked_as_strictly_as_the_file(self) -> None:
        told = faults(SMALLEST, {"schedule.steps": "4", "gates.nothing": 1, "name.x": 1})
        assert {fault.split(":")[0] for fault in told} == {
            "schedule.steps",
            "gates.nothing",
            "name.x",
        }

    def test_an_override_into_a_list_without_that_entry_is_told(self) -> None:
        told = faults(with_stage(), {"stages.quantise.weights": "int8"})
        assert "did you mean quantize" in told[0]

    def test_of_two_stages_of_a_name_one_has_to_be_named(self) -> None:
        with pytest.raises(RecipeError) as caught:
            schema.load("pocket_turbo", {"stages.distill.prompts": "mine.txt"})
        (told,) = caught.value.faults
        assert told.startswith("stages.distill.prompts: ")
        assert "stages.0 or stages.1" in told
        changed = schema.load("pocket_turbo", {"stages.1.distill.prompts": "mine.txt"})
        named = [stage.distill.prompts for stage in changed.stages if stage.distill]
        assert named == [None, "mine.txt"]

    def test_the_data_that_is_passed_in_is_left_alone(self) -> None:
        data = {**SMALLEST, "schedule": {"steps": 3}}
        schema.parse(data, {"schedule.steps": 4, "precision": "float16"})
        assert data == {**SMALLEST, "schedule": {"steps": 3}}


keys = st.sampled_from(
    ["name", "source", "model", "resolution", "stages", "quantize", "schedule", "steps", "rules"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(keys, values, max_size=6))
def test_whatever_the_data_it_is_a_recipe_or_a_list_of_faults(data: dict[str, Any]) -> None:
    with contextlib.suppress(RecipeError):
        recipe = schema.parse(data)
        assert schema.parse(recipe.resolved()) == recipe


def test_every_stage_of_the_schema_has_a_row_in_the_table_and_the_reverse() -> None:
    assert set(schema.Stage.model_fields) == set(stages.STAGES)


PRUNE = {"prune": {"blocks": "bk_base"}}
ADAPTERS = {"adapters": {"loras": [{"model": "style.safetensors"}]}}


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([{"quantize": {}}, PRUNE], "prune changes weights, so it cannot follow quantize"),
        ([{"fold": {}}, PRUNE], "prune changes weights, so it cannot follow fold"),
        ([{"quantize": {}}, {"fold": {}}], "fold cannot follow quantize"),
        ([PRUNE, ADAPTERS], "adapters comes first"),
        ([{"fold": {}}, {"fold": {}}], "fold is listed twice"),
    ],
)
def test_an_order_of_stages_that_cannot_work_is_told(stages: list[Any], told: str) -> None:
    (fault,) = faults({**SMALLEST, "stages": stages})
    assert told in fault


def test_stages_compose_in_any_sensible_order() -> None:
    order = [ADAPTERS, PRUNE, PRUNE, {"fold": {}}, {"quantize": {}}]
    recipe = schema.parse({**SMALLEST, "stages": order})
    assert [stage.name for stage in stages.changing(recipe)] == ["adapters", "prune", "prune"]
    assert [stage.name for stage in stages.preserving(recipe)] == ["fold", "quantize"]


def test_the_gates_of_a_recipe_are_the_gates_of_the_manifest() -> None:
    assert set(schema.GateOverrides.model_fields) == set(Gates.model_fields)


def test_a_gate_that_is_switched_off_stays_apart_from_one_that_is_not_named() -> None:
    recipe = schema.parse({**SMALLEST, "gates": {"picture_psnr_db": None}})
    assert recipe.resolved()["gates"] == {"picture_psnr_db": None}


@pytest.mark.parametrize("gate", sorted(schema.GateOverrides.model_fields))
@pytest.mark.parametrize("figure", [0.0, -40.0])
def test_a_gate_that_everything_reaches_is_refused(gate: str, figure: float) -> None:
    (told,) = faults({**SMALLEST, "gates": {gate: figure}})
    assert told.startswith(f"gates.{gate}: ")
    assert "greater than 0" in told
