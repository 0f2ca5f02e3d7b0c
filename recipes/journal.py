"""Figures that take long to measure, kept one by one, so that a run that was killed goes on."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes.work import default_cache

Figure = Callable[[str, Callable[[], Any]], Any]
"""Of a key, and how to measure it where it is not known yet: what it is, as JSON holds it."""


@contextmanager
def journal(name: str, digest: str) -> Iterator[Figure]:
    """A file of figures in the cache, removed when the block has come to its end.

    name: what they are. digest: of all that they depend on, but for their keys. Where the cache
    takes no file, everything is measured.
    """
    path = default_cache() / f"{name}-{digest[:16]}.jsonl"
    known = _read(path)
    with contextlib.ExitStack() as stack:
        stream = None
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(path.open("a", encoding="utf-8"))

        def figure(key: str, measure: Callable[[], Any]) -> Any:
            if key not in known:
                known[key] = measure()
                if stream is not None:
                    stream.write(json.dumps([key, known[key]]) + "\n")
                    stream.flush()
            return known[key]

        yield figure
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The whole lines of a journal; the last one may have been cut."""
    known = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError):
                key, value = json.loads(line)
                known[key] = value
    return known


def digest_of(*parts: str | nn.Module | Iterable[Tensor]) -> str:
    """SHA-256 of texts, tensors, and modules' tensors."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        tensors: Iterable[Tensor] = (
            part.state_dict().values() if isinstance(part, nn.Module) else part
        )
        for tensor in tensors:
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
