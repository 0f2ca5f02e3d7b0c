"""Jobs on an iPhone: a stand-in for `xcrun devicectl`, since there is no Mac here."""

import sys
from pathlib import Path

import pytest

from mobile_runtime import devices
from mobile_runtime.bundle import Bundle
from mobile_runtime.devices import ios
from mobile_runtime.errors import UserError
from mobile_runtime.on_devices import Asked, validate_on
from mobile_runtime.report import Report
from tests.bundles import make_bundle

UDID = "00008130-000630CE0146001C"
# Copies as devicectl does: into the app's folder, folders whole, over nothing that exists.
DEVICECTL = """#!{python}
import json, os, shutil, subprocess, sys
from pathlib import Path
phone, words = Path({phone!r}), sys.argv[2:]
value = lambda option: words[words.index(option) + 1]
with open(phone / "calls", "a") as calls:
    print(*words, file=calls)
if (phone / "gone").exists() or value("--device") != {udid!r}:
    sys.exit("ERROR: The specified device was not found.")
if words[:3] == ["device", "info", "details"]:
    sys.exit(0)
if words[:2] == ["device", "copy"]:
    assert value("--domain-type") == "appDataContainer"
    inside, outside = ("--destination", "--source")
    source, to = Path(value("--source")), Path(value("--destination"))
    source, to = (source, phone / to) if words[2] == "to" else (phone / source, to)
    if not source.exists():
        sys.exit("ERROR: The operation couldn't be completed. No such file or directory")
    if words[2] == "to" and (phone / "full").exists():
        sys.exit("ERROR: No space left on device")
    to.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, to)
    sys.exit(0)
assert words[:3] == ["device", "process", "launch"] and "--console" in words
if (phone / "locked").exists():
    sys.exit("ERROR: the device was not, or could not be, unlocked")
root, job = phone / "Documents/pocket_diffusion", value("--job")
bundle = json.loads((root / "jobs" / job / "job.json").read_text())["manifest_sha256"]
tasks = value("--only").split(",")
if (phone / "dies_at").exists() and (phone / "dies_at").read_text() in tasks:
    tasks = tasks[: tasks.index((phone / "dies_at").read_text())]
if tasks:
    command = [sys.executable, "-m", "mobile_runtime.job_runner", str(root / "jobs" / job)]
    command += [str(root / "bundles" / bundle), "--output", str(root / "results" / job)]
    subprocess.run([*command, "--only", *tasks], env={{**os.environ, "PYTHONPATH": {code!r}}})
if (phone / "hangs").exists():
    import time
    time.sleep(60)
"""


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "phone"
    (folder / "bin").mkdir(parents=True)
    code = str(Path(__file__).resolve().parents[2])
    script = DEVICECTL.format(python=sys.executable, phone=str(folder), udid=UDID, code=code)
    (folder / "bin/xcrun").write_text(script)
    (folder / "bin/xcrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ios, "POLL_S", 0.1)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("ios") / "bundle")


def checked(bundle: Bundle, timeout_s: float = 60) -> Report:
    return validate_on(bundle, [f"ios:{UDID}"], Asked(repeats=2, timeout_s=timeout_s))


def statuses(report: Report) -> dict[str, str]:
    return {
        check.component if check.prompt is None else f"prompt-{check.prompt}": check.status
        for check in report.checks
        if check.kind == "outputs"
    }


def test_a_phone_runs_the_whole_job_and_keeps_the_bundle(bundle, phone):
    report = checked(bundle)
    assert report.verdict == "pass"
    assert checked(bundle).verdict == "pass"
    calls = (phone / "calls").read_text().splitlines()
    sent = [
        call for call in calls if "copy to" in call and f"bundles/{bundle.manifest_sha256}" in call
    ]
    assert len(sent) == 2  # the folder, and the mark that it is whole; once


def test_an_app_that_dies_in_one_task_gives_the_others(bundle, phone):
    (phone / "dies_at").write_text("unet")
    found = statuses(checked(bundle))
    assert found["unet"] == "fail"
    assert {found[name] for name in ("text_encoder", "vae_decoder", "prompt-0")} == {"pass"}


def test_an_app_that_hangs_is_stopped_and_what_it_gave_is_kept(bundle, phone):
    (phone / "dies_at").write_text("vae_decoder")
    (phone / "hangs").touch()
    found = statuses(checked(bundle, timeout_s=4))
    assert found["text_encoder"] == found["unet"] == "pass"
    assert found["vae_decoder"] == "fail"


def test_a_phone_that_is_gone_or_full_is_told(bundle, phone):
    (phone / "full").touch()
    report = checked(bundle)
    assert report.verdict == "not_run"
    assert "No space left on device" in report.summary
    (phone / "gone").touch()
    report = checked(bundle)
    assert report.verdict == "not_run"
    assert "was not found" in report.summary
    assert "unlock it" in report.summary


def test_an_app_that_cannot_be_started_is_no_failure_of_the_bundle(bundle, phone):
    (phone / "locked").touch()
    report = checked(bundle)
    assert set(statuses(report).values()) == {"not_run"}
    assert "could not be, unlocked" in report.summary
    assert not [check for check in report.checks if check.status == "fail"]
    launches = [call for call in (phone / "calls").read_text().splitlines() if "launch" in call]
    assert len(launches) == 1


def test_without_xcode_that_is_told(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = devices.find(f"ios:{UDID}").obstacle()
    assert told is not None
    assert "a Mac with Xcode" in told


@pytest.mark.parametrize(
    "text", ["", "-x", "A B", f"{UDID},app=", f"{UDID},app=x;y", f"{UDID},a=b"]
)
def test_what_is_no_phone_is_refused(text):
    with pytest.raises(UserError, match="ios:UDID"):
        devices.find(f"ios:{text}")
