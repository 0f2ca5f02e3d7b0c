"""What each target can do: checked before any heavy work, printed by `--dry-run`.

A recipe asks for a precision and a weight scheme; this table says what the target makes of it, or
refuses and says what the target can do instead. A cell whose result is not what was asked for by
name carries a note, which goes into the manifest.

What one target alone has is an option of that target, and no row here: Core ML's palettes
(targets.coreml.palettes; palette_plan.py), over whatever weights the stages left in float.
"""

from dataclasses import dataclass
from typing import Literal

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import TRAJECTORY_SNR_DB, Gates, Target
from recipes.schema import Recipe

Precision = Literal["auto", "float32", "float16"]
Weights = Literal["float", "int8", "int8_static", "int8_dynamic", "int4"]


@dataclass(frozen=True)
class Scheme:
    """What a target makes of a request."""

    name: str
    arithmetic: Literal["float32", "float16"]
    note: str | None = None


@dataclass(frozen=True)
class Refusal:
    """What a target cannot do, and what it can."""

    reason: str
    instead: str


_XNNPACK_INT8 = (
    "XNNPACK has INT8 weights beside float activations in fully-connected layers only, so a "
    "convolution is computed as one over the shifted pictures that its kernel sees"
)
_NO_DYNAMIC = Refusal(
    "activations that are quantized as they come are an ExecuTorch scheme",
    "set quantize.activations to int8_static or none, or convert to ExecuTorch",
)
_STATIC_IN_FLOAT32 = "static INT8 activations are computed in float32 between the integers"
_STATIC_FLOAT16 = Refusal(
    "float16 rounds activations to the next INT8 step so often that layers fall to 35 dB",
    "leave the precision on auto or float32, or set quantize.activations to none",
)
_FP16_XNNPACK = Refusal(
    "the XNNPACK delegate computes these models in float32",
    "leave the precision on auto or float32, or convert to Core ML",
)
_FP16_ONNX_INT8 = Refusal(
    "ONNX Runtime's CPU kernels compute INT8 weights in float32",
    "leave the precision on auto or float32",
)
_FP16_ONNX_INT4 = Refusal(
    "ONNX Runtime's CPU kernels compute 4-bit weights in float32",
    "leave the precision on auto or float32",
)
_INT4_XNNPACK = Refusal(
    "XNNPACK has 4-bit weights in blocks beside activations that it rounds to INT8 alone, which is "
    "another function",
    "set quantize.weights to int8, or convert to ONNX or Core ML",
)

# (target, precision, weights) -> what it makes of it
SUPPORT: dict[tuple[Target, Precision, Weights], Scheme | Refusal] = {
    ("onnx", "auto", "float"): Scheme("float32", "float32"),
    ("onnx", "float32", "float"): Scheme("float32", "float32"),
    ("onnx", "float16", "float"): Scheme("float16", "float16"),
    ("onnx", "auto", "int8"): Scheme("w8", "float32"),
    ("onnx", "float32", "int8"): Scheme("w8", "float32"),
    ("onnx", "float16", "int8"): _FP16_ONNX_INT8,
    ("onnx", "auto", "int8_static"): Scheme("w8a8", "float32"),
    ("onnx", "float32", "int8_static"): Scheme("w8a8", "float32"),
    ("onnx", "float16", "int8_static"): _FP16_ONNX_INT8,
    ("onnx", "auto", "int8_dynamic"): _NO_DYNAMIC,
    ("onnx", "float32", "int8_dynamic"): _NO_DYNAMIC,
    ("onnx", "float16", "int8_dynamic"): _NO_DYNAMIC,
    ("onnx", "auto", "int4"): Scheme("w4", "float32"),
    ("onnx", "float32", "int4"): Scheme("w4", "float32"),
    ("onnx", "float16", "int4"): _FP16_ONNX_INT4,
    ("coreml", "auto", "float"): Scheme("float16", "float16"),
    ("coreml", "float32", "float"): Scheme("float32", "float32"),
    ("coreml", "float16", "float"): Scheme("float16", "float16"),
    ("coreml", "auto", "int8"): Scheme("w8", "float16"),
    ("coreml", "float32", "int8"): Scheme("w8", "float32"),
    ("coreml", "float16", "int8"): Scheme("w8", "float16"),
    ("coreml", "auto", "int8_static"): Scheme("w8a8", "float32", _STATIC_IN_FLOAT32),
    ("coreml", "float32", "int8_static"): Scheme("w8a8", "float32"),
    ("coreml", "float16", "int8_static"): _STATIC_FLOAT16,
    ("coreml", "auto", "int8_dynamic"): _NO_DYNAMIC,
    ("coreml", "float32", "int8_dynamic"): _NO_DYNAMIC,
    ("coreml", "float16", "int8_dynamic"): _NO_DYNAMIC,
    ("coreml", "auto", "int4"): Scheme("w4", "float16"),
    ("coreml", "float32", "int4"): Scheme("w4", "float32"),
    ("coreml", "float16", "int4"): Scheme("w4", "float16"),
    ("executorch", "auto", "float"): Scheme("float32", "float32"),
    ("executorch", "float32", "float"): Scheme("float32", "float32"),
    ("executorch", "float16", "float"): _FP16_XNNPACK,
    ("executorch", "auto", "int8"): Scheme("w8", "float32", _XNNPACK_INT8),
    ("executorch", "float32", "int8"): Scheme("w8", "float32", _XNNPACK_INT8),
    ("executorch", "float16", "int8"): _FP16_XNNPACK,
    ("executorch", "auto", "int8_static"): Scheme("w8a8", "float32"),
    ("executorch", "float32", "int8_static"): Scheme("w8a8", "float32"),
    ("executorch", "float16", "int8_static"): _FP16_XNNPACK,
    ("executorch", "auto", "int8_dynamic"): Scheme("w8a8_dynamic", "float32"),
    ("executorch", "float32", "int8_dynamic"): Scheme("w8a8_dynamic", "float32"),
    ("executorch", "float16", "int8_dynamic"): _FP16_XNNPACK,
    ("executorch", "auto", "int4"): _INT4_XNNPACK,
    ("executorch", "float32", "int4"): _INT4_XNNPACK,
    ("executorch", "float16", "int4"): _INT4_XNNPACK,
}


def scheme_for(target: Target, recipe: Recipe) -> Scheme:
    """The scheme that the target uses; raises UserError with the way out where it cannot."""
    weights: Weights = "float"
    for stage in recipe.stages:
        if stage.quantize:
            asked = stage.quantize.every_activations
            dynamic, static = "int8_dynamic" in asked, "int8_static" in asked
            weights = "int8_dynamic" if dynamic else "int8_static" if static else "int8"
            if "int4" in stage.quantize.every_weights:
                weights = "int4"
    found = SUPPORT[target, recipe.precision, weights]
    if isinstance(found, Refusal):
        request = f"precision {recipe.precision} with weights {weights}"
        raise UserError(f"{target} cannot do {request}: {found.reason}; {found.instead}")
    return found


def gates(recipe: Recipe, scheme: Scheme) -> Gates:
    """The figures that the bundle must reach: the target's own, and the recipe's over them.

    Quantized activations are gated layer by layer: single INT8 steps that flip by rounding are
    amplified by depth, so a whole component's SNR against fake quantization says little there.
    """
    integers = scheme.name in ("w8a8", "w8a8_dynamic")
    trajectory_db = 30.0 if scheme.arithmetic == "float16" else 60.0
    if integers:
        trajectory_db = TRAJECTORY_SNR_DB
    own = Gates(
        component_snr_db=None if integers else 60.0,
        float16_snr_db=45.0 if scheme.arithmetic == "float16" else None,
        layer_snr_db=45.0 if integers else None,
        trajectory_snr_db=trajectory_db,
        # Where a few steps flip, all later roundings do: the picture is then as far from torch's as
        # both are from the float picture (36 dB, on the embedded model).
        picture_psnr_db=30.0 if scheme.name == "w8a8" else 40.0,
    )
    return own.model_copy(update=recipe.gates.model_dump(exclude_unset=True))
