"""Validation passes a bundle that computes what its goldens say, and no other."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mobile_runtime import backends
from mobile_runtime.bundle import Bundle
from mobile_runtime.checks import QUANTIZED_SNR_DB
from mobile_runtime.errors import BundleError, UserError, run_cli
from mobile_runtime.manifest import LayerPlan, Manifest
from mobile_runtime.report import Check, Report, format_table, read_report
from mobile_runtime.report_html import render
from mobile_runtime.validate import add_arguments, run, runtimes, validate
from tests.bundles import make_bundle

Arrays = dict[str, np.ndarray]
Damage = Callable[[Arrays], Arrays]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("validate") / "bundle")


def checked(bundle: Bundle, **options: Any) -> Report:
    return validate(bundle, progress=False, **{"repeats": 0} | options)


def find(report: Report, component: str, kind: str, prompt: int | None = None) -> Check:
    (found,) = [
        check
        for check in report.checks
        if (check.component, check.kind, check.prompt) == (component, kind, prompt)
    ]
    return found


def damage_component(monkeypatch: pytest.MonkeyPatch, component: str, damage: Damage) -> None:
    """From now on that component's runner gives damaged outputs."""
    load = backends.load

    def damaged_load(bundle: Bundle, name: str, **options: Any) -> backends.Runner:
        runner = load(bundle, name, **options)
        return (lambda feeds: damage(runner(feeds))) if name == component else runner

    monkeypatch.setattr(backends, "load", damaged_load)


def test_an_undamaged_bundle_passes_with_every_check_made(good: Bundle) -> None:
    report = checked(good, repeats=2)
    assert report.verdict == "pass"
    assert report.manifest_sha256 == good.manifest_sha256
    kinds = {(check.component, check.kind) for check in report.checks}
    for component in ("text_encoder", "unet", "vae_decoder"):
        for kind in ("outputs", "same_function", "source", "repeat"):
            assert (component, kind) in kinds
    assert ("unet", "conditioning") in kinds
    for kind in ("tokens", "noise", "outputs", "trajectory", "picture", "source_picture"):
        assert ("pipeline", kind) in kinds
    same = find(report, "unet", "same_function")
    assert same.value is not None
    assert same.value > 100
    assert len(same.details["cases"]) == good.manifest.golden.cases["unet"]
    timed = [row.component for row in report.latency]
    assert timed == ["text_encoder", "unet", "vae_decoder", "pipeline"]
    calls = {name: len(times) for name, times in report.latency[-1].parts_ms.items()}
    steps = good.manifest.golden.prompts[0].steps
    texts = 2 if good.manifest.golden.prompts[0].guidance_scale > 1 else 1
    per_step = texts // good.component("unet").inputs[0].shape[0]
    assert calls == {"text_encoder": texts, "unet": steps * max(1, per_step), "vae_decoder": 1}
    assert len(find(report, "pipeline", "trajectory", 0).details["snr_db_by_step"]) == 4
    assert [pictures.prompt for pictures in report.pictures] == ["red fox", "the rat"]


def one_value(value: float) -> Damage:
    def damage(outputs: Arrays) -> Arrays:
        changed = {name: array.copy() for name, array in outputs.items()}
        next(iter(changed.values())).flat[7] = value
        return changed

    return damage


def each(change: Callable[[np.ndarray], Any]) -> Damage:
    return lambda outputs: {name: change(array) for name, array in outputs.items()}


DAMAGES: dict[str, Damage] = {
    "all NaN": each(lambda a: np.full_like(a, np.nan)),
    "one NaN": one_value(np.nan),
    "one infinity": one_value(np.inf),
    "zeros": each(np.zeros_like),
    "one spike": one_value(50.0),
    "wrong rank": each(np.ravel),
    "wrong dtype": each(lambda a: a.astype(np.float64)),
    "missing batch axis": each(lambda a: a[0]),
    "missing output": lambda outputs: {},
    "output under another name": lambda o: {f"{name}_2": array for name, array in o.items()},
    "an output too many": lambda outputs: outputs | {"more": np.ones(3, np.float32)},
    "halves of the batch or of the channels swapped": each(lambda a: a[:, ::-1]),
}


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_output_fails_and_the_component_is_named(
    good: Bundle, monkeypatch: pytest.MonkeyPatch, component: str, damage: str
) -> None:
    damage_component(monkeypatch, component, DAMAGES[damage])
    report = checked(good, prompts=1)
    assert report.verdict == "fail"
    assert report.summary.startswith(component)
    json.dumps(report.model_dump(mode="json", exclude={"pictures"}), allow_nan=False)
    assert "FAIL" in format_table(report)


def test_an_output_that_differs_between_two_runs_fails(
    good: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    damage_component(
        monkeypatch, "unet", each(lambda a: (a * (1 + 1e-6 * rng.random())).astype(a.dtype))
    )
    report = checked(good)
    assert find(report, "unet", "same_function").status == "pass"
    assert find(report, "unet", "repeat").status == "fail"
    assert report.verdict == "fail"


def test_a_state_that_leaks_into_the_next_call_fails(
    good: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def leaking(outputs: Arrays) -> Arrays:
        calls.append(1)
        return {name: array * np.float32(1 + 1e-6 * len(calls)) for name, array in outputs.items()}

    damage_component(monkeypatch, "vae_decoder", leaking)
    assert find(checked(good), "vae_decoder", "repeat").status == "fail"


def without_conditioning(component: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """A UNet whose context weights are zero: a whole model that ignores the prompt."""
    if component == "unet":
        for weight in model.graph.initializer:
            if weight.name == "context":
                zeros = np.zeros_like(numpy_helper.to_array(weight))
                weight.CopyFrom(numpy_helper.from_array(zeros, "context"))
    return model


def test_a_unet_that_ignores_the_prompt_fails_even_without_gates(tmp_path: Path) -> None:
    bundle = make_bundle(
        tmp_path / "bundle", change_model=without_conditioning, change_manifest=with_gates()
    )
    report = checked(bundle)
    check = find(report, "unet", "conditioning")
    assert (check.status, check.value) == ("fail", 0)
    assert report.verdict == "fail"


def with_gates(**gates: float) -> Callable[[Manifest], Manifest]:
    """Only these gates."""
    none = {"component_snr_db": None, "picture_psnr_db": None}

    def change(manifest: Manifest) -> Manifest:
        made = type(manifest.gates)(**none | gates)  # type: ignore[arg-type]
        return manifest.model_copy(update={"gates": made})

    return change


def test_without_gates_figures_are_told_and_do_not_decide(tmp_path: Path) -> None:
    report = checked(make_bundle(tmp_path / "bundle", change_manifest=with_gates()))
    assert report.verdict == "pass"
    assert find(report, "unet", "same_function").status == "not_gated"
    assert find(report, "unet", "same_function").value is not None
    assert find(report, "pipeline", "picture", 0).status == "not_gated"


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
@pytest.mark.parametrize("damage", ["one NaN", "wrong dtype", "missing batch axis"])
def test_without_gates_a_wrong_form_still_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, damage: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_manifest=with_gates())
    damage_component(monkeypatch, component, DAMAGES[damage])
    report = checked(bundle)
    assert report.verdict == "fail"
    assert report.summary.startswith(component)


def without_prompts(manifest: Manifest) -> Manifest:
    golden = manifest.golden.model_copy(update={"prompts": ()})
    return manifest.model_copy(update={"golden": golden})


def test_a_bundle_without_golden_prompts_does_not_pass(tmp_path: Path) -> None:
    report = checked(make_bundle(tmp_path / "bundle", change_manifest=without_prompts))
    missing = find(report, "pipeline", "outputs")
    assert (missing.status, missing.gated) == ("not_run", True)
    assert report.verdict == "not_run"
    assert "no golden prompt" in report.summary


def test_the_conclusion_of_a_bundle_without_gates_says_what_is_not_gated(tmp_path: Path) -> None:
    report = checked(make_bundle(tmp_path / "bundle", change_manifest=with_gates()))
    assert report.summary.endswith("; not gated: same function, source, picture, source picture")


@pytest.mark.parametrize("gates", [{}, {"source_component_snr_db": 20.0}], ids=["no gate", "gate"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_source_reference_that_is_not_finite_fails_with_a_gate_or_without(
    tmp_path: Path, value: float, gates: dict[str, float]
) -> None:
    def broken_source(name: str, tensors: Arrays) -> Arrays:
        if name == "unet":
            tensors["1/source/out_sample"] = np.full_like(tensors["1/source/out_sample"], value)
        return tensors

    path = tmp_path / "bundle"
    report = checked(
        make_bundle(path, change_golden=broken_source, change_manifest=with_gates(**gates))
    )
    check = find(report, "unet", "source")
    assert check.status == "fail"
    assert "out_sample has a reference that is not finite (case 1)" in check.reason
    assert report.verdict == "fail"


def test_a_missing_source_reference_is_told_by_its_name(tmp_path: Path) -> None:
    def without_source(name: str, tensors: Arrays) -> Arrays:
        return {k: v for k, v in tensors.items() if name != "unet" or "1/source/" not in k}

    bundle = make_bundle(
        tmp_path / "bundle", change_golden=without_source, change_manifest=with_gates()
    )
    with pytest.raises(BundleError, match=r"unet\.safetensors has no tensor 1/source/out_sample"):
        checked(bundle)


def far_source(name: str, tensors: Arrays) -> Arrays:
    """Goldens whose source is another function: what a strong stage would do."""
    rng = np.random.default_rng(0)
    return {
        key: (value + rng.standard_normal(value.shape)).astype(value.dtype)
        if "/source/" in key
        else value
        for key, value in tensors.items()
    }


def test_the_two_references_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    report = checked(make_bundle(path, change_golden=far_source))
    assert find(report, "unet", "same_function").status == "pass"
    assert find(report, "unet", "source").status == "fail"
    assert report.verdict == "fail"

    only_conversion = with_gates(component_snr_db=60)
    bundle = make_bundle(
        path, change_golden=far_source, change_manifest=only_conversion, force=True
    )
    report = checked(bundle)
    assert find(report, "unet", "source").status == "not_gated"
    assert report.verdict == "pass"


def scaled(key: str, factor: float) -> Callable[[str, Arrays], Arrays]:
    def change(name: str, tensors: Arrays) -> Arrays:
        return {k: v * np.float32(factor) if k.endswith(key) else v for k, v in tensors.items()}

    return change


def test_noise_that_the_seed_does_not_give_fails(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_golden=scaled("0/noise", 1.001))
    report = checked(bundle)
    assert find(report, "pipeline", "noise", 0).status == "fail"
    assert find(report, "pipeline", "noise", 1).status == "pass"
    assert report.verdict == "fail"


def test_token_ids_that_no_golden_case_has_fail(tmp_path: Path) -> None:
    def other_words(name: str, tensors: Arrays) -> Arrays:
        return {
            key: np.where(value == 513, 514, value).astype(value.dtype)
            if key.endswith("input_ids")
            else value
            for key, value in tensors.items()
        }

    report = checked(make_bundle(tmp_path / "bundle", change_golden=other_words))
    assert find(report, "pipeline", "tokens", 0).status == "fail"
    assert find(report, "pipeline", "tokens", 1).status == "pass"
    assert report.verdict == "fail"


def test_a_picture_unlike_the_stored_one_fails(tmp_path: Path) -> None:
    def other_picture(name: str, tensors: Arrays) -> Arrays:
        return {key: value[::-1] if key == "1/picture" else value for key, value in tensors.items()}

    report = checked(make_bundle(tmp_path / "bundle", change_golden=other_picture))
    assert find(report, "pipeline", "picture", 0).status == "pass"
    assert find(report, "pipeline", "picture", 1).status == "fail"
    assert report.verdict == "fail"


def test_a_stochastic_schedule_is_run_with_its_stored_fresh_noise(tmp_path: Path) -> None:
    report = checked(make_bundle(tmp_path / "bundle", stochastic=True))
    assert report.verdict == "pass", format_table(report)


def test_a_file_that_is_no_model_fails_without_a_traceback(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    bundle.file("unet/model.onnx").write_bytes(b"no model")
    report = checked(bundle)
    assert report.verdict == "fail"
    assert report.summary.startswith("unet")
    assert find(report, "text_encoder", "same_function").status == "pass"


def test_a_model_that_raises_when_it_runs_fails_without_a_traceback(
    good: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(outputs: Arrays) -> Arrays:
        raise RuntimeError("kernel burst\nwith details")

    damage_component(monkeypatch, "unet", burst)
    report = checked(good)
    assert report.verdict == "fail"
    assert "RuntimeError: kernel burst" in report.summary


def quantized(**figures: float) -> Callable[[Manifest], Manifest]:
    """A UNet with quantized activations, and the figures that its conversion recorded."""

    def change(manifest: Manifest) -> Manifest:
        plan = tuple(
            LayerPlan(layer=f"unet.{name}", weights="int8", activations="int8_dynamic", reason="x")
            for name in ("conv", "context")
        )
        recorded = {f"unet.{name}": snr_db for name, snr_db in figures.items()}
        components = tuple(
            entry.model_copy(update={"details": {"layer_snr_db": recorded}})
            if entry.name == "unet"
            else entry
            for entry in manifest.components
        )
        gates = manifest.gates.model_copy(update={"layer_snr_db": 45.0, "component_snr_db": 200.0})
        return manifest.model_copy(
            update={"quantization": plan, "components": components, "gates": gates}
        )

    return change


@pytest.mark.parametrize(
    ("figures", "status"),
    [
        ({"conv": 52.0, "context": 47.0}, "pass"),
        ({"conv": 52.0, "context": 44.9}, "fail"),
        ({"conv": 52.0}, "fail"),
        ({}, "not_run"),
    ],
    ids=["all reach it", "one misses", "one has no figure", "none recorded"],
)
def test_quantized_activations_are_gated_layer_by_layer_and_hardly_as_a_whole(
    tmp_path: Path, figures: dict[str, float], status: str
) -> None:
    report = checked(make_bundle(tmp_path / "bundle", change_manifest=quantized(**figures)))
    assert find(report, "unet", "layers_at_conversion").status == status
    whole = find(report, "unet", "same_function")
    assert (whole.status, whole.gate) == ("pass", QUANTIZED_SNR_DB)
    assert "a low gate" in whole.reason
    # A component with no such layer keeps its own gate, which nothing reaches here but equality.
    assert find(report, "vae_decoder", "same_function").status == "fail"


def without_case_count(component: str) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        cases = {k: v for k, v in manifest.golden.cases.items() if k != component}
        golden = manifest.golden.model_copy(update={"cases": cases})
        return manifest.model_copy(update={"golden": golden})

    return change


def test_a_component_without_golden_cases_keeps_the_bundle_from_passing(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_manifest=without_case_count("vae_decoder"))
    report = checked(bundle)
    assert find(report, "vae_decoder", "outputs").status == "not_run"
    assert report.verdict == "not_run"


def test_prompts_that_were_left_out_are_told(good: Bundle) -> None:
    report = checked(good, prompts=1)
    assert report.verdict == "pass"
    left_out = find(report, "pipeline", "elsewhere")
    assert left_out.status == "not_run"
    assert "1 of 2 golden prompts" in left_out.reason


def as_coreml(manifest: Manifest, **update: Any) -> Bundle:
    changed = manifest.model_copy(update={"target": "coreml", "arithmetic": "float16"} | update)
    return Bundle(Path("nowhere"), changed, "0" * 64)


def test_core_ml_off_the_mac_is_interpreted_in_both_arithmetics_each_with_its_gate(
    good: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    gates = good.manifest.gates.model_copy(update={"float16_snr_db": 45.0})
    bundle = as_coreml(good.manifest, gates=gates)
    chosen = runtimes(bundle)
    assert [runtime.label for runtime in chosen] == ["mil float32", "mil float16"]
    assert [runtime.gate_db(gates) for runtime in chosen] == [60.0, 45.0]
    assert [r.label for r in runtimes(as_coreml(good.manifest, arithmetic="float32"))] == [
        "mil float32"
    ]


def test_core_ml_runs_itself_on_a_mac(good: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert [r.label for r in runtimes(as_coreml(good.manifest))] == ["coreml"]


def test_core_ml_itself_is_told_as_not_run_off_the_mac(
    good: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    load = backends.load
    manifest = good.manifest.model_copy(update={"target": "coreml"})
    monkeypatch.setattr(
        backends,
        "load",
        lambda bundle, name, **_: load(good, name),  # ONNX Runtime stands in
    )
    report = checked(Bundle(good.path, manifest, good.manifest_sha256))
    coreml = find(report, "every model", "elsewhere")
    assert (coreml.status, coreml.gated, coreml.reason) == ("not_run", False, "Core ML needs a Mac")
    assert report.verdict == "pass"
    # The interpreter's time says nothing about a device.
    assert report.latency == ()


def test_an_unknown_backend_is_a_user_error_that_lists_the_choices(good: Bundle) -> None:
    with pytest.raises(UserError, match="onnxruntime"):
        checked(good, backend="tensorrt")


def command(*arguments: str) -> int:
    def main(argv: list[str]) -> int:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return run(parser.parse_args(argv))

    return run_cli(main, list(arguments))


def test_exit_code_0_and_the_report_in_the_bundle_when_it_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert command(str(bundle.path), "--repeats", "1") == 0
    report = read_report(bundle)
    assert report.verdict == "pass"
    assert report.latency[0].repeats == 1
    out = capsys.readouterr().out
    assert "PASS: " in out
    assert "report.html" in out
    assert Bundle.open(bundle.path).manifest_sha256 == bundle.manifest_sha256


def test_exit_code_1_when_a_gate_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_model=without_conditioning)
    assert command(str(bundle.path), "--repeats", "0") == 1
    assert "FAIL: unet in onnxruntime failed" in capsys.readouterr().out
    assert read_report(bundle).verdict == "fail"


def test_exit_code_1_when_a_gated_check_could_not_run(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_manifest=without_case_count("vae_decoder"))
    assert command(str(bundle.path), "--repeats", "0") == 1
    assert read_report(bundle).verdict == "not_run"


def test_exit_code_2_and_the_old_report_when_the_backend_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    assert command(str(bundle.path), "--repeats", "0") == 0
    before = bundle.file("report.json").read_bytes()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert command(str(bundle.path)) == 2
    assert "pip install" in capsys.readouterr().err
    assert bundle.file("report.json").read_bytes() == before
    # As a function it tells the same, and does not pass.
    assert checked(bundle).verdict == "not_run"


@pytest.mark.parametrize(
    "arguments", [["--backend", "tensorrt"], ["--backend", "executorch"], ["--backend", "torch"]]
)
def test_exit_code_2_for_a_backend_that_cannot_run_the_bundle(
    good: Bundle, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(str(good.path), *arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_report_that_cannot_be_kept_is_told_before_any_model_runs(
    good: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_load(*_: object, **__: object) -> backends.Runner:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(backends, "load", no_load)
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "report"):
        assert command(str(good.path), "--output", str(output)) == 2
        assert f"{output} is no folder that can be written to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_report_goes_elsewhere_on_request_and_json_is_printed(
    good: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "made" / "here"
    options = ["--output", str(output), "--json", "--repeats", "0", "--prompts", "1"]
    assert command(str(good.path), *options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "pass"
    assert read_report(good, output).manifest_sha256 == good.manifest_sha256
    assert not good.file("report.json").exists()


def without(*names: str) -> Callable[[str, Arrays], Arrays]:
    """Goldens in which these tensors are missing."""
    return lambda file, tensors: {k: v for k, v in tensors.items() if k not in names}


def as_type(name: str, dtype: type) -> Callable[[str, Arrays], Arrays]:
    """Goldens in which one tensor has another type."""
    return lambda file, tensors: {
        k: v.astype(dtype) if k == name else v for k, v in tensors.items()
    }


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without("1/out/out_sample"), r"unet\.safetensors has no tensor 1/out/out_sample"),
        (without("0/in/input_ids"), r"text_encoder\.safetensors has no tensor 0/in/input_ids"),
        (without("0/noise"), r"pipeline\.safetensors has no tensor 0/noise"),
        (without("1/fresh_noise"), r"pipeline\.safetensors has no tensor 1/fresh_noise"),
        (as_type("0/picture", np.float32), "0/picture has dtype float32, not uint8"),
        (as_type("1/source_picture", np.int8), "1/source_picture has dtype int8, not uint8"),
        (as_type("0/noise", np.float64), "0/noise has dtype float64, not float32"),
        (
            lambda file, tensors: {
                k: v[:-1] if k == "0/trajectory" else v for k, v in tensors.items()
            },
            r"0/trajectory has shape \(4, 4, 8, 8\), not \(5, 4, 8, 8\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_goldens_that_are_not_whole_are_told_by_the_tensors_name(
    tmp_path: Path, damage: Callable[[str, Arrays], Arrays], complaint: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", stochastic=True, change_golden=damage)
    with pytest.raises(BundleError, match=complaint):
        checked(bundle)


def test_a_text_encoder_without_golden_cases_fails_the_tokens(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_manifest=without_case_count("text_encoder"))
    assert find(checked(bundle), "pipeline", "tokens", 0).status == "fail"


def test_the_page_shows_steps_times_sizes_and_how_to_run_it_again(good: Bundle) -> None:
    page = render(checked(good, repeats=2))
    for heading in ("Step by step", "Latency", "Size and memory", "How to run it again"):
        assert f"<h2>{heading}</h2>" in page
    steps = good.manifest.golden.prompts[0].steps
    lines = re.findall(r'<polyline points="([^"]*)"', page)
    assert len(lines) == len(good.manifest.golden.prompts)
    assert len(lines[0].split()) == steps
    widths = [float(found) for found in re.findall(r'class="fill" style="width: ([\d.]+)%', page)]
    assert len(widths) == 3 + 4  # the components' parity; the times of them and of a picture
    assert 0 < max(widths) <= 100
    assert "<script" not in page


def test_the_page_tells_the_plan_with_the_most_sensitive_layer_first(tmp_path: Path) -> None:
    def planned(manifest: Manifest) -> Manifest:
        plans = tuple(
            LayerPlan(layer=f"unet.{name}", weights="int8", reason=f"default; sensitivity {db} dB")
            for name, db in (("calm", 80.5), ("worst", 12.25), ("middle", 40.0))
        )
        return manifest.model_copy(update={"quantization": plans})

    page = render(checked(make_bundle(tmp_path / "bundle", change_manifest=planned)))
    places = [page.index(f"<code>unet.{name}</code>") for name in ("worst", "middle", "calm")]
    assert places == sorted(places)
    assert "3 layers, the most sensitive first" in page


def test_a_prompt_drawn_in_several_runtimes_has_one_card(good: Bundle) -> None:
    report = checked(good)
    other = [shown.model_copy(update={"runtime": "elsewhere"}) for shown in report.pictures]
    page = render(report.model_copy(update={"pictures": (*report.pictures, *other)}))
    assert page.count('class="card prompt') == len(report.pictures)
    assert page.count("<b>elsewhere</b>") == len(report.pictures)
