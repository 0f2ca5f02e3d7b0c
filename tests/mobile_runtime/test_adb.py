"""Jobs on a phone: the real adb client, and a stand-in phone that speaks its protocol."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mobile_runtime import devices
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.devices import adb
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.on_devices import Asked, validate_on
from mobile_runtime.report import Check, Report
from tests.adb_standin import APP, Phone
from tests.bundles import make_bundle

pytestmark = pytest.mark.skipif(shutil.which("adb") is None, reason="there is no adb here")

NewPhone = Callable[..., Phone]


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adb server of our own, so that nobody's phones are touched."""
    import socket

    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # its keys go there
        patch.delenv("ANDROID_SERIAL", raising=False)
        yield
        subprocess.run(["adb", "kill-server"], check=False, capture_output=True, timeout=60)


def connect(phone: Phone) -> None:
    """As a user does who plugs a phone in."""
    for verb in ("disconnect", "connect"):
        command = ["adb", verb, phone.serial]
        subprocess.run(command, check=False, capture_output=True, timeout=60)
    deadline = time.monotonic() + 20
    states = (None, "offline", "connecting", "authorizing")
    while adb.devices().get(phone.serial) in states:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewPhone]:
    """Makes phones, and connects them."""
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    made: list[Phone] = []

    def new(authorized: bool = True) -> Phone:
        one = Phone(tmp_path / f"phone-{len(made)}", authorized)
        made.append(one)
        connect(one)
        return one

    yield new
    for one in made:
        one.close()
        command = ["adb", "disconnect", one.serial]
        subprocess.run(command, check=False, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("adb") / "bundle")


def checked(bundle: Bundle, phone: Phone, **asked: float) -> Report:
    return validate_on(bundle, [f"adb:{phone.serial}"], Asked(repeats=2, **asked))  # type: ignore[arg-type]


def outputs(report: Report) -> dict[str, Check]:
    """What became of each task, by its component or prompt."""
    return {
        check.component if check.prompt is None else f"prompt-{check.prompt}": check
        for check in report.checks
        if check.kind == "outputs"
    }


def test_a_phone_runs_the_whole_job_and_the_second_needs_no_bundle(bundle, phone):
    one = phone()
    report = checked(bundle, one)
    assert report.verdict == "pass"
    assert [device.name for device in report.devices] == [f"adb:{one.serial}"]
    assert {row.component for row in report.latency} >= {"text_encoder", "unet", "vae_decoder"}
    home = one.folder / "data/files/pocket_diffusion"
    assert [path.name for path in (home / "bundles").iterdir()] == [bundle.manifest_sha256]
    assert list((home / "jobs").iterdir()) == []
    assert list((home / "results").iterdir()) == []
    sent = sum("tar -xf" in command for command in one.commands)
    assert checked(bundle, one).verdict == "pass"
    assert sum("tar -xf" in command for command in one.commands) == sent + 1  # the job alone


def test_a_copy_that_was_damaged_there_is_sent_again(bundle, phone):
    one = phone()
    assert checked(bundle, one).verdict == "pass"
    there = one.folder / "data/files/pocket_diffusion/bundles" / bundle.manifest_sha256
    for damage in ("truncated", "gone"):
        model = there / "unet/model.onnx"
        model.write_bytes(model.read_bytes()[:-1]) if damage == "truncated" else model.unlink()
        assert checked(bundle, one).verdict == "pass"
        assert model.read_bytes() == bundle.file("unet/model.onnx").read_bytes()


def test_a_phone_is_cleaned_when_asked(bundle, phone, capsys):
    one = phone()
    checked(bundle, one)
    assert (one.folder / "data/files/pocket_diffusion/bundles").is_dir()
    assert run_cli(main, ["devices", "--clean", f"adb:{one.serial}"]) == 0
    assert not (one.folder / "data/files/pocket_diffusion").exists()
    assert (one.folder / "data/files").is_dir()
    assert "holds no bundles" in capsys.readouterr().out
    one.unplug()
    assert run_cli(main, ["devices", "--clean", f"adb:{one.serial}"]) == 2


def test_an_app_that_dies_in_one_task_gives_the_others(bundle, phone):
    one = phone()
    app = (one.folder / "app").read_text()
    one.set_app(app.replace("exec ", 'case ",$2," in *,unet,*) done=1;; esac\nexec ', 1))
    # It ends before the UNet, whenever that is asked for first.
    one.set_app(
        f'#!/bin/sh\ncase "$2" in unet*) exit 1;; esac\nset -- "$1" "${{2%%,unet*}}"\n{app}'
    )
    found = outputs(checked(bundle, one))
    assert found["unet"].status == "fail"
    assert "the app ended" in found["unet"].reason
    assert {found[name].status for name in ("text_encoder", "vae_decoder", "prompt-0")} == {"pass"}


def test_an_app_that_hangs_is_stopped(bundle, phone):
    one = phone()
    one.set_app("#!/bin/sh\nexec sleep 600\n")
    report = checked(bundle, one, timeout_s=4)
    assert report.verdict == "fail"
    assert {check.status for check in outputs(report).values()} == {"fail"}
    assert "gave no result for 4 s" in report.summary


def test_ctrl_c_ends_the_app(bundle, phone, monkeypatch):
    one = phone()
    one.set_app("#!/bin/sh\nexec sleep 600\n")

    def interrupted(self, result):
        if (one.folder / "pid").exists():
            raise KeyboardInterrupt
        return

    monkeypatch.setattr(adb.AdbDevice, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checked(bundle, one)
    pid = int((one.folder / "pid").read_text())
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    told = Path(f"/proc/{pid}/stat")
    assert not told.exists() or " Z " in told.read_text()


def test_a_phone_that_vanishes_keeps_what_was_measured_and_the_next_run_goes_on(
    bundle, phone, monkeypatch
):
    one = phone()
    fetch = adb.AdbDevice._fetch

    def fetch_and_unplug(self, result):
        fetch(self, result)
        if result.has("text_encoder"):
            one.unplug()

    monkeypatch.setattr(adb.AdbDevice, "_fetch", fetch_and_unplug)
    app = (one.folder / "app").read_text()
    slow = app.replace("exec ", "").replace("$(echo", "text_encoder; sleep 60 #")
    one.set_app(slow)
    found = outputs(checked(bundle, one))
    assert found["text_encoder"].status == "pass"
    assert {found[name].status for name in ("unet", "vae_decoder", "prompt-0")} == {"not_run"}
    assert one.serial in found["unet"].reason
    monkeypatch.setattr(adb.AdbDevice, "_fetch", fetch)
    one.set_app(app)
    one.plug_in()
    connect(one)
    assert checked(bundle, one).verdict == "pass"
    asked = [command for command in one.commands if command.startswith("am start")]
    assert "text_encoder" in asked[0]
    assert "text_encoder" not in asked[-1]


def test_a_phone_unplugged_while_it_is_tidied_up_has_given_all(bundle, phone, monkeypatch):
    one = phone()
    as_app = adb.AdbDevice._as_app

    def unplugged(self, command, data=None):
        if command.startswith("rm -rf files/pocket_diffusion/jobs") and "results" in command:
            one.unplug()
        return as_app(self, command, data)

    monkeypatch.setattr(adb.AdbDevice, "_as_app", unplugged)
    assert checked(bundle, one).verdict == "pass"


def test_a_phone_without_room_is_told(bundle, phone):
    one = phone()
    one.script("tar", 'cat >/dev/null; echo "tar: write: No space left on device" >&2; exit 1')
    report = checked(bundle, one)
    assert report.verdict == "not_run"
    assert "No space left on device" in report.summary
    assert not list((one.folder / "data/files/pocket_diffusion/bundles").iterdir())


def test_an_answer_that_is_garbage_is_told(bundle, phone):
    one = phone()
    real = shutil.which("tar")
    one.script("tar", f'[ "$1" = -xf ] && exec {real} "$@"; head -c 2000 /dev/urandom')
    report = checked(bundle, one)
    assert report.verdict == "not_run"
    assert "cut short" in report.summary


def test_an_app_that_is_not_there_is_told(bundle, phone):
    one = phone()
    name = f"adb:{one.serial},app=org.example.other"
    report = validate_on(bundle, [name], Asked(repeats=0))
    assert report.verdict == "not_run"
    assert "unknown package" in report.summary
    assert "install a debug build" in report.summary
    (one.folder / "no_activity").touch()
    report = checked(bundle, one)
    assert report.verdict == "not_run"
    assert f".JobActivity of {APP} does not start" in report.summary


def test_a_phone_that_has_not_allowed_debugging_is_told(phone):
    one = phone(authorized=False)
    told = adb.AdbDevice(one.serial).obstacle()
    assert told is not None
    assert "allow USB debugging" in told


def test_of_several_phones_one_has_to_be_named(phone, capsys):
    with pytest.raises(UserError, match="plug one in"):
        devices.find("adb")
    first = phone()
    assert devices.find("adb").name == f"adb:{first.serial}"
    second = phone()
    with pytest.raises(UserError, match="several phones"):
        devices.find("adb:")
    assert run_cli(main, ["devices"]) == 0
    told = capsys.readouterr().out
    for one in (first, second):
        assert f"adb:{one.serial}" in told


@pytest.mark.parametrize("text", ["-x", "A,app=", "A,app=two words", "A,apk=x", "A,app=a;reboot"])
def test_what_is_no_phone_is_refused(text):
    with pytest.raises(UserError, match="adb:SERIAL"):
        devices.find(f"adb:{text}")


def test_a_phone_that_nobody_knows_is_told(bundle):
    report = validate_on(bundle, ["adb:R58M000"], Asked(repeats=0))
    assert report.verdict == "not_run"
    assert "adb does not know R58M000" in report.summary
