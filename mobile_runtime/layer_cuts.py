"""Quantized layers cut out of an ONNX file, each with its own ends.

A cut begins at the float value in front of a layer's QuantizeLinear, and ends at its result: behind
the DequantizeLinear where that is quantized, too. Several are put beside each other into one model,
with an input and an output for each.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobile_runtime import taps
from mobile_runtime.errors import missing_backend
from mobile_runtime.goldens import Arrays


def import_onnx() -> Any:
    """The library; UserError where it is missing."""
    try:
        import onnx
    except ImportError as error:
        raise missing_backend("onnx", "onnx", "cutting layers out of a model") from error
    return onnx


@dataclass(frozen=True)
class Cut:
    """One layer in the graph: its nodes in order, the float values it reads, and its result."""

    layer: str
    nodes: tuple[Any, ...]
    inputs: tuple[str, ...]
    output: str


def cut(path: Path, known: taps.Taps, layers: Collection[str]) -> tuple[Any, list[Cut]]:
    """The model, and where these layers begin and end in it, in the order of execution."""
    model = import_onnx().load(path)
    return model, list(_cuts(model.graph, known, set(layers)))


def _cuts(graph: Any, known: taps.Taps, wanted: set[str]) -> Iterable[Cut]:
    """Where each wanted layer begins and ends in the graph."""
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    places = {id(node): k for k, node in enumerate(graph.node)}
    for tap in known.taps:
        if tap.layer not in wanted:
            continue
        wanted.discard(tap.layer)
        behind = _behind(tap.value, readers)
        nodes, inputs, waiting = list(behind), dict[str, None](), [tap.value]
        while waiting:
            name = waiting.pop()
            node = makers.get(name)
            if node is None or node in nodes:
                if node is None and name in {one.name for one in graph.input}:
                    inputs[name] = None
                continue
            nodes.append(node)
            if node.op_type == "QuantizeLinear" and node.input[0] in makers:
                inputs[node.input[0]] = None
                waiting += node.input[1:]
            else:
                waiting += node.input
        nodes.sort(key=lambda node: places[id(node)])
        output = behind[-1].output[0] if behind else tap.value
        yield Cut(tap.layer, tuple(nodes), tuple(inputs), output)


def _behind(value: str, readers: dict[str, list[Any]]) -> list[Any]:
    """The QuantizeLinear and DequantizeLinear behind a layer's result, if it is quantized."""
    for node in readers.get(value, ()):
        if node.op_type == "QuantizeLinear":
            for last in readers.get(node.output[0], ()):
                if last.op_type == "DequantizeLinear":
                    return [node, last]
    return []


def sizes(known: taps.Taps, names: Iterable[str]) -> dict[str, int]:
    """How many elements values have, about: the file tells it of none, and the taps of many."""
    elements = {tap.value: tap.elements for tap in known.taps}
    usual = sum(elements.values()) // len(elements)
    return {name: elements.get(name, usual) for name in names}


def beside(model: Any, cuts: Sequence[Cut], seen: Arrays) -> tuple[Any, Arrays]:
    """One model of the layers, and what to feed it. Only their constants keep their names.

    seen: what they read, by its name in the file. Layer k reads xk_0, xk_1, ... and gives yk.
    """
    onnx = import_onnx()
    nodes, inputs, outputs, fed = [], [], [], Arrays()
    constants: set[str] = set()
    known = {one.name for one in model.graph.initializer}
    for k, one in enumerate(cuts):
        names = {one.output: f"y{k}"}
        for j, name in enumerate(one.inputs):
            names[name] = f"x{k}_{j}"
            fed[f"x{k}_{j}"] = np.ascontiguousarray(seen[name])
            kind = onnx.helper.np_dtype_to_tensor_dtype(seen[name].dtype)
            inputs.append(onnx.helper.make_tensor_value_info(f"x{k}_{j}", kind, seen[name].shape))
        outputs.append(onnx.ValueInfoProto(name=f"y{k}"))
        for node in one.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"layer{k}_{node.name}"
            for field in (copy.input, copy.output):
                for i, name in enumerate(field):
                    if name and name not in known:
                        field[i] = names.setdefault(name, f"layer{k}_{name}")
            constants |= set(node.input) & known
            nodes.append(copy)
    graph = onnx.helper.make_graph(
        nodes,
        "layers",
        inputs,
        outputs,
        [one for one in model.graph.initializer if one.name in constants],
    )
    made = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    made.ir_version = model.ir_version
    return made, fed


def unoptimized(model: Any, fed: Arrays) -> Arrays:
    """What the layers give with every QuantizeLinear and DequantizeLinear computed by itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, fed), strict=True))
