"""Opening and running a program: the two arithmetics, what may be looked at, what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mobile_runtime.backends import mil
from mobile_runtime.backends.mil import Program
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError, UserError
from mobile_runtime.manifest import TensorSpec
from tests.mobile_runtime.mil_programs import coremltools, normal, quiet, write_program

HALF = np.zeros((2, 8), np.float16)
MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


def chain(mb: Any, v: dict[str, Any]) -> dict[str, Any]:
    """fp16: total = x + y, scaled = total * y, ratio = scaled / x, and a mean of the first."""
    total = mb.add(x=v["x"], y=v["y"], name="total")
    scaled = mb.mul(x=total, y=v["y"], name="scaled")
    ratio = mb.real_div(x=scaled, y=v["x"], name="ratio")
    mean = mb.reduce_mean(x=total, axes=[1], name="mean")
    return {"ratio_out": ratio, "mean_out": mean}


@pytest.fixture(scope="module")
def half_program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    path = tmp_path_factory.mktemp("mil") / "half.mlpackage"
    return Program.open(write_program({"x": HALF, "y": HALF}, chain, path))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """y = conv(x) with weights in the weight file."""
    weight = normal(4, 3, 3, 3)
    return write_program(
        {"x": normal(1, 3, 5, 5)},
        lambda mb, v: {"y": mb.conv(x=v["x"], weight=weight, pad_type="same")},
        tmp_path / "conv.mlpackage",
    )


halves = hnp.arrays(
    np.float16, (2, 8), elements=st.floats(-300, 300, width=16).filter(lambda value: value != 0)
)


@settings(max_examples=50, deadline=None)
@given(x=halves, y=halves)
def test_float16_arithmetic_rounds_after_each_operation_as_ieee_does(
    x: np.ndarray, y: np.ndarray, half_program: Program
) -> None:
    results = half_program.run({"x": x, "y": y}, arithmetic="float16")
    with np.errstate(over="ignore"):
        # numpy's fp16 operators round each result once.
        np.testing.assert_array_equal(results["ratio_out"], (x + y) * y / x)
        mean = (x + y).astype(np.float32).mean(1).astype(np.float16)
    np.testing.assert_allclose(results["mean_out"], mean, rtol=1e-3)


@settings(max_examples=50, deadline=None)
@given(x=halves, y=halves)
def test_float32_arithmetic_rounds_only_what_leaves_the_program(
    x: np.ndarray, y: np.ndarray, half_program: Program
) -> None:
    results = half_program.run({"x": x, "y": y}, arithmetic="float32")
    a, b = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(over="ignore"):
        expected = ((a + b) * b / a).astype(np.float16)
    np.testing.assert_array_equal(results["ratio_out"], expected)


def test_what_overflows_fp16_is_infinite_in_float16_arithmetic_only(half_program: Program) -> None:
    feeds = {"x": HALF + 250, "y": HALF + 300}  # scaled = 165,000
    seen = {}
    for arithmetic in mil.ARITHMETICS:
        half_program.run(
            feeds,
            arithmetic=arithmetic,
            observe=lambda name, array, a=arithmetic: seen.update({(a, name): array.copy()}),
        )
    assert np.isposinf(seen["float16", "scaled"]).all()
    assert (seen["float32", "scaled"] == 165_000).all()


def test_fp16_subnormals_are_kept(half_program: Program) -> None:
    tiny = np.full_like(HALF, 2**-24)
    total = half_program.run({"x": tiny, "y": tiny}, arithmetic="float16", outputs=["total"])
    assert (total["total"] == np.float16(2**-23)).all()


def test_an_observer_sees_every_result_in_order(half_program: Program) -> None:
    names: list[str] = []
    half_program.run({"x": HALF + 1, "y": HALF}, observe=lambda name, _: names.append(name))
    assert names == ["total", "scaled", "ratio_out", "mean_out"]


def test_only_what_the_asked_outputs_need_is_computed(half_program: Program) -> None:
    names: list[str] = []
    results = half_program.run(
        {"x": HALF + 1, "y": HALF + 2},
        outputs=["scaled", "x"],
        observe=lambda name, _: names.append(name),
    )
    assert names == ["total", "scaled"]
    assert list(results) == ["scaled", "x"]
    assert results["scaled"].dtype == np.float16
    assert (results["scaled"] == 6).all()


def test_running_leaves_its_inputs_alone_and_gives_own_arrays(half_program: Program) -> None:
    x = HALF + 1
    x.flags.writeable = False
    results = half_program.run({"x": x, "y": HALF}, outputs=["x"])
    results["x"][:] = 7
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("feeds", "told"),
    [
        ({"x": HALF}, "takes the inputs x, y; given: x"),
        ({"x": HALF, "y": HALF, "z": HALF}, "given: x, y, z"),
        ({"x": HALF, "y": HALF[:1]}, r"'y' must be float16 \[2, 8\], not float16 \[1, 8\]"),
        ({"x": HALF[0], "y": HALF}, r"'x' must be float16 \[2, 8\], not float16 \[8\]"),
        ({"x": HALF.astype(np.int32), "y": HALF}, "not int32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    feeds: dict[str, np.ndarray], told: str, half_program: Program
) -> None:
    with pytest.raises(UserError, match=told):
        half_program.run(feeds)


def test_an_unknown_output_or_arithmetic_is_refused(half_program: Program) -> None:
    feeds = {"x": HALF, "y": HALF}
    with pytest.raises(UserError, match="computes no value named 'totl'"):
        half_program.run(feeds, outputs=["totl"])
    with pytest.raises(UserError, match="unknown arithmetic 'bfloat16'; choose one of: float16,"):
        half_program.run(feeds, arithmetic="bfloat16")  # type: ignore[arg-type]


def test_operations_and_attributes_that_are_lacking_are_named_all_at_once(tmp_path: Path) -> None:
    def build(mb: Any, v: dict[str, Any]) -> dict[str, Any]:
        return {
            "normed": mb.local_response_norm(x=v["x"], size=3),
            "larger": mb.upsample_nearest_neighbor(x=v["x"], scale_factor_height=np.float32(1.5)),
        }

    path = write_program({"x": normal(1, 3, 4, 4)}, build, tmp_path / "odd.mlpackage")
    with pytest.raises(UserError) as caught:
        Program.open(path)
    told = str(caught.value)
    assert "op local_response_norm (output 'normed') is not supported" in told
    assert "op upsample_nearest_neighbor (output 'larger'): scale_factor_height 1.5" in told


def edit(package: Path, change: Any) -> None:
    """Change the model of a package through its protobuf."""
    proto = mil.package.model_proto().Model()
    proto.ParseFromString((package / MODEL).read_bytes())
    change(proto)
    (package / MODEL).write_bytes(proto.SerializeToString())


def operations(proto: Any) -> Any:
    (block,) = proto.mlProgram.functions["main"].block_specializations.values()
    return block.operations


def test_an_attribute_value_that_is_unknown_is_named(package: Path) -> None:
    def change(proto: Any) -> None:
        for op in operations(proto):
            if op.type != "const":
                continue
            value = op.attributes["val"].immediateValue.tensor.strings.values
            if list(value) == ["same"]:
                value[0] = "mirror"

    edit(package, change)
    with pytest.raises(
        UserError, match=r"op conv \(output 'y'\): pad_type 'mirror' is not supported \(only valid"
    ):
        Program.open(package)


def test_an_argument_that_is_unknown_or_missing_is_named(package: Path) -> None:
    def change(proto: Any) -> None:
        conv = next(op for op in operations(proto) if op.type == "conv")
        conv.inputs["twist"].CopyFrom(conv.inputs["pad_type"])

    edit(package, change)
    with pytest.raises(UserError, match=r"op conv .*: the argument 'twist' is not supported"):
        Program.open(package)
    edit(package, lambda proto: operations(proto)[-1].inputs.pop("twist"))
    edit(package, lambda proto: operations(proto)[-1].inputs.pop("weight"))
    with pytest.raises(UserError, match=r"op conv .*: the argument 'weight' is missing"):
        Program.open(package)


def test_a_value_that_nothing_computes_is_damage(package: Path) -> None:
    def change(proto: Any) -> None:
        operations(proto)[-1].inputs["x"].arguments[0].name = "nowhere"

    edit(package, change)
    with pytest.raises(BundleError, match="'nowhere' is used before it is computed"):
        Program.open(package)


def test_a_shape_that_the_operations_do_not_give_is_damage(package: Path) -> None:
    def change(proto: Any) -> None:
        dimensions = operations(proto)[-1].outputs[0].type.tensorType.dimensions
        dimensions[1].constant.size = 5

    edit(package, change)
    with pytest.raises(BundleError, match=r"computes shape \[1, 4, 5, 5\] where .* declares 'y'"):
        Program.open(package).run({"x": normal(1, 3, 5, 5)})


def test_a_model_that_is_no_program_is_refused(package: Path) -> None:
    edit(package, lambda proto: proto.neuralNetwork.SetInParent())
    with pytest.raises(UserError, match="of type neuralNetwork; the interpreter runs ML programs"):
        Program.open(package)


def test_an_unknown_function_lists_the_functions(package: Path) -> None:
    with pytest.raises(UserError, match=r"unknown function of .* 'other'; choose one of: main"):
        Program.open(package, function="other")


def test_damaged_packages_are_told_in_one_sentence(package: Path) -> None:
    manifest = package / "Manifest.json"
    content = json.loads(manifest.read_text())
    model, weights = (package / MODEL).read_bytes(), (package / WEIGHTS).read_bytes()

    (package / WEIGHTS).write_bytes(weights[:-8])
    with pytest.raises(BundleError, match="the file ends inside this value"):
        Program.open(package)
    (package / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="is missing"):
        Program.open(package)
    (package / WEIGHTS).write_bytes(weights)

    (package / MODEL).write_bytes(model[: len(model) // 2])
    with pytest.raises(BundleError, match="is not a Core ML model"):
        Program.open(package)

    outside = json.loads(manifest.read_text())
    outside["itemInfoEntries"][content["rootModelIdentifier"]]["path"] = "../../secret"
    manifest.write_text(json.dumps(outside))
    with pytest.raises(BundleError, match="points outside the package"):
        Program.open(package)
    manifest.write_text("{}")
    with pytest.raises(BundleError, match="does not name the package's model"):
        Program.open(package)
    manifest.unlink()
    with pytest.raises(UserError, match=r"is not an \.mlpackage: it has no Manifest.json"):
        Program.open(package)


def make_bundle(package: Path, file_format: str = "mlpackage") -> Bundle:
    entry = SimpleNamespace(
        path=package.name,
        format=file_format,
        inputs=[
            TensorSpec(name="x", shape=(1, 3, 5, 5), dtype="float32", layout="NCHW", description="")
        ],
        outputs=[
            TensorSpec(name="y", shape=(1, 4, 5, 5), dtype="float32", layout="NCHW", description="")
        ],
        details={},
    )
    manifest: Any = SimpleNamespace(component=lambda name: entry)
    return Bundle(package.parent, manifest, "")


def test_a_component_of_a_bundle_is_a_callable(package: Path) -> None:
    x = normal(1, 3, 5, 5)
    runner = mil.load(make_bundle(package), "unet", arithmetic="float32")
    assert runner({"x": x})["y"].shape == (1, 4, 5, 5)


def test_load_refuses_another_format_and_an_unknown_arithmetic(package: Path) -> None:
    with pytest.raises(UserError, match=r"unet of .* is onnx; choose the backend that fits"):
        mil.load(make_bundle(package, "onnx"), "unet")
    with pytest.raises(UserError, match="unknown arithmetic 'int8'"):
        mil.load(make_bundle(package), "unet", arithmetic="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("library", ["coremltools", "torch"])
def test_a_missing_library_is_told_with_its_extra(
    library: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == library else find(name)
    )
    with pytest.raises(UserError, match=rf"needs {library}, .* 'pocket-diffusion\[coreml\]'"):
        mil.load(make_bundle(package), "unet")


def printed_by(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_interpreter_loads_neither_torch_nor_coremltools() -> None:
    script = (
        "import sys, mobile_runtime.backends.mil.ops\n"
        "print([name for name in ('torch', 'coremltools', 'google') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_opening_a_package_does_not_import_coremltools(package: Path) -> None:
    script = (
        "import sys; from mobile_runtime.backends.mil import Program\n"
        f"Program.open({str(package)!r})\n"
        "print('coremltools' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False False"


def test_a_program_with_open_shapes_takes_any_size(tmp_path: Path) -> None:
    ct = coremltools()
    from coremltools.converters.mil import mil as builder

    mb, size = builder.Builder, builder.get_new_symbol()
    with quiet():

        @mb.program(input_specs=[mb.TensorSpec((size, 4))], opset_version=ct.target.iOS17)
        def program(x: Any) -> Any:
            return mb.relu(x=x, name="y")

        model = ct.convert(
            program,
            inputs=[ct.TensorType("x", (ct.RangeDim(1, 9), 4))],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(tmp_path / "open.mlpackage"))
    opened = Program.open(tmp_path / "open.mlpackage")
    for rows in (1, 5):
        assert opened.run({"x": normal(rows, 4)})["y"].shape == (rows, 4)
