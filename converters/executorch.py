"""ExecuTorch: an exported component becomes one XNNPACK delegate in a `.pte` file.

INT8 weights stay INT8 in the file. Where the plan leaves a layer's activations alone, XNNPACK
multiplies them in float32 (converters/xnnpack.py). Where it says `int8_static`, the layer reads and
writes int8 by the plan's scales. Where it says `int8_dynamic`, XNNPACK quantizes the layer's input
as it comes: a linear's by token, a convolution's by sample. The torch module says exactly that
(recipes/quantized_layers.py); here the dynamic graph is only written down in the form that
XNNPACK's partitioner looks for.
"""

if __name__ == "__main__":
    # Before the imports below: help and a wrong request need no torch.
    from converters.cli import run

    run("executorch")

import importlib.util
import operator
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Node

from converters.components import Component
from converters.layer_check import layer_check as layers_alone
from converters.lowered import Lowered, Run
from converters.support import Scheme
from mobile_runtime.backends.executorch import load_file
from mobile_runtime.errors import missing_backend
from recipes.quiet import quiet
from recipes.schema import Recipe

# What XNNPACK cannot take as diffusers and transformers write it (converters/rewrites.py).
REWRITES = (
    "explicit_attention",
    "split_geglu",
    "decomposed_group_norm",
    "decomposed_layer_norm",
    "upsample_by_concat",
    "float_tiny_decoder",
    "constant_timesteps",
    "gathered_embeddings",
)

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed

# Dynamic activations: (input, weight) of the layers that XNNPACK can compute in INT8.
_LAYERS = (aten.conv2d.default, aten.linear.default)
_NOTHING = (aten.dropout.default, aten.contiguous.default)
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute_copy.default,
)


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
    names = ([spec.name for spec in specs] for specs in (component.inputs, component.outputs))
    return Lowered(path, "pte", details, run=Run("executorch", load_file(path, *names)))


def _lower(
    program: torch.export.ExportedProgram, progress: Callable[[str], None] = lambda phase: None
) -> Any:
    """An EdgeProgramManager with everything that XNNPACK takes handed to it."""
    with quiet("executorch", "torchao", "torch.utils._pytree"):
        try:
            from converters import edge, xnnpack
        except ImportError as error:
            raise missing_backend("executorch", "executorch", "lowering to .pte") from error
        progress("lower to XNNPACK")
        own_storage(program)
        tidy(program.graph_module)
        write_dynamic_quantization(program.graph_module)
        with xnnpack.extended():
            # One decomposition of the graph, where to_edge_transform_and_lower makes three.
            return edge.to_edge(program).to_backend(xnnpack.Partitioner())


def layer_check(
    component: Component,
    inputs: Mapping[str, np.ndarray],
    options: ExecutorchOptions | None = None,
    progress: Callable[[str], None] = lambda phase: None,
    layers: Collection[str] | None = None,
) -> dict[str, float]:
    """Each layer with quantized activations alone in ExecuTorch; see converters/layer_check.py."""
    return layers_alone(component, inputs, _run_alone, progress, layers)


def _run_alone(layers: Component, args: list[torch.Tensor]) -> list[torch.Tensor]:
    # The runtime warns that its Python interface may change.
    with quiet("executorch"), torch.no_grad():
        from executorch.runtime import Runtime

        buffer = _lower(torch.export.export(layers.module, tuple(args))).to_executorch().buffer
        loaded = Runtime.get().load_program(buffer)
        return [out.clone() for out in loaded.load_method("forward").execute(args)]


def own_storage(program: torch.export.ExportedProgram) -> None:
    """Give every constant a storage of its own: XNNPACK's serializer writes whole storages."""
    for constants in (program.state_dict, program.constants):
        for name, tensor in constants.items():
            if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                alone = tensor.detach().clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                constants[name] = nn.Parameter(alone, False) if is_parameter else alone


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

    The torch module chooses a scale for each row of a view of the input: tokens, samples, pixels.
    The partitioner wants the per-tensor operators right before the layer, and XNNPACK then
    quantizes by token, sample and pixel all the same. Layers that read the same input share its
    quantization. Returns the number of layers.
    """
    written: dict[tuple[Node, bool], Node] = {}
    count = 0
    for layer in [node for node in graph_module.graph.nodes if node.target in _LAYERS]:
        source = _dynamic_source(layer.args[0])
        if source is None:
            continue
        by_sample = prod(_shape(layer.args[1])[2:]) > 1
        key = (source, by_sample)
        if key not in written:
            written[key] = _per_tensor(graph_module, source)
        layer.replace_input_with(layer.args[0], written[key])
        count += 1
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return count


def _dynamic_source(layer_input: Any) -> Node | None:
    """The float node that a dynamic quantize-dequantize pair makes a layer's input of, if any.

    Views before the pair line up what shares a scale; as many after it put the shape back.
    """
    views, node = 0, layer_input
    while node.target in _VIEWS:
        views, node = views + 1, node.args[0]
    if node.target is not quantized.dequantize_per_token.default:
        return None
    source = node.args[0].args[0]
    for _ in range(views):
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
