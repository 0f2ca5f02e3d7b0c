"""A LoRA to be trained: two thin matrices beside each of a UNet's layers, whose weights stay.

A layer's output becomes `layer(x) + up(down(x))` (arXiv:2106.09685), so gradients, the optimizer's
state and the average of the weights are those of the thin matrices alone. What was trained is added
into the weights (`fused`), and written as a file that diffusers' `load_lora_weights` and our
`adapters` stage open (`save`). adapters.py is for LoRAs that somebody else has trained.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recipes.measure import share_structure

# The layers that LCM-LoRA changes (arXiv:2311.05556; diffusers' train_lcm_distill_lora_sd_wds.py),
# by how their paths end.
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""


class LowRank(nn.Module):
    """A layer with a LoRA of some rank; its alpha is the rank, so that nothing is scaled.

    At first it computes what the layer alone does: `up` is zero.
    """

    def __init__(self, base: Any, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down: nn.Conv2d | nn.Linear
        self.up: nn.Conv2d | nn.Linear
        is_convolution = isinstance(base, nn.Conv2d)
        if is_convolution:
            self.down = nn.Conv2d(
                base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False
            )
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """down and up, as files hold them."""
        return self.down.weight.detach(), self.up.weight.detach()


def added(unet: Any, rank: int, seed: int) -> Any:
    """A copy of a UNet with a LoRA at every target; its other tensors are the UNet's own."""
    student = share_structure(unet)
    endings = tuple(f".{target}" for target in TARGETS)
    paths = [path for path, _ in student.named_modules() if path.endswith(endings)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same on every process
        for path in paths:
            student.set_submodule(path, LowRank(student.get_submodule(path), rank))
    return student


def is_trained(name: str) -> bool:
    """Whether a parameter of what `added` gives is the LoRA's."""
    return name.endswith((".down.weight", ".up.weight"))


def layers(student: Any) -> dict[str, LowRank]:
    """The layers with a LoRA, by their path in the UNet."""
    return {path: part for path, part in student.named_modules() if isinstance(part, LowRank)}


@torch.no_grad()
def fused(student: Any, unet: Any) -> Any:
    """The UNet that the LoRA was added to, with the LoRA in its weights; the UNet is left alone."""
    plain = share_structure(unet)
    for path, layer in layers(student).items():
        down, up = layer.matrices()
        target = plain.get_submodule(path)
        before = target.weight
        change = (up.flatten(1) @ down.flatten(1)).view(before.shape)
        target.weight = nn.Parameter(before + change.to(before), requires_grad=False)
    return plain


def save(student: Any, folder: Path) -> None:
    """Write the LoRA alone as `FILE`, in peft's spelling; without alpha, which is then the rank."""
    tensors = {}
    for path, layer in layers(student).items():
        down, up = layer.matrices()
        tensors[f"unet.{path}.lora_A.weight"] = down.contiguous()
        tensors[f"unet.{path}.lora_B.weight"] = up.contiguous()
    save_file(tensors, folder / FILE, {"format": "pt"})
