"""The support table answers every request, and a refusal says what the target can do instead."""

from itertools import product
from typing import get_args

import pytest

from converters.support import (
    SUPPORT,
    Precision,
    Refusal,
    Scheme,
    Weights,
    gates,
    scheme_for,
)
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import Target
from recipes import schema


def test_the_table_has_every_cell():
    requests = product(get_args(Target), get_args(Precision), get_args(Weights))
    assert set(SUPPORT) == set(requests)


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("name", schema.names())
def test_every_shipped_recipe_has_an_answer_for_every_target(name, target):
    recipe = schema.load(name)
    asked = [stage.quantize.every_weights for stage in recipe.stages if stage.quantize]
    weights = "float" if not asked else "int4" if "int4" in asked[0] else "int8"
    if isinstance(SUPPORT[target, recipe.precision, weights], Refusal):
        with pytest.raises(UserError, match=f"{target} cannot do .*; .* or "):
            scheme_for(target, recipe)
    else:
        assert isinstance(scheme_for(target, recipe), Scheme)


def test_dynamic_activations_are_executorchs_and_gated_layer_by_layer():
    recipe = schema.load("pocket_int8", {"stages.quantize.activations": "int8_dynamic"})
    told = gates(recipe, scheme_for("executorch", recipe))
    assert told.component_snr_db is None
    assert told.layer_snr_db == 45
    assert told.picture_psnr_db == 40
    for target in ("onnx", "coreml"):
        with pytest.raises(UserError, match="ExecuTorch"):
            scheme_for(target, recipe)


def test_one_rule_with_dynamic_activations_makes_the_whole_scheme_dynamic():
    rule = {"layers": "unet.*", "weights": "int8", "activations": "int8_dynamic", "reason": "test"}
    recipe = schema.load("pocket_int8", {"stages.quantize.rules": [rule]})
    assert scheme_for("executorch", recipe).name == "w8a8_dynamic"
    with pytest.raises(UserError, match="ExecuTorch"):
        scheme_for("onnx", recipe)


def test_weight_only_int8_is_gated_by_component():
    recipe = schema.load("pocket_int8")
    onnx = gates(recipe, scheme_for("onnx", recipe))
    executorch = gates(recipe, scheme_for("executorch", recipe))
    assert executorch == onnx
    coreml = gates(recipe, scheme_for("coreml", recipe))
    assert (onnx.component_snr_db, onnx.float16_snr_db) == (60, None)
    assert (coreml.component_snr_db, coreml.float16_snr_db) == (60, 45)


def test_a_recipe_may_replace_a_gate_or_switch_it_off():
    changes = {"gates.picture_psnr_db": None, "gates.source_picture_psnr_db": 25.0}
    recipe = schema.load("pocket_int8", changes)
    told = gates(recipe, scheme_for("onnx", recipe))
    assert told.picture_psnr_db is None
    assert told.source_picture_psnr_db == 25
    assert told.component_snr_db == 60


def test_static_activations_are_every_targets_and_gated_layer_by_layer():
    recipe = schema.load("pocket_int8", {"stages.quantize.activations": "int8_static"})
    for target in get_args(Target):
        scheme = scheme_for(target, recipe)
        told = gates(recipe, scheme)
        assert scheme.name == "w8a8"
        assert (told.component_snr_db, told.float16_snr_db) == (None, None)
        assert (told.layer_snr_db, told.picture_psnr_db) == (45, 30)
        assert scheme.arithmetic == "float32"


def test_static_activations_in_float16_are_refused_by_every_target():
    changes = {"stages.quantize.activations": "int8_static", "precision": "float16"}
    for target in get_args(Target):
        with pytest.raises(UserError, match="leave the precision on auto or float32"):
            scheme_for(target, schema.load("pocket_int8", changes))


def test_4_bits_in_blocks_are_onnxs_and_core_mls_and_gated_by_component():
    recipe = schema.load("pocket_int8", {"stages.quantize.weights": "int4"})
    for target, arithmetic in (("onnx", "float32"), ("coreml", "float16")):
        scheme = scheme_for(target, recipe)
        assert (scheme.name, scheme.arithmetic) == ("w4", arithmetic)
        told = gates(recipe, scheme)
        assert (told.component_snr_db, told.picture_psnr_db, told.layer_snr_db) == (60, 40, None)
    with pytest.raises(UserError, match="weights to int8, or convert to ONNX or Core"):
        scheme_for("executorch", recipe)


def test_one_rule_with_4_bits_makes_the_whole_scheme_4_bits():
    rule = {"layers": "unet.*", "weights": "int4", "reason": "test"}
    recipe = schema.load("pocket_int8", {"stages.quantize.rules": [rule]})
    assert scheme_for("onnx", recipe).name == "w4"
    with pytest.raises(UserError, match="another function"):
        scheme_for("executorch", recipe)
