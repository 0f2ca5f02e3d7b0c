"""An Arm processor without a phone: the Arm builds of Python and ONNX Runtime, emulated.

Arm's own INT8 kernels run so, instruction by instruction; how long they take says nothing. What it
takes is fetched once into a folder of the cache (`python -m mobile_runtime devices --setup arm64`):
the emulator qemu-user from Debian 13 (older ones crash on ONNX Runtime), Python for arm64 from
Debian 12, and wheels for aarch64 of the versions that this Python has. Nothing is installed.
"""

import hashlib
import io
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from mobile_runtime.cache import cache_root
from mobile_runtime.devices.processes import ProcessDevice
from mobile_runtime.errors import UserError

MIRROR = "https://deb.debian.org/debian"
EMULATOR_SUITE, PYTHON_SUITE = "trixie", "bookworm"
EMULATOR, QEMU = "qemu-user", "qemu-aarch64"
PYTHON = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8"),
    *("libbz2-1.0", "liblzma5", "libuuid1", "libcrypt1"),
    *("libpython3.11-minimal", "libpython3.11-stdlib", "python3.11-minimal"),
)
WHEELS = ("numpy", "onnxruntime", "pydantic", "safetensors", "tqdm", "regex")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64")
CPU = "max,sve=off,sme=off"
"""Dot products and int8 matrix products, as phones have them; no vectors of variable length."""
DONE = "done.json"


def folder() -> Path:
    """Where it lies."""
    return cache_root() / "arm64"


class Arm64Device(ProcessDevice):
    """The emulated processor."""

    def obstacle(self) -> str | None:
        """Why it cannot run here, or not yet."""
        if platform.machine() in ("aarch64", "arm64"):
            return "this machine is an Arm one; use local"
        if sys.platform != "linux":
            return f"qemu's user mode runs on Linux, and this is {sys.platform}"
        setup = "python -m mobile_runtime devices --setup arm64"
        if not (folder() / DONE).is_file():
            return f"not set up; run: {setup}"
        if told := _other_versions():
            return f"set up with {told}; run again: {setup}"
        return None


def arm64() -> Arm64Device:
    """The emulated Arm processor; its `obstacle` tells whether it is set up."""
    root = folder() / "root"
    return Arm64Device(
        name="arm64",
        python=(
            str(folder() / "emulator" / "usr" / "bin" / QEMU),
            *("-cpu", CPU, "-L", str(root)),
            str(root / "usr" / "bin" / "python3.11"),
        ),
        environment={
            "PYTHONHOME": str(root / "usr"),
            "PYTHONPATH": str(folder() / "wheels"),
            "QEMU_LD_PREFIX": str(root),
        },
        emulated=True,
    )


def set_up(tell: Callable[[str], None]) -> None:
    """Fetch what it takes, all or nothing. UserError where a download fails."""
    place = folder()
    obstacle = arm64().obstacle()
    if obstacle is None:
        tell(f"arm64 is set up in {place}")
        return
    if "--setup" not in obstacle:
        raise UserError(f"arm64: {obstacle}")
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        host = {"x86_64": "amd64"}.get(platform.machine(), platform.machine())
        for suite, architecture, names, to in (
            (EMULATOR_SUITE, host, (EMULATOR,), partial / "emulator"),
            (PYTHON_SUITE, "arm64", PYTHON, partial / "root"),
        ):
            tell(f"fetch Debian {suite}'s list of packages for {architecture}")
            index = _index(suite, architecture)
            for name in names:
                tell(f"fetch {name} for {architecture}")
                only = QEMU if name == EMULATOR else None
                _unpack(_package(index, name, suite), to, only)
        tell(f"fetch wheels for aarch64: {', '.join(WHEELS)}")
        _wheels(partial / "wheels")
        _link_libraries(partial / "root")
        (partial / DONE).write_text(json.dumps({"cpu": CPU, "wheels": _versions()}) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except (OSError, urllib.error.URLError, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f"arm64 cannot be set up: {error}; try again when it can be") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    tell(f"arm64 is set up in {place}")


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:  # https, see MIRROR
        return bytes(response.read())


def _index(suite: str, architecture: str) -> dict[str, dict[str, str]]:
    """Debian's list of packages: by name, the fields of each."""
    text = lzma.decompress(
        _fetch(f"{MIRROR}/dists/{suite}/main/binary-{architecture}/Packages.xz")
    ).decode()
    found = {}
    for paragraph in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1)
            for line in paragraph.splitlines()
            if ": " in line and not line.startswith(" ")
        )
        if "Package" in fields:
            found[fields["Package"]] = fields
    return found


def _package(index: dict[str, dict[str, str]], name: str, suite: str) -> bytes:
    """A package's file, with the hash that the list tells."""
    if name not in index:
        raise UserError(f"Debian {suite} has no package {name}; it may have a newer one")
    data = _fetch(f"{MIRROR}/{index[name]['Filename']}")
    if hashlib.sha256(data).hexdigest() != index[name]["SHA256"]:
        raise UserError(f"{name} from {MIRROR} has another hash than Debian's list tells")
    return data


def _unpack(package: bytes, to: Path, only: str | None = None) -> None:
    """The files of a Debian package (deb(5): an ar archive that holds a tar archive), or one."""
    for name, content in _members(package):
        if name.startswith("data.tar"):
            to.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                entries = [e for e in archive if only is None or e.name.endswith(f"/{only}")]
                for entry in entries:
                    if entry.name.startswith("/") or ".." in Path(entry.name).parts:
                        raise UserError(f"a Debian package holds {entry.name}; it is damaged")
                # Python before 3.11.4 has no filters.
                safely: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
                archive.extractall(to, entries, **safely)
            return
    raise UserError("a Debian package holds no data.tar; the download is damaged")


def _members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """The files of an ar archive: a header of 60 bytes before each, padded to even offsets."""
    at = len(b"!<arch>\n")
    while at + 60 <= len(archive):
        name = archive[at : at + 16].decode().strip().rstrip("/")
        size = int(archive[at + 48 : at + 58])
        yield name, archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


def _link_libraries(root: Path) -> None:
    """Debian's packages expect /lib to be /usr/lib, which is a link in an installed system."""
    for name in ("lib", "bin"):
        own = root / name
        if own.is_dir() and not own.is_symlink():
            shutil.copytree(own, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(own)
        if not own.exists():
            own.symlink_to(Path("usr") / name)


def _versions() -> dict[str, str]:
    """Of the wheels: this Python's own, so that the two compute with the same versions."""
    versions = {}
    for name in WHEELS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise UserError(f"arm64 is compared with this Python, which has no {name}") from error
    return versions


def _other_versions() -> str:
    """What the emulated Arm has in other versions than this Python, of which it proves nothing."""
    try:
        held = dict(json.loads((folder() / DONE).read_text())["wheels"])
    except (OSError, ValueError, KeyError, TypeError):
        return "versions that are not recorded"
    return ", ".join(
        f"{name} {held.get(name, 'missing')} where this Python has {version}"
        for name, version in _versions().items()
        if held.get(name) != version
    )


def _wheels(to: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(to)]
    command += ["--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"]
    command += [part for name in PLATFORMS for part in ("--platform", name)]
    command += [f"{name}=={version}" for name, version in _versions().items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"pip cannot fetch the wheels for aarch64: {said}")
