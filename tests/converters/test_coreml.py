"""Core ML: the same function, the same integers, and fp16 that stays in range.

The packages run in the interpreter of ML programs, from their files.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import components
from converters import coreml as converter
from converters.components import Component
from converters.coreml import CoreMLOptions, safe_group_norm
from converters.lowered import Lowered
from converters.support import scheme_for
from mobile_runtime.backends.mil import Program
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import TensorSpec
from recipes import schema
from recipes.quantize import quantize
from recipes.quantized_layers import QuantizedModule
from recipes.settings import QuantizeSettings
from tests.converters.small import (
    NAMES,
    build,
    make_small_pipeline,
    make_small_tiny_pipeline,
    make_static_pipeline,
)

EXACT_DB = 100.0
FLOAT16_DB = 45.0


def lower(component: Component, folder: Path, **options: Any) -> Lowered:
    program = components.export(component)
    return converter.lower(component, program, folder, CoreMLOptions(**options))


def snr_db(component: Component, path: Path, arithmetic: str) -> float:
    """The package's output against the module's, in dB of the module's power."""
    inputs = component.example_inputs(seed=3)
    with torch.no_grad():
        reference = component.module(*inputs.values()).double().numpy()
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    (out,) = Program.open(path).run(feeds, arithmetic=arithmetic).values()
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    noise = np.square(out - reference).mean(dtype=np.float64)
    power = np.square(reference).mean(dtype=np.float64)
    return 10 * float(np.log10(power / max(noise, 1e-30 * power)))


@pytest.fixture(scope="module")
def int8_pipeline() -> Any:
    pipeline, _ = quantize(make_small_pipeline(), QuantizeSettings(components=NAMES))
    return pipeline


@pytest.fixture(scope="module")
def int8(int8_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lowered]:
    folder = tmp_path_factory.mktemp("int8")
    return {name: lower(build(int8_pipeline, name), folder) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_an_int8_package_computes_what_the_quantized_module_computes(
    int8_pipeline: Any, int8: dict[str, Lowered], name: str
) -> None:
    assert snr_db(build(int8_pipeline, name), int8[name].path, "float16") >= FLOAT16_DB


@pytest.mark.parametrize("name", ["text_encoder", "unet"])
def test_a_float32_package_is_exact(int8_pipeline: Any, tmp_path: Path, name: str) -> None:
    component = build(int8_pipeline, name)
    lowered = lower(component, tmp_path, compute_precision="float32")
    assert snr_db(component, lowered.path, "float32") >= EXACT_DB
    assert "constexpr_affine_dequantize" in lowered.details["op_kinds"]


@pytest.mark.parametrize("name", ["text_encoder", "vae_encoder"])
def test_a_float_package_computes_what_the_module_computes(tmp_path: Path, name: str) -> None:
    component = build(make_small_pipeline(), name)
    lowered = lower(component, tmp_path)
    assert lowered.details["int8_weights"] == 0
    assert snr_db(component, lowered.path, "float16") >= FLOAT16_DB


def test_a_tiny_decoder_computes_what_the_module_computes(tmp_path: Path) -> None:
    component = build(make_small_tiny_pipeline(), "vae_decoder")
    lowered = lower(component, tmp_path)
    assert snr_db(component, lowered.path, "float16") >= FLOAT16_DB


def stored_integers(path: Path) -> list[np.ndarray]:
    """The integers of a package, by coremltools' own reader."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    (function,) = program.functions.values()
    return [
        (op.inputs.get("quantized_data") or op.inputs["data"]).val
        for op in function.operations
        if op.op_type.startswith("constexpr_")
    ]


@pytest.mark.filterwarnings("ignore:.*skip_model_load.*")
@pytest.mark.parametrize("name", NAMES)
def test_a_package_holds_the_integers_of_the_plan(
    int8_pipeline: Any, int8: dict[str, Lowered], name: str
) -> None:
    layers = [
        module
        for module in build(int8_pipeline, name).module.modules()
        if isinstance(module, QuantizedModule)
    ]
    stored = stored_integers(int8[name].path)
    assert len(stored) == len(layers) == int8[name].details["int8_weights"]
    assert {array.tobytes() for array in stored} == {
        layer.weight_int8.numpy().tobytes() for layer in layers
    }


def test_ios18_stores_the_same_integers_in_its_own_operation(
    int8_pipeline: Any, tmp_path: Path
) -> None:
    component = build(int8_pipeline, "text_encoder")
    lowered = lower(component, tmp_path, deployment_target="iOS18")
    kinds = lowered.details["op_kinds"]
    assert "constexpr_affine_dequantize" not in kinds
    assert kinds["constexpr_blockwise_shift_scale"] == lowered.details["int8_weights"]
    assert snr_db(component, lowered.path, "float16") >= FLOAT16_DB


def test_a_damaged_weight_is_found_when_the_package_is_read_back(
    int8_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = build(int8_pipeline, "text_encoder")
    other = converter._weight_integers

    def shifted(program: torch.export.ExportedProgram) -> list[torch.Tensor]:
        return [integers.roll(1) for integers in other(program)]

    monkeypatch.setattr(converter, "_weight_integers", shifted)
    with pytest.raises(RuntimeError, match="does not hold the integers"):
        lower(component, tmp_path)


def test_packages_have_the_names_that_apples_swift_package_looks_for(
    int8: dict[str, Lowered],
) -> None:
    assert [int8[name].path.name for name in NAMES] == [
        "TextEncoder.mlpackage",
        "Unet.mlpackage",
        "VAEDecoder.mlpackage",
        "VAEEncoder.mlpackage",
    ]
    assert {lowered.format for lowered in int8.values()} == {"mlpackage"}


def test_a_package_holds_nothing_but_the_model(int8: dict[str, Lowered]) -> None:
    path = int8["unet"].path
    assert {file.name for file in path.rglob("*") if file.is_file()} == {
        "Manifest.json",
        "model.mlmodel",
        "weight.bin",
    }
    assert "debug" not in (path / "Manifest.json").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_names_shapes_and_types_of_the_specs(
    int8_pipeline: Any, int8: dict[str, Lowered], name: str
) -> None:
    component = build(int8_pipeline, name)
    program = Program.open(int8[name].path)
    for specs, types in (
        (component.inputs, program.inputs),
        (component.outputs, program.outputs),
    ):
        assert [(spec.name, spec.shape, spec.dtype) for spec in specs] == [
            (key, value.shape, str(value.numpy)) for key, value in types.items()
        ]


def test_the_details_tell_what_the_program_is_made_of(int8: dict[str, Lowered]) -> None:
    details = int8["unet"].details
    assert details["deployment_target"] == "iOS17"
    assert details["specification_version"] == 8
    assert details["compute_precision"] == "float16"
    kinds = details["op_kinds"]
    assert kinds["constexpr_affine_dequantize"] == details["int8_weights"]
    assert kinds["sin"] == kinds["cos"] == 1
    assert dict(Program.open(int8["unet"].path).kinds) == kinds


def test_a_package_tells_nothing_of_the_machine(int8: dict[str, Lowered]) -> None:
    folders = (Path(torch.__file__).parent.parent, Path(__file__).parent.parent.parent)
    for file in int8["unet"].path.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not any(str(folder).encode() in content for folder in folders)


def test_the_sinusoid_of_the_timestep_is_computed_in_float32(int8: dict[str, Lowered]) -> None:
    assert int8["unet"].details["float32_ops"].keys() >= {"mul", "sin", "cos"}
    program = Program.open(int8["unet"].path)
    sine = next(name for step in program._steps for name, _ in step.outputs if step.kind == "sin")
    feeds = {
        name: np.zeros(declared.shape, np.float32) for name, declared in program.inputs.items()
    }
    feeds["timestep"][:] = 999
    found = program.run(feeds, arithmetic="float16", outputs=[sine])[sine]
    frequencies = np.exp(-np.log(10000) * np.arange(16) / 16)
    np.testing.assert_allclose(found[0], np.sin(999 * frequencies), atol=1e-3)


@given(
    scale=st.floats(-3, 3.9).map(lambda power: 10.0**power),
    offset=st.floats(-3, 3),
    groups=st.sampled_from([1, 2, 4]),
    eps=st.sampled_from([1e-6, 1e-5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_the_safe_group_norm_equals_pytorchs(
    scale: float, offset: float, groups: int, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 8, 3, 5, generator=generator, dtype=torch.float64) + offset) * scale
    weight, bias = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    found = safe_group_norm(x, groups, weight, bias, eps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_safe_group_norm_of_a_constant_is_its_bias() -> None:
    bias = torch.arange(8.0)
    found = safe_group_norm(torch.full((1, 8, 4, 4), 3.0), 2, torch.ones(8), bias)
    torch.testing.assert_close(found, bias.view(1, 8, 1, 1).expand(1, 8, 4, 4))


class Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, 16, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def component_of(module: torch.nn.Module) -> Component:
    tensor = {"shape": (1, 16, 8, 8), "dtype": "float32", "layout": "NCHW", "description": ""}
    spec = (TensorSpec(name="x", **tensor), TensorSpec(name="y", **tensor))
    module.eval().requires_grad_(False)
    return Component("vae_decoder", module, spec[:1], spec[1:])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1000.0, 8000.0])
def test_a_group_norm_stays_right_in_fp16_at_every_scale(tmp_path: Path, scale: float) -> None:
    component = component_of(Norm())
    path = lower(component, tmp_path).path
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).mul(scale).half()
    found = Program.open(path).run({"x": x.float().numpy()}, arithmetic="float16")["y"]
    torch.testing.assert_close(
        torch.from_numpy(found), component.module(x.float()), rtol=0, atol=1e-2
    )


def test_the_plain_group_norm_is_wrong_where_its_squares_overflow(tmp_path: Path) -> None:
    # Why the safe one is the default.
    path = lower(component_of(Norm()), tmp_path, group_norm="plain").path
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)) * 1000
    found = Program.open(path).run({"x": x.numpy()}, arithmetic="float16")["y"]
    assert np.abs(found).max() < 0.1


def test_layers_and_kinds_of_operation_can_be_kept_in_float32(
    int8_pipeline: Any, tmp_path: Path
) -> None:
    component = build(int8_pipeline, "text_encoder")
    keep = ("text_encoder.text_model.encoder.layers.1.mlp.*", "softmax", "unet.conv_out")
    details = lower(component, tmp_path, float32=keep).details
    assert details["kept_in_float32"] == sorted(keep)
    assert details["float32_ops"] == {
        "constexpr_affine_dequantize": 2,
        "linear": 2,
        "softmax": 2,
    }
    with pytest.raises(UserError, match=r"'text_encoder\.tex_model' matches no layer"):
        lower(component, tmp_path, float32=("text_encoder.tex_model",))
    with pytest.raises(UserError, match="'sotfmax' is neither a kind of operation"):
        lower(component, tmp_path, float32=("sotfmax",))


class Scaled(torch.nn.Module):
    def __init__(self, largest: float) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(16, 16, 1)
        self.conv.weight.data[0, 0] = largest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_a_weight_beyond_fp16_keeps_its_layer_in_float32(tmp_path: Path) -> None:
    component = component_of(Scaled(1e5))
    lowered = lower(component, tmp_path)
    assert lowered.details["float32_ops"].keys() >= {"conv"}
    assert snr_db(component, lowered.path, "float16") >= FLOAT16_DB


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        lower(component_of(Scaled(np.inf)), tmp_path)


def test_what_the_target_cannot_do_is_refused(int8_pipeline: Any, tmp_path: Path) -> None:
    component = build(int8_pipeline, "vae_decoder")
    with pytest.raises(UserError, match="unknown deployment target 'iOS12'; choose one of: iOS15"):
        lower(component, tmp_path, deployment_target="iOS12")
    with pytest.raises(UserError, match="unknown compute precision 'int4'"):
        lower(component, tmp_path, compute_precision="int4")
    with pytest.raises(UserError, match=r"iOS15 \(macOS 12\) has no int8 weights: .* iOS16"):
        lower(component, tmp_path, deployment_target="iOS15")
    dynamic, _ = quantize(
        make_small_pipeline(),
        QuantizeSettings(components=("text_encoder",), activations="int8_dynamic"),
    )
    with pytest.raises(UserError, match="activations: none"):
        lower(build(dynamic, "text_encoder"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_progress_is_told_and_the_screen_stays_clean(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    component = component_of(Norm())
    program = components.export(component)
    phases: list[str] = []
    converter.lower(component, program, tmp_path, progress=phases.append)
    assert phases[0] == "decompose the graph"
    assert phases[-2:] == ["save the package", "read the package back"]
    assert "Running MIL default pipeline" in phases
    assert capfd.readouterr() == ("", "")


def test_each_layer_with_static_activations_equals_torch_on_the_same_input() -> None:
    component = build(make_static_pipeline(), "vae_decoder")
    inputs = {name: tensor.numpy() for name, tensor in component.example_inputs().items()}
    options = CoreMLOptions(compute_precision="float32")
    figures = converter.layer_check(component, inputs, options)
    assert len(figures) == 21
    assert min(figures.values()) > EXACT_DB


def test_static_activations_become_quantize_operations_with_the_scales_of_the_plan(
    tmp_path: Path,
) -> None:
    component = build(make_static_pipeline(), "text_encoder")
    lowered = lower(component, tmp_path)
    kinds = lowered.details["op_kinds"]
    layers = [
        layer
        for layer in component.module.modules()
        if isinstance(layer, QuantizedModule) and layer.static is not None
    ]
    assert kinds["constexpr_affine_dequantize"] >= len(layers) == 12
    # Queries, keys and values read the same tensor.
    assert kinds["quantize"] == kinds["dequantize"] == 2 * len(layers) - 2 * 2


def test_ios16_refuses_static_activations() -> None:
    recipe = schema.load(
        "pocket_int8",
        {
            "stages.quantize.activations": "int8_static",
            "targets.coreml.deployment_target": "iOS16",
        },
    )
    with pytest.raises(UserError, match=r"iOS16.*choose iOS17"):
        converter.prepare(recipe, scheme_for("coreml", recipe))
