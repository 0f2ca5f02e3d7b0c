"""A stored report holds accuracy and size; a summary tells a pull request what happened."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mobile_runtime import baseline
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import run_cli
from mobile_runtime.report_markdown import render
from mobile_runtime.validate import validate
from tests.bundles import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def run(bundle: Bundle, folder: Path, *argv: Any) -> int:
    words = ["validate", bundle.path, "--repeats", "0", "--output", folder / "report", *argv]
    return run_cli(main, [str(word) for word in words])


def noisy(name: str, model: onnx.ModelProto, size: float) -> onnx.ModelProto:
    """The same model with one weight moved a little."""
    if name == "unet":
        (tensor,) = (each for each in model.graph.initializer if each.name == "conv")
        array = numpy_helper.to_array(tensor)
        rng = np.random.default_rng(0)
        moved = array + size * rng.standard_normal(array.shape).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    return model


def test_an_unchanged_bundle_is_as_good_as_its_baseline(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    assert run(bundle, tmp_path, "--save-baseline", file) == 0
    assert run(bundle, tmp_path, "--baseline", file) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    held = {check["component"] for check in report["checks"] if check["kind"] == "baseline"}
    assert held == {"text_encoder", "unet", "vae_decoder", "pipeline"}
    assert baseline.read(file).model_bytes["unet"] == bundle.component("unet").bytes


def test_a_figure_that_fell_fails_though_it_reaches_its_gate(tmp_path: Path, capsys: Any) -> None:
    good = make_bundle(tmp_path / "good", change_model=lambda *a: noisy(*a, 1e-5))
    worse = make_bundle(tmp_path / "worse", change_model=lambda *a: noisy(*a, 1e-4))
    file = tmp_path / "baseline.json"
    assert run(good, tmp_path, "--save-baseline", file) == 0
    assert run(worse, tmp_path) == 0  # above every gate
    assert run(worse, tmp_path, "--baseline", file) == 1
    told = capsys.readouterr().out
    assert "FAIL: unet in baseline failed: same function in onnxruntime fell from" in told
    assert run(good, tmp_path, "--baseline", file) == 0


def test_a_model_that_grew_fails(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "baseline.json"
    assert run(bundle, tmp_path, "--save-baseline", file) == 0
    data = json.loads(file.read_text())
    data["model_bytes"]["unet"] -= 1
    file.write_text(json.dumps(data))
    assert run(bundle, tmp_path, "--baseline", file) == 1
    assert "unet in baseline failed: it grew from" in capsys.readouterr().out


def test_what_is_measured_no_more_fails(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "baseline.json"
    assert run(bundle, tmp_path, "--save-baseline", file) == 0
    assert run(bundle, tmp_path, "--prompts", 1, "--baseline", file) == 1
    assert "of prompt 1 in onnxruntime was measured, and is not now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is no baseline"),
        ('{"schema_version": 2}', "is no baseline: schema_version"),
        (None, "make it with --save-baseline"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(
    text: str | None, told: str, bundle: Bundle, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "baseline.json"
    if text is not None:
        file.write_text(text)
    assert run(bundle, tmp_path, "--baseline", file) == 2
    assert told in capsys.readouterr().err


def test_the_baseline_of_another_bundle_is_refused_before_anything_runs(
    bundle: Bundle, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "baseline.json"
    assert run(bundle, tmp_path, "--save-baseline", file) == 0
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bundle": "other"}))
    monkeypatch.setattr("mobile_runtime.validate.validate", lambda *a, **k: pytest.fail("it ran"))
    assert run(bundle, tmp_path, "--baseline", file) == 2
    assert "the baseline is of other for onnx" in capsys.readouterr().err


def test_the_summary_tells_verdict_figures_and_faults(tmp_path: Path) -> None:
    bad = make_bundle(tmp_path / "bad", change_model=lambda *a: noisy(*a, 0.5))
    told = render(validate(bad, repeats=2, progress=False))
    assert told.startswith("### ")
    assert "for onnx: **FAIL**" in told.splitlines()[0]
    assert "| unet | onnxruntime |" in told
    assert "- **FAIL**: unet in onnxruntime: out\\_sample has an SNR of" in told
    for line in (line for line in told.splitlines() if line.startswith("|")):
        assert line.endswith(" |")


def test_the_summary_is_added_to_what_is_there(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    assert run(bundle, tmp_path, "--markdown", file) == 0
    assert run(bundle, tmp_path, "--markdown", file) == 0
    text = file.read_text()
    assert text.startswith("before\n### ")
    assert text.count(": pass\n") == 2


def test_a_text_cannot_break_the_table(tmp_path: Path) -> None:
    def renamed(manifest: Any) -> Any:
        return manifest.model_copy(update={"name": "a|b*c<script>"})

    bundle = make_bundle(tmp_path / "bundle", change_manifest=renamed)
    told = render(validate(bundle, repeats=0, progress=False))
    assert told.count("<script>") == told.count("\\<script>") > 0


def test_what_failed_is_not_stored(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "baseline.json"
    assert run(bundle, tmp_path, "--save-baseline", file) == 0
    before = file.read_text()
    data = json.loads(before)
    data["model_bytes"]["unet"] -= 1
    file.write_text(json.dumps(data))
    for _ in range(2):  # else the second run would pass
        assert run(bundle, tmp_path, "--baseline", file, "--save-baseline", file) == 1
    assert "only a pass is stored" in capsys.readouterr().err


def test_a_baseline_of_nothing_is_refused(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "baseline.json"
    assert run(bundle, tmp_path, "--save-baseline", file) == 0
    file.write_text(json.dumps({**json.loads(file.read_text()), "figures": []}))
    assert run(bundle, tmp_path, "--baseline", file) == 2
    assert "holds no figures" in capsys.readouterr().err
    for option in ("--markdown", "--save-baseline"):
        assert run(bundle, tmp_path, option, tmp_path) == 2
        assert "is no file" in capsys.readouterr().err
