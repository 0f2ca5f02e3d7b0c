"""The emulated Arm processor: what it takes is fetched whole, and it computes as this one does."""

import hashlib
import io
import json
import lzma
import sys
import tarfile
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobile_runtime.__main__ import main
from mobile_runtime.devices import arm64
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.on_devices import Asked, validate_on
from tests.bundles import make_bundle

OBSTACLE = arm64.arm64().obstacle()


def deb(**files: bytes) -> bytes:
    """A Debian package: an ar archive of an odd-sized note and a tar archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./usr/bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    package = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n."), ("data.tar.xz", stream.getvalue())):
        package += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    return package


class Mirror:
    """Debian's servers, small; `served` can be damaged."""

    def __init__(self) -> None:
        self.served = {}
        for suite, architecture, names in (
            (arm64.EMULATOR_SUITE, "amd64", (arm64.EMULATOR,)),
            (arm64.PYTHON_SUITE, "arm64", arm64.PYTHON),
        ):
            text = "Format: none\n\n"
            for name in names:
                package = deb(**{arm64.QEMU if name == arm64.EMULATOR else name: b"x", "more": b""})
                digest = hashlib.sha256(package).hexdigest()
                text += f"Package: {name}\nFilename: pool/{name}.deb\nSHA256: {digest}\n\n"
                self.served[f"{arm64.MIRROR}/pool/{name}.deb"] = package
            url = f"{arm64.MIRROR}/dists/{suite}/main/binary-{architecture}/Packages.xz"
            self.served[url] = lzma.compress(text.encode())

    def fetch(self, url: str) -> bytes:
        if url not in self.served:
            raise urllib.error.URLError(f"no {url}")
        return self.served[url]


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arm64.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    mirror = Mirror()
    monkeypatch.setattr(arm64, "_fetch", mirror.fetch)
    monkeypatch.setattr(arm64, "_wheels", lambda to: to.mkdir())
    return mirror


def test_it_is_set_up_by_one_command_and_once(mirror: Mirror, capsys: Any) -> None:
    device = arm64.arm64()
    assert "devices --setup arm64" in str(device.obstacle())
    assert run_cli(main, ["devices", "--setup", "arm64"]) == 0
    assert device.obstacle() is None
    assert Path(device.python[0]).is_file()
    assert not Path(device.python[0]).with_name("more").exists()
    assert (arm64.folder() / "root/usr/bin/python3.11-minimal").is_file()
    mirror.served.clear()
    assert run_cli(main, ["devices", "--setup", "arm64"]) == 0
    assert capsys.readouterr().out.count("arm64 is set up in") == 2


@pytest.mark.parametrize("versions", [{"numpy": "1.0.0"}, {}, None])
def test_wheels_of_other_versions_are_told_and_fetched_anew(
    versions: dict[str, str] | None, mirror: Mirror, capsys: Any
) -> None:
    arm64.set_up(lambda text: None)
    record = arm64.folder() / arm64.DONE
    kept = json.loads(record.read_text())
    held = None if versions is None else kept["wheels"] | versions if versions else {}
    record.write_text(json.dumps({**kept, "wheels": held}))
    told = str(arm64.arm64().obstacle())
    assert told.startswith("set up with ")
    assert "devices --setup arm64" in told
    assert run_cli(main, ["devices", "--setup", "arm64"]) == 0
    assert json.loads(record.read_text()) == kept
    assert arm64.arm64().obstacle() is None


@pytest.mark.parametrize(
    ("what", "damage", "told"),
    [
        ("pool/libffi8.deb", lambda data: data + b"!", "another hash"),
        ("pool/libffi8.deb", None, "cannot be set up"),
        ("binary-arm64/Packages.xz", lambda data: b"garbage", "cannot be set up"),
        ("binary-arm64/Packages.xz", lambda data: lzma.compress(b""), "has no package libc6"),
    ],
)
def test_a_bad_download_leaves_nothing(
    what: str, damage: Any, told: str, mirror: Mirror, capsys: Any
) -> None:
    (url,) = (url for url in mirror.served if url.endswith(what))
    data = mirror.served.pop(url)
    if damage is not None:
        mirror.served[url] = damage(data)
    assert run_cli(main, ["devices", "--setup", "arm64"]) == 2
    assert told in capsys.readouterr().err
    assert list(arm64.folder().parent.iterdir()) == []


@pytest.mark.parametrize(
    ("system", "machine", "told"),
    [("darwin", "x86_64", "runs on Linux"), ("linux", "aarch64", "use local")],
)
def test_where_it_cannot_run_that_is_told(
    system: str, machine: str, told: str, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(arm64.platform, "machine", lambda: machine)
    assert told in str(arm64.arm64().obstacle())
    with pytest.raises(UserError, match=told):
        arm64.set_up(lambda text: None)


@pytest.mark.skipif(OBSTACLE is not None, reason=f"arm64: {OBSTACLE}")
def test_the_emulated_processor_passes_a_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    report = validate_on(bundle, ["arm64"], Asked(repeats=2, prompts=1))
    assert report.verdict == "pass"
    (ran,) = report.devices
    assert ran.emulated
    assert ran.environment.machine == "aarch64"
    assert ran.environment.libraries["numpy"] == np.__version__
    assert report.latency == ()  # an emulator's times say nothing
