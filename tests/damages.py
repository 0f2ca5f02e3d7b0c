"""Ways to damage a bundle as a wrong conversion would, for the test of the harness itself.

Every damage leaves the bundle whole (the hashes are made anew), so that only what it computes
tells. `layer` is the module path that must be named as the first to diverge; None where the damage
lies outside the models.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

from mobile_runtime import taps
from mobile_runtime.bundle import MANIFEST, Bundle
from mobile_runtime.manifest import ComponentName


@dataclass(frozen=True)
class Damage:
    """One damage. apply: given the bundle's folder, a copy."""

    name: str
    apply: Callable[[Path], None]
    layer: str | None = None


def damaged(bundle: Path, damage: Damage, folder: Path) -> Path:
    """A copy of a bundle, damaged, with hashes that fit."""
    shutil.copytree(bundle, folder)
    damage.apply(folder)
    rehash(folder)
    return folder


def rehash(folder: Path) -> None:
    """Make the manifest's sizes and hashes fit the files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for entry in manifest["files"]:
        content = (folder / entry["path"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for component in manifest["components"]:
        sizes = [f["bytes"] for f in manifest["files"] if f["path"].startswith(component["path"])]
        component["bytes"] = sum(sizes)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def in_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of the manifest."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def in_golden(name: str, change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """A change of a golden file's tensors."""

    def apply(folder: Path) -> None:
        path = folder / "golden" / f"{name}.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)

    return apply


class Graph:
    """One component's ONNX model, opened for a change, and the names of its layers' values."""

    def __init__(self, folder: Path, component: ComponentName) -> None:
        self.path = folder / component / "model.onnx"
        self.model = onnx.load(self.path)
        self.graph = self.model.graph
        found = taps.read(Bundle.open(folder, verify=False), component)
        assert found is not None
        self.taps = found.taps
        self._initializers = {one.name: one for one in self.graph.initializer}

    def save(self) -> None:
        onnx.save(self.model, self.path)

    def node(self, layer: str, op: str | None = None) -> onnx.NodeProto:
        """The node whose value is a layer's tap."""
        value = next(t.value for t in self.taps if t.layer == layer and op in (None, t.op))
        return next(node for node in self.graph.node if value in node.output)

    def made_by(self, value: str) -> onnx.NodeProto | None:
        """The node that computes a value."""
        return next((node for node in self.graph.node if value in node.output), None)

    def constant(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._initializers[name])

    def set_constant(self, name: str, array: np.ndarray) -> None:
        self._initializers[name].CopyFrom(
            numpy_helper.from_array(np.ascontiguousarray(array), name)
        )

    def weight(self, layer: str) -> tuple[str, str | None]:
        """The names of a layer's weight, and of its scale where it is INT8."""
        node = self.node(layer)
        if node.op_type == "Add":  # a linear's bias, added to the product
            inputs = [self.made_by(name) for name in node.input]
            node = next(one for one in inputs if one is not None and one.op_type == "MatMul")
        name = node.input[0 if node.op_type == "Gather" else 1]
        for _ in range(4):
            if name in self._initializers:
                return name, None
            above = self.made_by(name)
            assert above is not None
            if above.op_type == "DequantizeLinear":
                return above.input[0], above.input[1]
            name = above.input[0]  # a transpose
        raise AssertionError(f"{layer} has no weight")


def on_graph(component: ComponentName, change: Callable[[Graph], None]) -> Callable[[Path], None]:
    """A change of a component's ONNX graph."""

    def apply(folder: Path) -> None:
        graph = Graph(folder, component)
        change(graph)
        graph.save()

    return apply


def on_weight(
    layer: str, change: Callable[[np.ndarray], np.ndarray], part: int = 0
) -> Damage | Any:
    """A change of a layer's weight (part 0) or of its scale (part 1)."""

    def apply(graph: Graph) -> None:
        name = graph.weight(layer)[part]
        assert name is not None, f"{layer} is not INT8"
        before = graph.constant(name)
        after = change(before.copy())
        assert not np.array_equal(before, after)
        graph.set_constant(name, after.astype(before.dtype))

    return on_graph(layer.split(".")[0], apply)  # type: ignore[arg-type]


def swap_weights(one: str, other: str) -> Callable[[Path], None]:
    """Two layers of a shape, with each other's weights and scales."""

    def apply(graph: Graph) -> None:
        for a, b in zip(graph.weight(one), graph.weight(other), strict=True):
            if a is None or b is None:
                continue
            first, second = graph.constant(a), graph.constant(b)
            assert first.shape == second.shape
            graph.set_constant(a, second)
            graph.set_constant(b, first)

    return on_graph(one.split(".")[0], apply)  # type: ignore[arg-type]


def on_input(
    layer: str, index: int, change: Callable[[np.ndarray], np.ndarray], op: str | None = None
) -> Callable[[Path], None]:
    """A change of a constant that a layer's last node reads: its bias, say."""

    def apply(graph: Graph) -> None:
        name = graph.node(layer, op).input[index]
        before = graph.constant(name)
        graph.set_constant(name, change(before.copy()).astype(before.dtype))

    return on_graph(layer.split(".")[0], apply)  # type: ignore[arg-type]


def dropped(layer: str) -> Callable[[Path], None]:
    """A layer's last node gone, its readers given what it read."""

    def apply(graph: Graph) -> None:
        node = graph.node(layer)
        for reader in graph.graph.node:
            for i, name in enumerate(reader.input):
                if name in node.output:
                    reader.input[i] = node.input[0]
        graph.graph.node.remove(node)

    return on_graph(layer.split(".")[0], apply)  # type: ignore[arg-type]


def swap_inputs(layer: str, op_type: str) -> Callable[[Path], None]:
    """The first node of a kind above a layer, with its inputs in the other order."""

    def apply(graph: Graph) -> None:
        value = graph.node(layer).output[0]
        seen = [value]
        while seen:
            node = graph.made_by(seen.pop(0))
            if node is None:
                continue
            if node.op_type == op_type:
                names = list(node.input)
                del node.input[:]
                node.input.extend(names[::-1])
                return
            seen += list(node.input)
        raise AssertionError(f"no {op_type} above {layer}")

    return on_graph(layer.split(".")[0], apply)  # type: ignore[arg-type]


def scaled_output(layer: str, factor: float, op: str | None = None) -> Callable[[Path], None]:
    """A layer's value, multiplied: what a lost 1/sqrt(d) or a norm's wrong epsilon amounts to."""

    def apply(graph: Graph) -> None:
        node = graph.node(layer, op)
        value = node.output[0]
        place = list(graph.graph.node).index(node)
        node.output[0] = f"{value}_before"
        graph.graph.initializer.append(
            numpy_helper.from_array(np.array(factor, np.float32), "damage_factor")
        )
        graph.graph.node.insert(
            place + 1, helper.make_node("Mul", [f"{value}_before", "damage_factor"], [value])
        )

    return on_graph(layer.split(".")[0], apply)  # type: ignore[arg-type]


def one_nan(array: np.ndarray) -> np.ndarray:
    """A NaN in the middle."""
    array.flat[array.size // 2] = np.nan
    return array


class BlobFile:
    """The constants of a Core ML package's weight file, to be changed in place."""

    DTYPES: ClassVar[dict[int, Any]] = {1: np.float16, 2: np.float32, 3: np.uint8, 4: np.int8}

    def __init__(self, package: Path) -> None:
        self.path = next(package.rglob("weight.bin"))
        self.content = bytearray(self.path.read_bytes())

    def change(self, offset: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the blob whose metadata lie at an offset (MIL's blob storage, version 2)."""
        sentinel, dtype, size, start = struct.unpack_from("<IIQQ", self.content, offset)
        assert sentinel == 0xDEADBEEF
        before = np.frombuffer(bytes(self.content[start : start + size]), self.DTYPES[dtype])
        after = change(before.copy()).astype(before.dtype)
        self.content[start : start + size] = after.tobytes()
        self.path.write_bytes(self.content)


def on_package(
    layer: str, parameter: str, field: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Path], None]:
    """A change of a constant in a Core ML package.

    parameter: of the layer's operation, `weight` or `bias`. field: of the operation that makes that
    constant, `val` for a plain one, `scale` or `quantized_data` for INT8.
    """

    def apply(folder: Path) -> None:
        from mobile_runtime.backends.mil.package import Package

        component: ComponentName = layer.split(".")[0]  # type: ignore[assignment]
        bundle = Bundle.open(folder, verify=False)
        found = taps.read(bundle, component)
        assert found is not None
        value = next(tap.value for tap in found.taps if tap.layer == layer)
        package = folder / bundle.component(component).path
        (function,) = Package(package).spec.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
        makers = {out.name: op for op in block.operations for out in op.outputs}
        constant = makers[makers[value].inputs[parameter].arguments[0].name]
        offset = constant.attributes[field].blobFileValue.offset
        assert offset, f"{layer}: {parameter} is no blob"
        BlobFile(package).change(offset, change)

    return apply
