"""Palettes in an ML program: weights become `constexpr_lut_to_dense`, and are read back.

The pass comes first of all, as coremltools' own does for palettized PyTorch models: what is
decompressed by an operation is no constant any more that later passes would fold or fuse.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.palettes import Palette, digest, looked_up
from mobile_runtime.backends.mil.values import Constant
from mobile_runtime.backends.mil.weights import unpack

_PASS = "pocket_diffusion::palettes"


def pass_pipeline(palettes: Iterable[Palette]) -> Any:
    """coremltools' default passes, and before them the one that stores weights by their palettes.

    A constant is known by its values. With no palettes, the default passes alone.
    """
    import coremltools

    passes = coremltools.PassPipeline.DEFAULT
    by_digest = {palette.digest: palette for palette in palettes}
    if by_digest:
        _register()
        passes.insert_pass(0, _PASS)
        passes.set_options(_PASS, {"palettes": by_digest})
    return passes


def _register() -> None:
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.helper import block_context_manager
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if _PASS in PASS_REGISTRY:
        return

    class palettes(AbstractGraphPass):  # noqa: N801 - coremltools takes the pass's name from it
        """Replaces each constant that a palette made."""

        palettes: Mapping[bytes, Palette] = {}

        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                self._apply(function)

        @block_context_manager
        def _apply(self, block: Any) -> None:
            for op in list(block.operations):
                value = op.outputs[0].val if op.op_type == "const" else None
                if isinstance(value, np.ndarray) and value.ndim > 1 and value.dtype.kind == "f":
                    palette = self.palettes.get(digest(value))
                    if palette is not None:
                        _replace(block, op, palette)

    register_pass(namespace=_PASS.split("::")[0])(palettes)


def _replace(block: Any, op: Any, palette: Palette) -> None:
    """Put the operation that looks a weight up in the place of the constant, under its name."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import types

    weight = op.outputs[0].val
    indices = palette.indices(weight)
    tables = palette.tables.astype(weight.dtype)
    given: dict[str, Any]
    if _has_typed_indices(block):
        narrow = types.nptype_from_builtin(types.string_to_builtin(f"uint{palette.bits}"))
        shape = (palette.groups, *[1] * (weight.ndim - 1), 2**palette.bits, 1)
        given = {"indices": indices.astype(narrow), "lut": tables.reshape(shape)}
    else:
        (table,) = tables
        bits = np.unpackbits(indices.reshape(-1, 1), axis=1, bitorder="little")
        packed = np.packbits(bits[:, : palette.bits], bitorder="little")
        given = {"indices": packed, "lut": table, "shape": np.array(weight.shape, np.uint32)}
    looked = Builder.constexpr_lut_to_dense(**given, before_op=op, name=op.name)
    block.replace_uses_of_var_after_op(
        anchor_op=op, old_var=op.outputs[0], new_var=looked, no_check_var_types=True
    )
    block.remove_ops([op])


def _has_typed_indices(block: Any) -> bool:
    """Whether the program is of iOS18, whose indices have types narrower than a byte."""
    import coremltools

    return bool(block.opset_version >= coremltools.target.iOS18)


def check_stored(
    path: Path, stored: Iterable[Mapping[str, Constant]], palettes: Iterable[Palette]
) -> None:
    """Refuse, as a bug, a package whose tables and indices do not make the weights of the plan.

    stored: the arguments of each `constexpr_lut_to_dense`, as they are in the file.
    """
    found = {digest(_decoded(**{name: c.read() for name, c in given.items()})) for given in stored}
    # A weight that two layers share may be stored once.
    if found != {palette.digest for palette in palettes}:
        raise RuntimeError(f"{path} does not hold the palettes of the plan")


def _decoded(indices: np.ndarray, lut: np.ndarray, shape: np.ndarray | None = None) -> np.ndarray:
    if shape is not None:
        bits = len(lut).bit_length() - 1
        return looked_up(unpack(indices, f"UINT{bits}", tuple(shape)), lut[None])
    return looked_up(indices, lut.reshape(-1, lut.shape[-2]))
