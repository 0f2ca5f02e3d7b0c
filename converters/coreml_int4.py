"""4-bit weights in blocks for coremltools: a `constexpr_blockwise_shift_scale` of iOS18."""

from typing import Any

# Defines the operator that is registered here.
import recipes.int4_layers  # noqa: F401


def register() -> None:
    """Teach coremltools our operator; once or again."""
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.mil import types

    @register_torch_op(torch_alias=["pocket_diffusion::dequantize_blockwise"], override=True)
    def dequantize_blockwise(context: Any, node: Any) -> None:
        integers, scale = _get_inputs(context, node, expected=2)
        packed = integers.val.astype(types.nptype_from_builtin(types.int4))
        weight = Builder.constexpr_blockwise_shift_scale(
            data=packed, scale=scale.val, name=node.name
        )
        context.add(weight, node.name)
