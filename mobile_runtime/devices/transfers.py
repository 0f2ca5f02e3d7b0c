"""What devices that are reached by a command have in common: folders as tar streams, both ways."""

import contextlib
import hashlib
import io
import secrets
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SHOWN_LETTERS = 300
STALE_MIN = 60
"""Minutes after which a folder that was half sent is nobody's any more."""


class LostError(Exception):
    """The device does not answer any more, or has no room."""


def said(output: bytes) -> str:
    """The end of what a command said, in one line."""
    return " ".join(output.decode(errors="replace").split())[-SHOWN_LETTERS:] or "it says nothing"


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each file of a folder, by its relative name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


@contextmanager
def sums(files: Iterable[tuple[str, bytes | Path]]) -> Iterator[IO[bytes]]:
    """Files' hashes, as `sha256sum -c` reads them, to be read from the beginning."""
    with tempfile.TemporaryFile() as spool:
        for name, content in files:
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                spool.write(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
        spool.seek(0)
        yield spool


@contextmanager
def packed(files: Iterable[tuple[str, bytes | Path]]) -> Iterator[IO[bytes]]:
    """Files, or their contents, as a tar archive, to be read from its beginning."""
    with tempfile.TemporaryFile() as spool:
        with tarfile.open(fileobj=spool, mode="w") as archive:
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.mode = 0o644
                with contextlib.ExitStack() as stack:
                    stream: IO[bytes]
                    if isinstance(content, Path):
                        entry.size = content.stat().st_size
                        stream = stack.enter_context(content.open("rb"))
                    else:
                        entry.size, stream = len(content), io.BytesIO(content)
                    archive.addfile(entry, stream)
        spool.seek(0)
        yield spool


def unpacking(to: str) -> tuple[str, str]:
    """The shell command that makes a tar stream a folder there, whole or not at all.

    Second: where it lies until it is whole; others may send the same at the same time.
    """
    partial = f"{to}.{secrets.token_hex(4)}.partial"
    stale = f"find {to}.*.partial -maxdepth 0 -mmin +{STALE_MIN} -exec rm -rf {{}} + 2>/dev/null"
    unpack = f"mkdir -p {partial} && tar -xf - -C {partial}"
    place = f"if [ -d {to} ]; then rm -rf {partial}; else mv {partial} {to}; fi"
    return f"{stale}; {unpack} && {place}", partial


def unpacked(data: bytes, wanted: set[str]) -> dict[str, bytes]:
    """The regular files of a tar archive with these very names; all else is left."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for entry in archive:
                stream = archive.extractfile(entry) if entry.isfile() else None
                if entry.name in wanted and stream is not None:
                    found[entry.name] = stream.read()
    except (tarfile.TarError, EOFError) as error:
        raise LostError(f"the result came back cut short: {error}") from error
    return found


def keep(found: Mapping[str, bytes], folder: Path) -> None:
    """Write what came back, each file whole; the records last, which say that a task is done."""
    for name in sorted(found, key=lambda name: name.endswith(".json")):
        partial = folder / f".{name}.partial"
        partial.write_bytes(found[name])
        partial.replace(folder / name)
