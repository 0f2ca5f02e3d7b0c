"""The figures of pictures and features, against closed forms and independent implementations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recipes import quality

SEEDS = st.integers(0, 2**31)


def features(seed: int, rows: int, columns: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def with_moments(mean: list[float], deviation: list[float], rows: int = 64) -> np.ndarray:
    """Rows with exactly this mean and, unbiased and diagonal, this covariance."""
    centred = features(1, rows, len(mean))
    centred -= centred.mean(0)
    basis, _ = np.linalg.qr(centred)
    return basis * math.sqrt(rows - 1) * np.array(deviation) + np.array(mean)


# --------------------------------------------------------------------------------- PSNR and SSIM


def test_psnr_is_of_all_pictures_as_one() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0] = 10  # the mean square over both is 50
    assert quality.psnr_db(a, b) == pytest.approx(10 * math.log10(255**2 / 50))
    assert quality.psnr_db(a, a) == math.inf


def ramps() -> tuple[np.ndarray, np.ndarray]:
    y = np.linspace(0, 255, 64)[:, None] * np.ones((1, 64))
    picture = np.stack([y, y.T, (y + y.T) / 2], -1).round().astype(np.uint8)[None]
    return picture, np.roll(picture, 3, axis=1)


def noisy() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    pictures = rng.integers(0, 256, (2, 24, 37, 3), np.uint8)
    noise = rng.integers(-40, 41, pictures.shape)
    return pictures, np.clip(pictures.astype(int) + noise, 0, 255).astype(np.uint8)


# scikit-image 0.26.0, the mean over pictures of structural_similarity(luma_a, luma_b,
#   gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
# with luma = picture @ [0.299, 0.587, 0.114] in float64.
@pytest.mark.parametrize(
    ("pair", "expected"), [(noisy(), 0.9481762134777084), (ramps(), 0.973127355080338)]
)
def test_ssim_is_scikit_images(pair: tuple[np.ndarray, np.ndarray], expected: float) -> None:
    assert quality.ssim(*pair) == pytest.approx(expected, abs=1e-10)


def test_ssim_of_equal_pictures_is_one_and_is_symmetric() -> None:
    a, b = noisy()
    assert quality.ssim(a, a) == 1
    assert quality.ssim(a, b) == pytest.approx(quality.ssim(b, a), abs=1e-14)


@pytest.mark.parametrize("shape", [(1, 10, 64, 3), (1, 64, 63, 3)])
def test_ssim_refuses_small_pictures_and_other_sizes(shape: tuple[int, ...]) -> None:
    other = (1, 10, 64, 3) if shape[1] == 10 else (1, 64, 64, 3)
    with pytest.raises(ValueError, match="no SSIM"):
        quality.ssim(np.zeros(shape, np.uint8), np.zeros(other, np.uint8))


# ------------------------------------------------------------------------------------ CLIP, CMMD


def test_clip_score_counts_an_opposite_text_as_none() -> None:
    pictures = np.array([[2.0, 0], [0, 3], [1, 1]])
    texts = np.array([[5.0, 0], [0, -1], [0, 7]])
    assert quality.clip_score(pictures, texts) == pytest.approx(100 * (1 + 0 + 0.5**0.5) / 3)


def test_cmmd_of_two_opposite_points_is_its_closed_form() -> None:
    x, y = np.array([[3.0, 0]]), np.array([[-0.5, 0]])  # at length 1 they are 2 apart
    assert quality.cmmd(x, y) == pytest.approx(1000 * 2 * (1 - math.exp(-4 / 200)))


@given(SEEDS, st.integers(1, 9), st.integers(1, 9))
def test_cmmd_is_the_mean_of_every_pairs_kernel(seed: int, n: int, m: int) -> None:
    x, y = quality.unit(features(seed, n)), quality.unit(features(seed + 1, m))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a]))

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert quality.cmmd(x, y) == pytest.approx(expected, abs=1e-9)
    assert quality.cmmd(x, y) == pytest.approx(quality.cmmd(y, x), abs=1e-9)
    assert quality.cmmd(x, y) >= 0


def test_cmmd_in_parts_is_cmmd_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(0, 50), features(1, 41)
    whole = quality.cmmd(x, y)
    monkeypatch.setattr(quality, "_ROWS", 7)
    assert quality.cmmd(x, y) == pytest.approx(whole, abs=1e-9)


# --------------------------------------------------------------------------------------- FID, KID


def test_fid_of_diagonal_gaussians_is_its_closed_form() -> None:
    x = with_moments([0, 1, 2], [1, 2, 3])
    y = with_moments([1, 1, 0], [2, 2, 0.5])
    expected = (1 + 0 + 4) + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 0.5) ** 2
    assert quality.fid(x, y) == pytest.approx(expected)


def expected_fid(x: np.ndarray, y: np.ndarray, trace_of_root: float) -> float:
    traces = sum(np.trace(np.cov(rows, rowvar=False)) for rows in (x, y))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * trace_of_root)


def test_fid_is_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = features(1, 30), 1.5 * features(2, 40) @ features(3, 6) + 0.3
    root = linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))
    assert quality.fid(x, y) == pytest.approx(expected_fid(x, y, np.trace(root.real)))


@given(SEEDS, st.integers(2, 20), st.integers(2, 20))
def test_fid_is_that_of_the_products_eigenvalues_also_of_few_pictures(
    seed: int, n: int, m: int
) -> None:
    x, y = features(seed, n), 1.5 * features(seed + 1, m) + 0.3
    values = np.linalg.eigvals(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    assert quality.fid(x, y) == pytest.approx(expected_fid(x, y, root), abs=1e-5)


@given(SEEDS, st.integers(2, 20))
def test_fid_of_a_set_and_its_shuffled_self_is_zero_and_fid_is_symmetric(seed: int, n: int) -> None:
    x, y = features(seed, n), features(seed + 1, 12) * 2
    assert quality.fid(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    assert quality.fid(x, y) == pytest.approx(quality.fid(y, x), abs=1e-9)


@given(SEEDS, st.integers(2, 7), st.integers(2, 7))
def test_kid_is_the_unbiased_mean_of_every_pairs_kernel(seed: int, n: int, m: int) -> None:
    x, y = features(seed, n), features(seed + 1, m)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 6 + 1) ** 3)

    inner = [
        sum(kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j)
        / (len(a) * (len(a) - 1))
        for a in (x, y)
    ]
    across = sum(kernel(p, q) for p in x for q in y) / (n * m)
    found = quality.kid(x, y)
    assert found.mean == pytest.approx(sum(inner) - 2 * across, abs=1e-9)
    assert (found.deviation, found.subsets, found.subset_size) == (None, 1, min(n, m))


def test_kid_of_one_distribution_is_zero_on_average() -> None:
    """A biased estimate of so few would be about 0.5 above."""
    found = np.array(
        [quality.kid(features(2 * i, 8), features(2 * i + 1, 8)).mean for i in range(3000)]
    )
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean()) < 4 * error
    assert 4 * error < 0.1


def test_kid_of_many_pictures_is_of_subsets_that_the_seed_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "KID_SUBSET_SIZE", 20)
    x, y = features(0, 60), features(1, 50) + 0.5
    first, again, other = quality.kid(x, y, 3), quality.kid(x, y, 3), quality.kid(x, y, 4)
    assert first == again
    assert first.mean != other.mean
    assert (first.subsets, first.subset_size) == (100, 20)
    assert first.deviation is not None
    monkeypatch.setattr(quality, "KID_SUBSET_SIZE", 60)
    assert first.mean == pytest.approx(quality.kid(x, y).mean, abs=first.deviation)


@pytest.mark.parametrize("distance", [quality.fid, quality.kid])
def test_one_picture_has_no_distribution(distance: object) -> None:
    assert callable(distance)
    with pytest.raises(ValueError, match="two pictures"):
        distance(features(0, 1), features(1, 5))


@given(
    arrays.arrays(np.uint8, (1, 12, 13, 3)),
    arrays.arrays(np.uint8, (1, 12, 13, 3)),
)
@settings(max_examples=10, deadline=None)
def test_ssim_is_between_minus_one_and_one(a: np.ndarray, b: np.ndarray) -> None:
    assert -1 - 1e-12 <= quality.ssim(a, b) <= 1 + 1e-12  # float64's rounding
    assert (quality.ssim(a, b) == pytest.approx(1, abs=1e-12)) or not np.array_equal(a, b)
