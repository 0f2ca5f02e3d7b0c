"""Compressed weights come out as coremltools decompresses them, in every scheme that it has.

Each program is x @ W.T with x the identity, so that its output is the decompressed weight.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobile_runtime.backends.mil import Program
from tests.mobile_runtime.mil_programs import coremltools, normal, quiet

ROWS, COLUMNS = 32, 64
FLOATS = {"float32": "FLOAT32", "float16": "FLOAT16"}


def make_model(precision: str, opset: str) -> Any:
    ct = coremltools()
    from coremltools.converters.mil import mil

    mb, dtype = mil.Builder, np.dtype(precision)
    weight = normal(ROWS, COLUMNS).astype(dtype)
    fp = mil.types.numpy_type_to_builtin_type(dtype)

    @mb.program(
        input_specs=[mb.TensorSpec((COLUMNS, COLUMNS), fp)],
        opset_version=getattr(ct.target, opset),
    )
    def program(x: Any) -> Any:
        return mb.linear(x=x, weight=weight, bias=np.zeros(ROWS, dtype), name="y")

    return ct.convert(
        program,
        minimum_deployment_target=getattr(ct.target, opset),
        compute_precision=getattr(ct.precision, FLOATS[precision]),
        skip_model_load=True,
    )


def linear_int(**arguments: Any) -> Any:
    def compress(cto: Any, model: Any) -> Any:
        op = cto.OpLinearQuantizerConfig(weight_threshold=0, **arguments)
        return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=op))

    return compress


def palettes(**arguments: Any) -> Any:
    def compress(cto: Any, model: Any) -> Any:
        op = cto.OpPalettizerConfig(weight_threshold=0, **arguments)
        return cto.palettize_weights(model, cto.OptimizationConfig(global_config=op))

    return compress


def pruned(cto: Any, model: Any) -> Any:
    op = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0)
    return cto.prune_weights(model, cto.OptimizationConfig(global_config=op))


def int8_on_top(first: Any, **arguments: Any) -> Any:
    def compress(cto: Any, model: Any) -> Any:
        op = cto.OpLinearQuantizerConfig(weight_threshold=0, dtype="int8", **arguments)
        config = cto.OptimizationConfig(global_config=op)
        return cto.linear_quantize_weights(first(cto, model), config, joint_compression=True)

    return compress


def palettes_on_top(first: Any) -> Any:
    def compress(cto: Any, model: Any) -> Any:
        op = cto.OpPalettizerConfig(weight_threshold=0, nbits=4, mode="uniform")
        config = cto.OptimizationConfig(global_config=op)
        return cto.palettize_weights(first(cto, model), config, joint_compression=True)

    return compress


# name: (opset, what the file must hold, how to compress)
SCHEMES: dict[str, tuple[str, str, Any]] = {
    **{
        f"int8_{mode}_{dtype}_{granularity}": (
            "iOS16",
            "constexpr_affine_dequantize",
            linear_int(mode=mode, dtype=dtype, granularity=granularity),
        )
        for mode in ("linear_symmetric", "linear")
        for dtype in ("int8", "uint8")
        for granularity in ("per_channel", "per_tensor")
    },
    **{
        f"blockwise_{dtype}_{mode}": (
            "iOS18",
            "constexpr_blockwise_shift_scale",
            linear_int(mode=mode, dtype=dtype, granularity="per_block", block_size=16),
        )
        for mode in ("linear_symmetric", "linear")
        for dtype in ("int4", "uint4", "int8", "uint8")
    },
    **{
        f"palette_{bits}bit": (
            "iOS16",
            "constexpr_lut_to_dense",
            palettes(nbits=bits, mode="uniform"),
        )
        for bits in (1, 2, 4, 6, 8)
    },
    **{
        f"palette_{bits}bit_grouped": (
            "iOS18",
            "constexpr_lut_to_dense",
            palettes(nbits=bits, mode="uniform", granularity="per_grouped_channel", group_size=8),
        )
        for bits in (1, 2, 3, 4, 6, 8)
    },
    "palette_vectors": (
        "iOS18",
        "constexpr_lut_to_dense",
        palettes(nbits=4, mode="kmeans", cluster_dim=4),
    ),
    "palette_scaled": (
        "iOS18",
        "constexpr_lut_to_dense",
        palettes(nbits=4, mode="uniform", enable_per_channel_scale=True),
    ),
    "sparse": ("iOS16", "constexpr_sparse_to_dense", pruned),
    "sparse_ios18": ("iOS18", "constexpr_sparse_to_dense", pruned),
    "sparse_int8": (
        "iOS18",
        "constexpr_sparse_blockwise_shift_scale",
        int8_on_top(pruned),
    ),
    "sparse_palette": ("iOS18", "constexpr_lut_to_sparse", palettes_on_top(pruned)),
    "palette_of_int8": (
        "iOS18",
        "constexpr_lut_to_dense",
        int8_on_top(palettes(nbits=4, mode="uniform"), granularity="per_tensor"),
    ),
}

ONE_OF_EACH_KIND = sorted({kind: name for name, (_, kind, _) in SCHEMES.items()}.values())


def weight_of(model: Any, folder: Path, name: str, precision: str) -> tuple[np.ndarray, set[str]]:
    """The weight that the saved model computes with, exactly as held, and its operations."""
    model.save(str(folder / f"{name}.mlpackage"))
    program = Program.open(folder / f"{name}.mlpackage")
    eye = np.eye(COLUMNS, dtype=precision)
    y = program.run({"x": eye}, arithmetic=precision)["y"]  # type: ignore[arg-type]
    return y.T, set(program.kinds)


# Every scheme in fp16, and one of each kind in fp32.
@pytest.mark.parametrize(
    ("scheme", "precision"),
    [(scheme, "float16") for scheme in SCHEMES]
    + [(scheme, "float32") for scheme in ONE_OF_EACH_KIND],
)
def test_a_compressed_weight_equals_its_decompression(
    scheme: str, precision: str, tmp_path: Path
) -> None:
    opset, kind, compress = SCHEMES[scheme]
    with quiet():
        import coremltools.optimize.coreml as cto

        compressed = compress(cto, make_model(precision, opset))
        weight, kinds = weight_of(compressed, tmp_path, "compressed", precision)
        dense, dense_kinds = weight_of(
            cto.decompress_weights(compressed), tmp_path, "dense", precision
        )
    assert kind in kinds
    assert not any(name.startswith("constexpr_") for name in dense_kinds)
    if precision == "float16":
        np.testing.assert_array_equal(weight, dense)
    else:
        np.testing.assert_allclose(weight, dense, rtol=1e-6, atol=1e-7)
