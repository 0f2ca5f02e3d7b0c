"""Palettes: a weight as indices into a small table of float16 values.

The table is found by k-means over the weight's values (Deep Compression, arXiv 1510.00149). A
float16 has 65536 patterns, so k-means works on how often each of them comes, however large the
weight is.

A palette is Core ML's alone, so it is made after the stages: the float layers of the torch pipeline
get the weights that their palettes stand for, and what is then exported is an ordinary float
module. coreml_palettes.py stores its weights as indices and tables, without loss. So the
conversion's error and the palettes' error stay two numbers, as with INT8.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

FLOAT16_MAX = 65504.0
ROUNDS = 200
"""Of Lloyd's iteration, at most; it ends by itself where nothing changes any more."""


@dataclass(frozen=True)
class Palette:
    """The tables of one weight, and the weight that they make, by its digest.

    tables: (groups, 2^bits) float16, each ascending; a shorter one is filled up with its last
    value. Each table is for an equal share of the weight's axis 0, in order.
    """

    tables: np.ndarray
    digest: bytes

    @property
    def bits(self) -> int:
        """Of an index."""
        return int(self.tables.shape[1]).bit_length() - 1

    @property
    def groups(self) -> int:
        """How many tables the weight has."""
        return len(self.tables)

    def indices(self, weight: np.ndarray) -> np.ndarray:
        """The uint8 indices, of the weight's shape, of a weight that this palette made."""
        rows = weight.reshape(self.groups, -1)
        found = [
            np.searchsorted(table[:-1], row.astype(table.dtype))
            for table, row in zip(self.tables, rows, strict=True)
        ]
        indices = np.stack(found).astype(np.uint8).reshape(weight.shape)
        if not np.array_equal(looked_up(indices, self.tables), weight):
            raise ValueError("the weight holds values that are not in its palette")
        return indices


def looked_up(indices: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The float32 weight of the indices' shape; tables: (groups, entries)."""
    rows = indices.reshape(len(tables), -1)
    found = [table[row] for table, row in zip(tables.astype(np.float32), rows, strict=True)]
    return np.stack(found).reshape(indices.shape)


def digest(weight: np.ndarray) -> bytes:
    """What tells a weight, in whatever float type it is held, from every other."""
    exact = np.ascontiguousarray(weight, np.float32) + np.float32(0)  # -0 and 0 are one value
    return hashlib.sha256(repr(exact.shape).encode() + exact.data).digest()


def palettized(weight: np.ndarray, bits: int, groups: int = 1) -> tuple[np.ndarray, Palette]:
    """The weight with each value replaced by the nearest of its palette, and the palette.

    weight: (channels, ...) floats within float16; `groups` divides the channels. Returns the weight
    in float32.
    """
    rows = weight.astype(np.float16).reshape(groups, -1) + np.float16(0)  # -0 becomes 0
    tables = np.empty((groups, 2**bits), np.float16)
    made = np.empty(rows.shape, np.float32)
    for row, table, out in zip(rows, tables, made, strict=True):
        patterns = row.view(np.uint16)
        counts = np.bincount(patterns, minlength=2**16)
        present = np.flatnonzero(counts).astype(np.uint16)
        values = present.view(np.float16).astype(np.float64)
        order = np.argsort(values)
        centers = kmeans(values[order], counts[present][order], 2**bits)
        # Two may round to one, and a small one to -0.
        entries = np.unique(centers.astype(np.float16) + np.float16(0))
        table[: len(entries)], table[len(entries) :] = entries, entries[-1]
        by_pattern = np.empty(2**16, np.float32)
        by_pattern[present] = entries[_nearest(values, entries.astype(np.float64))]
        out[:] = by_pattern[patterns]
    weight = made.reshape(weight.shape)
    return weight, Palette(tables, digest(weight))


def kmeans(values: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """At most k ascending centers with little squared distance from each value to its nearest.

    values: (n,) float64, ascending, no value twice. counts: (n,) how often each comes. Lloyd's
    iteration from where many levels are best spaced: as the cube root of the values' density
    (Panter and Dite, 1951).
    """
    if len(values) <= k:
        return values
    gaps = np.gradient(values)
    spread = np.cumsum(np.cbrt(counts / gaps) * gaps)
    starts = np.searchsorted(spread, (np.arange(k) + 0.5) / k * spread[-1])
    centers = _filled_up(values, counts, values[np.unique(starts)], k)
    # The sums of a run of values are differences of these.
    number = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    total = np.concatenate([[0.0], np.cumsum(counts * values)])
    before = None
    for _ in range(ROUNDS):
        edges = np.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
        if before is not None and np.array_equal(edges, before):
            break
        before = edges
        bounds = np.concatenate([[0], edges, [len(values)]])
        held = np.diff(number[bounds])
        centers = np.where(held > 0, np.diff(total[bounds]) / np.maximum(held, 1), centers)
    return centers


def _filled_up(values: np.ndarray, counts: np.ndarray, centers: np.ndarray, k: int) -> np.ndarray:
    """k centers: the given ones, and the values that are worst served by those so far."""
    while len(centers) < k:
        distance = np.square(values - centers[_nearest(values, centers)]) * counts
        missing = min(k - len(centers), max(1, len(centers)))
        worst = np.argsort(distance)[-missing:]
        centers = np.union1d(centers, values[worst[distance[worst] > 0]])
    return centers


def _nearest(values: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The index of the nearest of the ascending centers, for each value."""
    return np.searchsorted((centers[1:] + centers[:-1]) / 2, values)
