"""What each layer alone costs, and which layers stay in float for it.

Every planned layer is quantized by itself, all else in float, and the component runs on what it saw
in the calibration: the signal-to-noise ratio of its output is the layer's sensitivity (as in
MixDQ, arXiv 2405.17873). Where activations are static, a layer that stays keeps float activations
alone: INT8 weights are nearly free. With float activations, or by a budget of bytes, it keeps its
float weights.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobile_runtime.manifest import LayerPlan
from recipes.calibrate import Call
from recipes.journal import digest_of, journal
from recipes.settings import KeepSettings

Replace = Callable[[str, nn.Module], None]
Make = Callable[[str, nn.Module], nn.Module]

HIGHEST_DB = 200.0
"""Told of a layer that changes nothing."""


class Reference:
    """What components gave on remembered calls, to hold a change of their layers against."""

    def __init__(
        self,
        components: Mapping[str, Sequence[nn.Module]],
        calls: Mapping[str, Sequence[Call]],
    ) -> None:
        """components: the modules that run one after the other. calls: of the first of them."""
        self._components = components
        self._calls = calls
        self._expected = {name: self._outputs(name) for name in components}

    @torch.no_grad()
    def _outputs(self, name: str) -> list[Tensor]:
        return [_output(self._components[name], call) for call in self._calls[name]]

    def digest(self) -> str:
        """Of what all components gave."""
        return digest_of(*(outputs for outputs in self._expected.values()))

    def snr_db(self, name: str) -> float:
        """The SNR of a component's output as it is now, at most HIGHEST_DB."""
        expected, outputs = self._expected[name], self._outputs(name)
        signal = sum(float(tensor.double().square().sum()) for tensor in expected)
        noise = sum(
            float((out.double() - tensor.double()).square().sum())
            for out, tensor in zip(outputs, expected, strict=True)
        )
        ratio = torch.tensor(signal / max(noise, signal * 10 ** (-HIGHEST_DB / 10), 1e-300))
        return round(float(10 * ratio.double().log10()), 2)


def sensitivities(
    components: Mapping[str, Sequence[nn.Module]],
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, Sequence[Call]],
    make: Make,
    replace: Replace,
) -> dict[str, float]:
    """The SNR in dB of the component's output for each layer alone, at most HIGHEST_DB.

    components: the modules that run one after the other. layers: by path, the component's name
    first; what was measured stays when the run is killed (journal.py). calls: of each component.
    make(path, layer) gives the quantized layer, and
    replace(path, module) puts a module in a layer's place; all are put back.
    """
    reference = Reference(components, calls)
    figures = {}
    bar = tqdm(layers.items(), desc="sensitivity", unit="layer", delay=2, leave=False)
    with journal("sensitivity", reference.digest()) as figure:
        for path, layer in bar:
            made = make(path, layer)
            replace(path, made)
            try:
                key = f"{path} {digest_of(_settings(made), made)}"
                name = path.split(".")[0]
                figures[path] = figure(key, partial(reference.snr_db, name))
            finally:
                replace(path, layer)
    return figures


def _settings(made: nn.Module) -> str:
    """What a quantized layer computes with beside its tensors: the scales of its activations."""
    told = ("activations", "static", "form")
    return " ".join(
        f"{type(part).__name__} {[getattr(part, key, None) for key in told]}"
        for part in made.modules()
    )


def _output(modules: Sequence[nn.Module], call: Call) -> Tensor:
    """What the modules, one after the other, make of a component's call: its first tensor."""
    first, *others = modules
    out: Any = first(*call.args, **call.kwargs)
    out = out if isinstance(out, Tensor) else out[0]
    for module in others:
        out = module(out)
    return out


def share(macs: Mapping[str, int], component: str, layers: Collection[str]) -> float:
    """The layers' share of the multiply-adds of a component's convolutions and linears.

    Attention's two products are no layers: they stay in float on every target.
    """
    mine = {path: count for path, count in macs.items() if path.split(".")[0] == component}
    return sum(count for path, count in mine.items() if path in layers) / max(1, sum(mine.values()))


def kept(
    plans: Sequence[LayerPlan],
    snr_db: Mapping[str, float],
    macs: Mapping[str, int],
    sizes: Mapping[str, "Sizes"],
    settings: KeepSettings,
) -> list[LayerPlan]:
    """The plan after a budget: float where it says so, each with its figure.

    snr_db: of the layers that may stay in float. macs: of every convolution and linear. sizes: of
    every layer of the plan, for a budget of bytes.
    """
    if settings.min_snr_db is not None:
        reasons = {
            path: f"sensitivity {db} dB < {settings.min_snr_db:g}"
            for path, db in snr_db.items()
            if db < settings.min_snr_db
        }
    elif settings.macs is not None:
        static = {plan.layer for plan in plans if plan.activations == "int8_static"}
        reasons = _by_macs(snr_db, macs, static, settings.macs)
    else:
        assert settings.bytes is not None
        reasons = _by_bytes(snr_db, sizes, settings.bytes)
    decided = []
    for plan in plans:
        if plan.layer in reasons:
            decided.append(_in_float(plan, reasons[plan.layer], settings.bytes is not None))
        elif plan.layer in snr_db:
            reason = f"{plan.reason}; sensitivity {snr_db[plan.layer]} dB"
            decided.append(plan.model_copy(update={"reason": reason}))
        else:
            decided.append(plan)
    return decided


def _in_float(plan: LayerPlan, reason: str, weights: bool) -> LayerPlan:
    update: dict[str, Any]
    if plan.activations == "int8_static" and not weights:
        update = {"activations": "none", "reason": f"float activations: {reason}"}
    else:
        update = {"weights": "float32", "activations": "none", "block": None, "rank": None}
        update["reason"] = f"float: {reason}"
    return plan.model_copy(update=update)


def _by_macs(
    snr_db: Mapping[str, float], macs: Mapping[str, int], static: Collection[str], least: float
) -> dict[str, str]:
    """The most sensitive layers of each component, as long as the `share` of the rest is enough.

    static: all layers that are planned in INT8, those that have to stay among them.
    """
    reasons = {}
    for name in {path.split(".")[0] for path in snr_db}:
        left = {path for path in static if path.split(".")[0] == name}
        for path in sorted(left & snr_db.keys(), key=lambda path: snr_db[path]):
            left.remove(path)
            if share(macs, name, left) < least:
                break
            reasons[path] = (
                f"sensitivity {snr_db[path]} dB, among the lowest of {name} whose absence leaves "
                f"{least:.0%} of its multiply-adds in INT8"
            )
    return reasons


@dataclass(frozen=True)
class Sizes:
    """Bytes of a layer's weights: in float32, and as planned."""

    float32: int
    planned: int


def _by_bytes(
    snr_db: Mapping[str, float], sizes: Mapping[str, Sizes], most: float
) -> dict[str, str]:
    """The most sensitive layers of each component; one that would cost too much is passed over."""
    reasons = {}
    for name in {path.split(".")[0] for path in snr_db}:
        mine = {path: size for path, size in sizes.items() if path.split(".")[0] == name}
        left = most * sum(size.float32 for size in mine.values())
        left -= sum(size.planned for size in mine.values())
        for path in sorted(mine.keys() & snr_db.keys(), key=lambda path: snr_db[path]):
            cost = mine[path].float32 - mine[path].planned
            if cost <= left:
                left -= cost
                reasons[path] = (
                    f"sensitivity {snr_db[path]} dB, and {name} stays within {most:.0%} of its "
                    "float bytes"
                )
    return reasons
