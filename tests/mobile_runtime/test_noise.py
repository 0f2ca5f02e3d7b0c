"""The noise of a seed is CUDA's: checked against published vectors and a scalar Philox."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobile_runtime.errors import UserError
from mobile_runtime.noise import Noise, offset_step, philox, randn

# Random123 1.14.0, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_random123s_published_answers(counter: str, key: str, result: str) -> None:
    made = philox(np.array([words(counter)], np.uint32).T, tuple(words(key)))
    assert made[:, 0].tolist() == words(result)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10, one block in Python's integers, written from the paper's definition."""
    for _ in range(10):
        left, right = divmod(0xD2511F53 * counter[0], 2**32), divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [right[0] ^ counter[1] ^ key[0], right[1], left[0] ^ counter[3] ^ key[1], left[1]]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def scalar_randn(count: int, seed: int, offset: int, blocks: int) -> list[float]:
    """CUDA's kernel as it is written: every thread walks the grid; one element at a time."""
    result = [math.nan] * count
    grid = min(blocks, math.ceil(count / 256))
    for thread in range(256 * grid):
        position, linear = offset // 4, thread
        while linear < count:
            counter = [position % 2**32, position >> 32, thread % 2**32, thread >> 32]
            w = [float32(word) for word in scalar_philox(counter, [seed % 2**32, seed >> 32])]
            values = []
            for x, y in ((w[0], w[1]), (w[2], w[3])):
                radius = math.sqrt(-2 * math.log(float32(x * 2**-32 + 2**-33)))
                angle = 2 * math.pi * (y * 2**-32 + 2**-33)
                values += [radius * math.sin(angle), radius * math.cos(angle)]
            for index, value in enumerate(values):
                element = linear + 256 * grid * index
                if element < count:
                    result[element] = value
            linear += 256 * grid * 4
            position += 1
    return result


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 3000),
    seed=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**34).map(lambda value: 4 * value),
    blocks=st.integers(1, 3),
)
def test_the_layout_is_the_cuda_kernels(count: int, seed: int, offset: int, blocks: int) -> None:
    made = randn((count,), seed, offset, max_blocks=blocks)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, scalar_randn(count, seed, offset, blocks), atol=3e-6)


def test_seed_0_starts_as_on_nvidia_gpus() -> None:
    # The values that stable-diffusion-webui's documentation gives for torch.randn on CUDA.
    known = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(randn((3, 4), seed=0), known, atol=2e-6)


def test_latents_are_the_same_on_every_gpu_up_to_its_threads() -> None:
    shape = (1, 4, 96, 96)
    t4 = 40 * 1024 // 256
    np.testing.assert_array_equal(randn(shape, 7), randn(shape, 7, max_blocks=t4))
    assert not np.array_equal(randn((1, 4, 128, 128), 7), randn((1, 4, 128, 128), 7, 0, t4))


def test_the_noise_is_standard_normal_and_seeds_and_offsets_are_independent() -> None:
    draws = [randn((100_000,), seed, offset) for seed, offset in ((0, 0), (1, 0), (0, 4))]
    for draw in draws:
        assert abs(draw.mean()) < 0.02
        assert draw.std() == pytest.approx(1, abs=0.02)
        assert (draw**4).mean() == pytest.approx(3, abs=0.2)
    correlation = np.corrcoef(draws) - np.eye(3)
    assert np.abs(correlation).max() < 0.02


def test_the_first_draw_is_the_latents_and_the_next_ones_follow_cudas_offsets() -> None:
    noise = Noise(5)
    shape = (1, 4, 8, 8)
    for index in range(3):
        np.testing.assert_array_equal(noise.draw(shape), randn(shape, 5, offset=4 * index))


@pytest.mark.parametrize(("count", "blocks", "step"), [(1, None, 4), (1024, 1, 4), (1025, 1, 8)])
def test_the_offset_moves_by_four_a_round_of_the_grid(
    count: int, blocks: int | None, step: int
) -> None:
    assert offset_step(count, blocks) == step


def test_an_empty_shape_is_empty() -> None:
    assert randn((0, 4), seed=0).shape == (0, 4)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=r"from 0 to 2\^64 - 1"):
        randn((4,), seed)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 64, 64), (1, 4, 128, 128), (3, 700, 701)])
def test_cudas_randn_is_ours(shape: tuple[int, ...]) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    device = torch.cuda.get_device_properties(0)
    threads = device.max_threads_per_multi_processor
    noise = Noise(1234, max_blocks=device.multi_processor_count * (threads // 256))
    generator = torch.Generator("cuda").manual_seed(1234)
    for _ in range(3):
        theirs = torch.randn(shape, generator=generator, device="cuda").cpu().numpy()
        np.testing.assert_allclose(noise.draw(shape), theirs, atol=1e-5)
