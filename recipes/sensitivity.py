"""What each layer alone costs, and which layers keep float activations for it.

Every layer that is planned with static activations is quantized by itself, all else in float, and
the component runs on what it saw in the calibration: the signal-to-noise ratio of its output is the
layer's sensitivity (as in MixDQ, arXiv 2405.17873). The weights of a layer that keeps float
activations stay INT8: they are nearly free.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mobile_runtime.manifest import LayerPlan
from recipes.calibrate import Calibration, Call
from recipes.quantized_layers import quantized
from recipes.settings import KeepSettings

Replace = Callable[[str, nn.Module], None]

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
    found: Calibration,
    replace: Replace,
) -> dict[str, float]:
    """The SNR in dB of the component's output for each layer alone, at most HIGHEST_DB.

    components: the modules that run one after the other. layers: by path, the component's name
    first. replace(path, module) puts a module in a layer's place; all are put back.
    """
    reference = Reference(components, found.calls)
    figures = {}
    for path, layer in tqdm(layers.items(), desc="sensitivity", unit="layer", delay=2, leave=False):
        replace(path, quantized(layer, "int8_static", found.static[path]))
        try:
            figures[path] = reference.snr_db(path.split(".")[0])
        finally:
            replace(path, layer)
    return figures


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
    settings: KeepSettings,
) -> list[LayerPlan]:
    """The plan after a budget: float activations where it says so, each with its figure.

    snr_db: of the layers with static activations. macs: of every convolution and linear. With a
    budget of multiply-adds the most sensitive layers of a component go first, up to the one whose
    absence would bring the `share` of the rest below it; what a rule decided is not asked.
    """
    reasons: dict[str, str] = {}
    if settings.min_snr_db is not None:
        reasons = {
            path: f"float activations: sensitivity {db} dB < {settings.min_snr_db:g}"
            for path, db in snr_db.items()
            if db < settings.min_snr_db
        }
    if settings.macs is not None:
        for name in {path.split(".")[0] for path in snr_db}:
            left = {path for path in snr_db if path.split(".")[0] == name}
            for path in sorted(left, key=lambda path: snr_db[path]):
                left.remove(path)
                if share(macs, name, left) < settings.macs:
                    break
                reasons[path] = (
                    f"float activations: sensitivity {snr_db[path]} dB, among the lowest of {name} "
                    f"whose absence leaves {settings.macs:.0%} of its multiply-adds in INT8"
                )
    decided = []
    for plan in plans:
        if plan.layer in reasons:
            update = {"activations": "none", "reason": reasons[plan.layer]}
            plan = plan.model_copy(update=update)
        elif plan.layer in snr_db:
            reason = f"{plan.reason}; sensitivity {snr_db[plan.layer]} dB"
            plan = plan.model_copy(update={"reason": reason})
        decided.append(plan)
    return decided
