"""Gaussian noise from a seed, equal to CUDA's `torch.randn` to float32 rounding, in numpy alone.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011). What a port to another language has to know:

- Key: the seed's low and high 32 bits. Counter: (offset / 4 as low and high 32 bits, thread index
  as low and high 32 bits), where `offset` is the CUDA generator's, always a multiple of 4. One
  Philox block gives four words w0..w3.
- Box-Muller, as cuRAND's `curand_normal4` does it: u = w0 * 2^-32 + 2^-33 and
  v = w1 * 2pi * 2^-32 + pi * 2^-32 in float32; s = sqrt(-2 ln u); the four values are
  s sin v, s cos v, and the same from (w2, w3).
- Layout, as PyTorch's grid-stride kernel has it: blocks of 256 threads, as many as cover the n
  elements but at most `max_blocks` of the device. With T threads, value i of thread t's k-th
  Philox block is element t + T * (4k + i).
- A call with n elements moves the generator's offset on by 4 * ceil(n / (4 T)).

While n is at most 256 * max_blocks, T covers n, each element is the first value of its own
thread, and nothing depends on the device. `max_blocks` is the GPU's multiprocessors times its
threads per multiprocessor / 256: T4 160, A100 864, H100 1056. So up to 40,960 elements (a latent
of 4x96x96 has 36,864) every such GPU agrees, and `randn` computes that without `max_blocks`.

CUDA takes sine and logarithm from fast hardware approximations; the values agree to about 1e-6
in absolute terms, not in every bit.
"""

import math

import numpy as np

from mobile_runtime.errors import UserError

THREADS_PER_BLOCK = 256
VALUES_PER_CALL = 4
# Philox4x32's multipliers and its key increments (the golden ratio and sqrt(3) - 1).
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10. counter: (4, n) uint32; key: two 32-bit words. Returns (4, n) uint32."""
    c0, c1, c2, c3 = (row.astype(np.uint64) for row in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & np.uint64(MASK),
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & np.uint64(MASK),
        )
        k0, k1 = (k0 + INCREMENTS[0]) & MASK, (k1 + INCREMENTS[1]) & MASK
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def _box_muller(words: np.ndarray) -> np.ndarray:
    """Two rows of uint32 to two rows of float32 standard normals (sine first)."""
    two_pi = np.float32(2**-32) * np.float32(2 * math.pi)
    # In float64 and rounded once, like the GPU's fused multiply-add.
    x = words.astype(np.float32).astype(np.float64)
    u = (x[0] * 2**-32 + 2**-33).astype(np.float32)
    v = (x[1] * np.float64(two_pi) + np.float64(two_pi) / 2).astype(np.float32)
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    angle = v.astype(np.float64)
    return (radius * np.stack([np.sin(angle), np.cos(angle)])).astype(np.float32)


def _threads(count: int, max_blocks: int | None) -> int:
    blocks = -(-count // THREADS_PER_BLOCK)
    return THREADS_PER_BLOCK * (blocks if max_blocks is None else min(blocks, max_blocks))


def offset_step(count: int, max_blocks: int | None = None) -> int:
    """How far one `torch.randn` of `count` elements moves the CUDA generator's offset."""
    per_call = VALUES_PER_CALL * _threads(count, max_blocks)
    return VALUES_PER_CALL * -(-count // per_call)


def randn(
    shape: tuple[int, ...], seed: int, offset: int = 0, max_blocks: int | None = None
) -> np.ndarray:
    """Standard normal noise of `shape`, float32, as CUDA's `torch.randn` gives it for this seed.

    offset: the generator's position, a multiple of 4; 0 right after `manual_seed`.
    max_blocks: what the GPU launches at most (see the module); None: as many as cover the tensor.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed {seed} is out of range; take one from 0 to 2^64 - 1")
    if offset < 0 or offset % VALUES_PER_CALL:
        raise ValueError(f"offset {offset} is not a multiple of {VALUES_PER_CALL}")
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, np.float32)
    threads = _threads(count, max_blocks)
    calls = -(-count // (VALUES_PER_CALL * threads))
    used = min(threads, count)
    thread = np.arange(used, dtype=np.uint64)
    values = np.zeros((calls, VALUES_PER_CALL, threads), np.float32)
    for call in range(calls):
        position = offset // VALUES_PER_CALL + call
        counter = np.empty((4, used), np.uint32)
        counter[0], counter[1] = position & MASK, (position >> 32) & MASK
        counter[2], counter[3] = thread & np.uint64(MASK), thread >> np.uint64(32)
        words = philox(counter, (seed & MASK, seed >> 32))
        values[call, :2, :used] = _box_muller(words[:2])
        values[call, 2:, :used] = _box_muller(words[2:])
    return values.reshape(-1)[:count].reshape(shape)


class Noise:
    """A run's noise in the order in which a CUDA pipeline draws it.

    The first call of `draw` gives the initial noise, each later call one step's fresh noise, at
    the offsets that the CUDA generator would have reached.
    """

    def __init__(self, seed: int, max_blocks: int | None = None) -> None:
        self.seed = seed
        self.max_blocks = max_blocks
        self.offset = 0

    def draw(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next tensor, float32, and the generator moves on."""
        drawn = randn(shape, self.seed, self.offset, self.max_blocks)
        self.offset += offset_step(math.prod(shape), self.max_blocks)
        return drawn
