"""4-bit weights on each target that has them: the same integers, the same function."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from converters import components, coreml
from converters import onnx as to_onnx
from converters.components import Component
from converters.coreml import CoreMLOptions
from converters.lowered import Lowered
from converters.onnx import OnnxOptions
from mobile_runtime.backends.mil import Program
from mobile_runtime.backends.onnxruntime import EXACT_SESSION
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import ComponentName, TensorSpec
from recipes import int4_layers, schema
from recipes.int4_layers import Form, Int4Module
from recipes.quantize import quantize
from recipes.settings import Int4Settings, QuantizeSettings
from tests.converters.small import build, make_small_pipeline

NAMES: tuple[ComponentName, ...] = ("text_encoder", "vae_decoder")
EXACT_DB = 100.0
FLOAT16_DB = 45.0


@pytest.fixture(scope="module")
def pipeline() -> Any:
    settings = QuantizeSettings(
        weights="int4", int4=Int4Settings(rank=2, iterations=1), components=NAMES
    )
    return quantize(make_small_pipeline(), settings)[0]


@pytest.fixture(scope="module")
def onnx_files(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lowered]:
    folder = tmp_path_factory.mktemp("onnx")
    built = {name: build(pipeline, name) for name in NAMES}
    options = OnnxOptions(opset=21)
    return {
        name: to_onnx.lower(component, components.export(component), folder, options)
        for name, component in built.items()
    }


@pytest.fixture(scope="module")
def package(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """The decoder for Core ML, in float16."""
    component = build(pipeline, "vae_decoder")
    options = CoreMLOptions(deployment_target="iOS18")
    folder = tmp_path_factory.mktemp("coreml")
    return coreml.lower(component, components.export(component), folder, options)


def layers_of(component: Component) -> list[Any]:
    found: list[Any] = [
        module for module in component.module.modules() if isinstance(module, Int4Module)
    ]
    assert found
    return found


def feeds(component: Component) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in component.example_inputs(seed=3).items()}


def snr_db(component: Component, out: np.ndarray) -> float:
    with torch.no_grad():
        reference = component.module(*component.example_inputs(seed=3).values()).double().numpy()
    assert np.isfinite(out).all()
    noise = np.square(out - reference).mean() + 1e-300
    return 10 * float(np.log10(np.square(reference).mean() / noise))


def session(path: Path, exact: bool = True, optimized: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized:
        options.optimized_model_filepath = str(optimized)
    for key, value in EXACT_SESSION.items() if exact else ():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", NAMES)
def test_an_onnx_file_computes_what_the_module_computes(
    pipeline: Any, onnx_files: dict[str, Lowered], name: str
) -> None:
    component = build(pipeline, name)
    (out,) = session(onnx_files[name].path).run(None, feeds(component))
    assert snr_db(component, out) >= EXACT_DB
    # Without the session's options, ONNX Runtime rounds activations too.
    (rounded,) = session(onnx_files[name].path, exact=False).run(None, feeds(component))
    assert snr_db(component, rounded) < 70


@pytest.mark.parametrize("name", NAMES)
def test_an_onnx_file_holds_the_integers_in_4_bits_and_the_rest_in_float16(
    pipeline: Any, onnx_files: dict[str, Lowered], name: str
) -> None:
    lowered = onnx_files[name]
    stored = {tensor.name: tensor for tensor in onnx.load(lowered.path).graph.initializer}
    packed = [tensor for tensor in stored.values() if tensor.data_type == onnx.TensorProto.INT4]
    found = set()
    for tensor in packed:
        array = numpy_helper.to_array(tensor).astype(np.int8)
        assert len(tensor.raw_data) == (array.size + 1) // 2
        found |= {array.tobytes(), np.ascontiguousarray(array.T).tobytes()}
    layers = layers_of(build(pipeline, name))
    assert len(packed) == len(layers) == lowered.details["int4_weights"]
    assert all(layer.weight_int4.numpy().tobytes() in found for layer in layers)
    # Neither branch nor step of any size is stored in float32.
    halves = {
        numpy_helper.to_array(tensor).astype(np.float32).tobytes()
        for tensor in stored.values()
        if tensor.data_type == onnx.TensorProto.FLOAT16
    }
    for layer in layers:
        for part in (layer.weight_scale, layer.down.weight, layer.up.weight):
            flat = part.detach().numpy().squeeze()
            written = {flat.tobytes(), np.ascontiguousarray(flat.T).tobytes()}
            assert flat.size < 64 or written & halves


def test_onnx_runtime_multiplies_a_linears_4_bits_as_they_are(
    pipeline: Any, onnx_files: dict[str, Lowered], tmp_path: Path
) -> None:
    session(onnx_files["text_encoder"].path, optimized=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == len(layers_of(build(pipeline, "text_encoder")))
    assert all(
        attribute.i == 4 for n in products for attribute in n.attribute if attribute.name == "bits"
    )
    # The casts of steps and branches were computed when the file was loaded.
    assert not any(node.op_type == "Cast" for node in graph.node)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (torch.nn.Linear(64, 24), torch.randn(2, 5, 64)),
        (torch.nn.Linear(64, 24), torch.randn(5, 64)),
        (torch.nn.Conv2d(32, 8, 3, stride=2, padding=1), torch.randn(1, 32, 9, 9)),
    ],
    ids=["linear", "linear of rows", "conv"],
)
def test_a_layer_is_what_onnxs_reference_and_core_mls_interpreter_compute(
    layer: Any, x: torch.Tensor, tmp_path: Path
) -> None:
    made = int4_layers.quantized(layer, Form(16, 2))
    y = made(x)
    specs = [
        TensorSpec(
            name=n, shape=tuple(t.shape), dtype="float32", layout="N" * t.dim(), description=""
        )
        for n, t in (("x", x), ("y", y))
    ]
    component = Component("unet", made, (specs[0],), (specs[1],))
    program = torch.export.export(made, (x,))
    path = to_onnx.lower(component, program, tmp_path, OnnxOptions(opset=21)).path
    (out,) = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out, y.detach().numpy(), atol=1e-5)
    options = CoreMLOptions(deployment_target="iOS18", compute_precision="float32")
    lowered = coreml.lower(component, program, tmp_path, options)
    out = Program.open(lowered.path).run({"x": x.numpy()}, arithmetic="float32")["y"]
    np.testing.assert_allclose(out, y.detach().numpy(), atol=1e-5)


def test_an_ort_file_keeps_the_4_bits(pipeline: Any, tmp_path: Path) -> None:
    component = build(pipeline, "text_encoder")
    options = OnnxOptions(opset=21, ort_format=True)
    lowered = to_onnx.lower(component, components.export(component), tmp_path, options)
    assert lowered.details["op_kinds"]["MatMulNBits"] == len(layers_of(component))
    (out,) = session(lowered.path, exact=False).run(None, feeds(component))
    assert snr_db(component, out) >= EXACT_DB


def test_a_package_computes_what_the_module_computes(pipeline: Any, package: Lowered) -> None:
    component = build(pipeline, "vae_decoder")
    (out,) = Program.open(package.path).run(feeds(component), arithmetic="float16").values()
    assert snr_db(component, out) >= FLOAT16_DB
    (out,) = Program.open(package.path).run(feeds(component), arithmetic="float32").values()
    assert snr_db(component, out) >= 60


@pytest.mark.filterwarnings("ignore:.*skip_model_load.*")
def test_a_package_holds_the_integers_by_coremltools_own_reader(
    pipeline: Any, package: Lowered
) -> None:
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.converters.mil.mil import types

    model = coremltools.models.MLModel(str(package.path), skip_model_load=True)
    spec = model.get_spec()
    (function,) = load(spec, spec.specificationVersion, model.weights_dir).functions.values()
    stored = [
        op
        for op in function.operations
        if op.op_type == "constexpr_blockwise_shift_scale" and op.data.dtype is types.int4
    ]
    layers = layers_of(build(pipeline, "vae_decoder"))
    assert len(stored) == len(layers) == package.details["int4_weights"]
    assert {op.data.val.astype(np.int8).tobytes() for op in stored} == {
        layer.weight_int4.numpy().tobytes() for layer in layers
    }
    steps = {op.scale.val.astype(np.float32).tobytes() for op in stored}
    assert steps == {layer.weight_scale.numpy().tobytes() for layer in layers}


def test_a_package_with_other_integers_is_found_when_it_is_read_back(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = build(pipeline, "text_encoder")
    true_integers = coreml._weight_integers
    monkeypatch.setattr(
        coreml, "_weight_integers", lambda program: [t ^ 1 for t in true_integers(program)]
    )
    program = components.export(component)
    with pytest.raises(RuntimeError, match="does not hold the integers"):
        coreml.lower(component, program, tmp_path, CoreMLOptions(deployment_target="iOS18"))


def test_what_a_target_cannot_do_is_refused_before_the_work(pipeline: Any, tmp_path: Path) -> None:
    component = build(pipeline, "text_encoder")
    program = components.export(component)
    with pytest.raises(UserError, match=r"from opset 21 on, not in 18: set targets\.onnx\.opset"):
        to_onnx.lower(component, program, tmp_path, OnnxOptions())
    with pytest.raises(UserError, match="in float32, and 4-bit ones"):
        to_onnx.lower(component, program, tmp_path, OnnxOptions(opset=21, precision="float16"))
    with pytest.raises(UserError, match=r"iOS17 \(macOS 14\) has no int4 weights: .* iOS18"):
        coreml.lower(component, program, tmp_path, CoreMLOptions())
    assert not list(tmp_path.iterdir())


def test_a_recipes_options_are_checked_with_the_request() -> None:
    from converters.support import scheme_for

    asked = {"stages.quantize.weights": "int4"}
    recipe = schema.load("pocket_int8", asked)
    with pytest.raises(UserError, match=r"targets\.onnx\.opset to 21"):
        to_onnx.prepare(recipe, scheme_for("onnx", recipe))
    with pytest.raises(UserError, match=r"targets\.coreml\.deployment_target to iOS18"):
        coreml.prepare(recipe, scheme_for("coreml", recipe))
    fits = asked | {"targets.onnx.opset": 21, "targets.coreml.deployment_target": "iOS18"}
    recipe = schema.load("pocket_int8", fits)
    assert to_onnx.prepare(recipe, scheme_for("onnx", recipe)).opset == 21
    prepared = coreml.prepare(recipe, scheme_for("coreml", recipe))
    assert prepared.compute_precision == "float16"
