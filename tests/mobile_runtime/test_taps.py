"""Sketches stand for whole values: the same decibels, and nothing that is wrong goes unseen."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_runtime import sketches, taps
from mobile_runtime.backends.onnx_bytes import declared, more_outputs
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError
from mobile_runtime.sketches import SKETCH_SIZE, sketch, sketch_snr_db
from mobile_runtime.taps import Tap, Taps
from tests.bundles import make_bundle

FIRST_SIGNS = [1, -1, 1, 1, -1, -1, 1, 1, 1, 1, 1, -1]


def snr_db(reference: np.ndarray, given: np.ndarray) -> float:
    error = given.astype(np.float64) - reference
    return 10 * math.log10((reference.astype(np.float64) ** 2).sum() / (error**2).sum())


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(200, 30_000),
    seed=st.integers(0, 2**32 - 1),
    level_db=st.floats(0, 90),
    patch=st.floats(0.05, 1),
)
def test_a_sketchs_snr_is_the_values_give_or_take_a_few_decibels(count, seed, level_db, patch):
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(count).astype(np.float32)
    noise = rng.standard_normal(count) * 10 ** (-level_db / 20)
    noise[int(patch * count) :] = 0  # an error in one place
    given_value = (reference + noise).astype(np.float32)
    found = sketch_snr_db(sketch(reference), sketch(given_value))
    # 64 squares of a normal variable: 0.77 dB is one sigma for signal and noise each.
    assert abs(found - snr_db(reference, given_value)) < 6


@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_one_value_that_is_not_finite_shows(shape, seed, bad):
    rng = np.random.default_rng(seed)
    value = rng.standard_normal(shape).astype(np.float32)
    damaged = value.copy()
    damaged.flat[rng.integers(value.size)] = bad
    assert math.isnan(sketch_snr_db(sketch(value), sketch(damaged)))
    assert sketch_snr_db(sketch(value), sketch(value)) == sketches.HIGHEST_DB


def test_a_sketch_is_linear_and_the_same_everywhere():
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 3, 5, 70))
    np.testing.assert_allclose(sketch(one + other), sketch(one) + sketch(other), atol=1e-4)
    # The signs are Philox's bits: a sketch that is stored today is that of tomorrow.
    ones = sketch(np.ones(SKETCH_SIZE))
    assert set(ones) == {-1.0, 1.0}
    assert [int(v) for v in ones[:12]] == FIRST_SIGNS


@pytest.mark.parametrize("tokens", [2, 4, 16, 77, 256])
@pytest.mark.parametrize("width", [64, 128, 320, 768])
def test_an_error_of_a_channel_that_is_the_same_at_every_token_shows(tokens, width):
    """With 64 groups its signs cancelled for every third channel over four tokens."""
    value = np.random.default_rng(0).standard_normal((1, tokens, width)).astype(np.float32)
    told = []
    for channel in range(64):
        given = value.copy()
        given[..., channel] += 1
        told.append(sketch_snr_db(sketch(value), sketch(given)))
    whole = 10 * np.log10(np.square(value, dtype=np.float64).sum() / tokens)
    assert max(told) < whole + 12


def test_the_same_numbers_in_another_order_are_another_value():
    value = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    assert sketch_snr_db(sketch(value), sketch(value.T)) < 6
    assert sketch_snr_db(sketch(value), sketch(np.roll(value, 64))) < 6


@pytest.mark.parametrize(
    "names", [["a"], ["x" * 300, "wörter", "b"], [f"v{k}" for k in range(500)]]
)
def test_outputs_put_behind_a_model_are_read_as_its_own(names):
    import onnx

    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    read = onnx.load_from_string(model.SerializeToString() + more_outputs(names))
    assert [output.name for output in read.graph.output] == names
    assert read.graph.name == "g"


def test_bytes_that_are_no_model_are_refused_at_once():
    for garbage in (b"\xff" * 1_000_000, b"\x3a\xff\xff\xff\xff\x0f", b"not a model"):
        with pytest.raises(ValueError, match=r"more than ten bytes|cut short|wire type"):
            declared(garbage)


def test_taps_are_read_as_they_were_written_and_damaged_ones_are_told(tmp_path):
    from mobile_runtime.manifest import Manifest

    def tapped(manifest: Manifest) -> Manifest:
        golden = manifest.golden.model_copy(update={"taps": {"unet": "golden/unet.safetensors"}})
        return manifest.model_copy(update={"golden": golden})

    bundle = make_bundle(tmp_path / "bundle", change_manifest=tapped)
    with pytest.raises(BundleError, match="holds no taps"):
        taps.read(bundle, "unet")
    assert taps.read(bundle, "vae_decoder") is None
    told = Taps(
        (Tap("unet.a", "conv2d", "conv2d", 10, {"float32": 120.5}),),
        np.ones((1, SKETCH_SIZE), np.float32),
        "a machine",
    )
    path = Bundle.open(bundle.path).file("golden/unet.safetensors")
    taps.write(told, path)
    read = taps.read(bundle, "unet")
    assert read is not None
    assert (read.taps, read.made_on) == (told.taps, told.made_on)
    np.testing.assert_array_equal(read.sketches, told.sketches)
    taps.write(Taps((), np.ones((0, SKETCH_SIZE), np.float32), ""), path)
    with pytest.raises(BundleError, match="holds no taps"):
        taps.read(bundle, "unet")
    taps.write(Taps(told.taps, np.ones((2, SKETCH_SIZE), np.float32), ""), path)
    with pytest.raises(BundleError, match="1 taps and sketches"):
        taps.read(bundle, "unet")
