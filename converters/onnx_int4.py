"""4-bit weights in an ONNX graph: INT4 initializers behind a DequantizeLinear with blocks.

A linear's integers are stored as a MatMul reads them, (in, out): in that form alone ONNX Runtime
makes a MatMulNBits of the two, which keeps the 4 bits in memory; else it would write the whole
float weight at each call. A convolution's are dequantized at each call, as its INT8 ones are.

What float16 holds exactly (steps, branches) is stored in it, behind a Cast that ONNX Runtime runs
once, when it loads the file.
"""

from typing import Any

import numpy as np

from recipes.int4_layers import OPERATOR

OPSET = 21
"""The first that has INT4 and blocks."""

_SMALLEST_ARRAY = 64
"""Of numbers, that are stored as float16; for fewer the Cast would take more."""


def translations() -> dict[Any, Any]:
    """What torch's exporter has to know of our operator."""
    from onnxscript import opset21

    def dequantize_blockwise(integers: Any, scale: Any) -> Any:
        block = integers.shape[1] // scale.shape[1]
        return opset21.DequantizeLinear(integers, scale, axis=1, block_size=block)

    return {OPERATOR: dequantize_blockwise}


def store(ir: Any, model: Any) -> int:
    """Store a translated model's blockwise integers in 4 bits, in place; how many weights."""
    weights = [node for node in model.graph if _is_blockwise(node)]
    for node in weights:
        readers = {user for user, _ in node.outputs[0].uses()}
        alone = all(len(value.uses()) == 1 for value in node.inputs[:2])
        if alone and all(reader.op_type == "Transpose" for reader in readers):
            _transposed(ir, node, readers)
        integers = _constant(node.inputs[0])
        _set(ir, node.inputs[0], integers, ir.DataType.INT4)
    if weights:
        _store_float16(ir, model.graph)
    return len(weights)


def _is_blockwise(node: Any) -> bool:
    return node.op_type == "DequantizeLinear" and "block_size" in node.attributes


def _constant(value: Any) -> np.ndarray:
    found: np.ndarray = value.const_value.numpy()
    return found


def _set(ir: Any, value: Any, array: np.ndarray, dtype: Any) -> None:
    """Give an initializer another constant."""
    array = np.ascontiguousarray(array).astype(dtype.numpy())
    value.const_value = ir.Tensor(array, dtype=dtype, name=value.name)
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(dtype)


def _transposed(ir: Any, node: Any, readers: set[Any]) -> None:
    """Move the transposition after a weight into its constants."""
    for value in node.inputs[:2]:
        _set(ir, value, _constant(value).T, value.const_value.dtype)
    node.attributes["axis"] = ir.AttrInt64("axis", 0)
    node.outputs[0].shape = ir.Shape(reversed(tuple(node.outputs[0].shape)))
    for reader in readers:
        reader.outputs[0].replace_all_uses_with(node.outputs[0])
        reader.graph.remove(reader, safe=True)


def _store_float16(ir: Any, graph: Any) -> None:
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor.dtype != ir.DataType.FLOAT or tensor.size < _SMALLEST_ARRAY:
            continue
        whole = tensor.numpy()
        with np.errstate(over="ignore"):
            half = whole.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), whole):
            continue
        stored = ir.Value(name=f"{name}_float16")
        _set(ir, stored, half, ir.DataType.FLOAT16)
        graph.register_initializer(stored)
        cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)])
        value.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(graph[0], cast)
        del graph.initializers[name]
        cast.outputs[0].name = name
