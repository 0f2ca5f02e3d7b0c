"""Bundles on disk: open and verify one; write one whole or not at all.

Golden tensors are safetensors files. For a component, case k of n holds `k/in/NAME` (what to
feed), `k/out/NAME` (same function: the torch module after the stages) and `k/source/NAME` (the
fp32 pipeline before the stages). For the pipeline, case k holds `k/noise` (1, C, h, w; unit
variance), `k/fresh_noise` (steps, C, h, w; only where a schedule row has d != 0), `k/trajectory`
(steps + 1, C, h, w; the last row is what the decoder gets before scaling), `k/picture` and
`k/source_picture` (H, W, 3; uint8).
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mobile_runtime.errors import BundleError, PocketError, UserError, choices
from mobile_runtime.manifest import SCHEMA_VERSION, ComponentEntry, FileEntry, Manifest

MANIFEST = "manifest.json"
# Written after the bundle is whole, so they are not among its hashed files.
REPORTS = ("report.json", "report.html")
# An error with less free space than this is taken for a full disk.
LITTLE_SPACE_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Bundle:
    """An opened, verified bundle."""

    def __init__(self, path: Path, manifest: Manifest, manifest_sha256: str) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> "Bundle":
        """Open a bundle; check its schema, that every path stays inside, and every hash.

        verify: False skips reading every file for its hash (sizes are still checked).
        Raises BundleError, whose sentence names the file and what is wrong with it.
        """
        folder = Path(path)
        manifest_path = folder / MANIFEST
        if not manifest_path.is_file():
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}; "
                "make one with: python -m converters.onnx --recipe pocket_int8"
            )
        raw = manifest_path.read_bytes()
        manifest = _parse(raw, manifest_path)
        root = folder.resolve()
        listed = {entry.path for entry in manifest.files}
        for entry in manifest.files:
            _check_file(root, entry, verify)
        for needed in _named_paths(manifest):
            if needed not in listed and not any(p.startswith(needed + "/") for p in listed):
                raise BundleError(f"{manifest_path}: {needed} is named but not among its files")
        return cls(folder, manifest, hashlib.sha256(raw).hexdigest())

    def component(self, name: str) -> ComponentEntry:
        """The entry of one component; an unknown one is an error that lists what there is."""
        entry = self.manifest.component(name)
        if entry is None:
            raise choices("component", name, [c.name for c in self.manifest.components])
        return entry

    def file(self, relative: str) -> Path:
        """The path of a file of the bundle."""
        return self.path / relative

    def golden(self, relative: str) -> dict[str, np.ndarray]:
        """The tensors of one golden file."""
        try:
            return load_file(self.file(relative))
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{self.file(relative)} cannot be read: {error}") from error


def _parse(raw: bytes, where: Path) -> Manifest:
    try:
        data = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{where} is not valid JSON: {error}") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema {version}, and this reader knows up to {SCHEMA_VERSION}; "
            "update pocket-diffusion"
        )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
            for fault in error.errors()[:5]
        )
        raise BundleError(f"{where} does not hold a valid manifest: {faults}") from error


def _named_paths(manifest: Manifest) -> list[str]:
    paths = [component.path for component in manifest.components]
    paths += [manifest.tokenizer.vocab, manifest.tokenizer.merges, manifest.golden.pipeline]
    return paths + list(manifest.golden.components.values())


def _check_file(root: Path, entry: FileEntry, verify: bool) -> None:
    path = root / entry.path
    # A link inside the folder may lead out of it.
    if not path.resolve().is_relative_to(root):
        raise BundleError(f"{path}: the path {entry.path!r} points outside the bundle")
    if not path.is_file():
        raise BundleError(f"{path} is missing; make the bundle again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(f"{path} has {size} bytes, not {entry.bytes}; make the bundle again")
    if verify and sha256(path) != entry.sha256:
        raise BundleError(f"{path} has changed since it was made (SHA-256); make the bundle again")


class BundleWriter:
    """Writes a bundle beside its final place and renames it there when it is whole.

    Use as a context manager: put files under `.path`, then call `commit`. Leaving without a
    commit, by an error or a kill signal that Python sees, removes the temporary folder; what a
    hard kill leaves is a hidden `.NAME.PID.*.partial` folder, which the next writer removes, and
    `.NAME.PID.*.old.partial`, the old bundle on its way out, which it puts back.
    """

    def __init__(self, output: Path, force: bool = False) -> None:
        self.output = output
        self.force = force
        self.path = output  # set on entry

    @staticmethod
    def check_free(output: Path, force: bool) -> None:
        """Refuse an output that exists (or cannot be replaced safely) before any heavy work."""
        _clean_up_after_the_dead(output)
        if not output.exists() and not output.is_symlink():
            return
        if not force:
            raise UserError(
                f"{output} already exists; choose another --output, or replace it with --force"
            )
        is_empty = output.is_dir() and not any(output.iterdir())
        if output.is_symlink() or not ((output / MANIFEST).is_file() or is_empty):
            raise UserError(
                f"{output} is not a bundle, so --force will not replace it; choose another --output"
            )

    def __enter__(self) -> "BundleWriter":
        self.check_free(self.output, self.force)
        parent = self.output.absolute().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(
                tempfile.mkdtemp(
                    prefix=f".{self.output.name}.{os.getpid()}.", suffix=".partial", dir=parent
                )
            )
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"cannot write to {parent}: {error.strerror}") from error
        self.path.chmod(0o755)
        return self

    def hash_files(self) -> tuple[FileEntry, ...]:
        """Every file now under `.path`, with its size and hash, sorted by path."""
        return tuple(
            FileEntry(
                path=path.relative_to(self.path).as_posix(),
                bytes=path.stat().st_size,
                sha256=sha256(path),
            )
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        )

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest, move the folder into place, and open what was written."""
        text = manifest.model_dump_json(indent=1, exclude_none=False) + "\n"
        (self.path / MANIFEST).write_text(text, encoding="utf-8")
        retired = None
        if self.force and self.output.exists():
            retired = Path(f"{self.path}".removesuffix(".partial") + ".old.partial")
            self.output.rename(retired)
        try:
            self.path.rename(self.output)
        except BaseException as error:
            if retired is not None:
                retired.rename(self.output)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                # Another writer was first; replacing its bundle would need --force.
                self.check_free(self.output, force=False)
            raise
        if retired is not None:
            shutil.rmtree(retired)
        return Bundle.open(self.output)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Asked before the files go: a library tells a full disk in an error of its own kind.
        full = error is not None and self._disk_is_full(error)
        if self.path != self.output and self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        if full:
            raise UserError(
                f"the disk of {self.output.absolute().parent} is full; free space, or choose "
                "another --output, and run again"
            ) from error

    def _disk_is_full(self, error: BaseException) -> bool:
        if isinstance(error, PocketError) or not isinstance(error, Exception):
            return False
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        parent = self.output.absolute().parent
        little = parent.is_dir() and shutil.disk_usage(parent).free < LITTLE_SPACE_BYTES
        return little or "no space left" in str(error).lower()


def _clean_up_after_the_dead(output: Path) -> None:
    """Remove what killed writers of this output left; put back a bundle that they had moved."""
    parent = output.absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return
    ours = re.compile(rf"\.{re.escape(output.name)}\.(\d+)\.[^.]+(\.old)?\.partial")
    for leftover in list(parent.iterdir()):
        match = ours.fullmatch(leftover.name)
        if match is None or _alive(int(match[1])):
            continue
        if match[2] and not output.exists():
            leftover.rename(output)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
