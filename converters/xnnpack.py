"""INT8 weights with float activations in XNNPACK, which ExecuTorch's partitioner does not offer.

XNNPACK's runtime has a fully-connected kernel of float32 activations and INT8 weights (f32-qc8w);
the ahead-of-time part of ExecuTorch only knows quantized weights beside quantized activations.
Partitioner rules that accept such layers, and serializers that write them, close the gap: a linear
is that kernel, and a convolution is the sum of one for each tap of its kernel, over the picture
shifted by as much. The integers stay what they were.

And of the passes that prepare a graph for XNNPACK, only those run that can find something in it.

Import this module only where executorch is installed.
"""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast
from unittest import mock

import torch
from executorch.backends.xnnpack import _passes, xnnpack_preprocess
from executorch.backends.xnnpack._passes.decompose_cat import DecomposeConcatenate
from executorch.backends.xnnpack._passes.fuse_activation_pass import FuseActivationPass
from executorch.backends.xnnpack.operators import node_visitor
from executorch.backends.xnnpack.partition.config import (
    ALL_PARTITIONER_CONFIGS,
    ConvolutionConfig,
    LinearConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.utils.quant_utils import (
    is_dequant,
    is_dynamic_qdq,
    is_per_channel,
    is_qparam,
)
from executorch.backends.xnnpack.utils.utils import get_input_node, get_param_tensor, is_getitem
from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX, XNN_INVALID_VALUE_ID
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.pass_base import ExportPass
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Node
from torch.fx.passes.infra.partitioner import Partition

from converters import edge

_LINEAR, _CONVOLUTION = "aten.linear.default", "aten.convolution.default"


def is_weight_only(layer: Node) -> bool:
    """Whether a convolution or linear has INT8 weights and a float input."""
    weight = layer.args[1]
    return (
        isinstance(weight, Node)
        and is_dequant(weight)
        and is_per_channel(weight)
        and not is_dequant(get_input_node(layer, 0))
    )


class _WeightOnly:
    """Accepts a layer of INT8 weights whose input is float; all else as the base rule."""

    def _detect_precision(self, node: Node) -> ConfigPrecisionType:
        if is_weight_only(node):
            # The base class asks nothing of the output of a dynamically quantized layer.
            return ConfigPrecisionType.DYNAMIC_QUANT
        return super()._detect_precision(node)  # type: ignore[misc]

    def _get_act_deps(self, node: Node, ep: Any, precision: Any) -> tuple[bool, list[Node]]:
        if is_weight_only(node):
            return True, []
        return super()._get_act_deps(node, ep, precision)  # type: ignore[misc]


class WeightOnlyLinear(_WeightOnly, LinearConfig):
    """Linears, with the weight-only ones."""


class WeightOnlyConvolution(_WeightOnly, ConvolutionConfig):
    """Convolutions, with the weight-only ones that are neither dilated nor grouped."""

    def check_constraints(self, node: Node, ep: Any) -> bool:
        """Refuse a weight-only convolution of another kind."""
        if is_weight_only(node):
            _, _, _, _, _, dilation, transposed, _, groups = node.args
            if tuple(dilation) != (1, 1) or transposed or groups != 1:  # type: ignore[arg-type]
                return False
        return super().check_constraints(node, ep)


class Partitioner(XnnpackPartitioner):
    """XNNPACK's partitioner with the weight-only layers.

    A graph that XNNPACK takes as a whole is one partition. The library would find the same by
    merging the groups of nodes two by two, with a search for cycles each time.
    """

    def __init__(self) -> None:
        own = {LinearConfig: WeightOnlyLinear, ConvolutionConfig: WeightOnlyConvolution}
        super().__init__(configs=[own.get(rule, rule) for rule in ALL_PARTITIONER_CONFIGS])

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """The partitions of a program."""
        program = finished(ep)
        groups = self.get_matched_nodes_from_configs(program)
        taken = {node for group in groups for node in group}
        if all(node in taken for node in program.graph.nodes if node.op == "call_function"):
            return [Partition(id=0, nodes=[node for node in program.graph.nodes if node in taken])]
        return super().generate_partitions(program)


class _Writer(node_visitor.NodeVisitor):
    """Writes values and nodes of XNNPACK's graph that have no node of their own in torch's."""

    def constant(self, graph: schema.XNNGraph, tensor: torch.Tensor, scale: int | None) -> int:
        """A constant value: float32, or int8 by channel of axis 0 with the scales of a buffer."""
        buffer = self.buffer(graph, tensor)
        if scale is None:
            return self.value(graph, tensor.shape, buffer=buffer)
        value = self._tensor(graph, tensor.shape, schema.XNNDatatype.xnn_datatype_qcint8, buffer)
        quantization = schema.PerChannelQuant(
            scale=[], channel_dim=0, scale_buffer_idx=scale, num_scales=tensor.shape[0]
        )
        quantized = schema.XNNQuantizedTensorValue(tensor_value=value, quant_params=quantization)
        graph.xvalues.append(schema.XValue(xvalue_union=quantized))
        return value.id_out

    def value(self, graph: schema.XNNGraph, shape: Sequence[int], buffer: int = 0) -> int:
        """A float32 value, constant if it has a buffer."""
        value = self._tensor(graph, shape, schema.XNNDatatype.xnn_datatype_fp32, buffer)
        graph.xvalues.append(schema.XValue(xvalue_union=value))
        return value.id_out

    def buffer(self, graph: schema.XNNGraph, tensor: torch.Tensor) -> int:
        """Store a tensor's bytes; the same bytes are stored once."""
        data = tensor.contiguous().numpy().tobytes()
        key = hashlib.sha256(data).hexdigest()
        self._named_data_store.add_named_data(
            key, data, alignment=node_visitor.CONSTANT_TENSOR_ALIGNMENT
        )
        offset = schema.ConstantDataOffset(offset=UINT64_MAX, size=len(data), named_key=key)
        graph.constant_data.append(offset)
        return len(graph.constant_data) - 1

    def parameter(self, node: Any) -> torch.Tensor:
        """The constant tensor behind a node."""
        tensor = get_param_tensor(self.exported_program, node)
        assert tensor is not None
        return tensor.detach()

    def _tensor(
        self, graph: schema.XNNGraph, shape: Sequence[int], dtype: Any, buffer: int
    ) -> schema.XNNTensorValue:
        return schema.XNNTensorValue(
            datatype=dtype,
            num_dims=len(shape),
            dims=list(shape),
            constant_buffer_idx=buffer,
            external_id=XNN_INVALID_VALUE_ID,
            flags=0,
            id_out=len(graph.xvalues),
        )


class _WeightOnlyWriter(_Writer):
    """What the writers of both kinds of layer share: products, sums, and the bias at the end.

    XNNPACK's kernel would multiply a bias by the scale of the weights, so it is added afterwards.
    """

    base: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._base = self.base(*args)

    def define_node(
        self,
        node: Node,
        xnn_graph: schema.XNNGraph,
        vals_to_ids: dict[Node, int],
        debug_handle: int,
    ) -> None:
        """Serialize one layer: a weight-only one here, all others as the library does."""
        if not is_weight_only(node):
            self._base.define_node(node, xnn_graph, vals_to_ids, debug_handle)
            return
        first = len(xnn_graph.xnodes)
        nhwc = self.target == _CONVOLUTION
        self.define_tensor(get_input_node(node, 0), xnn_graph, vals_to_ids, convert_to_nhwc=nhwc)
        source = vals_to_ids[get_input_node(node, 0)]
        weight, scale, *_ = get_input_node(node, 1).args
        terms = self.products(
            node,
            xnn_graph,
            source,
            self.parameter(weight),
            self.buffer(xnn_graph, self.parameter(scale)),
        )
        if len(node.args) > 2 and node.args[2] is not None:
            terms.append(self.constant(xnn_graph, self.parameter(node.args[2]), None))
        self.define_tensor(node, xnn_graph, vals_to_ids, convert_to_nhwc=nhwc)
        self._sum(xnn_graph, terms, self._shape(node, nhwc), vals_to_ids[node])
        for written in xnn_graph.xnodes[first:]:
            written.debug_handle = debug_handle
        xnn_graph.xnodes[-1].output_min_max = FuseActivationPass.get_fused_activation(node)

    def products(
        self, node: Node, graph: schema.XNNGraph, source: int, weight: torch.Tensor, scale: int
    ) -> list[int]:
        """Write the products whose sum is the layer; their values."""
        raise NotImplementedError

    def product(
        self, graph: schema.XNNGraph, source: int, weight: torch.Tensor, scale: int, shape: Any
    ) -> int:
        """Write one fully-connected node; its value."""
        output = self.value(graph, shape)
        self.write(
            graph,
            schema.XNNFullyConnected(
                input1_id=source,
                filter_id=self.constant(graph, weight, scale),
                bias_id=XNN_INVALID_VALUE_ID,
                output_id=output,
                flags=0,
            ),
        )
        return output

    def write(self, graph: schema.XNNGraph, operation: Any) -> None:
        """Append a node."""
        graph.xnodes.append(schema.XNode(xnode_union=operation, debug_handle=0))

    def _sum(self, graph: schema.XNNGraph, terms: list[int], shape: Any, output: int) -> None:
        """Write the sum of some values into `output`."""
        if len(terms) == 1:
            # Nothing to add: the only product writes the output itself.
            graph.xnodes[-1].xnode_union.output_id = output
            return
        total = terms[0]
        for index, term in enumerate(terms[1:], start=2):
            out = output if index == len(terms) else self.value(graph, shape)
            self.write(
                graph, schema.XNNAdd(input1_id=total, input2_id=term, output_id=out, flags=0)
            )
            total = out

    def _shape(self, node: Any, nhwc: bool) -> list[int]:
        shape = list(node.meta["val"].shape)
        return [shape[0], *shape[2:], shape[1]] if nhwc else shape


class LinearWriter(_WeightOnlyWriter):
    """A weight-only linear: one product."""

    target = _LINEAR
    # The library's registering decorator leaves no name behind for its classes.
    base = node_visitor._node_visitor_dict[_LINEAR]

    def products(
        self, node: Node, graph: schema.XNNGraph, source: int, weight: torch.Tensor, scale: int
    ) -> list[int]:
        """One fully-connected node."""
        return [self.product(graph, source, weight, scale, self._shape(node, False))]


class ConvolutionWriter(_WeightOnlyWriter):
    """A weight-only convolution: a product for each tap of the kernel, one after the other.

    In channels-last order a pixel's channels lie together, so a tap is a fully-connected layer of
    the pixels that it meets. Steps of a stride are taken by folding them into axes of their own:
    (B, H, W, C) -> (B, H/2, 2, W/2, 2C).
    """

    target = _CONVOLUTION
    base = node_visitor._node_visitor_dict[_CONVOLUTION]

    def products(
        self, node: Node, graph: schema.XNNGraph, source: int, weight: torch.Tensor, scale: int
    ) -> list[int]:
        """Pad the picture once; then slice and multiply for each tap."""
        batch, rows, columns, channels = self._shape(get_input_node(node, 0), True)
        shape = self._shape(node, True)
        kernel = weight.shape[2:]
        arguments: Any = node.args  # fx types an argument as anything that a graph can hold
        stride, padding = arguments[3], arguments[4]
        blocks, padded = [], []
        for axis, size in enumerate((rows, columns)):
            step, before = stride[axis], padding[axis]
            needed = shape[1 + axis] + (kernel[axis] - 1) // step
            blocks.append(max(needed, -(-(size + before) // step)))
            padded.append(blocks[axis] * step)
        if padded != [rows, columns]:
            before = [0, padding[0], padding[1], 0]
            edges = zip(
                (batch, *padded, channels), (batch, rows, columns, channels), before, strict=True
            )
            after = [new - old - first for new, old, first in edges]
            output = self.value(graph, [batch, *padded, channels])
            pad = schema.XNNStaticConstantPad(before, after, 0.0, source, output, 0)
            self.write(graph, pad)
            source = output
        down, right = stride
        if (down, right) != (1, 1):
            folded = [batch, blocks[0], down, blocks[1], right * channels]
            source = self._reshape(graph, source, folded)
        terms = []
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                if (down, right) == (1, 1):
                    pixels = self._slice(
                        graph,
                        source,
                        [batch, *padded, channels],
                        [0, i, j, 0],
                        [*shape[:3], channels],
                    )
                else:
                    offsets = [0, i // down, i % down, j // right, j % right * channels]
                    sizes = [batch, shape[1], 1, shape[2], channels]
                    pixels = self._slice(graph, source, folded, offsets, sizes)
                    pixels = self._reshape(graph, pixels, [*shape[:3], channels])
                terms.append(self.product(graph, pixels, weight[:, :, i, j], scale, shape))
        return terms

    def _slice(
        self,
        graph: schema.XNNGraph,
        source: int,
        shape: list[int],
        offsets: list[int],
        sizes: list[int],
    ) -> int:
        if sizes == shape:
            return source
        output = self.value(graph, sizes)
        operation = schema.XNNStaticSlice(len(sizes), offsets, sizes, source, output, 0)
        self.write(graph, operation)
        return output

    def _reshape(self, graph: schema.XNNGraph, source: int, shape: list[int]) -> int:
        output = self.value(graph, shape)
        self.write(graph, schema.XNNStaticReshape(len(shape), shape, source, output, 0))
        return output


class KeepLayoutOfDynamicInputs(_passes.ChannelsLastTaggedReshapePass):
    """Lays a convolution's input out as channels-last before it is quantized, not far upstream.

    The base class converts the tensor where its chain of first arguments begins, which in a deep
    network is another tensor altogether.
    """

    def requires_nhwc_input(self, node: Node) -> bool:
        """Whether a node wants channels-last, now also what quantizes for a convolution."""
        return super().requires_nhwc_input(node) or _quantizes_for_convolution(node)


def _quantizes_for_convolution(node: Node) -> bool:
    if not (is_qparam(node) or is_dynamic_qdq(node)):
        return False
    users = [user for item in node.users for user in (item.users if is_getitem(item) else [item])]
    return any(
        "convolution" in str(user.target) or _quantizes_for_convolution(user) for user in users
    )


class LayoutWithoutRoundTrips(KeepLayoutOfDynamicInputs, _passes.RemoveRedundantCopyPass):
    """Lays pictures out as channels-last, then removes the copies that undo each other.

    Each of the two edits the graph and calls the next, and the last executes it, once.
    """


def _items(argument: Any) -> list[Any]:
    return list(argument)


_ACTIVATIONS = FuseActivationPass.FUSEABLE_ACTIVATIONS
_CAT = exir_ops.edge.aten.cat.default

# The passes that can find something in a diffusion model, and whether they find it in a node. A
# pass executes the whole graph anew, so those that find nothing do not run. ConvertToSDPAPass must
# not run at all: it mistakes a plain product, softmax and product for its own pattern, and fails.
PASSES: dict[type[ExportPass], Callable[[Node], bool]] = {
    _passes.XNNPACKRemoveCloneOpsTransform: lambda node: True,
    # Every pass that only looks at operators asks by itself (converters/edge.py).
    _passes.DimOrderOpsRevertPass: lambda node: True,
    FuseActivationPass: lambda node: node.target in _ACTIVATIONS,
    # As the pass counts: XNNPACK joins five tensors at most.
    DecomposeConcatenate: lambda node: node.target is _CAT and len(_items(node.args[0])) > 5,
    LayoutWithoutRoundTrips: lambda node: True,
}


class PassManager(_passes.XNNPACKPassManager):
    """Runs PASSES, each if it finds something; nothing changes the program afterwards."""

    def transform(self) -> ExportedProgram:
        """The program with its passes run."""
        program = self.exported_program
        for kind, finds in PASSES.items():
            if any(finds(node) for node in program.graph.nodes):
                program = _passes.XNNPACKPassManager(program, [kind]).transform()
        return finished(program)


def _made_once(name: str) -> Any:
    return cached_property(vars(ExportGraphSignature)[name].fget)


class FinishedSignature(ExportGraphSignature):
    """A signature that does not change any more, so that its tables are made once.

    XNNPACK's rules and writers ask for them some ten times a node.
    """

    parameters = _made_once("parameters")
    buffers = _made_once("buffers")
    inputs_to_parameters = _made_once("inputs_to_parameters")
    inputs_to_buffers = _made_once("inputs_to_buffers")
    inputs_to_lifted_tensor_constants = _made_once("inputs_to_lifted_tensor_constants")

    def replace_all_uses(self, old: str, new: str) -> None:
        """Refuse to change."""
        raise RuntimeError("a finished signature cannot change")


def finished(program: ExportedProgram) -> ExportedProgram:
    """The same program, of the same graph and constants, with a finished signature."""
    program = copy.copy(program)
    specs: list[Any] = [program.graph_signature.input_specs, program.graph_signature.output_specs]
    inputs, outputs = (cast(Any, tuple(each)) for each in specs)
    program._graph_signature = FinishedSignature(inputs, outputs)
    return program


@contextlib.contextmanager
def extended() -> Iterator[None]:
    """Lower with the extensions above; what ExecuTorch had is put back at the end.

    Each patch names what it replaces, and fails where an ExecuTorch has no such thing.
    """
    with (
        # Passes that would change nothing do not execute the graph.
        mock.patch.object(ExportPass, "call", edge.asking_first(ExportPass.call)),
        # Its preprocessing has no argument for the passes to run.
        mock.patch.object(xnnpack_preprocess, "XNNPACKPassManager", PassManager),
        # Its registry of writers is a plain dictionary, without a way to take one out.
        mock.patch.dict(node_visitor._node_visitor_dict),
    ):
        node_visitor.register_node_visitor(LinearWriter)
        node_visitor.register_node_visitor(ConvolutionWriter)
        yield
