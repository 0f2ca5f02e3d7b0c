"""Paths as users write them."""

from pathlib import Path

from mobile_runtime.errors import UserError


def user_path(text: str) -> Path:
    """The path that a text names, with ~ for a home folder; UserError where there is none."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder; write the path in full") from None
    except OSError as error:
        told = text if len(text) < 100 else f"{text[:100]}..."
        raise UserError(f"{told} cannot be looked at ({error.strerror}); name another") from None
    return path
