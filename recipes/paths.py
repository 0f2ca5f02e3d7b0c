"""Paths as users write them."""

from pathlib import Path

from mobile_runtime.errors import UserError


def user_path(text: str) -> Path:
    """The path that a text names, with ~ for a home folder; UserError where there is none."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder; write the path in full") from None
