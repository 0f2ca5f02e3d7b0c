"""DeepCache (Ma et al., arXiv:2312.00858) on a diffusers UNet2DConditionModel.

Between neighbouring steps the deep features of a UNet hardly change. A full call gives them beside
its output; a shallow call takes them, and computes only the first layers and the last.
"""

from typing import Any

LAYERS = 1
"""Layers of the first block that a shallow call computes: 1 is the paper's choice."""


class DeepCache:
    """The two calls over one UNet, as functions of tensors, so that each can be compiled."""

    def __init__(self, unet: Any, layers: int = LAYERS) -> None:
        self.unet = unet
        self.layers = layers

    @staticmethod
    def missing(unet: Any, layers: int = LAYERS) -> str | None:
        """Why a UNet has no such calls; None where it has."""
        first = getattr(unet, "down_blocks", [None])[0]
        if not hasattr(first, "resnets") or not hasattr(unet, "up_blocks"):
            return f"{type(unet).__name__} has no blocks of layers whose features could be kept"
        if len(first.resnets) < layers or len(unet.up_blocks[-1].resnets) < layers + 1:
            return "the UNet's first and last blocks have too few layers to go through alone"
        return None

    def full(self, x: Any, timestep: Any, states: Any) -> tuple[Any, Any]:
        """The UNet's output, and the deep features that its last layers start from."""
        unet = self.unet
        temb = self._time(x, timestep)
        x = unet.conv_in(x)
        skips = [x]
        for block in unet.down_blocks:
            x, kept = block(hidden_states=x, temb=temb, **_states(block, states))
            skips += kept
        if unet.mid_block is not None:
            x = unet.mid_block(x, temb, **_states(unet.mid_block, states))
        for block in unet.up_blocks[:-1]:
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            x = block(
                hidden_states=x,
                res_hidden_states_tuple=tuple(own),
                temb=temb,
                upsample_size=skips[-1].shape[-2:],
                **_states(block, states),
            )
        last = unet.up_blocks[-1]
        start = len(last.resnets) - self.layers - 1
        for layer in range(start):
            x = _layer(last, layer, x, skips.pop(), temb, states)
        deep = x
        return self._ending(x, skips, temb, states), deep

    def shallow(self, x: Any, timestep: Any, states: Any, deep: Any) -> Any:
        """The output from an earlier step's deep features."""
        temb = self._time(x, timestep)
        x = self.unet.conv_in(x)
        skips = [x]
        first = self.unet.down_blocks[0]
        for layer in range(self.layers):
            x = _layer(first, layer, x, None, temb, states)
            skips.append(x)
        return self._ending(deep, skips, temb, states)

    def _time(self, x: Any, timestep: Any) -> Any:
        return self.unet.time_embedding(self.unet.get_time_embed(sample=x, timestep=timestep), None)

    def _ending(self, x: Any, skips: list[Any], temb: Any, states: Any) -> Any:
        unet, last = self.unet, self.unet.up_blocks[-1]
        count = len(last.resnets)
        for layer in range(count - self.layers - 1, count):
            x = _layer(last, layer, x, skips.pop(), temb, states)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def _states(block: Any, states: Any) -> dict[str, Any]:
    crossed = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": states} if crossed else {}


def _layer(block: Any, index: int, x: Any, skip: Any, temb: Any, states: Any) -> Any:
    """A block's layer: its resnet, on the skip's channels too, and its attention if it has one."""
    import torch

    x = block.resnets[index](x if skip is None else torch.cat([x, skip], dim=1), temb)
    if getattr(block, "has_cross_attention", False):
        x = block.attentions[index](x, encoder_hidden_states=states, return_dict=False)[0]
    return x
