"""From an exported program to an edge program of ExecuTorch, without work for nothing.

ExecuTorch executes the whole graph anew for every pass and for its decomposition, whether they
find something or not; thousands of nodes make that most of the time. Here a graph that is core
ATen already is not decomposed, and a pass that would write every node as it is does not run. Both
ask the graph, so that another graph goes the whole way.

Import this module only where executorch is installed.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, EdgeProgramManager
from executorch.exir import to_edge as library_to_edge
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.pass_base import ExportPass, NodeMetadata, ProxyValue
from executorch.exir.program._program import _generate_edge_program
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

aten = torch.ops.aten

# Not tagged as core ATen, and kept by ExecuTorch's decomposition all the same.
_KEPT = (aten.linear.default, aten.permute_copy.default, aten.view_copy.default)

# Functions that no pass without such hooks looks at.
_OPAQUE = (operator.getitem, executorch_call_delegate)

# How a pass meets what is no operator; one with its own way of it must run.
_OTHER_HOOKS = [
    name
    for name in dir(ExportPass)
    if name in ("inputs", "on_attr", "output", "placeholder")
    or (name.startswith("call_") and name != "call_operator")
]


def to_edge(program: ExportedProgram) -> EdgeProgramManager:
    """What ExecuTorch's to_edge makes of a program, which is changed on the way."""
    config = EdgeCompileConfig(_check_ir_validity=False, preserve_ops=[aten.linear.default])
    write_core(program.graph_module)
    if not is_core(program.graph_module):
        return library_to_edge(program, compile_config=config)
    edge = _generate_edge_program(config, program, preserve_ops=config.preserve_ops)
    return EdgeProgramManager(edge, compile_config=config)


def is_core(graph_module: GraphModule) -> bool:
    """Whether a decomposition would find nothing to do."""
    return all(
        node.op in ("placeholder", "output")
        or node.target is operator.getitem
        or (isinstance(node.target, OpOverload) and _is_core(node.target))
        for node in graph_module.graph.nodes
    )


def _is_core(target: OpOverload) -> bool:
    own = target.namespace == "quantized_decomposed"
    return own or target in _KEPT or torch.Tag.core in target.tags


def write_core(graph_module: GraphModule) -> None:
    """Write a diffusion model's operators in core ATen, as their decompositions do."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is aten.conv2d.default:
            # The defaults of what the call leaves out; then the order of convolution's arguments.
            given = (*node.args, *(None, (1, 1), (0, 0), (1, 1), 1)[len(node.args) - 2 :])
            x, weight, bias, stride, padding, dilation, groups = given
            node.target = aten.convolution.default
            node.args = (x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
        elif node.target in (aten.reshape.default, aten.view.default):
            node.target = aten.view_copy.default
            node.args = (node.args[0], list(node.meta["val"].shape))
        elif node.target is aten.softmax.int and len(node.args) == 2 and not node.kwargs:
            node.target = aten._softmax.default
            node.args = (*node.args, False)
        elif node.target is aten.silu.default:
            with graph.inserting_before(node):
                gate = graph.call_function(aten.sigmoid.default, node.args)
            gate.meta = node.meta.copy()
            node.target, node.args = aten.mul.Tensor, (node.args[0], gate)
    graph.lint()
    graph_module.recompile()


def asking_first(
    call: Callable[[Any, GraphModule], PassResult],
) -> Callable[[Any, GraphModule], PassResult]:
    """ExportPass.call, but a pass that would change nothing leaves the graph alone."""

    def ask(self: Any, graph_module: GraphModule) -> PassResult:
        if changes_nothing(self, graph_module):
            return PassResult(graph_module, False)
        return call(self, graph_module)

    return ask


def changes_nothing(pass_: Any, graph_module: GraphModule) -> bool:
    """Whether a pass that only looks at operators, one by one, writes each of them as it is.

    A pass that edits the graph by itself, and executes it for fresh values then, is none of these.
    """
    kind = type(pass_)
    if not issubclass(kind, ExportPass) or kind.call_operator is ExportPass.call_operator:
        return False
    if any(getattr(kind, hook) is not getattr(ExportPass, hook) for hook in _OTHER_HOOKS):
        return False

    def write(kind: str, target: Any, args: Any, kwargs: Any, meta: NodeMetadata) -> ProxyValue:
        """In the place of ExportPass._fx, which executes an operator and writes its node."""
        same = (
            target is node.target
            and len(args) == len(given)
            and all(new is old for new, old in zip(args, given, strict=True))
            and kwargs.keys() == named.keys()
            and all(kwargs[name] is old for name, old in named.items())
        )
        if not same:
            raise _WouldChangeError
        return ProxyValue(node.meta["val"], node)

    def value(node: Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(graph_module)
        return ProxyValue(node.meta["val"], node)

    pass_._fx = write
    try:
        for node in graph_module.graph.nodes:
            if isinstance(node.target, OpOverload | EdgeOpOverload):
                given, named = map_arg(node.args, value), map_arg(node.kwargs, value)
                pass_.call_operator(node.target, given, named, NodeMetadata(node.meta))
            elif node.op == "call_function" and node.target not in _OPAQUE:
                return False
    except _WouldChangeError:
        return False
    finally:
        del pass_._fx
    return True


class _WouldChangeError(Exception):
    pass
