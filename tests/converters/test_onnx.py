"""ONNX: the same function, the same integers, and a folder that Optimum opens."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from converters import components
from converters import onnx as converter
from converters.components import Component
from converters.lowered import Lowered
from converters.onnx import OnnxOptions
from mobile_runtime.backends.onnxruntime import EXACT_SESSION
from mobile_runtime.errors import UserError
from mobile_runtime.latency import environment
from mobile_runtime.manifest import TensorSpec
from mobile_runtime.parity import measure
from recipes.quantize import quantize
from recipes.quantized_layers import QuantizedModule
from recipes.schema import OnnxOptions as OnnxSettings
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
    return converter.lower(component, program, folder, OnnxOptions(**options))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in EXACT_SESSION.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def snr_db(component: Component, path: Path) -> float:
    """The file's output against the module's, in dB of the module's power."""
    inputs = component.example_inputs(seed=3)
    with torch.no_grad():
        reference = component.module(*inputs.values()).double().numpy()
    (out,) = session(path).run(None, {name: x.numpy() for name, x in inputs.items()})
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    noise = np.square(out - reference).mean() + 1e-300
    return 10 * float(np.log10(np.square(reference).mean() / noise))


@pytest.fixture(scope="module")
def int8_pipeline() -> Any:
    settings = QuantizeSettings(components=NAMES)
    pipeline, _ = quantize(make_small_pipeline(), settings)
    return pipeline


@pytest.fixture(scope="module")
def int8_folder(int8_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The INT8 pipeline with guidance, as the ONNX part of a bundle."""
    folder = tmp_path_factory.mktemp("int8")
    converter.write_optimum_files(int8_pipeline, folder, NAMES)
    for name in NAMES:
        lower(build(int8_pipeline, name), folder)
    return folder


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float pipeline without guidance."""
    folder = tmp_path_factory.mktemp("float")
    pipeline = make_small_pipeline()
    names = NAMES[:3]
    converter.write_optimum_files(pipeline, folder, names, resolution=(16, 16))
    for name in names:
        lower(build(pipeline, name, batch=1), folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_int8_file_computes_what_the_quantized_module_computes(
    int8_pipeline: Any, int8_folder: Path, name: str
) -> None:
    assert snr_db(build(int8_pipeline, name), int8_folder / name / "model.onnx") >= EXACT_DB


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_float_file_computes_what_the_module_computes(float_folder: Path, name: str) -> None:
    component = build(make_small_pipeline(), name, batch=1)
    assert snr_db(component, float_folder / name / "model.onnx") >= EXACT_DB


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_plan_is_stored_as_the_same_int8(
    int8_pipeline: Any, int8_folder: Path, name: str
) -> None:
    graph = onnx.load(int8_folder / name / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dequantized = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.attribute[0].name == "axis"
    ]
    assert all(node.attribute[0].i == 0 for node in dequantized)
    found = {stored[node.input[0]].tobytes() for node in dequantized}
    layers = [
        module
        for module in build(int8_pipeline, name).module.modules()
        if isinstance(module, QuantizedModule)
    ]
    assert layers
    assert found == {layer.weight_int8.numpy().tobytes() for layer in layers}
    # No weight was folded back to float beside its integers.
    floats = sum(array.size for array in stored.values() if array.dtype == np.float32)
    kept = sum(tensor.numel() for tensor in build(int8_pipeline, name).module.parameters())
    scales = sum(layer.weight_scale.numel() for layer in layers)
    assert floats <= kept + scales + 1000


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_names_shapes_and_types_of_the_specs(
    int8_pipeline: Any, int8_folder: Path, name: str
) -> None:
    component = build(int8_pipeline, name)
    opened = session(int8_folder / name / "model.onnx")
    types = {"float32": "tensor(float)", "int32": "tensor(int32)"}
    for specs, given in (
        (component.inputs, opened.get_inputs()),
        (component.outputs, opened.get_outputs()),
    ):
        assert [(spec.name, list(spec.shape), types[spec.dtype]) for spec in specs] == [
            (value.name, value.shape, value.type) for value in given
        ]


def test_a_file_tells_nothing_of_the_machine_and_holds_no_stale_shapes(int8_folder: Path) -> None:
    path = int8_folder / "unet" / "model.onnx"
    content = path.read_bytes()
    for folder in (Path(torch.__file__).parent.parent, Path(__file__).parent.parent.parent):
        assert str(folder).encode() not in content
    assert not onnx.load(path).graph.value_info
    assert [file.name for file in path.parent.iterdir()].count("model.onnx.data") == 0


def test_float16_halves_the_weights_and_keeps_float32_at_the_ends(tmp_path: Path) -> None:
    component = build(make_small_pipeline(), "unet")
    lowered = lower(component, tmp_path, precision="float16")
    assert snr_db(component, lowered.path) >= FLOAT16_DB
    weights = sum(tensor.numel() for tensor in component.module.parameters())
    assert lowered.path.stat().st_size < 2.5 * weights


def test_float16_refuses_a_weight_that_does_not_fit(tmp_path: Path) -> None:
    pipeline = make_small_pipeline()
    pipeline.vae.post_quant_conv.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"post_quant_conv\.weight of vae_decoder does not fit"):
        lower(build(pipeline, "vae_decoder"), tmp_path, precision="float16")


def test_weights_beyond_the_limit_of_one_message_go_to_one_file_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = build(make_small_pipeline(), "text_encoder")
    monkeypatch.setattr(converter, "LIMIT_BYTES", 1000)
    lowered = lower(component, tmp_path)
    assert lowered.details["external_data"] is True
    beside = {file.name for file in lowered.path.parent.iterdir()}
    assert beside == {"model.onnx", "model.onnx.data"}
    assert snr_db(component, lowered.path) >= EXACT_DB


@pytest.fixture(scope="module")
def ort_folder(int8_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ort")
    for name in ("text_encoder", "vae_decoder"):
        lowered = lower(build(int8_pipeline, name), folder, ort_format=True)
        assert (lowered.path, lowered.format) == (folder / name / "model.ort", "ort")
        assert "not for Optimum" in lowered.details["note"]
        required = (folder / "required_operators.config").read_text()
        assert all(kind in required for kind in lowered.details["op_kinds"])
    return folder


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_an_ort_file_takes_the_place_of_the_onnx_file(
    int8_pipeline: Any, ort_folder: Path, name: str
) -> None:
    assert [file.name for file in (ort_folder / name).iterdir()] == ["model.ort"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    component = build(int8_pipeline, name)
    inputs = component.example_inputs()
    # Default options: what keeps the activations in float32 was fixed when it was made.
    opened = onnxruntime.InferenceSession(str(ort_folder / name / "model.ort"), options)
    (out,) = opened.run(None, {key: x.numpy() for key, x in inputs.items()})
    with torch.no_grad():
        expected = component.module(*inputs.values())
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)


def test_making_an_ort_file_leaves_the_screen_clean(
    int8_pipeline: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logged: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: logged.append(record.name)  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        lower(build(int8_pipeline, "text_encoder"), tmp_path, ort_format=True)
    finally:
        logging.getLogger().removeHandler(handler)
    assert logged == []
    assert capfd.readouterr().err == ""


def test_the_operators_that_a_reduced_build_needs_are_those_of_all_components(
    ort_folder: Path,
) -> None:
    plain = (ort_folder / "required_operators.config").read_text()
    typed = (ort_folder / "required_operators_and_types.config").read_text()
    for text in (plain, typed):
        assert "# - text_encoder/model.ort\n# - vae_decoder/model.ort\n" in text
        assert "Conv" in text  # of the decoder
        assert "Gather" in text  # of the text encoder
        assert str(ort_folder) not in text
    assert "inputs" in typed
    assert "inputs" not in plain


def test_an_ort_file_beyond_two_gigabytes_is_refused_before_any_work(tmp_path: Path) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2**15, 2**15, device="meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    spec = TensorSpec(name="x", shape=(1,), dtype="float32", layout="N", description="")
    component = Component("unet", Wide(), (spec,), (spec,))
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    with pytest.raises(UserError, match=r"unet has 4\.3 GB of weights, and an \.ort file holds"):
        converter.lower(component, program, tmp_path, OnnxOptions(ort_format=True))
    assert not list(tmp_path.iterdir())


def test_what_the_target_cannot_do_is_refused(int8_pipeline: Any, tmp_path: Path) -> None:
    component = build(int8_pipeline, "vae_decoder")
    with pytest.raises(UserError, match="unknown opset '17'; choose one of: 18, 19"):
        lower(component, tmp_path, opset=17)
    opset = OnnxSettings.model_json_schema()["properties"]["opset"]
    assert (opset["minimum"], opset["maximum"]) == (converter.OPSETS[0], converter.OPSETS[-1])
    with pytest.raises(UserError, match="unknown precision 'int4'"):
        lower(component, tmp_path, precision="int4")
    with pytest.raises(UserError, match="INT8 weights in float32"):
        lower(component, tmp_path, precision="float16")
    dynamic, _ = quantize(
        make_small_pipeline(),
        QuantizeSettings(components=("text_encoder",), activations="int8_dynamic"),
    )
    with pytest.raises(UserError, match="activations: none"):
        lower(build(dynamic, "text_encoder"), tmp_path)


def test_progress_is_told_phase_by_phase(tmp_path: Path) -> None:
    component = build(make_small_pipeline(), "text_encoder")
    phases: list[str] = []
    program = components.export(component)
    converter.lower(component, program, tmp_path, OnnxOptions(opset=21), phases.append)
    assert phases == ["translate the graph", "write the model", "check the file"]
    opened = onnx.load(tmp_path / "text_encoder" / "model.onnx")
    assert opened.opset_import[0].version == 21
    assert snr_db(component, tmp_path / "text_encoder" / "model.onnx") >= EXACT_DB


def picture(pipeline: Callable[..., Any], guidance_scale: float) -> np.ndarray:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    made = pipeline(
        "a red star",
        latents=latents,
        guidance_scale=guidance_scale,
        num_inference_steps=3,
        output_type="np",
    )
    return np.asarray(made.images[0])


# Optimum uses deprecated parts of torch and diffusers.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "guidance_scale"), [("int8", 7.5), ("float", 0.0)], ids=["guided int8", "float"]
)
def test_optimum_draws_the_picture_that_diffusers_draws(
    kind: str, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    from optimum.onnxruntime import ORTDiffusionPipeline

    folder: Path = request.getfixturevalue(f"{kind}_folder")
    torch_pipeline = (
        request.getfixturevalue("int8_pipeline") if kind == "int8" else make_small_pipeline()
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in EXACT_SESSION.items():
        options.add_session_config_entry(key, value)
    opened = ORTDiffusionPipeline.from_pretrained(folder, session_options=options)
    assert_same_picture(opened, torch_pipeline, guidance_scale)


def assert_same_picture(opened: Any, torch_pipeline: Any, guidance_scale: float) -> None:
    for pipeline in (opened, torch_pipeline):
        pipeline.set_progress_bar_config(disable=True)
    drawn, expected = picture(opened, guidance_scale), picture(torch_pipeline, guidance_scale)
    assert drawn.shape == (16, 16, 3)
    assert expected.std() > 0.01
    np.testing.assert_allclose(drawn, expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_optimum_draws_with_a_tiny_decoder(float_folder: Path, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTDiffusionPipeline

    folder = Path(shutil.copytree(float_folder, tmp_path / "tiny"))
    shutil.rmtree(folder / "vae_decoder")
    pipeline = make_small_tiny_pipeline()
    converter.write_optimum_files(pipeline, folder, NAMES[:3], resolution=(16, 16))
    component = build(pipeline, "vae_decoder")
    lower(component, folder)
    assert snr_db(component, folder / "vae_decoder" / "model.onnx") >= EXACT_DB
    assert_same_picture(ORTDiffusionPipeline.from_pretrained(folder), pipeline, 0.0)


@pytest.mark.parametrize("activations", ["int8", "uint8"])
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_every_layer_with_static_activations_runs_in_an_integer_kernel(
    name: str, activations: str, tmp_path: Path
) -> None:
    component = build(make_static_pipeline(), name)
    path = lower(component, tmp_path, activations=activations).path
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for key, value in EXACT_SESSION.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    layers = [
        layer
        for layer in component.module.modules()
        if isinstance(layer, QuantizedModule) and layer.static is not None
    ]
    convolutions = sum(layer.weight_int8.dim() == 4 for layer in layers)
    assert kinds.count("QLinearConv") == convolutions
    assert kinds.count("QGemm") + kinds.count("QLinearMatMul") == len(layers) - convolutions > 0


def test_activations_in_uint8_are_the_same_values(tmp_path: Path) -> None:
    """On Arm, and on x86 with VNNI; without it, uint8 by int8 saturates."""
    component = build(make_static_pipeline(), "unet")
    inputs = {name: tensor.numpy() for name, tensor in component.example_inputs().items()}
    kinds, outputs = [], []
    for activations in ("int8", "uint8"):
        path = lower(component, tmp_path / activations, activations=activations).path
        graph = onnx.load(path).graph
        constants = {one.name: one.data_type for one in graph.initializer}
        points = {constants[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
        kinds.append(points)
        outputs.append(session(path).run(None, inputs)[0])
    assert kinds == [{onnx.TensorProto.INT8}, {onnx.TensorProto.UINT8}]
    if "avx512_vnni" in environment().cpu_flags or "asimd" in environment().cpu_flags:
        assert measure(*outputs).snr_db > 100


def test_each_layer_with_static_activations_equals_torch_on_the_same_input() -> None:
    component = build(make_static_pipeline(), "vae_decoder")
    inputs = {name: tensor.numpy() for name, tensor in component.example_inputs().items()}
    figures = converter.layer_check(component, inputs)
    assert len(figures) == 21
    assert min(figures.values()) > 60
