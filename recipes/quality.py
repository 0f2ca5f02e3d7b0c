"""Figures of pictures, as the papers define them, on arrays alone; all in float64.

Against a reference, picture by picture: PSNR and SSIM. Of features that a network makes of
pictures, rows of (N, D) arrays: CLIP score, CMMD, FID and KID.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobile_runtime.parity import picture_psnr_db, picture_ssim

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
_ROWS = 1024


def psnr_db(reference: np.ndarray, pictures: np.ndarray) -> float:
    """PSNR in dB of pictures (N, H, W, 3) uint8, all taken as one picture; equal ones: infinite."""
    return picture_psnr_db(np.concatenate(reference), np.concatenate(pictures))


def ssim(reference: np.ndarray, pictures: np.ndarray) -> float:
    """Mean structural similarity (parity.py) of pictures (N, H, W, 3) uint8; equal ones: 1."""
    if reference.shape != pictures.shape:
        raise ValueError(f"no SSIM of pictures {reference.shape} and {pictures.shape}")
    found = [picture_ssim(a, b) for a, b in zip(reference, pictures, strict=True)]
    return math.fsum(found) / len(found)


def clip_score(pictures: np.ndarray, texts: np.ndarray) -> float:
    """Mean of 100 max(cos, 0) of CLIP's features of pictures and of their texts, each (N, D).

    Hessel et al. 2021 (arXiv:2104.08718), who have 2.5 in place of 100.
    """
    cosines = (unit(pictures) * unit(texts)).sum(1)
    return float(100 * np.maximum(cosines, 0).mean())


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD of two sets of CLIP features (N, D) and (M, D) (Jayasumana et al., arXiv:2401.09603).

    1000 times the squared MMD with an RBF kernel of sigma 10 on features of unit length. As in the
    paper's code it is the biased estimate, which is never negative; equal sets: 0.
    """
    x, y = unit(x), unit(y)
    within = _rbf_mean(x, x) + _rbf_mean(y, y)
    # Rounding alone can take it below zero.
    return max(0.0, CMMD_SCALE * (within - 2 * _rbf_mean(x, y)))


def _rbf_mean(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for rows in _split(x):
        squared = (rows**2).sum(1)[:, None] + (y**2).sum(1) - 2 * rows @ y.T
        total += float(np.exp(-squared / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))


def fid(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of two sets of features (N, D) and (M, D) (Heusel et al. arXiv:1706.08500).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with unbiased covariances. It is biased upwards for
    few pictures, so compare only figures of equally many. Raises ValueError below 2 rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("a covariance needs two pictures or more")
    factors: list[np.ndarray] = []
    for rows in (x, y):
        centred = (rows - rows.mean(0)) / math.sqrt(len(rows) - 1)
        factor: Any = np.linalg.qr(centred, mode="r")  # S = R^T R
        factors.append(factor)
    # The eigenvalues of S1 S2 are the squared singular values of R1 R2^T.
    root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    traces = sum(float((factor**2).sum()) for factor in factors)
    shift = x.mean(0) - y.mean(0)
    return max(0.0, float(shift @ shift + traces - 2 * root))


@dataclass(frozen=True)
class Kid:
    """The mean over subsets and, of several, its deviation among them."""

    mean: float
    deviation: float | None
    subsets: int
    subset_size: int


def kid(x: np.ndarray, y: np.ndarray, seed: int = 0) -> Kid:
    """Kernel distance of two sets of features (N, D) and (M, D) (Binkowski et al. 1801.01401).

    The unbiased squared MMD with the kernel (x.y / D + 1)^3, which may be negative: of all pictures
    where both sets have at most 1000, else the mean over 100 subsets drawn without replacement.
    Raises ValueError below 2 rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("an unbiased estimate needs two pictures or more")
    size = min(len(x), len(y), KID_SUBSET_SIZE)
    if max(len(x), len(y)) <= KID_SUBSET_SIZE:
        return Kid(_unbiased_mmd(x, y), None, 1, size)
    rng = np.random.default_rng([seed, 31])
    found = [
        _unbiased_mmd(*(rows[rng.choice(len(rows), size, replace=False)] for rows in (x, y)))
        for _ in range(KID_SUBSETS)
    ]
    return Kid(float(np.mean(found)), float(np.std(found)), KID_SUBSETS, size)


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(a: np.ndarray) -> float:
        inner = kernel(a, a)
        return float((inner.sum() - np.trace(inner)) / (len(a) * (len(a) - 1)))

    return off_diagonal(x) + off_diagonal(y) - 2 * float(kernel(x, y).mean())


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) at length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _split(rows: np.ndarray) -> Iterator[np.ndarray]:
    """In parts, so that the table of distances stays small."""
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]
