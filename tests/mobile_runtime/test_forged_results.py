"""Results that are not what a device computed: none passes, and none ends in a traceback."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mobile_runtime import jobs
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle, sha256
from mobile_runtime.devices.processes import ProcessDevice
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.job_runner import run_job
from mobile_runtime.on_devices import Asked, validate_on
from mobile_runtime.report import REPORT_JSON, Report, load_report, write_report
from tests.bundles import make_bundle

QUICK = Asked(options={"threads": 1}, repeats=2, timeout_s=60)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("forged") / "bundle")


@pytest.fixture(scope="module")
def sound(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and its result."""
    folder = tmp_path_factory.mktemp("phone") / "phone"
    validate_on(bundle, [f"folder:{folder}"], QUICK)
    run_job(folder / "job", bundle, folder / "result")
    return folder


@pytest.fixture
def phone(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "phone")
    return tmp_path / "phone"


def judged(bundle: Bundle, folder: Path) -> Report:
    """The report on it, which can be written, too."""
    report = validate_on(bundle, [f"folder:{folder}"], QUICK)
    write_report(report, folder.parent / "report")
    return report


def forge(folder: Path, task: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change a task's tensors, and let its record agree."""
    path = folder / f"result/{task}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    record = folder / f"result/{task}.json"
    data = json.loads(record.read_text())
    record.write_text(json.dumps(data | {"tensors_sha256": sha256(path)}))


def set_timing(folder: Path, task: str, **values: Any) -> None:
    record = folder / f"result/{task}.json"
    data = json.loads(record.read_text())
    record.write_text(json.dumps(data | {"timing": data["timing"] | values}))


def random_latents(tensors: dict[str, np.ndarray]) -> None:
    latents = tensors["trajectory"]
    latents[1:] = np.random.default_rng(0).standard_normal(latents[1:].shape)


def zero_latents(tensors: dict[str, np.ndarray]) -> None:
    tensors["trajectory"][1:] = 0


def another_beginning(tensors: dict[str, np.ndarray]) -> None:
    tensors["trajectory"][0] = -tensors["trajectory"][0]


@pytest.mark.parametrize("change", [random_latents, zero_latents, another_beginning])
def test_latents_that_have_nothing_to_do_with_the_picture_fail(
    bundle: Bundle, phone: Path, change: Any
) -> None:
    forge(phone, "prompt-0", change)
    report = judged(bundle, phone)
    assert report.verdict == "fail"
    assert "pipeline (prompt 0)" in report.summary
    wrong = [check.kind for check in report.checks if check.status == "fail"]
    assert wrong == ["trajectory"]


def test_latents_of_another_prompt_fail(bundle: Bundle, phone: Path) -> None:
    other = load_file(phone / "result/prompt-1.safetensors")["trajectory"]

    def swap(tensors: dict[str, np.ndarray]) -> None:
        steps = len(tensors["trajectory"])
        tensors["trajectory"] = np.concatenate([other] * 4)[:steps]

    forge(phone, "prompt-0", swap)
    assert judged(bundle, phone).verdict == "fail"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(picture=tensors["picture"].astype(np.float32)),
        lambda tensors: tensors.update(picture=np.zeros((0, 0, 3), np.uint8)),
        lambda tensors: tensors.update(picture=tensors["picture"][0]),
    ],
)
def test_a_picture_of_another_form_fails_and_the_page_is_whole(
    bundle: Bundle, phone: Path, change: Any
) -> None:
    forge(phone, "prompt-0", change)
    assert judged(bundle, phone).verdict == "fail"
    assert "</html>" in (phone.parent / "report/report.html").read_text()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"times_ms": [0.0, 0.0]}, "timing.times_ms.0: Input should be greater than 0"),
        ({"times_ms": [1e308, 1.0]}, "timing.times_ms.0: Input should be less than"),
        ({"first_ms": -1.0}, "timing.first_ms"),
        ({"parts_ms": {"unet": []}}, "timing.parts_ms.unet"),
    ],
)
def test_times_that_no_clock_gave_fail(
    bundle: Bundle, phone: Path, values: dict[str, Any], told: str
) -> None:
    set_timing(phone, "prompt-0", **values)
    report = judged(bundle, phone)
    assert report.verdict == "fail"
    assert told in report.summary


def test_a_task_that_failed_without_a_reason_says_so(bundle: Bundle, phone: Path) -> None:
    record = phone / "result/unet.json"
    data = json.loads(record.read_text()) | {"status": "fail", "reason": ""}
    record.write_text(json.dumps(data))
    assert "the device does not say why" in judged(bundle, phone).summary


def test_a_folder_has_one_name(bundle: Bundle, phone: Path) -> None:
    with pytest.raises(UserError, match="is named twice"):
        validate_on(bundle, [f"folder:{phone}", f"folder:{phone}/"], QUICK)


def test_a_whole_result_of_another_machine_is_measured_anew(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it between the last task and the report."""
    whole: list[Path] = []
    assert validate_on(bundle, ["local"], QUICK, whole=whole).verdict == "pass"
    (folder,) = whole
    ran: list[str] = []
    run = ProcessDevice._process

    def watched(self: Any, work: Any, result: Any, tasks: Any) -> Any:
        ran.extend(tasks)
        return run(self, work, result, tasks)

    monkeypatch.setattr(ProcessDevice, "_process", watched)
    assert validate_on(bundle, ["local"], QUICK, whole=[]).verdict == "pass"
    assert ran == []  # of this very machine
    path = folder / "result/device.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "An older machine"}))
    assert validate_on(bundle, ["local"], QUICK).verdict == "pass"
    assert len(ran) == 5
    assert not folder.exists()


def test_a_job_that_a_kill_has_damaged_is_made_anew(bundle: Bundle) -> None:
    whole: list[Path] = []
    validate_on(bundle, ["local"], QUICK, whole=whole)
    inputs = whole[0] / "job/inputs.safetensors"
    inputs.write_bytes(inputs.read_bytes()[:100])
    assert validate_on(bundle, ["local"], QUICK).verdict == "pass"


def test_what_was_measured_outlives_a_report_that_cannot_be_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ["validate", str(bundle.path), "--device", "local", "--repeats", "2"]
    argv += ["--option", "threads=1", "-o", str(tmp_path / "report")]

    replace = Path.replace

    def no_room(path: Path, target: Path) -> Path:
        if target.name == REPORT_JSON:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", no_room)
        assert run_cli(main, argv) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(ProcessDevice, "_process", None)  # nothing is run again
    assert run_cli(main, argv) == 0


def test_a_full_disk_is_told_and_nothing_half_made_stays(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "save_file", no_room)
        for device in ("local", f"folder:{tmp_path / 'f'}"):
            with pytest.raises(UserError, match="No space left on device"):
                validate_on(bundle, [device], QUICK)
    assert [path.name for path in tmp_path.rglob("*") if "job" in path.name] == ["jobs"]
    assert validate_on(bundle, ["local"], QUICK).verdict == "pass"


def test_a_report_whose_check_is_below_its_gate_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    validate_on(bundle, ["local"], QUICK)
    report = validate_on(bundle, ["local"], QUICK)
    path, _ = write_report(report, tmp_path / "report")
    assert load_report(path).verdict == "pass"
    data = json.loads(path.read_text())
    check = next(c for c in data["checks"] if c["kind"] == "same_function" and not c["equal"])
    check["value"] = 3.0
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="its checks do not"):
        load_report(path)


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_what_is_no_report_of_ours_is_not_replaced(
    bundle: Bundle, tmp_path: Path, name: str, capsys: Any
) -> None:
    mine = tmp_path / "mine" / name
    mine.parent.mkdir()
    mine.write_text("{}")
    assert run_cli(main, ["validate", str(bundle.path), "-o", str(mine.parent)]) == 2
    assert f"{mine} is no report of a bundle" in capsys.readouterr().err
    assert mine.read_text() == "{}"


def test_notes_are_not_replaced_by_a_baseline(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    argv = ["validate", str(bundle.path), "-o", str(tmp_path / "report")]
    assert run_cli(main, [*argv, "--save-baseline", str(notes)]) == 2
    assert "is no baseline" in capsys.readouterr().err
    assert notes.read_text() == "mine"


def test_a_task_that_the_job_has_not_is_refused(bundle: Bundle, phone: Path) -> None:
    with pytest.raises(UserError, match="zzz"):
        run_job(phone / "job", bundle, phone / "result", only=["zzz"])


def test_what_lies_beside_a_bundle_stays_here(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "bundle")
    (tmp_path / "bundle/secret.txt").write_text("mine")
    names = [name for name, _ in Bundle.open(tmp_path / "bundle").files()]
    assert "secret.txt" not in names
    assert "manifest.json" in names
    assert "unet/model.onnx" in names
