"""Quantized layers alone, held against the conversion: damage that rounding hides elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from mobile_runtime import layer_goldens, taps
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError
from mobile_runtime.report import Check, Report
from mobile_runtime.validate import validate
from tests.converters.small import convert_quantized
from tests.damages import Damage, damaged, in_manifest

FC1 = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
CONV2 = "vae_decoder.decoder.mid_block.resnets.0.conv2"
TO_OUT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_quantized(tmp_path_factory.mktemp("kept"))


def checked(folder: Path, **options: Any) -> Report:
    return validate(Bundle.open(folder), repeats=0, progress=False, options=options)


def kept(report: Report) -> dict[str, Check]:
    return {c.component: c for c in report.checks if c.kind == "quantized_layers"}


def on_initializer(
    layer: str, what: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Path], None]:
    """A change of a layer's bias, or of a scale or zero point of what it reads."""

    def apply(folder: Path) -> None:
        component = layer.split(".")[0]
        path = folder / component / "model.onnx"
        model = onnx.load(path)
        constants = {one.name: one for one in model.graph.initializer}
        makers = {name: node for node in model.graph.node for name in node.output}
        name = f"{layer}.bias"
        if what != "bias":
            known = taps.open_taps(folder / taps.path_of(component))
            waiting = [next(tap.value for tap in known.taps if tap.layer == layer)]
            while (node := makers[waiting[0]]).op_type != "QuantizeLinear":
                waiting = [one for one in node.input if one in makers] + waiting[1:]
            name = node.input[1 if what == "scale" else 2]
        before = numpy_helper.to_array(constants[name])
        after = change(before.copy()).astype(before.dtype)
        assert not np.array_equal(before, after)
        constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(after), name))
        onnx.save(model, path)

    return apply


def test_each_quantized_layer_is_kept_and_an_undamaged_bundle_passes(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for component, relative in opened.manifest.golden.layers.items():
        found = taps.open_taps(opened.file(relative))
        assert {tap.layer for tap in found.taps} == set(opened.quantized_layers(component))
        # The integer kernels give what every operator by itself gives.
        assert min(tap.snr_db["float32"] for tap in found.taps) > 45
    report = checked(bundle)
    assert report.verdict == "pass"
    assert {c: check.status for c, check in kept(report).items()} == dict.fromkeys(
        ("text_encoder", "unet", "vae_decoder"), "pass"
    )


@pytest.mark.parametrize(
    ("layer", "what", "change"),
    [
        (FC1, "bias", lambda bias: bias + 0.01 * np.sign(np.arange(bias.size) % 2 - 0.5)),
        (TO_OUT, "bias", lambda bias: np.roll(bias, 1)),
        (TO_OUT, "scale", lambda scale: 2 * scale),
        (CONV2, "zero point", lambda point: point - 30),
    ],
)
def test_a_small_damage_of_a_quantized_layer_is_named(
    bundle: Path, layer: str, what: str, change: Any, tmp_path: Path
) -> None:
    damage = Damage(what, on_initializer(layer, what, change))
    report = checked(damaged(bundle, damage, tmp_path / "bundle"))
    check = kept(report)[layer.split(".")[0]]
    assert report.verdict == "fail"
    assert (check.status, check.gated, check.details["layer"]) == ("fail", True, layer)
    assert layer in report.summary


def test_another_machine_is_held_to_45_db(bundle: Path, tmp_path: Path) -> None:
    def elsewhere(folder: Path) -> None:
        path = folder / layer_goldens.path_of("unet")
        found = taps.open_taps(path)
        reads = layer_goldens.open_reads(path)
        own = taps.Taps(found.taps, found.sketches, "another processor")
        layer_goldens.write(own, reads, path)

    moved = damaged(bundle, Damage("moved", elsewhere), tmp_path / "moved")
    assert kept(checked(moved))["unet"].status == "pass"
    worse = Damage("scale", on_initializer(TO_OUT, "scale", lambda scale: 2 * scale))
    report = checked(damaged(moved, worse, tmp_path / "worse"))
    assert kept(report)["unet"].details["layer"] == TO_OUT


def test_threads_change_nothing(bundle: Path) -> None:
    assert checked(bundle, threads=1).verdict == "pass"


def test_kept_layers_that_do_not_fit_fail_and_damaged_ones_are_refused(
    bundle: Path, tmp_path: Path
) -> None:
    def fewer(folder: Path) -> None:
        path = folder / layer_goldens.path_of("unet")
        found, reads = taps.open_taps(path), layer_goldens.open_reads(path)
        own = taps.Taps(found.taps[1:], found.sketches[1:], found.made_on)
        layer_goldens.write(own, reads, path)

    def another(folder: Path) -> None:
        path = folder / layer_goldens.path_of("unet")
        path.write_bytes((folder / layer_goldens.path_of("vae_decoder")).read_bytes())

    def no_reads(folder: Path) -> None:
        path = folder / layer_goldens.path_of("unet")
        taps.write(taps.open_taps(path), path)

    for name, change in (("fewer", fewer), ("another", another)):
        report = checked(damaged(bundle, Damage(name, change), tmp_path / name))
        assert report.verdict == "fail"
        assert "lacks" in kept(report)["unet"].reason
    with pytest.raises(BundleError, match="holds no layers"):
        checked(damaged(bundle, Damage("none", no_reads), tmp_path / "none"))


def test_a_bundle_of_before_is_told_and_passes(bundle: Path, tmp_path: Path) -> None:
    def before(manifest: dict[str, Any]) -> None:
        del manifest["golden"]["layers"]

    report = checked(damaged(bundle, Damage("old", in_manifest(before)), tmp_path / "old"))
    assert {check.status for check in kept(report).values()} == {"not_run"}
    assert report.verdict == "pass"
    assert "convert it again" in report.summary


def test_what_layers_read_is_as_it_is_in_the_first_golden_case(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    reads = layer_goldens.open_reads(opened.file(opened.manifest.golden.layers["unet"]))
    case = load_file(opened.file("golden/unet.safetensors"))["0/in/sample"]
    first = reads["sample"]
    assert first.shape == case.shape
    assert (first.low, first.high) == (case.min(), case.max())
    assert (first.mean, first.deviation) == pytest.approx((case.mean(), case.std()), rel=1e-5)
    read = layer_goldens.Read("x", 3, (1, 64, 64), 1.0, 3.0, 2.5, 0.1)
    noise = layer_goldens.noise(read)
    usual, wide = noise[:, :32], noise[:, 32:]
    assert noise.dtype == np.float32
    assert (usual.mean(), usual.std()) == pytest.approx((2.5, 0.1), abs=0.01)
    assert (wide.min(), wide.mean(), wide.max()) == pytest.approx((0, 2, 4), abs=0.05)
    flat = layer_goldens.Read("x", 0, (8,), 0.0, 0.0, 0.0, 0.0)
    assert layer_goldens.noise(flat).shape == (8,)
