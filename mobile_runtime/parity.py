"""Does an output equal its reference? The rules that turn two arrays into a verdict.

First the form: names, shape (nothing broadcasts), dtype, finiteness. Then figures, with power and
peak always taken from the reference, so that no output can raise its own verdict by being large:

    snr_db  = 10 log10( sum(reference^2) / sum((output - reference)^2) )
    peak_db = 20 log10( max|reference| / max|output - reference| )

The gate holds `snr_db`. It also holds `peak_db`, 20 dB below, because one wrong value among a
million hardly moves a sum. Every comparison asks whether a figure *reaches* its gate, so that a
NaN, for which every comparison is false, fails. Everything is computed in float64.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# not_gated: sound and measured, but no gate was set. not_run: could not be checked here.
Status = Literal["pass", "fail", "not_run", "not_gated"]

# How far below the SNR gate the peak figure may lie. Errors that are spread like noise have about
# equal figures (both maxima are some 5 sigma); 20 dB leaves room for uneven ones.
PEAK_MARGIN_DB = 20.0

# The effect of the prompt, against the reference's. Noise that doubles the effect also turns it by
# 60 degrees, so the two limits agree.
CONDITIONING_RATIO = (0.5, 2.0)
CONDITIONING_COSINE = 0.5

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Figures:
    """How far an output is from its reference. Equal arrays have infinite decibels."""

    snr_db: float
    peak_db: float
    max_abs: float
    cosine: float


@dataclass(frozen=True)
class TensorVerdict:
    """The verdict on one named array; `figures` is None where the form is already wrong."""

    name: str
    status: Status
    reason: str
    figures: Figures | None = None

    @property
    def sound(self) -> bool:
        """Whether name, shape, dtype and finiteness are right, whatever the figures say."""
        return self.figures is not None


def check_tensor(
    name: str, reference: np.ndarray, output: object, *, gate_db: float | None = None
) -> TensorVerdict:
    """Compare one array of any shape with its reference.

    gate_db: the SNR to reach; None measures and does not gate.
    """
    fault = _fault(reference, output)
    if fault:
        return TensorVerdict(name, "fail", f"{name} {fault}")
    assert isinstance(output, np.ndarray)
    figures = measure(reference, output)
    if gate_db is None:
        return TensorVerdict(name, "not_gated", f"{name}: {figures.snr_db:.1f} dB", figures)
    if not figures.snr_db >= gate_db:
        reason = f"{name} has an SNR of {figures.snr_db:.1f} dB, and its gate is {gate_db:g} dB"
        return TensorVerdict(name, "fail", reason, figures)
    if not figures.peak_db >= gate_db - PEAK_MARGIN_DB:
        reason = (
            f"{name} has a spike: its largest error, {figures.max_abs:.3g}, is only "
            f"{figures.peak_db:.1f} dB below the reference's peak"
        )
        return TensorVerdict(name, "fail", reason, figures)
    return TensorVerdict(name, "pass", f"{name}: {figures.snr_db:.1f} dB", figures)


def check_outputs(
    reference: Mapping[str, np.ndarray],
    output: Mapping[str, object],
    *,
    gate_db: float | None = None,
) -> tuple[TensorVerdict, ...]:
    """Compare named outputs: a missing name fails, and so does one that should not be there."""
    verdicts = [
        check_tensor(name, reference[name], output[name], gate_db=gate_db)
        if name in output
        else TensorVerdict(name, "fail", f"{name} is missing; the outputs are {_names(output)}")
        for name in reference
    ]
    verdicts += [
        TensorVerdict(name, "fail", f"{name} is not an output; there are {_names(reference)}")
        for name in output
        if name not in reference
    ]
    if not verdicts:
        verdicts.append(TensorVerdict("outputs", "fail", "outputs: there is nothing to compare"))
    return tuple(verdicts)


def measure(reference: np.ndarray, output: np.ndarray) -> Figures:
    """The figures of two finite arrays of equal shape; the reference is not all zero."""
    # Scaled by the reference's peak, squares neither overflow nor vanish.
    peak = float(np.max(np.abs(reference.astype(np.float64))))
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = reference.astype(np.float64).ravel() / peak
        given = output.astype(np.float64).ravel() / peak
        error = given - wanted
        power, error_power = float(wanted @ wanted), float(error @ error)
        max_error = float(np.max(np.abs(error)))
        length = math.sqrt(power) * math.sqrt(float(given @ given))
        dot = float(wanted @ given)
    return Figures(
        snr_db=_decibel(power, error_power),
        peak_db=_decibel(1.0, max_error**2 if max_error < 1e150 else math.inf),
        max_abs=max_error * peak,
        cosine=dot / length if 0 < length < math.inf else 0.0,
    )


def check_repeat(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> TensorVerdict:
    """Whether two runs on the same input gave the same bits."""
    if first.keys() != second.keys():
        return TensorVerdict("outputs", "fail", "the second run gave other outputs than the first")
    for name in first:
        a, b = np.asarray(first[name]), np.asarray(second[name])
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            reason = f"{name} differs between two runs on the same input"
            return TensorVerdict(name, "fail", reason)
    return TensorVerdict("outputs", "pass", "two runs on the same input gave the same bits")


def check_conditioning(
    reference: tuple[np.ndarray, np.ndarray], output: tuple[np.ndarray, np.ndarray]
) -> tuple[TensorVerdict, float | None]:
    """Whether the prompt changes the output as it changes the reference.

    Each pair is (with prompt, with the empty prompt), all else equal. Returns the verdict and the
    ratio of the effects' root mean squares, output over reference (1 is right, 0 is ignored).
    """
    name = "conditioning"
    for wanted, given in zip(reference, output, strict=True):
        fault = _fault(wanted, given)
        if fault:
            return TensorVerdict(name, "fail", f"the output {fault}"), None
    wanted, given = (
        (with_prompt.astype(np.float64) - empty.astype(np.float64)).ravel()
        for with_prompt, empty in (reference, output)
    )
    effect, given_effect = math.sqrt(wanted @ wanted), math.sqrt(given @ given)
    if not effect > 0:
        reason = "the reference itself ignores the prompt, so this proves nothing"
        return TensorVerdict(name, "fail", reason), None
    ratio = given_effect / effect
    if not ratio > 0:
        return TensorVerdict(name, "fail", "the output ignores the prompt"), ratio
    low, high = CONDITIONING_RATIO
    if not low <= ratio <= high:
        reason = f"the prompt's effect is {ratio:.2f} of the reference's, not {low:g} to {high:g}"
        return TensorVerdict(name, "fail", reason), ratio
    cosine = float(wanted @ given) / (effect * given_effect)
    if not cosine >= CONDITIONING_COSINE:
        reason = f"the prompt changes the output in another way (cosine {cosine:.2f})"
        return TensorVerdict(name, "fail", reason), ratio
    reason = f"the prompt's effect is {ratio:.2f} of the reference's"
    return TensorVerdict(name, "pass", reason), ratio


def picture_psnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    """PSNR of two pictures (H, W, 3) uint8, with 8 bits' own peak of 255; equal ones: infinite.

    Raises ValueError where either is no such picture or the sizes differ.
    """
    for picture in (reference, output):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"a picture is (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    if reference.shape != output.shape:
        raise ValueError(f"the pictures' sizes differ: {reference.shape} and {output.shape}")
    error = output.astype(np.float64) - reference.astype(np.float64)
    return _decibel(255.0**2, float(np.mean(error**2)))


def picture_ssim(reference: np.ndarray, output: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004) of pictures (H, W, 3) uint8; equal ones: 1.

    Of the luma (BT.601), at full size, with the paper's Gaussian window of 11 pixels and its
    constants; windows that would leave the picture are left out.
    Raises ValueError where the sizes differ or are below the window's.
    """
    if reference.shape != output.shape or min(output.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"no SSIM of pictures {reference.shape} and {output.shape}")
    x, y = reference @ _LUMA, output @ _LUMA
    axis = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(axis**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        for direction in (0, 1):
            values = sliding_window_view(values, SSIM_WINDOW, axis=direction) @ window
        return values

    mean_x, mean_y = mean(x), mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = mean(x * y) - mean_x * mean_y
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similar / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def check_picture(
    reference: np.ndarray, output: np.ndarray, *, gate_db: float | None = None
) -> tuple[TensorVerdict, float | None]:
    """The verdict on a picture, and its PSNR in dB where it can be told."""
    name = "picture"
    try:
        psnr_db = picture_psnr_db(reference, output)
    except ValueError as error:
        return TensorVerdict(name, "fail", str(error)), None
    if reference.min() == reference.max():
        # Also what a NaN looks like once it is cast to uint8.
        return TensorVerdict(
            name, "fail", "the reference picture is blank, so it proves nothing"
        ), None
    if gate_db is None:
        return TensorVerdict(name, "not_gated", f"the picture has {psnr_db:.1f} dB"), psnr_db
    if not psnr_db >= gate_db:
        reason = f"the picture has a PSNR of {psnr_db:.1f} dB, and its gate is {gate_db:g} dB"
        return TensorVerdict(name, "fail", reason), psnr_db
    return TensorVerdict(name, "pass", f"the picture has {psnr_db:.1f} dB"), psnr_db


def _fault(reference: np.ndarray, output: object) -> str | None:
    """What is wrong with the form of an output, or with a reference that can prove nothing."""
    if not isinstance(output, np.ndarray):
        return f"is no array but {type(output).__name__}"
    if output.shape != reference.shape:
        return f"has shape {output.shape}, not {reference.shape}"
    if output.dtype != reference.dtype:
        return f"has dtype {output.dtype}, not {reference.dtype}"
    if not np.all(np.isfinite(reference)):
        return "has a reference that is not finite, so it proves nothing"
    if not np.any(reference):
        return "has a reference that is all zero, so it proves nothing"
    bad = int(np.count_nonzero(~np.isfinite(output)))
    if bad:
        return f"is not finite: {bad} of {output.size} values are NaN or infinite"
    return None


def _decibel(power: float, error_power: float) -> float:
    if error_power == 0:
        return math.inf
    ratio = power / error_power
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def _names(tensors: Mapping[str, object]) -> str:
    return ", ".join(tensors) or "none"
