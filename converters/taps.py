"""Taps: what every operator of a component computes in PyTorch, and where the target's file has it.

What they are for is told in mobile_runtime/taps.py.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from converters.components import Component
from converters.lowered import Watch
from mobile_runtime import backends, taps
from mobile_runtime import sketches as sk
from mobile_runtime.taps import Tap, Taps

# What moves values, or names them anew, computes nothing that could diverge.
MOVING = frozenset(
    (
        *("_assert_tensor_metadata", "_to_copy", "alias", "arange", "cat", "clone", "contiguous"),
        *("detach", "dropout", "expand", "flatten", "full", "getitem", "permute", "reshape"),
        *("select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose"),
        *("unflatten", "unsqueeze", "view", "zeros"),
    )
)
# A value in the file is a tap's if it agrees so far; quantized activations deep inside have little.
MATCHES_DB = 20.0
TIME = "time_emb_proj"
"""What diffusers calls the layers that a UNet's resnets add the timestep by."""


@dataclass(frozen=True)
class Computed:
    """What one operator computed in PyTorch. value: the name of its node in the exported graph."""

    layer: str
    op: str
    value: str
    elements: int
    sketch: np.ndarray


def computed(
    program: torch.export.ExportedProgram, inputs: Iterable[np.ndarray], layers: str = ""
) -> list[Computed]:
    """Run a program on one case, and sketch the float value of every operator, in order.

    layers: how the paths of the layers end that are wanted; only what they need is computed.
    """
    seen: list[Computed] = []
    module = program.module()
    needed = _needed(module.graph, layers)

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_function" and n not in needed:
                return None
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                note(n, value)
            return value

    def note(node: fx.Node, value: Tensor) -> None:
        op = _op_of(node)
        if (
            op is None
            or not value.is_floating_point()
            or not 1 < value.numel() <= taps.MAX_ELEMENTS
        ):
            return
        layer = _layer_of(node)
        if layer.endswith(layers):
            seen.append(Computed(layer, op, node.name, value.numel(), sk.sketch(value.numpy())))

    with torch.no_grad():
        Watched(module).run(*(torch.from_numpy(array) for array in inputs))
    return seen


def _needed(graph: fx.Graph, layers: str) -> set[fx.Node]:
    """The nodes of the layers whose paths end so, and all that they take."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in needed or (node.op == "call_function" and _layer_of(node).endswith(layers)):
            needed |= {node, *node.all_input_nodes}
    return needed


def _op_of(node: fx.Node) -> str | None:
    """The operator's name as in `aten.conv2d`; None for one that only moves values."""
    target = node.target
    name = getattr(target, "overloadpacket", target)
    name = getattr(name, "__name__", str(name))
    integer = "quantized_decomposed" in str(target)
    return None if name in MOVING or integer else name


def _layer_of(node: fx.Node) -> str:
    """The path of the innermost module that the operator belongs to."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else "(the component itself)"


def record(
    component: Component,
    seen: list[Computed],
    inputs: Mapping[str, np.ndarray],
    path: Path,
    watch: Watch,
) -> Taps:
    """Find what PyTorch computed in the final file, and how well it agrees there.

    A value that the target has fused away is left out: the next one shows what is wrong there.
    """
    feeds = {spec.name: inputs[spec.name] for spec in component.inputs}
    outputs = {spec.name: math.prod(spec.shape) for spec in component.outputs}
    sizes = {one.value: one.elements for one in seen} | outputs
    wanted = (
        _Everything()
        if watch.names is None
        else {name: sizes[name] for name in watch.names if name in sizes}
    )
    there = {
        arithmetic: taps.watch(path, watch.backend, feeds, wanted, outputs, options)
        for arithmetic, options in watch.runs.items()
    }
    first = next(iter(there.values()))
    names, sketches = list(first), np.array(list(first.values())).reshape(-1, sk.SKETCH_SIZE)
    found = []
    for one in seen if names else ():
        index, snr_db = _closest(one, names, sketches)
        if snr_db >= MATCHES_DB:
            value = names[index]
            figures = {
                arithmetic: round(sk.sketch_snr_db(one.sketch, values[value]), 1)
                for arithmetic, values in there.items()
            }
            found.append((Tap(one.layer, one.op, value, one.elements, figures), one.sketch))
    return Taps(
        tuple(tap for tap, _ in found),
        np.array([sketch for _, sketch in found], np.float32).reshape(-1, sk.SKETCH_SIZE),
        taps.machine(watch.backend),
    )


def record_timesteps(
    program: torch.export.ExportedProgram,
    component: Component,
    inputs: Mapping[str, np.ndarray],
    timesteps: Sequence[float],
    found: Taps,
    path: Path,
    watch: Watch,
) -> Taps | None:
    """What the resnets make of every timestep, of those of their values that are in the file.

    found: the UNet's taps. None where it has no such layers, or the file none of their values.
    """
    named = {(tap.layer, tap.op): tap.value for tap in found.taps if tap.layer.endswith(TIME)}
    if not named:
        return None
    cases = [dict(inputs) | {"timestep": np.full_like(inputs["timestep"], t)} for t in timesteps]
    seen = [
        [
            one
            for one in computed(program, [case[spec.name] for spec in component.inputs], TIME)
            if (one.layer, one.op) in named
        ]
        for case in cases
    ]
    there = {
        arithmetic: list(
            backends.some_values(path, watch.backend, list(named.values()), cases, **options)
        )
        for arithmetic, options in watch.runs.items()
    }
    taps_of, sketches = [], []
    for k, row in enumerate(seen):
        for one in row:
            value = named[one.layer, one.op]
            figures = {
                arithmetic: round(sk.sketch_snr_db(one.sketch, sk.sketch(values[k][value])), 1)
                for arithmetic, values in there.items()
            }
            taps_of.append(Tap(one.layer, one.op, value, one.elements, figures))
            sketches.append(one.sketch)
    return Taps(tuple(taps_of), np.array(sketches), found.made_on, tuple(timesteps))


def _closest(one: Computed, names: Sequence[str], sketches: np.ndarray) -> tuple[int, float]:
    """Which of the file's values (V, 67) is it: of its name, else the most like it; and the SNR."""
    noise = np.square(sketches - one.sketch, dtype=np.float64).sum(1)
    if not np.isfinite(noise).any():
        return 0, -sk.HIGHEST_DB
    snr_db = -sk.HIGHEST_DB
    if one.value in names:
        index = names.index(one.value)
        snr_db = sk.sketch_snr_db(one.sketch, sketches[index])
    if not snr_db >= MATCHES_DB:  # a target may number its values anew
        index = int(np.nanargmin(noise))
        snr_db = sk.sketch_snr_db(one.sketch, sketches[index])
    return index, snr_db


class _Everything(dict[str, int]):
    """Every name is wanted."""

    def __contains__(self, name: object) -> bool:
        return True
