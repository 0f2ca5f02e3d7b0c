"""The errors that people see, and the exit codes that scripts see.

0 done, 1 a gate failed, 2 the request is wrong. A `PocketError` is one sentence that says what is
wrong, where, and what to do; it is printed without a traceback. Anything else is a bug in this
project and keeps its traceback.
"""

import errno
import sys
from collections.abc import Callable


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
        return main(sys.argv[1:] if argv is None else argv)
    except PocketError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f" while writing {error.filename}" if error.filename else ""
            print(f"error: the disk is full{where}; free space and run again", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("interrupted; nothing half made was left behind", file=sys.stderr)
        return 130
