"""`python -m converters.TARGET`: a wrong request is told in one sentence, and harms nothing."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from converters import cli, convert, golden
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, run_cli

SMALL = ["--recipe", "pocket_int8", "--no-validate"]


def run(target: str, *argv: str | Path) -> int:
    """The command, in this process."""
    return run_cli(lambda given: cli.main(target, given), [str(word) for word in argv])


def refused(capsys: pytest.CaptureFixture[str], target: str, *argv: str | Path) -> str:
    """The one message of a command that has to be refused."""
    assert run(target, *argv) == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert "Traceback" not in told
    return told


def test_an_unknown_recipe_lists_the_choices(capsys):
    told = refused(capsys, "onnx", "--recipe", "pocket_int9")
    assert "did you mean" in told.lower()
    assert "sd_turbo_int8" in told


def test_a_misspelt_key_is_named_with_the_right_one(capsys):
    told = refused(capsys, "onnx", *SMALL, "--set", "schedule.stepz=3")
    assert "schedule.stepz" in told
    assert "steps" in told


def test_two_faults_are_told_at_once(capsys):
    told = refused(capsys, "onnx", *SMALL, "--set", "schedule.stepz=3", "--set", "resolution=big")
    assert "schedule.stepz" in told
    assert "resolution" in told


def test_a_resolution_that_does_not_fit_names_what_does(capsys, tmp_path):
    told = refused(capsys, "onnx", *SMALL, "--resolution", "70", "--output", tmp_path / "bundle")
    assert "no multiple of 4" in told
    assert "68 or 72" in told
    assert not (tmp_path / "bundle").exists()


def test_a_layer_pattern_that_matches_nothing_is_named(capsys, tmp_path):
    rule = "stages.quantize.rules=[{layers: unet.conv_inn, weights: float32, reason: test}]"
    told = refused(capsys, "onnx", *SMALL, "--set", rule, "--output", tmp_path / "bundle")
    assert "unet.conv_inn" in told
    assert "unet.conv_in" in told


RULE_FOR_NOTHING = "stages.quantize.rules=[{layers: unet.conv_inn, weights: float32, reason: test}]"


def test_a_wrong_resolution_and_a_wrong_pattern_are_told_at_once(capsys, tmp_path):
    wrong = ["--resolution", "[65, 70]", "--set", RULE_FOR_NOTHING]
    told = refused(capsys, "onnx", *SMALL, *wrong, "-o", tmp_path / "bundle")
    for part in ("height of 65", "width of 70", "unet.conv_inn"):
        assert part in told


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--resolution", "65"], "multiple of 4"),
        (["--set", RULE_FOR_NOTHING], "unet.conv_inn"),
        (["--set", "schedule.scheduler=lcm", "--steps", "51"], "LCMScheduler cannot make 51"),
    ],
)
def test_what_does_not_fit_the_source_is_told_before_its_weights_are_read(
    capsys, monkeypatch, tmp_path, wrong, said
):
    read: list[bool] = []
    open_source = convert.open_source

    def watched(*args: Any, weights: bool) -> Any:
        read.append(weights)
        return open_source(*args, weights=weights)

    monkeypatch.setattr(convert, "open_source", watched)
    assert said in refused(capsys, "onnx", *SMALL, *wrong, "-o", tmp_path / "bundle")
    assert read == [False]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ("there", "already exists"),
        ("bundle", "lie one in the other"),
        ("bundle/pipeline", "lie one in the other"),
        (".", "lie one in the other"),
    ],
)
def test_a_folder_for_the_pipeline_that_is_taken_is_refused_before_any_work(
    capsys, tmp_path, saved, said, more
):
    (tmp_path / "there").mkdir()
    argv = ["--output", tmp_path / "bundle", "--save-pipeline", tmp_path / saved, *more]
    told = refused(capsys, "onnx", *SMALL, *argv)
    assert said in told
    assert "open embedded" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_for_the_pipeline_that_cannot_be_made_is_refused_before_any_stage(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(convert.stages, "apply", None)
    (tmp_path / "file").write_text("mine")
    for saved in ("file/pipeline", "file/deeper/pipeline"):
        argv = ["--output", tmp_path / "bundle", "--save-pipeline", tmp_path / saved]
        told = refused(capsys, "onnx", *SMALL, *argv)
        assert "is no folder that can be written to" in told
        assert "choose another --save-pipeline" in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("damage", ["pickled", "cut short"])
def test_a_dry_run_tells_weights_that_cannot_be_read(capsys, tmp_path, tiny_pipeline, damage):
    source = tmp_path / "source"
    tiny_pipeline.save_pretrained(source)
    weights = source / "unet/diffusion_pytorch_model.safetensors"
    if damage == "pickled":
        shutil.move(weights, weights.with_suffix(".bin"))
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    assert damage in refused(capsys, "onnx", *SMALL, "--model", source, "--dry-run")


@pytest.mark.parametrize(("ort_format", "for_optimum"), [("false", True), ("true", False)])
def test_optimums_files_are_written_for_models_that_it_opens_and_lowering_leaves_no_litter(
    capsys, monkeypatch, tmp_path, ort_format, for_optimum
):
    from converters import onnx

    seen: list[str] = []

    def lower(component: Any, program: Any, folder: Path, *_: Any) -> None:
        seen.extend(path.name for path in folder.iterdir())
        assert Path(tempfile.mkdtemp()).is_relative_to(folder), "it would outlive a kill"
        raise UserError("far enough")

    monkeypatch.setattr(onnx, "lower", lower)
    changes = ["--steps", "1", "--set", f"targets.onnx.ort_format={ort_format}"]
    told = refused(capsys, "onnx", *SMALL, *changes, "--output", tmp_path / "bundle")
    assert "far enough" in told
    assert ("model_index.json" in seen) == for_optimum
    assert ("scheduler" in seen) == for_optimum
    assert "tokenizer" in seen
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_target_lacks_says_what_it_can_do(capsys):
    told = refused(capsys, "executorch", "--recipe", "pocket_fp32", "--set", "precision=float16")
    assert "XNNPACK" in told
    assert "float32" in told


@pytest.mark.parametrize(
    ("target", "library"),
    [("coreml", "coremltools"), ("executorch", "executorch"), ("onnx", "onnx")],
)
def test_a_missing_library_says_how_to_install_it(capsys, monkeypatch, tmp_path, target, library):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    started = time.monotonic()
    told = refused(capsys, target, *SMALL, "--output", tmp_path / "bundle")
    assert f"pocket-diffusion[{target}]" in told
    assert time.monotonic() - started < 30, "told before the heavy work"
    assert list(tmp_path.iterdir()) == []


def run_without(library: str, target: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """The command as users run it, in an installation that lacks a library."""
    code = (
        f"import runpy, sys; sys.modules[{library!r}] = None; "
        f"runpy.run_module('converters.{target}', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", ["coreml", "onnx", "executorch"])
def test_help_and_a_wrong_recipe_need_no_torch(target):
    told = run_without("torch", target, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert "examples:" in told.stdout
    told = run_without("torch", target, "--recipe", "pocket_int9")
    assert told.returncode == 2
    assert told.stderr.startswith("error: unknown recipe 'pocket_int9'")


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers"])
def test_a_missing_training_library_says_how_to_install_it(library):
    told = run_without(library, "coreml", "--recipe", "pocket_int8", "--dry-run")
    assert told.returncode == 2
    assert told.stderr == (
        f"error: converting needs {library}, which is not installed; "
        "install it with: pip install 'pocket-diffusion[coreml]'\n"
    )


def test_an_existing_output_is_left_alone(capsys, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "--force" in refused(capsys, "onnx", *SMALL, "--output", output)
    assert "not a bundle" in refused(capsys, "onnx", *SMALL, "--output", output, "--force")
    assert (output / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(capsys, monkeypatch, tmp_path):
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(golden, "save_file", full)
    told = refused(capsys, "onnx", *SMALL, "--steps", "1", "--output", tmp_path / "bundle")
    assert "full" in told
    assert list(tmp_path.iterdir()) == []


def test_a_hub_model_without_network_is_refused_with_the_ways_out(tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing answers there
        "HF_HOME": str(tmp_path / "empty_cache"),
    }
    command = [sys.executable, "-m", "converters.coreml", "--recipe", "sd_turbo_int8"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "bundle")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "stabilityai/sd-turbo" in done.stderr
    for way_out in ("embedded", "random:", "folder"):
        assert way_out in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_kill_leaves_nothing_half_made_and_the_next_run_works(tmp_path):
    output = tmp_path / "bundle"
    command = [sys.executable, "-m", "converters.onnx", *SMALL, "--output", str(output)]
    process = subprocess.Popen([*command, "--steps", "1"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.*.partial/golden")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert run("onnx", *SMALL, "--steps", "1", "--output", output) == 0
    assert Bundle.open(output).manifest.name == "pocket_int8"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_dry_run_tells_sizes_and_writes_nothing(capsys, tmp_path):
    output = tmp_path / "bundle"
    argv = ["--recipe", "sd_turbo_int8", "--model", "random:sd_turbo", "--dry-run"]
    assert run("executorch", *argv, "--output", output) == 0
    told = capsys.readouterr().out
    assert "865,910,724" in told
    assert "w8" in told
    assert not output.exists()


def test_a_vae_encoder_on_request_is_quantized_as_the_rest_is(capsys, tmp_path):
    argv = ["--recipe", "pocket_int8", "--vae-encoder", "-o", str(tmp_path / "b"), "--dry-run"]
    assert run("onnx", *argv) == 0
    (row,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("vae_encoder")
    ]
    assert row.split()[3] == "21"


@pytest.mark.parametrize(("budget", "told"), [("bytes=0.4", True), ("macs=0.9", False)])
def test_a_dry_run_tells_that_a_budget_of_bytes_is_planned_later(capsys, budget, told):
    keep = ["--set", f"stages.2.quantize.keep={{{budget.replace('=', ': ')}}}"]
    assert run("onnx", "--recipe", "pocket_turbo_w8a8", *keep, "--dry-run") == 0
    assert ("are chosen by measurements, so MB are at least" in capsys.readouterr().out) is told


def test_a_dry_run_tells_what_trains_and_counts_the_branches_beside_4_bits(capsys):
    trains = "trains, unless the result is kept from before: distill (200 steps), distill (300"
    parameters = []
    for rank in ("16", "0"):
        changes = ["--set", f"stages.quantize.int4.rank={rank}"]
        assert run("onnx", "--recipe", "pocket_turbo_4bit", *changes, "--dry-run") == 0
        told = capsys.readouterr().out
        assert trains in told
        (row,) = [line.split() for line in told.splitlines() if line.startswith("unet")]
        parameters.append((int(row[1].replace(",", "")), float(row[2])))
    assert parameters[0] > parameters[1]
    assert parameters[0][1] > parameters[1][1]
    assert run("onnx", *SMALL, "--dry-run") == 0
    assert "trains" not in capsys.readouterr().out


def test_the_columns_of_a_dry_run_stay_apart_for_the_largest_pictures(capsys):
    argv = ["--recipe", "sd_turbo_int8", "--model", "random:sd_turbo", "--resolution", "8192"]
    assert run("onnx", *argv, "--dry-run") == 0
    rows = capsys.readouterr().out.splitlines()
    assert [len(row.split()) for row in rows if row.startswith(("unet", "vae_decoder"))] == [5, 5]


def test_a_number_of_steps_that_is_named_twice_gets_one_table(capsys):
    assert run("onnx", *SMALL, "--dry-run", "--set", "schedule.other_steps=[25, 10]") == 0
    assert "DDIMScheduler, 25, 10 steps" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["coreml", "onnx", "executorch"])
def test_help_ends_with_examples(capsys, target):
    with pytest.raises(SystemExit) as stop:
        cli.main(target, ["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert f"python -m converters.{target} --recipe" in told.split("examples:")[1]
