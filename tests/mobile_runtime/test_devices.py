"""A device runs a job, or does not: what it gave is judged and kept, and the rest is told."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from mobile_runtime import devices, on_devices
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle, sha256
from mobile_runtime.devices.processes import ProcessDevice
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.job_runner import run_job
from mobile_runtime.jobs import Result, open_job
from mobile_runtime.manifest import Manifest
from mobile_runtime.on_devices import Asked, validate_on
from mobile_runtime.report import Report
from mobile_runtime.report_html import render
from tests.bundles import make_bundle

QUICK = Asked(options={"threads": 1}, repeats=2, timeout_s=60)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("devices") / "bundle")


def outputs(report: Report) -> dict[str, tuple[str, str]]:
    """Of each task: whether there are outputs, and why not."""
    return {
        check.component if check.prompt is None else f"prompt-{check.prompt}": (
            check.status,
            check.reason,
        )
        for check in report.checks
        if check.kind == "outputs"
    }


def test_this_machine_in_a_process_of_its_own_passes(bundle: Bundle, tmp_path: Path) -> None:
    report = validate_on(bundle, ["local"], QUICK)
    assert report.verdict == "pass"
    where = {check.runtime for check in report.checks}
    assert where == {"onnxruntime on local", "onnxruntime here"}
    timed = [row.component for row in report.latency]
    assert timed == ["text_encoder", "unet", "vae_decoder", "pipeline"]
    assert len(report.latency[-1].parts_ms["unet"]) == 4  # each step of the picture
    assert report.devices[0].options == {"threads": 1}
    assert all((row.peak_bytes or 0) > 1e6 for row in report.latency)
    (ran,) = report.devices
    assert ran.name == "local"
    assert ran.environment.libraries["onnxruntime"]
    assert list((tmp_path / "cache/jobs").iterdir()) == []  # the next one measures anew


def badly(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `local` starts a Python that misbehaves; `go` runs the job's tasks."""
    stub = tmp_path / "python.py"
    head = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from mobile_runtime.job_runner import main\n"
        "argv = sys.argv[3:]\n"
        "job, bundle, result = (Path(argv[k]) for k in (0, 1, 3))\n"
        "tasks = argv[argv.index('--only') + 1:]\n"
        "def go(*names):\n"
        "    main([*argv[:4], '--only', *names])\n"
    )
    stub.write_text(head + script)
    device = ProcessDevice("local", (sys.executable, str(stub)))
    monkeypatch.setattr("mobile_runtime.devices.processes.local", lambda: device)


CRASH = """
for task in tasks:
    if task == 'unet':
        os.kill(os.getpid(), signal.SIGSEGV)
    go(task)
"""


def test_a_task_that_kills_its_process_keeps_no_other_from_running(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    badly(CRASH, tmp_path, monkeypatch)
    report = validate_on(bundle, ["local"], QUICK)
    assert report.verdict == "fail"
    found = outputs(report)
    assert found.pop("unet") == ("fail", "local: the process was ended by signal 11")
    assert {status for status, _ in found.values()} == {"pass"}
    assert "unet in onnxruntime on local failed" in report.summary


def test_a_task_that_hangs_is_stopped_and_the_next_run_asks_for_the_rest(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        badly("go('text_encoder')\ntime.sleep(600)\n", tmp_path, patch)
        asked = Asked(options={"threads": 1}, repeats=2, timeout_s=4, prompts=1)
        # Of the tasks that are left each has its chance, so one prompt is enough.
        report = validate_on(bundle, ["local"], asked)
    found = outputs(report)
    assert found["text_encoder"][0] == "pass"
    assert found["unet"] == ("fail", "local gave no result for 4 s and was stopped")
    (place,) = (tmp_path / "cache/jobs").iterdir()
    kept = (place / "result/text_encoder.json").stat().st_mtime_ns
    ran: list[str] = []
    run = ProcessDevice._process

    def watched(self: Any, work: Any, result: Any, tasks: Any) -> Any:
        ran.extend(tasks)
        assert (place / "result/text_encoder.json").stat().st_mtime_ns == kept
        return run(self, work, result, tasks)

    monkeypatch.setattr(ProcessDevice, "_process", watched)
    assert validate_on(bundle, ["local"], asked).verdict == "pass"
    assert ran == ["unet", "vae_decoder", "prompt-0"]


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("sys.exit('no module named onnxruntime')", "not_run", "code 1: no module named onnx"),
        ("print('no space left'); sys.exit(3)", "not_run", "code 3: no space left"),
        ("raise OSError(28, 'no space', 'x')", "not_run", "no space: 'x'"),
        ("sys.exit(0)", "fail", "ended without a result"),
    ],
)
def test_a_device_that_never_begins_is_told_once(
    script: str,
    status: str,
    told: str,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    badly(script, tmp_path, monkeypatch)
    report = validate_on(bundle, ["local"], QUICK)
    found = outputs(report)
    assert report.verdict in ("fail", "not_run")
    assert report.verdict != "pass"
    assert found["text_encoder"][0] == status
    assert told in found["text_encoder"][1]


GARBAGE = """
go(*tasks)
path = result / 'unet.{suffix}'
path.write_bytes({bytes})
"""


@pytest.mark.parametrize(
    ("suffix", "written", "told"),
    [
        ("json", "b'{'", "no sound record"),
        ("json", r"b'\xff\xfe'", "no sound record"),
        ("safetensors", "b'garbage'", "not what its record says"),
        ("safetensors", "path.read_bytes()[:-8]", "not what its record says"),
    ],
)
def test_garbage_is_no_result(
    suffix: str,
    written: str,
    told: str,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    badly(GARBAGE.format(suffix=suffix, bytes=written), tmp_path, monkeypatch)
    report = validate_on(bundle, ["local"], QUICK)
    found = outputs(report)
    assert report.verdict == "fail"
    assert found.pop("unet")[0] == "fail"
    assert {status for status, _ in found.values()} == {"pass"}


def test_a_folder_is_filled_by_hand(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = ["--device", f"folder:{tmp_path / 'phone'}"]
    argv = ["validate", str(bundle.path), *device, "--output", str(tmp_path / "report")]
    assert run_cli(main, argv) == 2
    told = capsys.readouterr().err
    assert f"run the job in {tmp_path / 'phone/job'} on the device" in told
    run_job(tmp_path / "phone/job", bundle, tmp_path / "phone/result")
    assert run_cli(main, argv) == 0
    assert (tmp_path / "phone/result/unet.json").is_file()
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["verdict"] == "pass"
    assert [ran["name"] for ran in report["devices"]] == [f"folder:{tmp_path / 'phone'}"]


@pytest.fixture(scope="module")
def phone(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and its result."""
    folder = tmp_path_factory.mktemp("phone") / "phone"
    validate_on(bundle, [f"folder:{folder}"], QUICK)
    run_job(folder / "job", bundle, folder / "result")
    return folder


@pytest.fixture
def copied(phone: Path, tmp_path: Path) -> Path:
    shutil.copytree(phone, tmp_path / "copied")
    return tmp_path / "copied"


def told(bundle: Bundle, folder: Path) -> Report:
    return validate_on(bundle, [f"folder:{folder}"], QUICK)


def test_a_sound_folder_passes(bundle: Bundle, copied: Path) -> None:
    report = told(bundle, copied)
    assert report.verdict == "pass"
    assert [row.component for row in report.latency] == [
        "text_encoder",
        "unet",
        "vae_decoder",
        "pipeline",
    ]


def test_an_emulated_device_has_no_latency(bundle: Bundle, copied: Path) -> None:
    facts = json.loads((copied / "result/device.json").read_text())
    (copied / "result/device.json").write_text(json.dumps(facts | {"emulated": True}))
    report = told(bundle, copied)
    assert report.verdict == "pass"
    assert report.latency == ()


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def no_warm_up(folder: Path) -> None:
    path = folder / "result/unet.json"
    timing = json.loads(path.read_text())["timing"]
    change(path, timing=timing | {"warm_up": 0})


def no_times(folder: Path) -> None:
    change(folder / "result/unet.json", timing=None)


def nothing_timed(folder: Path) -> None:
    path = folder / "result/unet.json"
    timing = json.loads(path.read_text())["timing"]
    change(path, timing=timing | {"times_ms": []})


def stale(folder: Path) -> None:
    change(folder / "result/unet.json", job="0" * 32)


def too_few(folder: Path) -> None:
    path = folder / "result/unet.json"
    timing = json.loads(path.read_text())["timing"]
    change(path, timing=timing | {"times_ms": timing["times_ms"][:1]})


def no_device(folder: Path) -> None:
    (folder / "result/device.json").unlink()


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (no_warm_up, "timed after 0 calls to warm up, and the job asks for 2"),
        (no_times, "tells no times"),
        (nothing_timed, "has no timed calls"),
        (too_few, "has 1 timed calls, and the job asks for 2 or 10 s"),
        (stale, "the result of another job"),
        (no_device, "does not tell what device it is from"),
    ],
)
def test_a_result_that_is_not_what_was_asked_fails(
    damage: Any, why: str, bundle: Bundle, copied: Path
) -> None:
    damage(copied)
    report = told(bundle, copied)
    assert report.verdict == "fail"
    assert why in outputs(report)["unet"][1]


@pytest.mark.parametrize(
    "edit",
    [
        {"components": []},
        {"components": [{"component": "unet", "cases": 1, "warm_up": 2, "repeats": 2}]},
        {"components": [{"component": "unet", "cases": 99, "warm_up": 2, "repeats": 2}]},
        {"inputs_sha256": None},
    ],
)
def test_a_job_that_was_edited_judges_nothing(
    edit: dict[str, Any], bundle: Bundle, copied: Path
) -> None:
    path = copied / "job/job.json"
    if "inputs_sha256" in edit:
        inputs = copied / "job/inputs.safetensors"
        tensors = load_file(inputs)
        tensors["unet/0/sample"] += 1
        save_file(tensors, inputs)
        edit = {"inputs_sha256": sha256(inputs)}
    change(path, **edit)
    with pytest.raises(UserError, match="was edited"):
        told(bundle, copied)


def test_heat_and_a_long_reason_are_told_in_short(bundle: Bundle, copied: Path) -> None:
    change(copied / "result/unet.json", thermal="critical")
    change(copied / "result/text_encoder.json", status="fail", reason="\x1b[31m!" * 100_000)
    report = told(bundle, copied)
    assert report.verdict == "fail"
    assert report.devices[0].thermal == "critical"
    assert "critical" in render(report)
    reason = outputs(report)["text_encoder"][1]
    assert len(reason) <= 1000
    assert reason.isprintable()


def test_the_ids_of_another_prompt_are_wrong(bundle: Bundle, copied: Path) -> None:
    one, other = (copied / f"result/prompt-{k}.safetensors" for k in (0, 1))
    save_file({**load_file(other), "ids": load_file(one)["ids"]}, other)
    change(copied / "result/prompt-1.json", tensors_sha256=sha256(other))
    report = told(bundle, copied)
    assert report.verdict == "fail"
    assert "are not what the tokenizer gives" in report.summary


def test_what_another_runtime_measured_is_measured_anew(bundle: Bundle, copied: Path) -> None:
    record = copied / "result/unet.json"
    timing = json.loads(record.read_text())["timing"]
    change(record, timing=timing | {"times_ms": [999.0, 999.0]})
    run_job(copied / "job", bundle, copied / "result")
    assert 999.0 in json.loads(record.read_text())["timing"]["times_ms"]  # of this very machine
    change(copied / "result/device.json", device="An older machine")
    run_job(copied / "job", bundle, copied / "result")
    assert 999.0 not in json.loads(record.read_text())["timing"]["times_ms"]


def test_two_validations_at_a_time_do_not_meet(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ProcessDevice.run

    def beside(self: Any, work: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(ProcessDevice, "run", run)
            with pytest.raises(UserError, match="another validation of this bundle on local"):
                validate_on(bundle, ["local"], QUICK)
        return run(self, work)

    monkeypatch.setattr(ProcessDevice, "run", beside)
    assert validate_on(bundle, ["local"], QUICK).verdict == "pass"


def test_a_missing_record_is_not_run(bundle: Bundle, copied: Path) -> None:
    (copied / "result/unet.json").unlink()
    report = told(bundle, copied)
    assert report.verdict == "not_run"
    assert outputs(report)["unet"][0] == "not_run"


def test_a_value_that_is_wrong_is_found_though_its_record_agrees(
    bundle: Bundle, copied: Path
) -> None:
    job, _ = open_job(copied / "job")
    result = Result(copied / "result", job)
    record = result.record("unet")
    assert record is not None
    tensors = result.tensors(record)
    tensors["1/out_sample"][0, 0, 0, 0] += 1
    result.write(record.model_copy(update={"tensors_sha256": None}), tensors)
    report = told(bundle, copied)
    assert report.verdict == "fail"
    assert "unet in onnxruntime on folder" in report.summary


def test_missing_tensors_of_a_picture_are_named(bundle: Bundle, copied: Path) -> None:
    path = copied / "result/prompt-0.safetensors"
    tensors = load_file(path)
    del tensors["picture"]
    save_file(tensors, path)
    change(copied / "result/prompt-0.json", tensors_sha256=sha256(path))
    report = told(bundle, copied)
    assert outputs(report)["prompt-0"] == ("fail", "prompt-0 of the result has no tensor picture")


def test_a_folder_with_the_job_of_another_bundle_is_refused(copied: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", steps=(2,))
    with pytest.raises(UserError, match="is damaged, or the job of another bundle"):
        told(other, copied)


@pytest.mark.parametrize(
    "other",
    [
        Asked(options={"threads": 2}, repeats=2),
        Asked(options={"threads": 1}, repeats=3),
        Asked(options={"threads": 1}, repeats=2, prompts=1),
        Asked(backend="mil", options={"threads": 1}, repeats=2),
    ],
)
def test_a_folder_with_a_job_of_another_request_is_refused(
    other: Asked, bundle: Bundle, copied: Path
) -> None:
    """Or the report would name options that nobody ran with."""
    with pytest.raises(UserError, match="is a job with another --backend, --option"):
        validate_on(bundle, [f"folder:{copied}"], other)


def test_the_interpreter_is_judged_and_run_in_the_packages_own_arithmetic(tmp_path: Path) -> None:
    def half(manifest: Manifest) -> Manifest:
        gates = manifest.gates.model_copy(update={"float16_snr_db": 45.0})
        update = {"target": "coreml", "arithmetic": "float16", "gates": gates}
        return manifest.model_copy(update=update)

    bundle = make_bundle(tmp_path / "bundle", change_manifest=half)
    asked = Asked(backend="mil")
    runtime = on_devices._runtime(bundle, devices.find("local"), asked)
    assert (runtime.arithmetic, runtime.options) == ("float16", {"arithmetic": "float16"})
    phone = f"folder:{tmp_path / 'phone'}"
    validate_on(bundle, [phone], asked)
    job, _ = open_job(tmp_path / "phone/job")
    assert {task.repeats for task in job.tasks} == {0}  # its times say nothing
    single = Asked(backend="mil", options={"arithmetic": "float32"})
    runtime = on_devices._runtime(bundle, devices.find("local"), single)
    assert runtime.arithmetic == "float32"  # and has float32's gate


def test_prompts_that_are_left_out_are_told(bundle: Bundle) -> None:
    report = validate_on(bundle, ["local"], Asked(options={"threads": 1}, repeats=0, prompts=1))
    assert report.verdict == "pass"
    assert "golden prompts left out" in report.summary


def test_several_devices_are_in_one_report(bundle: Bundle, copied: Path) -> None:
    report = validate_on(bundle, ["local", f"folder:{copied}"], QUICK)
    assert report.verdict == "pass"
    assert len(report.devices) == 2
    found = {check.runtime for check in report.checks if check.kind == "outputs"}
    assert found == {"onnxruntime on local", f"onnxruntime on folder:{copied}"}
    with pytest.raises(UserError, match="local is named twice"):
        validate_on(bundle, ["local", "local"], QUICK)


@pytest.mark.parametrize("name", ["phone", "local:x", "folder:", "", ":"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown device|needs a path"):
        devices.find(name)


def test_the_devices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, ["devices"]) == 0
    told = capsys.readouterr().out
    assert "local                    ready" in told
    assert "folder:DIR" in told


def test_a_wrong_option_is_told_before_anything_runs(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_devices, "validate_on", lambda *_: pytest.fail("it ran"))
    argv = ["validate", str(bundle.path), "--device", "local", "--option", "thread=2"]
    assert run_cli(main, argv) == 2
    assert "unknown option of the backend onnxruntime 'thread'" in capsys.readouterr().err
    assert run_cli(main, ["validate", str(bundle.path), "--option", "thread=2"]) == 2
    assert "unknown option of the backend onnxruntime 'thread'" in capsys.readouterr().err
    assert run_cli(main, ["validate", str(bundle.path), "--layers"]) == 2
    assert "--layers goes with --device" in capsys.readouterr().err
    with pytest.raises(UserError, match="no layers with quantized activations"):
        validate_on(bundle, ["local"], Asked(layers=True))
    with pytest.raises(UserError, match="unknown backend 'torch'"):
        validate_on(bundle, ["local"], Asked(backend="torch"))


def test_a_job_runs_with_the_options_that_it_names(bundle: Bundle) -> None:
    asked = Asked(options={"providers": ["QNNExecutionProvider"]}, repeats=0)
    report = validate_on(bundle, ["local"], asked)
    assert report.verdict == "not_run"
    assert "unknown execution provider" in outputs(report)["unet"][1]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_run_ends_with_what_started_it(bundle: Bundle, tmp_path: Path) -> None:
    validate_on(bundle, [f"folder:{tmp_path / 'phone'}"], Asked(repeats=10**9))
    script = (
        "import os, subprocess, sys, time\n"
        "runner = [sys.executable, '-m', 'mobile_runtime.job_runner', *sys.argv[1:]]\n"
        "made = subprocess.Popen([*runner, '--parent', str(os.getpid())])\n"
        "print(made.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    folder = tmp_path / "phone"
    words = [folder / "job", bundle.path, "--output", folder / "result"]
    command = [sys.executable, "-c", script, *map(str, words)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("name", ["local", "folder:somewhere", "ios:00008110"])
def test_a_device_that_keeps_nothing_here_is_not_cleaned(name: str) -> None:
    with pytest.raises(UserError, match="nothing lies there that can be removed from here"):
        devices.clean(name)
