"""The pytest plugin shows a bundle's checks as tests, for a continuous integration of one's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import run_cli
from mobile_runtime.manifest import Manifest
from tests.bundles import make_bundle

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("plugin") / "bundle")


@pytest.fixture(autouse=True)
def _no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is installed here is none of these tests' business, and slow to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


# Of a good bundle, with two prompts and nothing to replay.
PASSED, SKIPPED = 26, 2
CHECKS = PASSED + SKIPPED


def louder_goldens(name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Goldens that the UNet misses by a tenth."""
    return {
        key: value * np.float32(1.1) if name == "unet" and "/out/" in key else value
        for key, value in tensors.items()
    }


def goldens_without_outputs(name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Goldens that do not say what the UNet gave."""
    return {k: v for k, v in tensors.items() if name != "unet" or "/out/" not in k}


def without_pairs(manifest: Manifest) -> Manifest:
    """A bundle in which the UNet's conditioning cannot be checked."""
    golden = manifest.golden.model_copy(update={"conditioning_pairs": ()})
    return manifest.model_copy(update={"golden": golden})


def run_plugin(pytester: pytest.Pytester, bundle: Bundle, *more: str) -> pytest.RunResult:
    return pytester.runpytest(
        "-p", "mobile_runtime.pytest_plugin", f"--bundle={bundle.path}", "-rA", *more
    )


def test_the_pytest_plugin_shows_every_check_of_a_good_bundle_as_a_test(
    pytester: pytest.Pytester, good: Bundle
) -> None:
    result = run_plugin(pytester, good)
    result.assert_outcomes(passed=PASSED, skipped=SKIPPED)
    result.stdout.fnmatch_lines(["*PASSED *unet_conditioning[[]onnxruntime]*"])
    result.stdout.fnmatch_lines(["*PASSED *pipeline_picture[[]onnxruntime-prompt1]*"])


def test_the_pytest_plugin_fails_with_the_reason_and_no_traceback(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_golden=louder_goldens)
    result = run_plugin(pytester, bundle, "-k", "unet_same_function")
    result.assert_outcomes(failed=1, deselected=CHECKS - 1)
    result.stdout.fnmatch_lines(["*has an SNR of * dB, and its gate is 60 dB*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_the_pytest_plugin_takes_gates_from_the_command_line(
    pytester: pytest.Pytester, good: Bundle
) -> None:
    chosen = ("-k", "unet_same_function")
    run_plugin(pytester, good, *chosen).assert_outcomes(passed=1)
    high = run_plugin(pytester, good, *chosen, "--bundle-gate", "component_snr_db=500")
    high.assert_outcomes(failed=1)
    high.stdout.fnmatch_lines(["*gate is 500 dB*"])
    off = run_plugin(pytester, good, *chosen, "--bundle-gate", "component_snr_db=none")
    off.assert_outcomes(skipped=1)
    wrong = run_plugin(pytester, good, *chosen, "--bundle-gate", "component_db=50")
    assert "component_snr_db" in wrong.stdout.str() + wrong.stderr.str()
    assert wrong.ret != 0


def test_the_pytest_plugin_tells_a_golden_tensor_that_is_missing_without_a_traceback(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_golden=goldens_without_outputs)
    result = run_plugin(pytester, bundle, "-k", "unet_same_function")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*unet.safetensors*out*"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_the_pytest_plugin_fails_what_could_not_run(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_manifest=without_pairs)
    result = run_plugin(pytester, bundle, "-k", "unet_conditioning")
    result.assert_outcomes(failed=1, deselected=CHECKS - 1)


def test_the_pytest_plugin_runs_beside_the_tests_that_are_named(
    pytester: pytest.Pytester, good: Bundle
) -> None:
    pytester.makepyfile(test_mine="def test_mine(): pass")
    run_plugin(pytester, good).assert_outcomes(passed=PASSED, skipped=SKIPPED)
    both = run_plugin(pytester, good, "test_mine.py")
    both.assert_outcomes(passed=PASSED + 1, skipped=SKIPPED)


def test_the_pytest_plugin_gives_ids_that_begin_with_the_bundles_folder_and_select_a_test(
    pytester: pytest.Pytester, good: Bundle
) -> None:
    result = run_plugin(pytester, good, "--collect-only", "-q")
    ids = [line for line in result.outlines if "::" in line]
    assert len(ids) == CHECKS
    assert all(line.startswith("bundle::") for line in ids)
    chosen = "bundle::unet_same_function[onnxruntime]"
    assert chosen in ids
    run_plugin(pytester, good, chosen).assert_outcomes(passed=1)
    run_plugin(pytester, good, "--deselect", chosen).assert_outcomes(
        passed=PASSED - 1, skipped=SKIPPED, deselected=1
    )
    pytester.makepyfile(test_mine="def test_mine(): pass")
    run_plugin(pytester, good, "test_mine.py", chosen).assert_outcomes(passed=2)


def baseline_of(bundle: Bundle, file: Path, **changes: Any) -> str:
    """The option for a baseline that `validate` stored, with some of its figures changed."""
    argv = ["validate", str(bundle.path), "-o", str(file.parent / "report")]
    assert run_cli(main, [*argv, "--save-baseline", str(file)]) == 0
    data = json.loads(file.read_text())
    data["model_bytes"] |= changes.get("model_bytes", {})
    for figure in data["figures"]:
        key = f"{figure['component']}_{figure['kind']}"
        figure["value_db"] = changes.get(key, figure["value_db"])
    file.write_text(json.dumps(data))
    return f"--bundle-baseline={file}"


def test_the_pytest_plugin_holds_each_component_to_a_stored_baseline(
    pytester: pytest.Pytester, good: Bundle, tmp_path: Path
) -> None:
    same = baseline_of(good, tmp_path / "same.json")
    result = run_plugin(pytester, good, same)
    result.assert_outcomes(passed=PASSED + 4, skipped=SKIPPED)
    result.stdout.fnmatch_lines(["*PASSED *unet_baseline*", "*PASSED *pipeline_baseline*"])
    chosen = run_plugin(pytester, good, same, "bundle::pipeline_baseline")
    chosen.assert_outcomes(passed=1)


def test_the_pytest_plugin_fails_what_is_worse_than_the_baseline(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_golden=louder_goldens)
    good = make_bundle(tmp_path / "good")
    better = baseline_of(good, tmp_path / "b.json", model_bytes={"text_encoder": 1, "gone": 5})
    result = run_plugin(pytester, bundle, better, "-k", "baseline")
    result.assert_outcomes(passed=2, failed=3, deselected=CHECKS)
    result.stdout.fnmatch_lines(["*it grew from 1 to * bytes*"])
    result.stdout.fnmatch_lines(["*same function in onnxruntime fell from * to * dB*"])
    result.stdout.fnmatch_lines(["*it is gone*"])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "make it with --save-baseline"), ("{", "is no baseline"), ("other", "save one of its")],
)
def test_the_pytest_plugin_refuses_what_is_no_baseline_of_this_bundle(
    pytester: pytest.Pytester, good: Bundle, tmp_path: Path, text: str | None, told: str
) -> None:
    file = tmp_path / "baseline.json"
    if text == "other":
        baseline_of(good, file)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"bundle": "other"}))
    elif text is not None:
        file.write_text(text)
    result = run_plugin(pytester, good, f"--bundle-baseline={file}")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"*{told}*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def without_prompts(manifest: Manifest) -> Manifest:
    """A bundle in which no picture can be checked."""
    golden = manifest.golden.model_copy(update={"prompts": ()})
    return manifest.model_copy(update={"golden": golden})


def test_the_pytest_plugin_fails_a_bundle_without_golden_prompts(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", change_manifest=without_prompts)
    result = run_plugin(pytester, bundle, "-k", "pipeline")
    result.assert_outcomes(failed=1, deselected=14)
    result.stdout.fnmatch_lines(["*no golden prompt*"])


def test_the_pytest_plugin_names_a_folder_that_is_no_bundle_and_a_damaged_bundle(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    empty = pytester.runpytest("-p", "mobile_runtime.pytest_plugin", f"--bundle={tmp_path}")
    assert empty.ret == pytest.ExitCode.USAGE_ERROR
    bundle = make_bundle(tmp_path / "bundle")
    path = bundle.file("unet/model.onnx")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = run_plugin(pytester, bundle)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*has changed since it was made*"])
