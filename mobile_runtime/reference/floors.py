"""What a row of the ablation takes at least: its arithmetic and its bytes at measured rates."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mobile_runtime.reference.models import arithmetic
from mobile_runtime.reference.parts import Parts
from mobile_runtime.reference.rows import Row
from mobile_runtime.reference.switches import EXACT, Machine, Settings


@dataclass(frozen=True)
class Rates:
    """Measured on this machine: multiply-adds a second by arithmetic, and bytes a second."""

    macs: dict[str, float]
    bytes: float


MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
RATE_REPEATS = 10


def rates(machine: Machine, kinds: Sequence[str]) -> Rates:
    """The best of several large matrix products in each arithmetic, and of several large copies."""
    import torch

    kind = "cuda" if machine.cuda else "cpu"
    side = MATRIX_SIDE[kind]

    def best(call: Callable[[], object]) -> float:
        call()
        times = []
        for _ in range(RATE_REPEATS):
            if machine.cuda:
                torch.cuda.synchronize(machine.device)
            began = time.perf_counter()
            call()
            if machine.cuda:
                torch.cuda.synchronize(machine.device)
            times.append(time.perf_counter() - began)
        return min(times)

    macs = {}
    for name in kinds:
        how = Settings(tf32=True) if name == "tf32" else EXACT
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        with arithmetic(how, machine):
            a, b = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
            macs[name] = side**3 / best(partial(torch.matmul, a, b))
    with arithmetic(EXACT, machine):
        source = torch.empty(COPIED_BYTES[kind], dtype=torch.uint8, device=machine.device)
        goal = torch.empty_like(source)
        moved = 2 * COPIED_BYTES[kind] / best(lambda: goal.copy_(source))
    return Rates(macs, moved)


def floor_s(row: Row, settings: Settings, parts: Parts, steps: int, speed: Rates) -> float | None:
    """Seconds of a picture that this row's arithmetic takes at least, at the measured rates.

    The larger of its multiply-adds and its weights' bytes, for each model; a batch reads the
    weights once. None where the work is not known (merged tokens, kept features, INT8).
    """
    if settings.int8 or settings.deep_cache > 1 or settings.merged_tokens:
        return None
    if row.own and settings.precision == "float32":
        return None  # PyTorch's own defaults let a GPU's convolutions use TF32 there
    vae = parts.vae if settings.tiny_decoder is None else parts.open_tiny(settings.tiny_decoder)
    guided = parts.generation.guidance_scale > 1
    width = 4 if settings.precision == "float32" else 2
    total = 0.0
    for macs, parameters, calls in _work(parts, vae, guided):
        times = steps if calls == "step" else 1
        arithmetic_s = macs / speed.macs[settings.arithmetic]
        reading_s = width * parameters / speed.bytes / row.batch
        total += times * max(arithmetic_s, reading_s)
    return total


def _work(parts: Parts, vae: Any, guided: bool) -> list[tuple[int, int, str]]:
    """Multiply-adds of a picture's call, parameters, and how often, of each model."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    own = parts.generation
    config = parts.text_encoder.config
    length = config.max_position_embeddings

    def counted(module: Any, call: Callable[[Any], object]) -> int:
        memo = {id(t): t.to("meta") for t in [*module.parameters(), *module.buffers()]}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(copy.deepcopy(module, memo))
        return counter.get_total_flops() // 2

    def size(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    batch = 2 if guided else 1
    latents = torch.empty(
        batch, own.latent_channels, own.latent_height, own.latent_width, device="meta"
    )
    states = torch.empty(batch, length, parts.unet.config.cross_attention_dim, device="meta")
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    timestep = torch.empty(1, device="meta")
    decoder = vae.decoder
    return [
        (batch * counted(parts.text_encoder, lambda m: m(ids)), size(parts.text_encoder), "once"),
        (counted(parts.unet, lambda m: m(latents, timestep, states)), size(parts.unet), "step"),
        (counted(vae, lambda m: m.decode(latents[:1])), size(decoder), "once"),
    ]
