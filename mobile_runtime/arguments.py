"""Types of command-line arguments that several commands take."""

import argparse


def count(text: str) -> int:
    """A whole number, zero or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """A whole number above zero."""
    if count(text) == 0:
        raise argparse.ArgumentTypeError("take at least one")
    return int(text)
