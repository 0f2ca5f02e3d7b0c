"""A computer that ssh reaches, here a real sshd on this machine's loopback."""

import getpass
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobile_runtime.bundle import Bundle
from mobile_runtime.devices import Work, clean, find, ssh, transfers
from mobile_runtime.devices.ssh import SshDevice
from mobile_runtime.errors import UserError
from mobile_runtime.jobs import Result, make_job
from mobile_runtime.on_devices import Asked, validate_on
from tests.bundles import make_bundle

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
QUICK = Asked(options={"threads": 1}, repeats=2, timeout_s=60)

needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs OpenSSH's client and server"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("ssh") / "bundle")


class Server:
    """An sshd of this user, whose logins have a home folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        for name in ("host", "user"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(key, check=True)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
            f"PidFile none\nSetEnv HOME={self.home}\n"
        )
        (folder / "ssh_config").write_text(
            f"Host board\n HostName 127.0.0.1\n Port {self.port}\n User {getpass.getuser()}\n"
            f" IdentityFile {folder}/user\n UserKnownHostsFile /dev/null\n"
            " StrictHostKeyChecking no\n LogLevel ERROR\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert SSHD is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)
        raise TimeoutError((self.folder / "log").read_text())

    def stop(self) -> None:
        """End it, and every connection that it has."""
        if self.process is not None:
            found = subprocess.run(
                ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
            )
            children: dict[int, list[int]] = {}
            for line in found.stdout.splitlines():
                pid, parent = map(int, line.split())
                children.setdefault(parent, []).append(pid)
            doomed = [self.process.pid]
            for pid in doomed:
                doomed += children.get(pid, [])
            for pid in doomed:
                subprocess.run(["kill", "-9", str(pid)], check=False, stderr=subprocess.DEVNULL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    monkeypatch.setenv(ssh.COMMAND, f"ssh -F {server.folder}/ssh_config")
    server.start()
    yield server
    server.stop()


def name(python: str | Path = sys.executable) -> str:
    return f"ssh:board,python={python}"


@needs_sshd
def test_a_computer_runs_a_bundle_and_keeps_it_for_the_next_time(
    bundle: Bundle, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = validate_on(bundle, [name()], QUICK)
    assert report.verdict == "pass"
    where = {check.runtime for check in report.checks if check.kind == "outputs"}
    assert where == {"onnxruntime on ssh:board"}
    assert [ran.name for ran in report.devices] == ["ssh:board"]
    root = server.home / ssh.ROOT
    assert [path.name for path in (root / "bundles").iterdir()] == [bundle.manifest_sha256]
    assert (root / "bundles" / bundle.manifest_sha256 / "manifest.json").is_file()
    assert list((root / "jobs").iterdir()) == list((root / "results").iterdir()) == []
    sent: list[str] = []
    send = SshDevice._send

    def watched(self: SshDevice, files: object, to: str) -> None:
        if not (server.home / to).exists():
            sent.append(to)
        send(self, files, to)  # type: ignore[arg-type]

    monkeypatch.setattr(SshDevice, "_send", watched)
    assert validate_on(bundle, [name()], QUICK).verdict == "pass"
    assert [Path(to).parent.name for to in sent] == ["jobs"]


STUB = """#!{python}
import os, sys, time
if "--only" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
from mobile_runtime.job_runner import main
argv = sys.argv[sys.argv.index("mobile_runtime.job_runner") + 1:]
main([*argv[:argv.index("--only")], "--only", "text_encoder"])
time.sleep(600)
"""


@pytest.fixture
def stuck(tmp_path: Path) -> Path:
    """A Python that runs a job's first task and then does nothing more."""
    path = tmp_path / "stuck"
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return path


@needs_sshd
def test_a_computer_that_vanishes_loses_nothing_and_is_asked_for_the_rest(
    bundle: Bundle, server: Server, stuck: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(text: str) -> None:
        if "text_encoder is done" in text:
            server.stop()

    report = validate_on(bundle, [name(stuck)], QUICK, tell=vanish)
    assert report.verdict == "not_run"
    found = {check.component: check for check in report.checks if check.kind == "outputs"}
    assert found["text_encoder"].status == "pass"
    assert found["unet"].status == "not_run"
    assert "ssh:board: the connection was lost" in found["unet"].reason
    assert list((tmp_path / "cache/jobs").glob("*/result/text_encoder.json"))
    server.start()
    asked: list[str] = []
    attempt = SshDevice._attempt

    def watched(self: SshDevice, work: Work, result: Result, tasks: list[str]) -> object:
        asked.extend(tasks)
        return attempt(self, work, result, tasks)

    monkeypatch.setattr(SshDevice, "_attempt", watched)
    assert validate_on(bundle, [name()], QUICK).verdict == "pass"
    assert asked[:2] == ["unet", "vae_decoder"]


@needs_sshd
def test_a_task_that_hangs_there_is_given_up(bundle: Bundle, server: Server, stuck: Path) -> None:
    asked = Asked(options={"threads": 1}, repeats=0, timeout_s=4, prompts=1)
    report = validate_on(bundle, [name(stuck)], asked)
    found = {check.component: check for check in report.checks if check.kind == "outputs"}
    assert found["text_encoder"].status == "pass"
    assert found["unet"].reason == "ssh:board gave no result for 4 s"
    assert report.verdict == "fail"
    until = time.monotonic() + 20
    while (left := _running(str(stuck))) and time.monotonic() < until:
        time.sleep(0.2)
    assert left == []  # nothing is timed beside it


def _running(text: str) -> list[str]:
    told = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True)
    return [line for line in told.stdout.splitlines() if text in line and "--only" in line]


@needs_sshd
def test_a_copy_that_was_damaged_there_is_sent_again(bundle: Bundle, server: Server) -> None:
    assert validate_on(bundle, [name()], QUICK).verdict == "pass"
    model = server.home / ssh.ROOT / "bundles" / bundle.manifest_sha256 / "unet/model.onnx"
    with model.open("ab") as stream:
        stream.write(b"x")
    report = validate_on(bundle, [name()], QUICK)
    assert report.verdict == "not_run"
    assert "its copies, which are removed; run it again" in report.summary
    assert validate_on(bundle, [name()], QUICK).verdict == "pass"


@needs_sshd
def test_a_computer_is_cleaned_when_asked(bundle: Bundle, server: Server) -> None:
    validate_on(bundle, [name()], QUICK)
    assert (server.home / ssh.ROOT).is_dir()
    assert "holds no bundles" in clean(name())
    assert not (server.home / ssh.ROOT).exists()


@needs_sshd
def test_a_computer_without_python_tells_what_to_install(bundle: Bundle, server: Server) -> None:
    for python, why in (("/nowhere/python3", "lacks something"), ("/bin/false", "lacks something")):
        obstacle = find(name(python)).obstacle()
        assert obstacle is not None
        assert why in obstacle
        assert "pip install numpy" in obstacle


@needs_sshd
def test_a_computer_that_cannot_be_reached_is_not_run(bundle: Bundle, server: Server) -> None:
    server.stop()
    report = validate_on(bundle, [name()], QUICK)
    assert report.verdict == "not_run"
    assert "board cannot be reached" in report.summary


@needs_sshd
def test_a_full_disk_is_told(bundle: Bundle, server: Server, tmp_path: Path) -> None:
    (server.home / ".cache").mkdir()
    (server.home / ssh.ROOT).write_text("a file where the folder should be")
    device = find(name())
    make_job(bundle, tmp_path / "job", "onnxruntime")
    troubles = device.run(Work(bundle, tmp_path / "job", tmp_path / "result"))
    assert {why.status for why in troubles.values()} == {"not_run"}
    assert all("could not be sent" in why.reason for why in troubles.values())


@pytest.mark.parametrize("text", ["", "-oProxyCommand=x", "host,pyton=3", "host,python="])
def test_a_name_that_is_no_computer_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="names no computer"):
        find(f"ssh:{text}")


def test_what_comes_back_is_only_what_was_asked_for(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path in ("unet.json", "../../evil", "/etc/evil", "other.json"):
            entry = tarfile.TarInfo(path)
            entry.size = 2
            archive.addfile(entry, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("unet.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found = transfers.unpacked(stream.getvalue(), {"unet.json", "unet.safetensors"})
    assert found == {"unet.json": b"{}"}
    with pytest.raises(transfers.LostError, match="cut short"):
        transfers.unpacked(stream.getvalue()[:700], {"unet.json"})
