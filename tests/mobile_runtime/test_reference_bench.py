"""The figures of the desktop pipeline: its table, its profile, and beside a device."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import cli
from converters import reference as opening
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.reference import Parts
from mobile_runtime.reference import rows as planning
from mobile_runtime.reference.bench import Bench
from mobile_runtime.reference.switches import Machine
from recipes import schema

CPU = Machine("cpu", "a test")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["generate", "x", "--with", "turbo"], "unknown switch 'turbo'"),
        (["generate", "x", "--device", "tpu"], "unknown device 'tpu'"),
        (["generate", "x", "--device", "cuda:7"], "is not here"),
        (["generate", "x", "--device", "cuda:abc"], "unknown device 'cuda:abc'"),
        (["generate", "x", "-o", "x.jpg"], "should be a .png"),
        (["generate", "x", "--scheduler", "heun"], "unknown scheduler 'heun'"),
        (["generate", "x", "--recipe", "nothing"], "unknown recipe"),
        (["bench", "--rows", "alone"], "--rows goes with --ablation"),
        (["bench", "--ablation", "--fast"], "--ablation runs every switch"),
        (["bench", "--ablation", "--rows", "none"], "there is no row 'none'"),
        (["bench", "--rounds", "1"], "should be 2 or more"),
        (["bench", "--judged", "9999"], "there are 512 captions"),
        (["bench", "--bundle", "x"], "needs -o DIR"),
        (["profile", "--rows", "0"], "should be 1 or more"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    argv: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(main, ["reference", *argv]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheduler", ["dpm_solver_pp_2m", "euler", "ddim", "euler_ancestral"])
def test_the_yardstick_of_diffusers_runs_the_same_schedule(
    small_recipe: Path, scheduler: str
) -> None:
    recipe = schema.load(str(small_recipe), {"schedule.scheduler": scheduler})
    parts = opening.open_recipe(recipe.resolved())
    bench = Bench(parts, CPU, steps=4, rounds=2, compared=1)
    found = bench.measure(planning.Row("yardstick", "diffusers float32", own=True))
    assert found.status == "done"
    if scheduler == "euler_ancestral":
        assert found.psnr_db is None  # diffusers draws that noise itself
    else:
        assert found.equal or (found.psnr_db or 0) > 60


def test_the_ablation_is_measured_and_kept(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reference", "bench", "--ablation", "--recipe", str(small_recipe), "--rounds", "2"]
    argv += ["--tiny-decoder", "random", "--compared", "1", "--device", "cpu"]
    for name in ("exact", "diffusers float32", "channels_last", "tiny_decoder", "deep_cache"):
        argv += ["--rows", name]
    assert run_cli(main, [*argv, "-o", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "left out: tf32: needs a CUDA device" in table
    data = json.loads((tmp_path / "out/ablation.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["exact"]["equal"]
    assert rows["exact"]["ssim"] == 1
    assert rows["diffusers float32"]["equal"] or rows["diffusers float32"]["psnr_db"] > 60
    assert rows["tiny_decoder"]["psnr_db"] < 40  # it is untrained
    for row in rows.values():
        assert row["status"] == "done"
        assert row["seconds"] > 0
        assert row["times_low"] <= row["times"] <= row["times_high"]
        assert row["peak_bytes"] is not None
    assert rows["exact"]["floor_s"] > 0
    assert rows["deep_cache"]["floor_s"] is None
    assert run_cli(main, [*argv, "-o", str(tmp_path / "out")]) == 2
    assert "already exists" in capsys.readouterr().err
    page = (tmp_path / "out/ablation.html").read_text()
    assert "<script" not in page
    assert "tiny_decoder" in page.replace("<wbr>", "")


def test_a_row_that_has_no_memory_is_told_and_the_others_run(
    small: Parts, monkeypatch: Any
) -> None:
    bench = Bench(small, CPU, steps=2, rounds=2, compared=1)
    wanted = planning.Row("alone", "half", ("half",))
    with monkeypatch.context() as patch:
        name = "mobile_runtime.reference.models.prepare"
        patch.setattr(name, lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        found = bench.measure(wanted)
    assert found.status.startswith("the memory of cpu does not hold this")
    assert found.seconds is None
    assert bench.measure(wanted).status == "done"


def test_a_schedule_that_a_source_cannot_have_is_told_in_its_row(small: Parts) -> None:
    def schedule(steps: int, scheduler: str | None) -> Any:
        if scheduler == "ddim":
            raise UserError("DDIMScheduler with clip_sample=True cannot be compiled")
        return small.schedule(steps, scheduler)

    bench = Bench(replace(small, schedule=schedule), CPU, steps=2, rounds=2, compared=1)
    found = bench.measure(planning.Row("steps", "ddim 50", scheduler="ddim", steps=50))
    assert "clip_sample" in found.status
    assert bench.measure(planning.Row("yardstick", "exact")).status == "done"


def test_the_judge_reads_the_embedded_models_pictures(parts: Parts) -> None:
    bench = Bench(parts, CPU, steps=2, rounds=2, compared=1, judged=8)
    found = bench.measure(planning.Row("yardstick", "exact"))
    assert found.judged_pictures == 8
    assert found.judged is not None
    assert found.judged >= 0.75


def test_a_profile_has_a_table_and_a_trace(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    argv = ["reference", "profile", "--recipe", str(small_recipe), "--device", "cpu"]
    assert run_cli(main, [*argv, "-o", str(trace), "--rows", "5"]) == 0
    assert "aten::" in capsys.readouterr().out
    assert json.loads(trace.read_text())["traceEvents"]
    assert run_cli(main, [*argv, "-o", str(trace)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_desktop_stands_beside_a_bundle(
    small_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, kept = tmp_path / "bundle", tmp_path / "kept"
    argv = ["--recipe", str(small_recipe), "--output", str(bundle), "--no-validate"]
    assert cli.main("onnx", argv) == 0
    argv = ["reference", "bench", "--bundle", str(bundle), "-o", str(kept), "--rounds", "2"]
    assert run_cli(main, [*argv, "--device", "cpu", "--without", "compile"]) == 0
    capsys.readouterr()
    argv = ["validate", str(bundle), "--repeats", "1", "--reference", str(kept)]
    assert run_cli(main, argv) == 0
    report = json.loads((bundle / "report.json").read_text())
    found = [check for check in report["checks"] if check["kind"] == "reference"]
    places = {(check["runtime"], check["details"]["against"]) for check in found}
    assert places == {
        ("onnxruntime", "exact"),
        ("onnxruntime", "fast"),
        ("desktop fast", "exact"),
    }
    near = [check for check in found if check["details"]["against"] == "exact"]
    assert all(check["equal"] or check["value"] > 40 for check in near)
    desktop = [row for row in report["latency"] if row["runtime"].startswith("desktop ")]
    assert len(desktop) == 2
    assert all(row["load_ms"] > 0 and row["first_ms"] > 0 for row in desktop)
    assert all(row["peak_bytes"] is not None for row in desktop)
    page = (bundle / "report.html").read_text()
    assert "Beside the desktop pipeline" in page
    assert page.count("the desktop pipeline</figcaption>") == 4  # two prompts, exact and fast

    (kept / "reference.safetensors").write_bytes(b"x")
    assert run_cli(main, argv) == 2
    assert "is not what reference.json says" in capsys.readouterr().err
    data = json.loads((kept / "reference.json").read_text())
    (kept / "reference.json").write_text(json.dumps({**data, "manifest_sha256": "0" * 64}))
    assert run_cli(main, argv) == 2
    assert "was made for another bundle" in capsys.readouterr().err
    assert Bundle.open(bundle).manifest.name == "small"
