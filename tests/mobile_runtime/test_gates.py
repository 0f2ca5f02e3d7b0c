"""Gates from the command line."""

import json
from pathlib import Path

import pytest

from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import run_cli
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("gates") / "bundle")


def test_gates_from_the_command_line_replace_the_bundles_and_are_told(
    good: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["validate", str(good.path), "--repeats", "0", "--prompts", "1"]
    high = [*argv, "--gate", "component_snr_db=500", "--output", str(tmp_path / "high")]
    assert run_cli(main, high) == 1
    told = capsys.readouterr().out
    assert "its gate is 500 dB" in told
    assert "gates from the command line: component_snr_db 500 dB" in told
    off = [*argv, "--gate", "component_snr_db=none", "--gate", "picture_psnr_db=20"]
    assert run_cli(main, [*off, "--output", str(tmp_path / "off")]) == 0
    assert "component_snr_db off, picture_psnr_db 20 dB" in capsys.readouterr().out
    page = (tmp_path / "off/report.html").read_text()
    assert "Gates from the command line: component_snr_db off" in page
    assert "--gate component_snr_db=none --gate picture_psnr_db=20" in page
    report = json.loads((tmp_path / "off/report.json").read_text())
    assert report["asked_gates"] == {"component_snr_db": None, "picture_psnr_db": 20}


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ("component_db=50", "component_snr_db"),
        ("picture_psnr_db", "above 0"),
        ("picture_psnr_db=0", "above 0"),
        ("picture_psnr_db=-3", "above 0"),
        ("picture_psnr_db=nan", "above 0"),
        ("picture_psnr_db=inf", "above 0"),
        ("picture_psnr_db=high", "above 0"),
        ("float16_snr_db=50", "computes in float32"),
    ],
)
def test_what_is_no_gate_is_refused_before_anything_runs(
    good: Bundle, gate: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, ["validate", str(good.path), "--gate", gate]) == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert sentence in told
