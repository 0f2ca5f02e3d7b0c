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


def set_record(folder: Path, name: str, **values: Any) -> None:
    path = folder / f"result/{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "parts",
    [
        {"unet": [1.0]},
        {"unet": [1.0] * 9},
        {"<b>evil</b>": [1e9]},
        {"vae_decoder": [1.0, 1.0]},
    ],
)
def test_times_of_calls_that_a_picture_does_not_make_fail(
    bundle: Bundle, phone: Path, parts: dict[str, list[float]]
) -> None:
    set_timing(phone, "prompt-0", parts_ms=parts)
    report = judged(bundle, phone)
    assert report.verdict == "fail"
    assert "which is not what it calls" in report.summary


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"parts_ms": {"unet": [5.0, 5.0, 5.0]}, "times_ms": [0.001]}, "15 ms of model calls"),
        ({"times_ms": [1.0] * 9}, "has 9 timed calls, and the job asks for"),
    ],
)
def test_times_that_do_not_fit_each_other_or_the_job_fail(
    bundle: Bundle, phone: Path, values: dict[str, Any], told: str
) -> None:
    steps = bundle.manifest.golden.prompts[0].steps
    if "parts_ms" in values:
        values = {**values, "parts_ms": {"unet": [15.0 / steps] * steps}}
        record = json.loads((phone / "result/prompt-0.json").read_text())
        values["times_ms"] = [0.001] * len(record["timing"]["times_ms"])
    set_timing(phone, "prompt-0", **values)
    report = judged(bundle, phone)
    assert report.verdict == "fail"
    assert told in report.summary


def test_what_a_device_says_of_itself_is_short_and_plain(bundle: Bundle, phone: Path) -> None:
    device = json.loads((phone / "result/device.json").read_text())
    environment = device["environment"] | {"cpu": "y" * 100_000, "libraries": {"z" * 9000: "1"}}
    name = "\x1b[31mPixel\0" + "x" * 4_000_000
    set_record(phone, "device", device=name, environment=environment)
    assert judged(bundle, phone).verdict == "pass"
    page = (phone.parent / "report/report.html").read_bytes()
    assert len(page) < 200_000
    assert not {0, 0x1B} & set(page)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unet", {"thermal": "warm" * 1000}),
        ("unet", {"peak_bytes": 0}),
        ("device", {"environment": {"cpu_flags": ["avx"] * 50_000}}),
        ("device", {"environment": {"libraries": {str(k): "1" for k in range(20_000)}}}),
    ],
)
def test_a_record_with_more_than_a_device_has_to_say_fails(
    bundle: Bundle, phone: Path, name: str, values: dict[str, Any]
) -> None:
    if "environment" in values:
        known = json.loads((phone / "result/device.json").read_text())["environment"]
        values = {"environment": known | values["environment"]}
    set_record(phone, name, **values)
    assert judged(bundle, phone).verdict == "fail"


def test_all_that_a_folder_lacks_is_told_at_once(bundle: Bundle, tmp_path: Path) -> None:
    report = validate_on(bundle, [f"folder:{tmp_path / 'empty'}"], QUICK)
    first = next(check for check in report.checks if check.status == "not_run")
    assert "text_encoder.json (nor those of unet, vae_decoder, prompt-0, prompt-1)" in first.reason


def test_a_folder_inside_the_bundle_is_refused(bundle: Bundle) -> None:
    for place in (bundle.path, bundle.path / "phone"):
        with pytest.raises(UserError, match="lies in the bundle"):
            validate_on(bundle, [f"folder:{place}"], QUICK)
    assert not (bundle.path / "job").exists()


@pytest.mark.parametrize("name", ["mine.json", "bundle/notes.md", "page.html"])
def test_a_summary_is_added_to_markdown_alone(tmp_path: Path, name: str, capsys: Any) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    path = tmp_path / name
    path.write_text("mine")
    assert run_cli(main, ["validate", str(bundle.path), "--markdown", str(path)]) == 2
    assert "is no place for a summary" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_a_report_of_another_bundle_is_not_compared(tmp_path: Path, capsys: Any) -> None:
    one = make_bundle(tmp_path / "one")
    other = make_bundle(tmp_path / "other", guidance_scale=2.0)
    write_report(validate_on(one, ["local"], QUICK), other.path)
    page = tmp_path / "page.html"
    assert run_cli(main, ["compare", str(other.path), "-o", str(page)]) == 2
    assert "was made for another bundle" in capsys.readouterr().err
    assert not page.exists()


@pytest.mark.parametrize("kind", ["same_function", "picture"])
def test_a_pass_without_what_passes_is_refused(bundle: Bundle, tmp_path: Path, kind: str) -> None:
    path, _ = write_report(validate_on(bundle, ["local"], QUICK), tmp_path / "report")
    data = json.loads(path.read_text())
    data["checks"] = [check for check in data["checks"] if check["kind"] != kind]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="its checks do not"):
        load_report(path)
