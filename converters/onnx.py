"""ONNX: an exported component becomes `COMPONENT/model.onnx` for ONNX Runtime.

INT8 weights stay INT8 initializers, each behind a DequantizeLinear; those of 4 bits are written by
onnx_int4.py. The bundle's folder is laid out as Optimum's `ORTDiffusionPipeline.from_pretrained`
expects (`write_optimum_files`).
"""

if __name__ == "__main__":
    # Before the imports below: help and a wrong request need no torch.
    from converters.cli import run

    run("onnx")

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from converters import components as exporting
from converters import onnx_int4
from converters.components import Component
from converters.layer_check import layer_check as layers_alone
from converters.lowered import Lowered, Run, Watch
from converters.support import Scheme
from mobile_runtime.backends.onnxruntime import EXACT_SESSION, load_file
from mobile_runtime.errors import UserError, choices, missing_backend
from recipes import measure
from recipes.int4_layers import is_int4
from recipes.quiet import quiet
from recipes.schema import Recipe

Precision = Literal["float32", "float16"]
OPSETS = tuple(range(18, 24))

# The exact rewrites (converters/rewrites.py) that this target asks for: of an upsampling to an odd
# size the exporter would make a Resize by a fraction. ONNX takes all else as it is.
REWRITES: tuple[str, ...] = ("cropped_upsample",)

# One protobuf message, and one flatbuffer, holds less than 2 GiB; some room is for the graph.
LIMIT_BYTES = 2**31 - 2**26
# This optimizer's result runs on x86 alone.
X86_ONLY_OPTIMIZERS = ("NchwcTransformer",)


@dataclass(frozen=True)
class OnnxOptions:
    """How to lower to ONNX.

    opset: of the ai.onnx domain; 18 is what the exporter writes itself, later ones are converted.
    ort_format: write `model.ort` instead of `model.onnx`, optimized ahead for any CPU, and beside
    the components `required_operators.config` and `required_operators_and_types.config` for
    onnxruntime's `build.py --include_ops_by_config`. Optimum does not open such a folder.
    precision: float16 stores weights and computes in fp16 (inputs, outputs and the timestep's
    sinusoid stay float32); it is for GPUs and NPUs, onnxruntime's CPU casts around each operator.
    activations: what static ones are written as. On x86, onnxruntime has quick kernels for uint8 by
    int8 alone, which saturate without VNNI; Arm has both.
    """

    opset: int = 18
    ort_format: bool = False
    precision: Precision = "float32"
    activations: Literal["int8", "uint8"] = "int8"


def prepare(recipe: Recipe, scheme: Scheme) -> OnnxOptions:
    """The options that a recipe asks for, checked, with ONNX's libraries there."""
    _libraries()
    own = recipe.targets.onnx
    options = OnnxOptions(own.opset, own.ort_format, scheme.arithmetic, own.activations)
    _check_options(options, int4=scheme.name == "w4")
    return options


def lower(
    component: Component,
    program: torch.export.ExportedProgram,
    folder: Path,
    options: OnnxOptions | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Lowered:
    """Convert one exported component to `folder`/NAME/model.onnx, and check the file.

    program: what `components.export(component)` gave. progress: told what is being done. Over 2 GB
    the weights go to one file beside the model, `model.onnx.data`.
    Raises UserError for what the target cannot do.
    """
    options = options or OnnxOptions()
    int4 = is_int4(program)
    _check_options(options, int4)
    _check_fits(component, program, options)
    ir = _libraries()
    if options.precision == "float16":
        progress("export in float16")
        program = exporting.export(_in_half(component))
    progress("translate the graph")
    # The exporter logs about torchvision; its parts warn about each other's old names.
    with quiet("torch.onnx", "onnxscript", "onnx_ir"):
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=options.opset,
            input_names=[spec.name for spec in component.inputs],
            output_names=[spec.name for spec in component.outputs],
            optimize=True,
            verbose=False,
            custom_translation_table=onnx_int4.translations() if int4 else None,
        )
    assert translated is not None  # what a dynamo export gives
    model = translated.model
    int4_weights = onnx_int4.store(ir, model)
    if options.activations == "uint8":
        _write_uint8(ir, model)
    _tidy(model)
    path = folder / component.name / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    progress("write the model")
    external = _initializer_bytes(model) > LIMIT_BYTES
    ir.save(model, path, external_data="model.onnx.data" if external else None)
    details: dict[str, Any] = {
        "opset": options.opset,
        "precision": options.precision,
        "external_data": external,
        "op_kinds": dict(sorted(Counter(node.op_type for node in model.graph).items())),
        "int8_weights": _count_int8(ir, model),
        "int4_weights": int4_weights,
        "session_options": EXACT_SESSION,
    }
    names = tuple(value.name or "" for node in model.graph for value in node.outputs)
    watch = Watch("onnxruntime", names, {options.precision: {}})
    del model, translated
    progress("check the file")
    _check_file(path, component, external)
    if options.ort_format:
        progress("convert to .ort")
        path = _to_ort(path, folder)
        details["op_kinds"] = _ort_op_kinds(path)
        details["note"] = "model.ort in place of model.onnx: for ONNX Runtime, not for Optimum"
        return Lowered(path, path.suffix[1:], details, run=Run("onnxruntime", load_file(path)))
    return Lowered(path, path.suffix[1:], details, watch)


def layer_check(
    component: Component,
    inputs: Mapping[str, np.ndarray],
    options: OnnxOptions | None = None,
    progress: Callable[[str], None] = lambda phase: None,
    layers: Collection[str] | None = None,
) -> dict[str, float]:
    """Each layer with quantized activations alone in ONNX Runtime; see layer_check.py."""
    own = replace(options or OnnxOptions(), ort_format=False)
    return layers_alone(component, inputs, partial(_run_alone, own), progress, layers)


def _run_alone(own: OnnxOptions, layers: Component, args: list[torch.Tensor]) -> list[torch.Tensor]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(layers.module, tuple(args))
        path = lower(layers, program, Path(folder), own).path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for key, value in EXACT_SESSION.items():
            options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feeds = {spec.name: x.numpy() for spec, x in zip(layers.inputs, args, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, feeds)]


def write_optimum_files(
    pipeline: Any,
    folder: Path,
    components: Sequence[str],
    resolution: tuple[int, int] | None = None,
) -> None:
    """Write the files that let Optimum's `ORTDiffusionPipeline.from_pretrained` open the folder.

    pipeline: the StableDiffusionPipeline whose components are lowered. components: their names.
    resolution: height and width in pixels, where they are not the UNet's own.
    Writes model_index.json, scheduler/, tokenizer/ and a config.json beside each model.

    Shapes are static, so Optimum has to be called as the bundle was made: with guidance
    (`guidance_scale` above 1) for a UNet of batch 2, without for batch 1, one picture a call.
    """
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    modules = {
        "text_encoder": pipeline.text_encoder,
        "unet": pipeline.unet,
        "vae_decoder": pipeline.vae,
        "vae_encoder": pipeline.vae,
    }
    for name in components:
        config = _config(modules[name])
        if name == "unet" and resolution is not None:
            factor = measure.vae_factor(pipeline.vae)
            config["sample_size"] = [side // factor for side in resolution]
        _write_json(folder / name / "config.json", config)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _config(pipeline.unet)["_diffusers_version"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(pipeline.scheduler).__name__],
        "text_encoder": ["optimum.onnxruntime.modeling_diffusion", "ORTTextEncoder"],
        "tokenizer": ["transformers", type(pipeline.tokenizer).__name__],
        "unet": ["optimum.onnxruntime.modeling_diffusion", "ORTUnet"],
        "vae": ["optimum.onnxruntime.modeling_diffusion", "ORTVae"],
    }
    _write_json(folder / "model_index.json", index)


def _config(module: Any) -> dict[str, Any]:
    """A module's configuration, without the folder that it came from."""
    config = module.config
    text = config.to_json_string() if hasattr(config, "to_json_string") else module.to_json_string()
    return {key: value for key, value in json.loads(text).items() if key != "_name_or_path"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _libraries() -> Any:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(library)
        except ImportError as error:
            raise missing_backend(library, "onnx", "converting to ONNX") from error
    import onnx_ir

    return onnx_ir


def _check_options(options: OnnxOptions, int4: bool) -> None:
    if options.opset not in OPSETS:
        raise choices("opset", str(options.opset), [str(opset) for opset in OPSETS])
    if options.precision not in get_args(Precision):
        raise choices("precision", options.precision, list(get_args(Precision)))
    if int4 and options.opset < onnx_int4.OPSET:
        raise UserError(
            f"ONNX has 4-bit weights in blocks from opset {onnx_int4.OPSET} on, not in "
            f"{options.opset}: set targets.onnx.opset to {onnx_int4.OPSET}, or use weights int8"
        )


def _check_fits(
    component: Component, program: torch.export.ExportedProgram, options: OnnxOptions
) -> None:
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    prefixes = ("quantized_decomposed.", "pocket_diffusion.")
    quantized = {name for name in operators if name.startswith(prefixes)}
    if any("choose_qparams" in name for name in quantized):
        raise UserError(
            "the ONNX converter does not quantize activations as they come; use a recipe whose "
            "quantize stage has activations: none"
        )
    if quantized and options.precision == "float16":
        raise UserError(
            "ONNX Runtime computes INT8 weights in float32, and 4-bit ones: leave the precision on "
            "float32, or use a recipe without them"
        )
    weights = component.module.state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    size //= 2 if options.precision == "float16" else 1
    if options.ort_format and size > LIMIT_BYTES:
        raise UserError(
            f"{component.name} has {size / 1e9:.1f} GB of weights, and an .ort file holds less "
            "than 2 GB: use a recipe with INT8 weights, or leave ort_format off"
        )


class _HalfInside(nn.Module):
    """Runs a float16 module between float32 inputs and outputs.

    A timestep is passed on as it is: diffusers computes its sinusoid in float32 and casts that.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        halved = [
            tensor.half() if tensor.is_floating_point() and name != "timestep" else tensor
            for name, tensor in zip(self.names, inputs, strict=True)
        ]
        return self.module(*halved).float()


def _in_half(component: Component) -> Component:
    """The component with its weights in float16."""
    half = measure.share_structure(
        component.module, lambda tensor: tensor.half() if tensor.is_floating_point() else tensor
    )
    for name, tensor in half.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"the weight {name} of {component.name} does not fit float16; "
                "convert with precision float32"
            )
    module = _HalfInside(half, [spec.name for spec in component.inputs])
    return Component(component.name, module, component.inputs, component.outputs)


def _write_uint8(ir: Any, model: Any) -> None:
    """Write activations' integers, and their zero points, 128 higher as uint8: the same values."""
    made: dict[str, Any] = {}
    for node in model.graph:
        data = node.inputs[0].producer() if node.op_type == "DequantizeLinear" else node
        if data is None or data.op_type != "QuantizeLinear":
            continue
        point = node.inputs[2]
        if point.const_value.dtype != ir.DataType.INT8:
            continue
        if point.name not in made:
            array = (point.const_value.numpy().astype(np.int16) + 128).astype(np.uint8)
            tensor = ir.Tensor(array, name=f"{point.name}_uint8")
            made[point.name] = ir.Value(name=tensor.name, const_value=tensor)
            model.graph.register_initializer(made[point.name])
        node.replace_input_with(2, made[point.name])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]


def _tidy(model: Any) -> None:
    """Drop what describes the making of the graph.

    Metadata holds stack traces with paths of this machine. Shapes of values inside the graph can
    be stale after optimization, and then quantization tools stop at the file.
    """
    graph = model.graph
    inside = [value for node in graph for value in node.outputs] + [*graph.initializers.values()]
    for value in set(inside) - set(graph.outputs):
        value.shape, value.type = None, None
    for node in graph:
        node.doc_string = None
    for described in (*graph, *inside, *graph.inputs, graph, model):
        described.metadata_props.clear()
    graph.name = "main_graph"


def _initializer_bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def _count_int8(ir: Any, model: Any) -> int:
    """INT8 initializers that a DequantizeLinear reads as data."""
    weights = {
        node.inputs[0].name
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    }
    return sum(
        value.const_value.dtype == ir.DataType.INT8 and name in weights
        for name, value in model.graph.initializers.items()
    )


def _check_file(path: Path, component: Component, external: bool) -> None:
    """Let onnx's checker read the file, and compare its tensors with the component's."""
    import onnx

    # By path, since a model with external data is too large for one message. The full check infers
    # every shape, in memory, so it is left out for the largest.
    onnx.checker.check_model(str(path), full_check=not external)
    graph = onnx.load(str(path), load_external_data=False).graph
    for spec, value in zip(
        (*component.inputs, *component.outputs), (*graph.input, *graph.output), strict=True
    ):
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in tensor.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        if (value.name, shape, dtype) != (spec.name, spec.shape, spec.dtype):
            raise RuntimeError(f"{path} declares {value.name} {dtype} {shape}, not {spec}")


def _to_ort(path: Path, folder: Path) -> Path:
    """Replace model.onnx by model.ort, and write anew what all .ort files of the folder need.

    What `onnxruntime.tools.convert_onnx_models_to_ort` does in its Fixed style for phones, but
    with float32 activations behind INT8 weights, which that tool cannot be asked for.
    """
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    session = onnxruntime.SessionOptions()
    session.log_severity_level = 3
    session.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session.optimized_model_filepath = str(path.with_suffix(".ort"))
    session.add_session_config_entry("session.save_model_format", "ORT")
    for key, value in EXACT_SESSION.items():
        session.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(
        str(path),
        session,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(X86_ONLY_OPTIMIZERS),
    )
    path.unlink()
    models = sorted(folder.glob("*/model.ort"))
    for name, types in (
        ("required_operators.config", False),
        ("required_operators_and_types.config", True),
    ):
        config = folder / name
        # The tool leaves its files open, and Python warns.
        with quiet("ort_format_model.utils"):
            create_config_from_models(models, config, types)
        # The tool writes full paths into its comment.
        text = config.read_text(encoding="utf-8").replace(f"{folder}/", "")
        config.write_text(text, encoding="utf-8")
    return path.with_suffix(".ort")


def _ort_op_kinds(path: Path) -> dict[str, int]:
    """The operators of an .ort file, which were fused when it was made, and how many of each."""
    # Importing it puts the module that reads the format on the path.
    import onnxruntime.tools.ort_format_model  # noqa: F401
    from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    session = InferenceSession.GetRootAsInferenceSession(path.read_bytes(), 0)
    graph = session.Model().Graph()
    kinds = Counter(graph.Nodes(i).OpType().decode() for i in range(graph.NodesLength()))
    return dict(sorted(kinds.items()))
