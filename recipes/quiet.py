"""Keeps the chatter of the libraries off a user's screen; errors still come through."""

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

from mobile_runtime.errors import missing_backend

# What these say on import is about parts of theirs that nobody uses here (CUDA kernels, other
# packages' versions), and a user would take it for trouble.
IMPORT_CHATTER = ("torchao", "torch.utils._pytree", "transformers", "coremltools")


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hold back Python warnings, and what the named loggers say below ERROR."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def import_torch(extra: str, needed_for: str) -> None:
    """Import torch and what builds on it, without their chatter; UserError where one is missing."""
    # diffusers sets its own level on import, to this.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with quiet(*IMPORT_CHATTER):
        for library in ("torch", "transformers", "diffusers"):
            try:
                importlib.import_module(library)
            except ImportError as error:
                if error.name != library:
                    raise  # it is installed, and broken
                raise missing_backend(library, extra, needed_for) from error
        # Loaded at first use, past `quiet`, if not here.
        importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")


@contextlib.contextmanager
def bars_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell the title of each tqdm bar that would be drawn on stderr, instead of drawing it."""
    with contextlib.redirect_stderr(_Bars(sys.stderr, tell)):
        yield


class _Bars(io.TextIOBase):
    """Takes stderr's place: swallows tqdm's bars, and passes on whatever else is written."""

    def __init__(self, stream: TextIO, tell: Callable[[str], None]) -> None:
        self._stream = stream
        self._tell = tell
        self._title = ""

    def write(self, text: str) -> int:
        if "%|" in text:
            title = text.split(":")[0].strip()
            if title != self._title:
                self._title = title
                self._tell(title)
        elif text.strip():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
