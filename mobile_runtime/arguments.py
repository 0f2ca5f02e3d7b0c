"""What several commands take, and what they ask of it."""

import argparse
import json
from pathlib import Path
from typing import Any

from mobile_runtime.errors import UserError
from mobile_runtime.report import check_writable, write_atomically


def count(text: str) -> int:
    """A whole number, zero or more."""
    number = _whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is too few; it has to be 0 or more")
    return number


def positive(text: str) -> int:
    """A whole number above zero."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError("take at least one")
    return number


def _whole(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def check_new_file(path: Path, option: str, force: bool) -> None:
    """Raise UserError unless a file can be written there that is new, or may be replaced."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file that can be replaced; choose another {option}")
    if path.exists() and not force:
        raise UserError(f"{path} already exists; choose another {option}, or add --force")
    check_writable(path.absolute().parent, option)


def write_json(path: Path, data: Any) -> None:
    """Write a file that was asked for, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.resolve(), json.dumps(data, indent=1) + "\n")
