"""Each quantized layer alone on the target, fed what the torch component feeds it.

Integer kernels and torch round a few outputs to neighbouring steps, and depth amplifies that, so
that a whole component's error says little about the conversion; a layer's does.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from converters.components import Component
from mobile_runtime.manifest import LAYOUTS, TensorSpec
from mobile_runtime.sketches import HIGHEST_DB
from recipes.losses import snr_db

RunAlone = Callable[[Component, list[Tensor]], list[Tensor]]


class Layers(nn.Module):
    """Several layers beside each other: one tensor in and one out for each."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(alone(layer) for layer in layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def alone(layer: nn.Module) -> nn.Module:
    """The layer without its hooks, which would run again while it is traced."""
    bare = copy.copy(layer)
    bare._forward_hooks = OrderedDict()
    return bare


def layer_check(
    component: Component,
    inputs: Mapping[str, np.ndarray],
    run_alone: RunAlone,
    progress: Callable[[str], None] = lambda phase: None,
    layers: Collection[str] | None = None,
    together: int = 32,
) -> dict[str, float]:
    """The SNR in dB of each layer's output on the target against torch's, at most HIGHEST_DB.

    component: not rewritten, so that its layers have the plan's names. inputs: by name, as the
    component's. run_alone: lowers layers and runs them. layers: which to check; all that quantize
    their activations by default. together: how many are lowered at once.
    """
    modules = dict(component.module.named_modules())
    if layers is None:
        layers = [
            name
            for name, module in modules.items()
            if getattr(module, "activations", "none") != "none"
        ]
    figures: dict[str, float] = {}
    waiting: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def flush() -> None:
        if waiting:
            progress(f"layer {len(figures) + 1} of {len(layers)}")
            chosen, args, expected = (list(items) for items in zip(*waiting.values(), strict=True))
            outputs = run_alone(_beside(Layers(chosen), args, expected), args)
            for name, out, reference in zip(waiting, outputs, expected, strict=True):
                figures[name] = round(min(snr_db(reference, out), HIGHEST_DB), 2)
            waiting.clear()

    def hook(name: str) -> Callable[..., None]:
        def look(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            if name not in figures and name not in waiting:
                waiting[name] = layer, args[0].contiguous(), out
                if len(waiting) == together:
                    flush()

        return look

    hooks = [modules[name].register_forward_hook(hook(name)) for name in layers]
    try:
        with torch.no_grad():
            component.module(*(torch.from_numpy(inputs[spec.name]) for spec in component.inputs))
            flush()
    finally:
        for each in hooks:
            each.remove()
    return figures


def _beside(layers: Layers, inputs: list[Tensor], outputs: list[Tensor]) -> Component:
    """The layers as a component, so that they are lowered as one is."""

    def specs(name: str, tensors: list[Tensor]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=f"{name}_{k}",
                shape=tuple(tensor.shape),
                dtype="float32",
                layout=LAYOUTS.get(tensor.dim(), "N" * tensor.dim()),
                description="Of one layer.",
            )
            for k, tensor in enumerate(tensors)
        )

    return Component("unet", layers.eval(), specs("x", inputs), specs("y", outputs))
