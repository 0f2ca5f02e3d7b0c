"""Parity lets through what equals its reference, and nothing else."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mobile_runtime.parity import (
    check_conditioning,
    check_outputs,
    check_picture,
    check_repeat,
    check_tensor,
    measure,
    picture_psnr_db,
    picture_ssim,
)

GATE_DB = 60.0
SHAPE = (1, 4, 8, 8)


def reference(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def with_noise(array: np.ndarray, snr_db: float, seed: int = 1) -> np.ndarray:
    """The array plus noise of exactly that SNR (up to float32 rounding)."""
    noise = np.random.default_rng(seed).standard_normal(array.shape)
    power, noise_power = np.sum(array.astype(np.float64) ** 2), np.sum(noise**2)
    scale = math.sqrt(power / noise_power / 10 ** (snr_db / 10))
    return (array + noise * scale).astype(array.dtype)


def status(output: object, wanted: np.ndarray | None = None) -> str:
    wanted = reference() if wanted is None else wanted
    return check_tensor("out", wanted, output, gate_db=GATE_DB).status


def test_an_undamaged_output_passes() -> None:
    verdict = check_tensor("out", reference(), reference(), gate_db=GATE_DB)
    assert verdict.status == "pass"
    assert verdict.figures is not None
    assert verdict.figures.snr_db == math.inf
    assert verdict.figures.max_abs == 0
    assert verdict.figures.cosine == pytest.approx(1)


def test_the_gate_lies_where_it_says() -> None:
    assert status(with_noise(reference(), GATE_DB + 0.1)) == "pass"
    assert status(with_noise(reference(), GATE_DB - 0.1)) == "fail"


def test_without_a_gate_an_output_is_measured_and_never_passes() -> None:
    verdict = check_tensor("out", reference(), reference())
    assert verdict.status == "not_gated"
    assert verdict.figures is not None


def test_a_gate_that_is_nan_never_passes() -> None:
    assert check_tensor("out", reference(), reference(), gate_db=math.nan).status == "fail"


DAMAGES = {
    "all NaN": lambda a: np.full_like(a, np.nan),
    "all zero": np.zeros_like,
    "wrong rank": lambda a: a[0],
    "a batch axis too many": lambda a: a[None],
    "wrong dtype, lower": lambda a: a.astype(np.float16),
    "wrong dtype, higher": lambda a: a.astype(np.float64),
    "missing batch axis": lambda a: a.reshape(a.shape[1:]),
    "broadcastable shape": lambda a: a[:, :1],
    "transposed axes": lambda a: a.transpose(0, 1, 3, 2),
    "negated": np.negative,
    "scaled up": lambda a: a * 1e6,
    "flattened": np.ravel,
    "a list": lambda a: a.tolist(),
    "nothing": lambda a: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_rejected(damage: str) -> None:
    assert status(DAMAGES[damage](reference())) == "fail"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 100, -1])
@pytest.mark.parametrize("gate_db", [GATE_DB, -1e9, None])
def test_one_value_that_is_not_finite_is_rejected_at_any_gate(
    value: float, place: int, gate_db: float | None
) -> None:
    output = reference()
    output.flat[place] = value
    assert check_tensor("out", reference(), output, gate_db=gate_db).status == "fail"


def test_one_spike_is_rejected() -> None:
    output = reference()
    output.flat[17] = 1e4
    assert status(output) == "fail"


def test_one_spike_among_a_million_is_rejected_though_the_snr_reaches_the_gate() -> None:
    wanted = np.random.default_rng(0).standard_normal((1, 4, 512, 512)).astype(np.float32)
    output = wanted.copy()
    output.flat[17] += 0.9
    assert measure(wanted, output).snr_db > GATE_DB
    verdict = check_tensor("out", wanted, output, gate_db=GATE_DB)
    assert verdict.status == "fail"
    assert "spike" in verdict.reason


def test_a_reference_that_is_all_zero_proves_nothing() -> None:
    zeros = np.zeros(SHAPE, np.float32)
    assert status(zeros, wanted=zeros) == "fail"


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    for value in (np.nan, np.inf):
        wanted = reference()
        wanted.flat[3] = value
        assert status(wanted, wanted=wanted) == "fail"


def test_an_empty_output_proves_nothing() -> None:
    empty = np.zeros((0, 4), np.float32)
    assert status(empty, wanted=empty) == "fail"


def test_a_missing_output_is_rejected_by_name() -> None:
    wanted = {"a": reference(0), "b": reference(1)}
    verdicts = check_outputs(wanted, {"a": reference(0)}, gate_db=GATE_DB)
    assert [verdict.status for verdict in verdicts] == ["pass", "fail"]
    assert verdicts[1].reason.startswith("b is missing")


def test_an_output_too_many_is_rejected() -> None:
    verdicts = check_outputs({"a": reference()}, {"a": reference(), "c": reference()})
    assert [verdict.status for verdict in verdicts] == ["not_gated", "fail"]


def test_swapped_outputs_are_rejected() -> None:
    wanted = {"a": reference(0), "b": reference(1)}
    swapped = {"a": wanted["b"], "b": wanted["a"]}
    verdicts = check_outputs(wanted, swapped, gate_db=GATE_DB)
    assert all(verdict.status == "fail" for verdict in verdicts)


def test_no_outputs_at_all_prove_nothing() -> None:
    assert [v.status for v in check_outputs({}, {}, gate_db=GATE_DB)] == ["fail"]


def test_two_equal_runs_pass() -> None:
    assert check_repeat({"a": reference()}, {"a": reference()}).status == "pass"


def test_an_output_that_differs_between_two_runs_is_rejected() -> None:
    second = reference()
    second.flat[5] = np.nextafter(second.flat[5], np.float32(np.inf))
    assert check_repeat({"a": reference()}, {"a": second}).status == "fail"
    assert check_repeat({"a": reference()}, {"a": reference(), "b": second}).status == "fail"
    # Equal as numbers, not as bits.
    zero = np.zeros(3, np.float32)
    assert check_repeat({"a": zero}, {"a": -zero}).status == "fail"


def test_ignored_conditioning_is_rejected() -> None:
    prompt, empty = reference(0), with_noise(reference(0), 20)
    verdict, ratio = check_conditioning((prompt, empty), (empty, empty))
    assert verdict.status == "fail"
    assert "ignores the prompt" in verdict.reason
    assert ratio == 0


def test_conditioning_that_is_followed_passes() -> None:
    prompt, empty = reference(0), with_noise(reference(0), 20)
    noisy = with_noise(prompt, 50, seed=3), with_noise(empty, 50, seed=4)
    verdict, ratio = check_conditioning((prompt, empty), noisy)
    assert verdict.status == "pass"
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("factor", [0.4, 2.5, -1.0])
def test_conditioning_that_is_weakened_strengthened_or_turned_is_rejected(factor: float) -> None:
    prompt, empty = reference(0), with_noise(reference(0), 20)
    changed = (empty + np.float32(factor) * (prompt - empty)).astype(np.float32)
    assert check_conditioning((prompt, empty), (changed, empty))[0].status == "fail"


def test_a_reference_that_ignores_its_prompt_proves_nothing() -> None:
    same = (reference(), reference())
    assert check_conditioning(same, same)[0].status == "fail"


def test_conditioning_with_a_nan_is_rejected() -> None:
    prompt, empty = reference(0), reference(1)
    bad = prompt.copy()
    bad.flat[0] = np.nan
    assert check_conditioning((prompt, empty), (bad, empty))[0].status == "fail"


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_a_picture_one_level_off_has_the_psnr_of_the_textbook() -> None:
    wanted = picture() // 2
    assert picture_psnr_db(wanted, wanted + 1) == pytest.approx(20 * math.log10(255))


def test_equal_pictures_pass_and_have_no_finite_psnr() -> None:
    verdict, psnr_db = check_picture(picture(), picture(), gate_db=40)
    assert verdict.status == "pass"
    assert psnr_db == math.inf


@pytest.mark.parametrize(
    "output",
    [
        picture(1),
        picture()[:8],
        picture().astype(np.float32),
        picture()[..., 0],
        np.zeros_like(picture()),
    ],
    ids=["another", "a part", "float", "grey", "black"],
)
def test_a_picture_that_is_not_the_reference_is_rejected(output: np.ndarray) -> None:
    assert check_picture(picture(), output, gate_db=40)[0].status == "fail"


def test_a_blank_reference_picture_proves_nothing() -> None:
    black = np.zeros((8, 8, 3), np.uint8)
    assert check_picture(black, black, gate_db=40)[0].status == "fail"


# A busy machine is no reason to fail.
without_deadline = settings(deadline=None)

FLOATS = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-3 else 1.0)
PAIRS = array_shapes(min_dims=1, max_dims=4, max_side=5).flatmap(
    lambda shape: st.tuples(
        arrays(np.float32, shape, elements=FLOATS), arrays(np.float32, shape, elements=FLOATS)
    )
)


@without_deadline
@given(PAIRS)
def test_the_snr_is_the_textbook_formula(pair: tuple[np.ndarray, np.ndarray]) -> None:
    wanted, output = (array.astype(np.float64) for array in pair)
    noise = np.mean((output - wanted) ** 2)
    figures = measure(*pair)
    if noise == 0:
        assert figures.snr_db == math.inf
    else:
        expected = 10 * math.log10(np.mean(wanted**2) / noise)
        assert figures.snr_db == pytest.approx(expected, abs=1e-9)
    assert figures.max_abs == pytest.approx(np.max(np.abs(output - wanted)), rel=1e-12)


@without_deadline
@given(PAIRS, st.integers(-20, 20))
def test_the_figures_do_not_depend_on_the_unit(
    pair: tuple[np.ndarray, np.ndarray], exponent: int
) -> None:
    # A power of two scales float32 exactly.
    scaled = (array * np.float32(2.0**exponent) for array in pair)
    assert measure(*scaled).snr_db == pytest.approx(measure(*pair).snr_db, abs=1e-9)


@without_deadline
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_figures_do_not_depend_on_the_order_of_the_values(
    pair: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    order = list(range(pair[0].size))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = (array.ravel()[order] for array in pair)
    assert measure(*shuffled).snr_db == pytest.approx(measure(*pair).snr_db, abs=1e-9)


@without_deadline
@given(PAIRS)
def test_an_error_above_and_one_below_the_reference_count_the_same(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    wanted = pair[0].astype(np.float64)
    error = pair[1].astype(np.float64)
    above, below = measure(wanted, wanted + error), measure(wanted, wanted - error)
    assert above.snr_db == pytest.approx(below.snr_db, abs=1e-6)
    for gate_db in (0.0, above.snr_db - 1, above.snr_db + 1):
        verdicts = {
            check_tensor("out", wanted, wanted + sign * error, gate_db=gate_db).status
            for sign in (1, -1)
        }
        assert len(verdicts) == 1


@without_deadline
@given(PAIRS, st.floats(1, 1e6))
def test_a_larger_error_never_has_a_better_figure(
    pair: tuple[np.ndarray, np.ndarray], factor: float
) -> None:
    wanted = pair[0].astype(np.float64)
    error = pair[1].astype(np.float64)
    small, large = measure(wanted, wanted + error), measure(wanted, wanted + factor * error)
    assert large.snr_db <= small.snr_db + 1e-6
    assert large.peak_db <= small.peak_db + 1e-6


@without_deadline
@given(PAIRS, st.floats(3, 1e30))
def test_scaling_the_output_up_never_raises_the_verdict(
    pair: tuple[np.ndarray, np.ndarray], factor: float
) -> None:
    # ||k y - r|| >= k||y|| - ||r|| grows with k once past the reference, so a figure whose peak
    # came from the output would rise here, and ours falls.
    wanted, output = (array.astype(np.float64) for array in pair)
    output *= np.linalg.norm(wanted) / np.linalg.norm(output)
    scaled, scaled_more = measure(wanted, output * factor), measure(wanted, output * factor * 10)
    assert scaled_more.snr_db <= scaled.snr_db <= 0
    assert check_tensor("out", wanted, output * factor, gate_db=0.0).status == "fail"


def test_huge_and_tiny_values_are_measured_without_overflow() -> None:
    for scale in (1e-300, 1e300):
        wanted = reference().astype(np.float64) * scale
        verdict = check_tensor("out", wanted, wanted * (1 + 1e-4), gate_db=GATE_DB)
        assert verdict.status == "pass"
        assert verdict.figures is not None
        assert verdict.figures.snr_db == pytest.approx(80, abs=1e-3)
    tiny = reference().astype(np.float64) * 1e-300
    assert check_tensor("out", tiny, np.full_like(tiny, 1e300), gate_db=0).status == "fail"


def test_ssim_of_equal_pictures_is_one_and_small_ones_have_none() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 13, 3), np.uint8)
    assert picture_ssim(picture, picture) == pytest.approx(1)
    with pytest.raises(ValueError, match="no SSIM"):
        picture_ssim(picture[:8], picture[:8])
