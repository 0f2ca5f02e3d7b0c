"""Bundles on disk: open and verify one; write one whole or not at all.

Golden tensors are safetensors files. For a component, case k of n holds `k/in/NAME` (what to
feed), `k/out/NAME` (same function: the torch module after the stages) and `k/source/NAME` (the
fp32 pipeline before the stages). For the pipeline, case k holds `k/noise` (1, C, h, w; unit
variance), `k/fresh_noise` (steps, C, h, w; only where a schedule row has d != 0), `k/trajectory`
(steps + 1, C, h, w; the last row is what the decoder gets before scaling), `k/picture` and
`k/source_picture` (H, W, 3; uint8). What is kept of the values inside, of every timestep and of
every token is told in taps.py and vocabulary.py.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeGuard, get_args

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mobile_runtime.errors import BundleError, PocketError, UserError, choices
from mobile_runtime.manifest import SCHEMA_VERSION, ComponentEntry, FileEntry, Manifest, Target

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

    def quantized_layers(self, component: str) -> list[str]:
        """The layers of a component whose activations are quantized."""
        return [
            plan.layer
            for plan in self.manifest.quantization
            if plan.activations != "none" and plan.layer.split(".")[0] == component
        ]

    def file(self, relative: str) -> Path:
        """The path of a file of the bundle."""
        return self.path / relative

    def files(self) -> list[tuple[str, Path]]:
        """All that the bundle is, by relative path; other files that lie in the folder are not."""
        names = [MANIFEST, *(entry.path for entry in self.manifest.files)]
        return [(name, self.file(name)) for name in names]

    def golden(self, relative: str) -> dict[str, np.ndarray]:
        """The tensors of one golden file."""
        try:
            return load_file(self.file(relative))
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            # The last two: a type of tensor that numpy does not have.
            raise BundleError(f"{self.file(relative)} cannot be read: {error}") from error


def _parse(raw: bytes, where: Path) -> Manifest:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        # Also text that is no UTF-8, numbers of thousands of digits, and lists too deep to read.
        raise BundleError(f"{where} is not valid JSON: {error}") from error
    invalid = f"{where} does not hold a valid manifest: "
    if isinstance(data, dict):
        version = data.get("schema_version")
        if not _is_int(version):
            # The type's default is for writers; a reader does not guess.
            raise BundleError(f"{invalid}schema_version is {version!r}, not a whole number")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema {version}, and this reader knows up to {SCHEMA_VERSION}; "
                "update pocket-diffusion"
            )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        faults = [
            ": ".join(
                part
                for part in (
                    ".".join(str(part) for part in fault["loc"]),
                    fault["msg"].removeprefix("Value error, "),
                )
                if part
            )
            for fault in error.errors()[:5]
        ]
        raise BundleError(invalid + "; ".join(faults)) from error


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _named_paths(manifest: Manifest) -> list[str]:
    paths = [component.path for component in manifest.components]
    paths += [manifest.tokenizer.vocab, manifest.tokenizer.merges, manifest.golden.pipeline]
    golden = manifest.golden
    paths += filter(None, (golden.vocabulary, golden.timesteps))
    paths += [*golden.components.values(), *golden.taps.values(), *golden.layers.values()]
    return paths


def _check_file(root: Path, entry: FileEntry, verify: bool) -> None:
    path = root / entry.path
    # Asked first: links that lead in a circle are no file, and cannot be resolved.
    if not path.is_file():
        raise BundleError(f"{path} is missing; make the bundle again")
    # A link inside the folder may lead out of it.
    if not path.resolve().is_relative_to(root):
        raise BundleError(f"{path}: the path {entry.path!r} points outside the bundle")
    size = path.stat().st_size
    if size != entry.bytes:
        raise BundleError(f"{path} has {size} bytes, not {entry.bytes}; make the bundle again")
    if verify and sha256(path) != entry.sha256:
        raise BundleError(f"{path} has changed since it was made (SHA-256); make the bundle again")


class BundleWriter:
    """Writes a bundle beside its final place and renames it there when it is whole.

    Use as a context manager: put files under `.path`, then call `commit`. Leaving without a
    commit, by an error or a kill signal that Python sees, removes the temporary folder; what a
    hard kill leaves is a hidden `.NAME.HOST.PID.*.partial` folder, which the next writer on that
    host removes, and `.NAME.HOST.PID.*.old.partial`, the old bundle on its way out, which it puts
    back.
    """

    def __init__(self, output: Path, force: bool = False) -> None:
        self.output = output
        self.force = force
        self.path = output  # set on entry

    @staticmethod
    def check_free(output: Path, force: bool) -> None:
        """Refuse an output that exists, or that cannot be written, before any heavy work.

        force: an empty folder may be replaced, and so may a bundle, damaged or of another schema,
        in which lies nothing that was not made with it. Leaves no trace on the disk.
        """
        if os.path.lexists(output):
            fault = _why_not_replaceable(output)
            if fault is not None:
                raise UserError(
                    f"{output} already exists and is not a bundle, so --force will not replace it: "
                    f"{fault}; choose another --output"
                )
            if not force:
                raise UserError(
                    f"{output} already exists; choose another --output, or replace it with --force"
                )
        above = next(path for path in output.absolute().parents if os.path.lexists(path))
        with _refusing(above):
            # Tried, because for root and on some file systems the permissions do not tell.
            _make_partial(above, output.name).rmdir()

    def __enter__(self) -> "BundleWriter":
        parent = self.output.absolute().parent
        with _refusing(parent):
            _clean_up_after_the_dead(self.output)
        self.check_free(self.output, self.force)
        with _refusing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            self.path = _make_partial(parent, self.output.name)
        return self

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for temporary files, which is also where `tempfile` puts them meanwhile.

        It lies inside the unfinished bundle, so that what a library leaves there when it is killed
        goes with the rest. It is gone when the block ends, so it is never part of the bundle.
        """
        folder = Path(tempfile.mkdtemp(prefix=".scratch.", dir=self.path))
        before = tempfile.tempdir
        tempfile.tempdir = str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before
            shutil.rmtree(folder, ignore_errors=True)

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
        open_to_others(self.path)
        # Hours may have passed, and something else may lie there now.
        self.check_free(self.output, self.force)
        retired = None
        try:
            if self.force and self.output.exists():
                retired = Path(f"{self.path}".removesuffix(".partial") + ".old.partial")
                self.output.rename(retired)
            self.path.rename(self.output)
        except BaseException as error:
            if retired is not None and retired.exists() and not self.output.exists():
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
        full = self._full_disk(error) if isinstance(error, Exception) else None
        if self.path != self.output and self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        if full is not None:
            raise UserError(
                f"the disk of {full} is full; free space, or choose another --output, and run again"
            ) from error

    def _full_disk(self, error: Exception) -> str | None:
        """Whose disk is full, as far as it can be told; None if the error is another one."""
        if isinstance(error, PocketError):
            return None
        parent = self.output.absolute().parent
        no_space = "no space left" in str(error).lower()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            no_space = True
            if error.filename is not None:
                named = Path(os.fsdecode(error.filename)).absolute()
                inside = named.is_relative_to(self.path.absolute())
                return str(parent if inside else named)
        if parent.is_dir() and shutil.disk_usage(parent).free < LITTLE_SPACE_BYTES:
            return str(parent)
        if no_space:
            return f"{parent}, or that of {tempfile.gettempdir()},"
        return None


def open_to_others(folder: Path) -> None:
    """Give a folder, and all in it, the permissions that this process gives to new files.

    Temporary folders and the files of safetensors and coremltools are their owner's alone.
    """
    umask = os.umask(0)  # it can be read only by setting it
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn what the system says against writing to a folder into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another --output"
        ) from error


def _make_partial(parent: Path, name: str) -> Path:
    """A new hidden folder for an unfinished bundle; its name says who writes it."""
    prefix = f".{name}.{_host()}.{os.getpid()}."
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))


def _host() -> str:
    """This machine's name as a part of a file's name; a process number means nothing elsewhere."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


def _why_not_replaceable(output: Path) -> str | None:
    """Why what lies at an output may not be replaced; None for a bundle or an empty folder."""
    if output.is_symlink():
        return "it is a link"
    if not output.is_dir():
        return "it is no folder"
    made = _made_files(output)
    foreign = next((name for name in _files_in(output) if name not in made), None)
    return f"it holds {foreign}, which no conversion made" if foreign else None


def _files_in(folder: Path) -> Iterator[str]:
    """The paths of all that is no folder, one by one: the folder may be somebody's whole disk."""
    for above, folders, files in os.walk(folder):
        folders.sort()
        links = [name for name in folders if Path(above, name).is_symlink()]
        for name in sorted(files + links):
            yield Path(above, name).relative_to(folder).as_posix()


def _made_files(folder: Path) -> set[str]:
    """The files that were made as a bundle, by its manifest of whatever schema; empty without."""
    path = folder / MANIFEST
    if not path.is_file():
        return set()
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return set()
    if not (
        isinstance(data, dict)
        and _is_int(data.get("schema_version"))
        and data.get("target") in get_args(Target)
        and isinstance(data.get("files"), list)
    ):
        return set()
    paths = [entry.get("path") for entry in data["files"] if isinstance(entry, dict)]
    # The last is what a Mac leaves in every folder that somebody looks at.
    return {path for path in paths if isinstance(path, str)} | {MANIFEST, *REPORTS, ".DS_Store"}


def _clean_up_after_the_dead(output: Path) -> None:
    """Remove what killed writers of this output left; put back a bundle that they had moved."""
    parent = output.absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return
    name = f"{re.escape(output.name)}\\.{re.escape(_host())}"
    ours = re.compile(rf"\.{name}\.(\d+)\.[^.]+(\.old)?\.partial")
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
