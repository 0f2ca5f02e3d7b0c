"""ExecuTorch: an exported component becomes one XNNPACK delegate in a `.pte` file.

XNNPACK has no weight-only INT8. A layer whose plan says `int8_dynamic` keeps its INT8 weights in
the file, and XNNPACK quantizes the layer's input as it comes: a linear's by token, a convolution's
by sample. The torch module says exactly that (recipes/quantize.py); here its graph is only written
down in the form that XNNPACK's partitioner looks for.
"""

import importlib.util
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from converters.components import Component
from converters.lowered import Lowered
from converters.quiet import quiet
from converters.support import Scheme
from mobile_runtime.errors import missing_backend
from recipes.schema import Recipe

# What XNNPACK cannot take as diffusers and transformers write it (converters/rewrites.py).
REWRITES = (
    "explicit_attention",
    "split_geglu",
    "decomposed_group_norm",
    "decomposed_layer_norm",
    "upsample_by_concat",
    "constant_timesteps",
    "gathered_embeddings",
)

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed

# Dynamic activations: (input, weight) of the layers that XNNPACK can compute in INT8.
_LAYERS = (aten.conv2d.default, aten.linear.default)
_NOTHING = (aten.dropout.default, aten.contiguous.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.view_as.default)


@dataclass(frozen=True)
class ExecutorchOptions:
    """How to lower to ExecuTorch. There is one way so far: XNNPACK."""


def prepare(recipe: Recipe, scheme: Scheme) -> ExecutorchOptions:
    """The options that a recipe asks for; UserError where executorch is missing."""
    if importlib.util.find_spec("executorch") is None:
        raise missing_backend("executorch", "executorch", "lowering to .pte")
    return ExecutorchOptions()


def lower(
    component: Component,
    program: torch.export.ExportedProgram,
    folder: Path,
    options: ExecutorchOptions | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Lowered:
    """Lower one exported component, rewritten by REWRITES, to `folder`/NAME.pte.

    details: delegate_calls, nondelegated (calls of each operator that stayed outside XNNPACK),
    macs_delegated_fraction, lowering_seconds. Raises UserError when ExecuTorch is not installed.
    """
    path = folder / f"{component.name}.pte"
    started = time.perf_counter()
    total = count_macs(program.graph_module)
    manager = _lower(program, progress)
    graph_module = manager.exported_program().graph_module
    calls = Counter(_calls(graph_module))
    remaining = count_macs(graph_module)
    progress("write the program")
    # Its serializer reads its schema by a deprecated call.
    with quiet("executorch"), path.open("wb") as file:
        manager.to_executorch().write_to_file(file)
    details = {
        "delegate_calls": calls.pop("executorch_call_delegate", 0),
        "nondelegated": dict(sorted(calls.items())),
        "macs_delegated_fraction": 1 - remaining / total if total else 1.0,
        "lowering_seconds": round(time.perf_counter() - started, 2),
    }
    return Lowered(path, "pte", details)


def _lower(
    program: torch.export.ExportedProgram, progress: Callable[[str], None] = lambda phase: None
) -> Any:
    """An EdgeProgramManager with everything that XNNPACK takes handed to it."""
    with quiet("executorch", "torchao", "torch.utils._pytree"):
        try:
            from executorch.exir import EdgeCompileConfig, to_edge

            from converters import xnnpack
        except ImportError as error:
            raise missing_backend("executorch", "executorch", "lowering to .pte") from error
        progress("lower to XNNPACK")
        tidy(program.graph_module)
        write_dynamic_quantization(program.graph_module)
        config = EdgeCompileConfig(_check_ir_validity=False, preserve_ops=[aten.linear.default])
        with xnnpack.extended():
            # One decomposition of the graph, where to_edge_transform_and_lower makes three.
            return to_edge(program, compile_config=config).to_backend(xnnpack.partitioner())


def tidy(graph_module: GraphModule) -> None:
    """Remove what does nothing, and let permutations give contiguous tensors.

    diffusers divides every residual block by one and drops out nothing; a permuted view would be
    cloned before it is reshaped.
    """
    for node in list(graph_module.graph.nodes):
        if (node.target is aten.div.Tensor and node.args[1] == 1) or node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        elif node.target is aten.permute.default:
            node.target = aten.permute_copy.default
    graph_module.recompile()


def write_dynamic_quantization(graph_module: GraphModule) -> int:
    """Write every dynamically quantized input as XNNPACK's partitioner looks for it.

    The torch module chooses one scale a row of a view of the input: by token for a linear, by
    sample for a convolution. The partitioner wants the per-tensor operators right before the
    layer, and XNNPACK then quantizes by token and by sample all the same. Layers that read the
    same input share its quantization. Returns the number of layers.
    """
    graph = graph_module.graph
    written: dict[Node, Node] = {}
    layers = [node for node in graph.nodes if node.target in _LAYERS]
    count = 0
    for layer in layers:
        source = _dynamic_source(layer.args[0])
        if source is None:
            continue
        if source not in written:
            written[source] = _per_tensor(graph_module, source)
        layer.replace_input_with(layer.args[0], written[source])
        count += 1
    graph.eliminate_dead_code()
    graph_module.recompile()
    return count


def _dynamic_source(layer_input: Any) -> Node | None:
    """The float node that a dynamic quantize-dequantize pair makes a layer's input of, if any.

    Views before and after the pair only line up what shares a scale; the source has the shape that
    the layer sees.
    """
    node = layer_input
    while node.target in _VIEWS:
        node = node.args[0]
    if node.target is not quantized.dequantize_per_token.default:
        return None
    source = node.args[0].args[0]
    while _shape(source) != _shape(layer_input):
        source = source.args[0]
    return source


def _per_tensor(graph_module: GraphModule, source: Node) -> Node:
    """Insert choose_qparams, quantize and dequantize after `source`; the dequantized node."""
    graph = graph_module.graph
    bounds = (-128, 127)

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        node.meta["val"] = target(*values)
        return node

    def item(pair: Node, index: int) -> Node:
        return call(operator.getitem, pair, index)

    with graph.inserting_after(source):
        eps = torch.finfo(torch.float32).eps
        pair = call(quantized.choose_qparams.tensor, source, *bounds, eps, torch.int8)
    with graph.inserting_after(pair):
        scale = item(pair, 0)
    with graph.inserting_after(scale):
        zero = item(pair, 1)
    with graph.inserting_after(zero):
        q = call(quantized.quantize_per_tensor.tensor, source, scale, zero, *bounds, torch.int8)
    with graph.inserting_after(q):
        return call(quantized.dequantize_per_tensor.tensor, q, scale, zero, *bounds, torch.int8)


def count_macs(graph_module: GraphModule) -> int:
    """Multiply-adds of the convolutions, linears and matrix products of a graph."""
    return sum(
        count(node)
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        for count in (_MACS.get(operator_name(node)),)
        if count is not None
    )


def operator_name(node: Node) -> str:
    """`bmm.default` for an aten or edge operator; the plain name of another callable."""
    name = getattr(node.target, "__name__", str(node.target))
    return ".".join(name.split(".")[-2:])


def _calls(graph_module: GraphModule) -> Iterator[str]:
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and operator_name(node) != "getitem":
            yield operator_name(node)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _convolution_macs(node: Node) -> int:
    return prod(_shape(node)) * prod(_shape(node.args[1])[1:])


def _product_macs(node: Node) -> int:
    return prod(_shape(node)) * _shape(node.args[0])[-1]


_MACS: dict[str, Callable[[Node], int]] = {
    "conv2d.default": _convolution_macs,
    "convolution.default": _convolution_macs,
    "linear.default": _product_macs,
    "bmm.default": _product_macs,
    "mm.default": _product_macs,
    "matmul.default": _product_macs,
    "addmm.default": lambda node: prod(_shape(node)) * _shape(node.args[1])[-1],
}


if __name__ == "__main__":
    from converters.cli import run

    run("executorch")
