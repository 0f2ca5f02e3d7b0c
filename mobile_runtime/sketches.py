"""Sketches: 67 numbers that stand for a value of any size.

A sketch adds up the value's elements, with random signs, in 67 groups (Charikar, Chen and
Farach-Colton, "Finding frequent items in data streams", 2002). It is linear, and keeps squared
lengths on average, so that the SNR of two sketches is that of the whole values, give or take a few
decibels; every element has a part in it, so that one NaN shows.

The groups take turns along the value. Their number is a prime, so that it divides no width of a
model: else each channel of (1, tokens, channels) would be of one group, where an error that is the
same at each token, as a wrong bias is, could cancel.
"""

import math

import numpy as np

SKETCH_SIZE = 67
SKETCH_KEY = 0x7A95  # of Philox, whose bits give the signs
HIGHEST_DB = 200.0
"""Told of values that are equal."""

_signs = np.empty(0, np.int8)


def sketch(value: np.ndarray) -> np.ndarray:
    """67 numbers (float32) that stand for a value of any shape."""
    flat = np.asarray(value).reshape(-1)
    rows = -(-flat.size // SKETCH_SIZE)
    padded = np.zeros(rows * SKETCH_SIZE, np.float64)
    padded[: flat.size] = flat
    padded *= _first_signs(padded.size)
    # A value that is not finite makes its group not finite, and nobody needs to hear of it here.
    with np.errstate(invalid="ignore", over="ignore"):
        total: np.ndarray = padded.reshape(rows, SKETCH_SIZE).sum(0).astype(np.float32)
    return total


def _first_signs(count: int) -> np.ndarray:
    """+1 and -1: the first so many of an endless list; Philox's stream is the same everywhere."""
    global _signs
    if _signs.size < count:
        words = np.random.Philox(key=SKETCH_KEY).random_raw(-(-count // 64))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
        _signs = 1 - 2 * bits.astype(np.int8)
    return _signs[:count]


def sketch_snr_db(reference: np.ndarray, given: np.ndarray) -> float:
    """The SNR of two sketches in dB, at most HIGHEST_DB; NaN where one is not finite."""
    if not (np.isfinite(reference).all() and np.isfinite(given).all()):
        return math.nan
    wanted, error = reference.astype(np.float64), given.astype(np.float64) - reference
    signal, noise = float(wanted @ wanted), float(error @ error)
    if noise == 0:
        return HIGHEST_DB
    return min(10 * math.log10(signal / noise), HIGHEST_DB) if signal else -HIGHEST_DB
