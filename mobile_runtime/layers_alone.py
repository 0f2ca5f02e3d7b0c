"""Quantized layers alone, on the same inputs: are the integer kernels of two machines the same?

Depth amplifies a single quantized step that two kernels round otherwise, so a whole component's
error says little about either. Here each layer is cut out of the bundle's own ONNX file, from the
float value in front of its QuantizeLinear to the one behind the DequantizeLinear of its result, and
fed what it sees in a run here. All of them make one model, with an input and an output for each,
in a small bundle of its own; so that every device that runs bundles runs it as it is.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mobile_runtime import backends, layer_cuts, sketches, taps
from mobile_runtime.bundle import Bundle, BundleWriter
from mobile_runtime.devices import Device
from mobile_runtime.devices.folder import FolderDevice
from mobile_runtime.errors import UserError
from mobile_runtime.goldens import Arrays, golden_cases
from mobile_runtime.manifest import LAYOUTS, ComponentName, Golden, TensorSpec
from mobile_runtime.on_devices import Asked, run_on
from mobile_runtime.parity import measure
from mobile_runtime.runs import ComponentRun
from mobile_runtime.validate import run_here, runtimes


@dataclass(frozen=True)
class Layer:
    """What one layer gave on a device, beside the same layer's result here.

    snr_db: at most sketches.HIGHEST_DB. differing: the share of its values that do.
    """

    component: str
    layer: str
    device: str
    equal: bool
    snr_db: float
    differing: float


@dataclass(frozen=True)
class Part:
    """A component's layers beside each other: their names, an ONNX model of them, what to feed."""

    layers: tuple[str, ...]
    model: Any
    fed: Arrays


def compare_on(
    bundle: Bundle,
    chosen: Sequence[Device],
    folder: Path,
    asked: Asked | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Layer]:
    """Each quantized layer of a bundle here and on devices, on the same inputs.

    folder: for the small bundle; made, and left there. asked: whose options and timeout are taken.
    tell: is told what runs.
    Raises UserError for a bundle without such layers or of another target, for results that are
    gathered by hand, and where a device gave nothing.
    """
    for device in chosen:
        if isinstance(device, FolderDevice):
            raise UserError(
                f"{device.name} cannot be asked for layers alone: they are a small bundle of their "
                "own; name a device that runs jobs by itself"
            )
    asked = replace(asked or Asked(), prompts=0, repeats=0, layers=False)
    tell("cut the quantized layers out")
    small, layers = cut_out(bundle, folder)
    (runtime,) = runtimes(small)
    tell("the quantized layers here")
    here = {
        component: run_here(small, component, runtime, repeats=0, step=lambda text: None)
        for component in layers
    }
    found = []
    for device in chosen:
        tell(f"the quantized layers on {device.name}")
        _, there = run_on(small, device, asked)
        for component, own in layers.items():
            mine, theirs = here[component], there[component]
            for run in (mine, theirs):
                if not isinstance(run, ComponentRun):
                    raise UserError(f"the layers of {component} cannot be compared: {run.reason}")
            assert isinstance(mine, ComponentRun)
            assert isinstance(theirs, ComponentRun)
            found += [
                _compared(component, layer, device.name, value, theirs.outputs[0][output])
                for layer, (output, value) in zip(own, mine.outputs[0].items(), strict=True)
            ]
    return found


def _compared(
    component: str, layer: str, device: str, mine: np.ndarray, theirs: np.ndarray
) -> Layer:
    return Layer(
        component=component,
        layer=layer,
        device=device,
        equal=mine.tobytes() == theirs.tobytes(),
        snr_db=min(measure(mine, theirs).snr_db, sketches.HIGHEST_DB),
        differing=float(np.mean(mine != theirs)),
    )


def cut_out(bundle: Bundle, folder: Path) -> tuple[Bundle, dict[ComponentName, tuple[str, ...]]]:
    """A bundle of the quantized layers beside each other; and their names, by component, in order.

    The one golden case of a component holds what its layers read, and what they give, in a run
    here. A component that has none is a model that gives back a number.
    """
    onnx = layer_cuts.import_onnx()
    names = [entry.name for entry in bundle.manifest.components]
    if bundle.manifest.target != "onnx":
        raise UserError(f"layers are cut out of .onnx files, and {bundle.path} has none")
    wanted = {name: bundle.quantized_layers(name) for name in names}
    if not any(wanted.values()):
        raise UserError(f"{bundle.path} has no layer with quantized activations")
    parts = {
        name: _part(bundle, name, layers) if layers else _nothing(onnx)
        for name, layers in wanted.items()
    }
    small = _bundle(onnx, bundle, parts, folder)
    return small, {name: part.layers for name, part in parts.items() if part.layers}


def _part(bundle: Bundle, component: ComponentName, wanted: Sequence[str]) -> Part:
    """Cut the wanted layers out of a component; what they read comes from a run here."""
    entry, known = bundle.component(component), taps.read(bundle, component)
    if entry.format != "onnx":
        raise UserError(f"layers are cut out of .onnx files, and {entry.path} is none")
    if known is None:
        raise UserError(f"{bundle.path} was made without taps; convert it again")
    model, cuts = layer_cuts.cut(bundle.file(entry.path), known, wanted)
    feeds = golden_cases(bundle, component)[0].inputs
    seen = dict(feeds)
    backends.watch(
        bundle.file(entry.path),
        "onnxruntime",
        feeds,
        layer_cuts.sizes(known, (n for one in cuts for n in one.inputs if n not in feeds)),
        [spec.name for spec in entry.outputs],
        lambda name, value: seen.update({name: value.copy()}),
    )
    made, fed = layer_cuts.beside(model, cuts, seen)
    return Part(tuple(one.layer for one in cuts), made, fed)


def _nothing(onnx: Any) -> Part:
    """A model of no layer."""
    form = (onnx.TensorProto.FLOAT, (1,))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "none",
        [onnx.helper.make_tensor_value_info("x", *form)],
        [onnx.helper.make_tensor_value_info("y", *form)],
    )
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    return Part((), model, {"x": np.ones(1, np.float32)})


def _bundle(onnx: Any, bundle: Bundle, parts: Mapping[ComponentName, Part], folder: Path) -> Bundle:
    """A bundle of these models; a golden case is what one gives here, unoptimized."""
    manifest = bundle.manifest
    entries, golden = [], dict[ComponentName, str]()
    with BundleWriter(folder) as writer:
        for relative in (manifest.tokenizer.vocab, manifest.tokenizer.merges):
            (writer.path / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(relative), writer.path / relative)
        (writer.path / "golden").mkdir()
        for component, part in parts.items():
            path = f"{component}/model.onnx"
            (writer.path / component).mkdir()
            given = layer_cuts.unoptimized(part.model, part.fed)
            _declare(onnx, part.model, given)
            onnx.save(part.model, writer.path / path)
            golden[component] = f"golden/{component}.safetensors"
            tensors = {f"0/in/{name}": value for name, value in part.fed.items()}
            for kind in ("out", "source"):
                tensors |= {f"0/{kind}/{name}": value for name, value in given.items()}
            save_file(tensors, writer.path / golden[component])
            changed = {
                "path": path,
                "inputs": _specs(part.fed),
                "outputs": _specs(given),
                "bytes": (writer.path / path).stat().st_size,
                "details": {},
            }
            entries.append(bundle.component(component).model_copy(update=changed))
        save_file({"none": np.zeros(1, np.float32)}, writer.path / "golden/pipeline.safetensors")
        changed = {
            "name": f"{manifest.name}, layers alone",
            "components": tuple(entries),
            "quantization": (),
            "golden": Golden(
                components=golden,
                cases=dict.fromkeys(golden, 1),
                pipeline="golden/pipeline.safetensors",
                prompts=(),
            ),
            "files": writer.hash_files(),
        }
        return writer.commit(manifest.model_copy(update=changed))


def _declare(onnx: Any, model: Any, given: Arrays) -> None:
    """Tell the outputs' types and shapes, which nobody knows before they are computed."""
    for output in model.graph.output:
        value = given[output.name]
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, kind, value.shape))


def _specs(tensors: Arrays) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=name,
            shape=value.shape,
            dtype="float32",
            layout=LAYOUTS.get(value.ndim, "N" * value.ndim),
            description="Of one layer.",
        )
        for name, value in tensors.items()
    )
