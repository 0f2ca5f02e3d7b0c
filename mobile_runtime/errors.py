"""The errors that people see, and the exit codes that scripts see.

0 done, 1 a gate failed, 2 the request is wrong or a file cannot be used, 70 a bug in this project,
130 interrupted, 141 nobody reads the output any more, 143 terminated. A `PocketError` is one
sentence that says what is wrong, where, and what to do; it is printed without a traceback, and so
is what the system says about a file. Anything else is a bug and keeps its traceback.
"""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

BUG = 70  # EX_SOFTWARE of sysexits.h


class PocketError(Exception):
    """Base of the errors that are told as one sentence."""

    exit_code = 2


class UserError(PocketError):
    """The request is wrong: a bad recipe, an unknown name, a missing backend, no network."""


class BundleError(UserError):
    """A bundle is damaged, incomplete, of another schema, or points outside itself."""


class GateError(PocketError):
    """Everything ran, and a figure missed its gate."""

    exit_code = 1


def choices(what: str, given: str, known: list[str]) -> UserError:
    """The error for an unknown name: it lists the names that exist."""
    return UserError(f"unknown {what} {given!r}; choose one of: {', '.join(sorted(known))}")


def missing_backend(library: str, extra: str, needed_for: str) -> UserError:
    """The error for an optional library that is not installed."""
    return UserError(
        f"{needed_for} needs {library}, which is not installed; "
        f"install it with: pip install 'pocket-diffusion[{extra}]'"
    )


def run_cli(main: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Run a command; turn the errors of a user's mistake into one sentence and an exit code."""
    try:
        with _cleaning_up_when_terminated():
            code = main(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()  # here, where a reader that is gone can still be told from a bug
            return code
    except PocketError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # `| head` has read enough. The interpreter flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted; nothing half made was left behind", file=sys.stderr)
        return 130
    except Exception as error:
        sentence = _about_a_file(error) if isinstance(error, OSError) else None
        if sentence is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(
            "this is a bug in pocket-diffusion; please report it with the lines above",
            file=sys.stderr,
        )
        return BUG


def _about_a_file(error: OSError) -> str | None:
    """What the system says about a file and what to do; None if it names no file."""
    # Of a rename, the target is the one that the user knows.
    name = error.filename2 or error.filename
    if error.errno == errno.ENOSPC:
        where = f" while writing {name}" if name else ""
        return f"the disk is full{where}; free space and run again"
    if not isinstance(name, str | bytes | os.PathLike):
        return None
    return (
        f"{os.fsdecode(name)}: {error.strerror}; "
        "check the path and its permissions, or choose another"
    )


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that unfinished files are removed, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # None: a handler that was not set from Python, which cannot be set from here either.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
