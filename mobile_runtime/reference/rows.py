"""The rows of the ablation: which settings, how many steps, how many pictures at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mobile_runtime.errors import UserError
from mobile_runtime.reference.deep_cache import DeepCache
from mobile_runtime.reference.parts import Parts
from mobile_runtime.reference.switches import SWITCHES, Machine, missing

Kind = Literal["yardstick", "cumulative", "alone", "steps", "batch"]
STEPS_LADDER: tuple[tuple[str, int], ...] = (
    ("ddpm", 1000),
    ("ddim", 50),
    ("dpm_solver_pp_2m", 20),
    ("source", 4),
    ("source", 2),
    ("source", 1),
)
BATCHES = (4, 16)
MANY_STEPS = 4
"""Fewer, and DeepCache has nothing to reuse."""


@dataclass(frozen=True)
class Row:
    """One line of the table. switches: on together. own: diffusers' pipeline, not ours."""

    kind: Kind
    name: str
    switches: tuple[str, ...] = ()
    scheduler: str | None = None
    steps: int | None = None
    batch: int = 1
    own: bool = False


@dataclass(frozen=True)
class Plan:
    """The rows that this machine can run, and what was left out, with the reason."""

    rows: tuple[Row, ...]
    left_out: dict[str, str]


def usable(
    names: Sequence[str], parts: Parts, machine: Machine, steps: int, tiny_decoder: str | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those of the switches that this machine and pipeline take, and why not the others."""
    told = missing(names, machine)
    if "tiny_decoder" in names and tiny_decoder is None:
        told["tiny_decoder"] = "no decoder is named; give --tiny-decoder FOLDER, ID or random"
    if "deep_cache" in names:
        if why := DeepCache.missing(parts.unet):
            told["deep_cache"] = why
        elif steps < MANY_STEPS:
            told["deep_cache"] = f"{steps} steps have nothing to reuse; it needs {MANY_STEPS}"
    return tuple(name for name in names if name not in told), told


CONFLICTS = {
    "xformers": ("compile", "its kernels are not PyTorch's to compile"),
    "fused_qkv": ("xformers", "xFormers' attention asks for each projection by itself"),
    "compile": ("tensorrt", "TensorRT compiles in its place"),
    "half": ("bfloat16", "one precision at a time"),
}
"""What is left out beside another switch, and why."""


def without_conflicts(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Switches that go together, and those that were left out for another."""
    told: dict[str, str] = {}
    for name, (other, why) in CONFLICTS.items():
        if name in names and other in names and other not in told:
            told[name] = f"not beside {other}: {why}"
    return tuple(name for name in names if name not in told), told


def plan(
    parts: Parts,
    machine: Machine,
    *,
    steps: int,
    tiny_decoder: str | None = None,
    only: Sequence[str] = (),
) -> Plan:
    """All rows, or those of the kinds or names in `only`.

    Cumulative: the switches that keep the picture, one more each; then those that change it. Alone:
    each switch by itself. Steps: from DDPM's 1000 to one, with all that keeps the picture on.
    """
    names, told = usable(list(SWITCHES), parts, machine, steps, tiny_decoder)
    rows = _rows(names, machine.cuda)
    if only:
        known = [*rows, *_rows(tuple(SWITCHES), machine.cuda)]
        places = {row.name for row in known} | {row.kind for row in known}
        if unknown := [name for name in only if name not in places]:
            kinds = ", ".join(dict.fromkeys(row.kind for row in rows))
            raise UserError(
                f"there is no row {unknown[0]!r}; choose kinds ({kinds}) or names, as in "
                f"{rows[-1].name!r}"
            )
        rows = [row for row in rows if row.kind in only or row.name in only]
        if not rows:
            why = "; ".join(f"{name}: {reason}" for name, reason in told.items())
            raise UserError(f"no row of {', '.join(only)} can run here ({why})")
    return Plan(tuple(rows), told)


def _rows(names: tuple[str, ...], cuda: bool) -> list[Row]:
    """The rows of these switches."""
    fast = tuple(name for name in names if not SWITCHES[name].asked)
    rows = [Row("yardstick", "exact")]
    rows.append(Row("yardstick", "diffusers float32", own=True))
    rows.append(Row("yardstick", "diffusers half", ("half",), own=True))
    if "compile" in names:
        rows.append(Row("yardstick", "diffusers half, compiled", ("half", "compile"), own=True))
    stacked: tuple[str, ...] = ()
    for name in fast:
        stacked = (*stacked, name)
        rows.append(Row("cumulative", f"+ {name}", stacked))
    for name in ("tiny_decoder", "int8", "deep_cache"):
        if name in names:
            stacked = (*stacked, name)
            rows.append(Row("cumulative", f"+ {name}", stacked))
    for name in names:
        also = ("half",) if name == "float_norms" else ()
        if name == "int8" and cuda and "compile" in names:
            # Called one by one, torchao's products wait for the device to print a tensor each.
            rows.append(Row("alone", "int8, compiled", ("compile", name)))
            continue
        rows.append(Row("alone", name, (*also, name)))
    rows += [
        Row("batch", f"{what}, {batch} at a time", switches, batch=batch)
        for what, switches in (("exact", ()), ("fast", fast))
        for batch in BATCHES
    ]
    if "tiny_decoder" in names:
        small = (*fast, "tiny_decoder")
        rows += [
            Row("batch", f"fast, tiny decoder, {b} at a time", small, batch=b) for b in BATCHES
        ]
    for scheduler, count in STEPS_LADDER:
        kept = None if scheduler == "source" else scheduler
        rows.append(Row("steps", f"{scheduler} {count}", fast, scheduler=kept, steps=count))
    return rows
