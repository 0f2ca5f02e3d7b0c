"""Core ML: an exported component becomes an ML program in an `.mlpackage`.

Three things here are not coremltools' defaults. A GroupNorm is written so that no fp16 number in it
leaves fp16's range. The sinusoid of the timestep stays in float32: in fp16 the phase of step 999 is
wrong by up to half a radian. And the saved package is read back: it holds the same integers as the
PyTorch module, and no constant that fp16 made infinite.
"""

if __name__ == "__main__":
    # Before the imports below: help and a wrong request need no torch.
    from converters.cli import run

    run("coreml")

import fnmatch
import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from converters import coreml_int4
from converters.components import Component
from converters.coreml_palettes import check_stored, pass_pipeline
from converters.layer_check import layer_check as layers_alone
from converters.lowered import Lowered, Watch
from converters.palettes import Palette
from converters.support import Scheme
from mobile_runtime.backends.mil import Program
from mobile_runtime.backends.mil.package import Package
from mobile_runtime.backends.mil.values import Constant, parse_constant
from mobile_runtime.errors import UserError, choices, missing_backend
from recipes.int4_layers import is_int4
from recipes.quiet import bars_told, quiet
from recipes.schema import Recipe

DeploymentTarget = Literal["iOS15", "iOS16", "iOS17", "iOS18"]
ComputePrecision = Literal["float16", "float32"]

# The names that Apple's Swift package looks for.
PACKAGES = {
    "text_encoder": "TextEncoder",
    "unet": "Unet",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}

# deployment target -> the macOS of the same year, and what the target's weights may be.
DEPLOYMENT_TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "iOS15": ("macOS 12", ("float",)),
    "iOS16": ("macOS 13", ("float", "int8")),
    "iOS17": ("macOS 14", ("float", "int8")),
    "iOS18": ("macOS 15", ("float", "int8", "int4")),
}

# The exact rewrites (converters/rewrites.py) that this target asks for: of an upsampling to an odd
# size coremltools would make one by a fraction. Core ML takes all else as it is.
REWRITES: tuple[str, ...] = ("cropped_upsample",)

_quantized = torch.ops.quantized_decomposed
_WEIGHT_OPS = ("dequantize_per_channel.default", "dequantize_blockwise.default")
_STATIC_OPS = ("quantize_per_tensor.default", "dequantize_per_tensor.default")
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14


@dataclass(frozen=True)
class CoreMLOptions:
    """How to lower to Core ML.

    deployment_target: the oldest system that has to run it (a key of DEPLOYMENT_TARGETS).
    compute_precision: what the program declares its tensors as; inputs and outputs stay float32.
    group_norm: "safe" keeps every fp16 number of a GroupNorm in range whatever the activations'
    scale; "plain" is coremltools' own form, a little cheaper, whose squares overflow beyond 256.
    float32: what to keep in float32 under float16: glob patterns over the paths of convs and
    linears (e.g. "unet.up_blocks.3.*"), and kinds of operation (e.g. "softmax"). A pattern for
    another component than the one at hand is passed over.
    palettes: of the weights that palette_plan.py made, by the layer's path.
    """

    deployment_target: DeploymentTarget = "iOS17"
    compute_precision: ComputePrecision = "float16"
    group_norm: Literal["safe", "plain"] = "safe"
    float32: tuple[str, ...] = ()
    palettes: Mapping[str, Palette] = field(default_factory=dict)


def check(options: CoreMLOptions, weights: Literal["float", "int8", "int4"] = "float") -> None:
    """Refuse, before any work, options that are unknown or that the deployment target lacks.

    Raises UserError that lists the choices, or says what the target can do instead.
    """
    target = options.deployment_target
    if target not in DEPLOYMENT_TARGETS:
        raise choices("deployment target", target, list(DEPLOYMENT_TARGETS))
    if options.compute_precision not in get_args(ComputePrecision):
        raise choices(
            "compute precision", options.compute_precision, list(get_args(ComputePrecision))
        )
    macos, can = DEPLOYMENT_TARGETS[target]
    if weights not in can:
        first = next(name for name, (_, kinds) in DEPLOYMENT_TARGETS.items() if weights in kinds)
        raise UserError(
            f"the deployment target {target} ({macos}) has no {weights} weights: set "
            f"targets.coreml.deployment_target to {first} or later, or use a recipe without them"
        )


def prepare(recipe: Recipe, scheme: Scheme) -> CoreMLOptions:
    """The options that a recipe asks for, checked; UserError where coremltools is missing."""
    options = CoreMLOptions(recipe.targets.coreml.deployment_target, scheme.arithmetic)
    is_float = scheme.name == scheme.arithmetic
    check(options, "float" if is_float else "int4" if scheme.name == "w4" else "int8")
    if scheme.name == "w8a8" and options.deployment_target == "iOS16":
        raise UserError(
            "the deployment target iOS16 (macOS 13) has no quantized activations: choose iOS17 or "
            "later, or set quantize.activations to none"
        )
    _coremltools()
    return options


def lower(
    component: Component,
    program: torch.export.ExportedProgram,
    folder: Path,
    options: CoreMLOptions | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Lowered:
    """Convert one exported component to `folder`/NAME.mlpackage, and read it back.

    program: what `components.export(component)` gave. progress: told what is being done.
    Raises UserError for what the target cannot do, and for weights that do not fit float16.
    """
    options = options or CoreMLOptions()
    integers = _weight_integers(program)
    int4 = is_int4(program)
    check(options, "int4" if int4 else "int8" if integers else "float")
    _check_activations(program)
    ct = _coremltools()
    path = folder / f"{PACKAGES[component.name]}.mlpackage"
    keep = _KeepFloat32(component.name, program, options.float32)
    palettes = [
        palette
        for layer, palette in options.palettes.items()
        if layer.split(".")[0] == component.name
    ]
    with quiet("coremltools"), bars_told(progress):
        progress("decompose the graph")
        core_program = _decompose(program, options)
        model = ct.convert(
            core_program,
            convert_to="mlprogram",
            inputs=[
                ct.TensorType(spec.name, spec.shape, getattr(np, spec.dtype))
                for spec in component.inputs
            ],
            outputs=[ct.TensorType(spec.name, dtype=np.float32) for spec in component.outputs],
            minimum_deployment_target=getattr(ct.target, options.deployment_target),
            compute_precision=(
                ct.transform.FP16ComputePrecision(op_selector=lambda op: not keep(op))
                if options.compute_precision == "float16"
                else ct.precision.FLOAT32
            ),
            pass_pipeline=pass_pipeline(palettes),
            skip_model_load=True,
        )
        _describe(model, component)
        progress("save the package")
        model.save(str(path))
    # coremltools leaves it in the package, which does not list it; no runtime reads it.
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    progress("read the package back")
    details = {
        "deployment_target": options.deployment_target,
        "compute_precision": options.compute_precision,
        "group_norm": options.group_norm,
        "kept_in_float32": sorted(options.float32),
        **_read_back(path, component, integers, palettes),
    }
    kinds = ("float32", "float16") if options.compute_precision == "float16" else ("float32",)
    watch = Watch("mil", None, {kind: {"arithmetic": kind} for kind in kinds})
    return Lowered(path, "mlpackage", details, watch)


def layer_check(
    component: Component,
    inputs: Mapping[str, np.ndarray],
    options: CoreMLOptions | None = None,
    progress: Callable[[str], None] = lambda phase: None,
    layers: Collection[str] | None = None,
) -> dict[str, float]:
    """Each layer with quantized activations alone in our interpreter; see layer_check.py."""
    chosen = options or CoreMLOptions()

    def run_alone(layers: Component, args: list[torch.Tensor]) -> list[torch.Tensor]:
        program = torch.export.export(layers.module, tuple(args))
        with tempfile.TemporaryDirectory() as folder:
            # What it computes in is the package's; the layers' names are not the plan's here.
            plain = replace(chosen, float32=(), palettes={})
            path = lower(layers, program, Path(folder), plain).path
            feeds = {spec.name: x.numpy() for spec, x in zip(layers.inputs, args, strict=True)}
            found = Program.open(path).run(feeds, arithmetic=chosen.compute_precision)
        return [torch.from_numpy(found[spec.name]) for spec in layers.outputs]

    return layers_alone(component, inputs, run_alone, progress, layers)


def _coremltools() -> Any:
    # The import itself logs about libraries that only a Mac has, and about version ranges.
    with quiet("coremltools", "torchao"):
        try:
            import coremltools

            coreml_int4.register()
        except ImportError as error:
            raise missing_backend("coremltools", "coreml", "converting to Core ML") from error
    return coremltools


def _describe(model: Any, component: Component) -> None:
    model.short_description = f"{component.name} of a Stable Diffusion pipeline"
    for spec in component.inputs:
        model.input_description[spec.name] = spec.description
    for spec in component.outputs:
        model.output_description[spec.name] = spec.description


def _quantized_ops(program: torch.export.ExportedProgram) -> Iterator[torch.fx.Node]:
    for node in program.graph.nodes:
        namespace = str(node.target).split(".")[0]
        if node.op == "call_function" and namespace in ("quantized_decomposed", "pocket_diffusion"):
            yield node


def _check_activations(program: torch.export.ExportedProgram) -> None:
    for node in _quantized_ops(program):
        if not str(node.target).endswith((*_WEIGHT_OPS, *_STATIC_OPS)):
            raise UserError(
                "Core ML cannot quantize activations as they come "
                f"({str(node.target).split('.')[1]}); use a recipe whose quantize stage has "
                "activations: none"
            )


def _weight_integers(program: torch.export.ExportedProgram) -> list[torch.Tensor]:
    """The integer weights that the graph dequantizes, each as often as it is used."""
    buffers = program.graph_signature.inputs_to_buffers
    return [
        program.state_dict[buffers[node.args[0].name]]  # type: ignore[union-attr]
        for node in _quantized_ops(program)
        if str(node.target).endswith(_WEIGHT_OPS)
    ]


def _decompose(
    program: torch.export.ExportedProgram, options: CoreMLOptions
) -> torch.export.ExportedProgram:
    """The program in the operators that coremltools converts."""
    table: dict[Any, Callable[..., Any]] = {}
    if options.group_norm == "safe" and options.compute_precision == "float16":
        table[torch.ops.aten.group_norm.default] = safe_group_norm
    decomposed = program.run_decompositions(table)
    graph = decomposed.graph_module.graph
    for node in list(graph.nodes):
        # What a read of a buffer leaves behind; coremltools does not know it.
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return decomposed


def safe_group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """GroupNorm, equal to PyTorch's, whose every intermediate fits fp16 at any scale of x.

    x: (N, C, ...). A group is divided by its largest deviation m before it is squared, and
    (x - mean) / sqrt(var + eps) = u / sqrt(mean(u^2) + eps / m^2) with u = (x - mean) / m. With
    m at least sqrt(eps), u and eps / m^2 are at most 1. Squares of x itself would overflow where
    x is beyond 256 from its mean, and eps and small variances are fp16 subnormals.
    """
    batch, channels = x.shape[:2]
    grouped = x.reshape(batch, groups, channels // groups, -1)
    deviation = grouped - grouped.mean((2, 3), keepdim=True)
    floor = math.sqrt(eps)
    largest = deviation.abs().amax((2, 3), keepdim=True).clamp_min(floor)
    unit = deviation / largest
    variance = (unit * unit).mean((2, 3), keepdim=True)
    # floor / m through a root, because coremltools writes a reciprocal as 1 / (m + 1e-4).
    root = torch.rsqrt(largest) * math.sqrt(floor)
    ratio = root * root
    normal = (unit * torch.rsqrt(variance + ratio * ratio)).reshape(x.shape)
    per_channel = (1, channels) + (1,) * (x.dim() - 2)
    if weight is not None:
        normal = normal * weight.reshape(per_channel)
    return normal if bias is None else normal + bias.reshape(per_channel)


class _KeepFloat32:
    """Says which operations stay in float32: those of the timestep, and what the options name."""

    def __init__(
        self, component: str, program: torch.export.ExportedProgram, patterns: tuple[str, ...]
    ) -> None:
        self._kinds = {pattern for pattern in patterns if "." not in pattern}
        _check_kinds(self._kinds)
        layers = [p for p in patterns if p.startswith(f"{component}.")]
        self._weights = _weight_names(program, layers)
        self._of_timestep: set[Any] | None = None

    def __call__(self, op: Any) -> bool:
        if self._of_timestep is None:
            # The first call comes before the pass has changed anything.
            self._of_timestep = _of_timestep(op.enclosing_block)
        if op in self._of_timestep or op.op_type in self._kinds:
            return True
        weight = op.inputs.get("weight")
        return op.outputs[0].name in self._weights or (
            weight is not None and weight.name in self._weights
        )


def _check_kinds(kinds: set[str]) -> None:
    from coremltools.converters.mil import Builder

    unknown = sorted(kind for kind in kinds if not hasattr(Builder, kind))
    if unknown:
        raise UserError(
            f"float32: {unknown[0]!r} is neither a kind of operation of an ML program (e.g. "
            "'softmax') nor the path of a layer (e.g. 'unet.conv_out')"
        )


def _weight_names(program: torch.export.ExportedProgram, patterns: list[str]) -> set[str]:
    """The names, in the MIL program, of the weights of the layers that the patterns match."""
    signature = program.graph_signature
    held = signature.inputs_to_parameters | signature.inputs_to_buffers
    layers = {name: path.rpartition(".")[0] for name, path in held.items()}
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name, layer in layers.items() if fnmatch.fnmatchcase(layer, pattern)}
        if not hits:
            raise UserError(f"float32: the pattern {pattern!r} matches no layer")
        matched |= hits
    dequantized = {
        node.name
        for node in _quantized_ops(program)
        if getattr(node.args[0], "name", None) in matched
    }
    return matched | dequantized


def _of_timestep(block: Any) -> set[Any]:
    """What is computed from the timestep in float32, which float16 cannot hold.

    Every operation that a sine or cosine depends on, or, where the time path is folded into a
    table (recipes/fold.py), the comparison with the table's timesteps; and these themselves.
    """
    found: set[Any] = set()
    waiting = [op for op in block.operations if op.op_type in ("sin", "cos", "equal")]
    while waiting:
        op = waiting.pop()
        if op in found:
            continue
        found.add(op)
        for value in op.inputs.values():
            variables = value if isinstance(value, list | tuple) else [value]
            waiting += [variable.op for variable in variables if variable.op is not None]
    return found


def _read_back(
    path: Path, component: Component, integers: list[torch.Tensor], palettes: list[Palette]
) -> dict[str, Any]:
    """Check the saved package against the component; what it holds, for the manifest.

    Raises UserError for a constant that is not finite, and RuntimeError, a bug, where the package
    does not declare the component's tensors or does not hold its integers and palettes.
    """
    package = Package(path)
    function = package.spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    described = package.spec.description
    declared = [value.name for value in (*described.input, *described.output)]
    expected = [spec.name for spec in (*component.inputs, *component.outputs)]
    if declared != expected:
        raise RuntimeError(f"{path} declares the tensors {declared}, not {expected}")
    constants: dict[str, Constant] = {}
    stored: list[tuple[Constant, Constant]] = []
    palettized: list[Mapping[str, Constant]] = []
    for op in operations:
        own = {
            name: parse_constant(value, package)
            for name, value in op.attributes.items()
            if name != "name"
        }
        _check_finite(path, op, own)
        if op.type == "const":
            constants[op.outputs[0].name] = own["val"]
        elif op.type.startswith("constexpr_"):
            # Older targets hold the arguments as attributes, newer ones as inputs.
            given = own | {
                name: _bound(argument.arguments[0], constants, package)
                for name, argument in op.inputs.items()
            }
            if op.type == "constexpr_lut_to_dense":
                palettized.append(given)
                continue
            stored.append((given.get("quantized_data") or given["data"], given["scale"]))
    hashes = Counter(_hash(np.asarray(data.read())) for data, _ in stored)
    wanted = Counter(_hash(tensor.numpy()) for tensor in integers)
    # A weight that two layers share may be stored once.
    if set(hashes) != set(wanted):
        raise RuntimeError(f"{path} does not hold the integers of the quantized module")
    check_stored(path, palettized, palettes)
    return {
        "specification_version": package.spec.specificationVersion,
        "op_kinds": dict(sorted(Counter(op.type for op in operations).items())),
        "float32_ops": _float32_ops(operations),
        "int8_weights": sum(data.type.dtype == "INT8" for data, _ in stored),
        "int4_weights": sum(data.type.dtype == "INT4" for data, _ in stored),
        "palettized_weights": len(palettized),
        "subnormal_scales": sum(_subnormal(scale) for _, scale in stored),
    }


def _bound(binding: Any, constants: dict[str, Constant], package: Package) -> Constant:
    if binding.WhichOneof("binding") == "value":
        return parse_constant(binding.value, package)
    return constants[binding.name]


def _check_finite(path: Path, op: Any, constants: dict[str, Constant]) -> None:
    for constant in constants.values():
        if constant.type.is_float and not np.isfinite(constant.read()).all():
            raise UserError(
                f"{path}: the {op.type} {op.outputs[0].name} holds values that are not finite in "
                f"{constant.type.dtype.lower()}; convert with compute precision float32, or "
                "repair the source's weights"
            )


def _float32_ops(operations: Any) -> dict[str, int]:
    """The kinds of the operations that compute in float32, leaving out casts and constants."""
    kinds = Counter(
        op.type
        for op in operations
        if op.type not in ("const", "cast")
        and any(str(_element_type(value)) == "FLOAT32" for value in op.outputs)
    )
    return dict(sorted(kinds.items()))


def _element_type(value: Any) -> str:
    tensor = value.type.tensorType
    return (
        tensor.DESCRIPTOR.fields_by_name["dataType"]
        .enum_type.values_by_number[tensor.dataType]
        .name
    )


def _subnormal(scale: Constant) -> int:
    """How many scales fp16 stores with less than its full precision."""
    if scale.type.dtype != "FLOAT16":
        return 0
    return int((np.abs(scale.read()) < _SMALLEST_NORMAL_FLOAT16).sum())


def _hash(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()
