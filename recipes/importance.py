"""How much each block of a UNet's channels matters: by its weights, or by what its output says.

magnitude: the L2 norm of what belongs to the channels. taylor: how far the UNet's output would move
without them, to first order: E |d out / d mask|^2, where a mask of 1 multiplies the channels where
they are read (Molchanov et al., arXiv 1906.10771, with the output's error in the place of a loss,
so that nothing but prompts is needed). Averaged over the steps that the recipe runs, as
Diff-Pruning averages over timesteps (Fang et al., arXiv 2305.10924).
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from recipes import drawn, prompts
from recipes.journal import digest_of, journal
from recipes.measure import latent_size, share_structure, with_modules
from recipes.schedulers import choose_scheduler
from recipes.schema import Recipe
from recipes.settings import ChannelSettings
from recipes.trainer import accelerator
from recipes.widths import Group, Part, groups

DRAW_STEPS = 10
"""Most steps that a picture is drawn in; each is looked at."""


def per_block(group: Group, parts: Iterable[Part], values: Callable[[str], Tensor]) -> Tensor:
    """Sums over what parts hold of each block of channels: (width / block,) float64.

    values: a tensor's key -> one value for each of its elements.
    """
    total = torch.zeros(group.width, dtype=torch.float64)
    for part in parts:
        tensor = values(part.key).movedim(part.axis, 0)
        sums = tensor.reshape(part.copies, group.width, -1).sum((0, 2), dtype=torch.float64)
        total += sums.cpu()
    return total.view(-1, group.block).sum(1)


def magnitude(unet: nn.Module) -> dict[str, Tensor]:
    """Module path -> the L2 norm of each block of channels."""
    weights = unet.state_dict()
    return {
        path: per_block(group, group.parts, lambda key: weights[key].square()).sqrt()
        for path, group in groups(unet).items()
    }


def taylor(
    unet: Any, pipeline: Any, settings: ChannelSettings, recipe: Recipe
) -> dict[str, Tensor]:
    """Module path -> the squared first-order change of the output without each block.

    Averaged over the calls of `unet` while it draws pictures as the recipe's schedule does, with
    the rest of `pipeline`. The square is estimated by random projections r of the output:
    E (r . d out / d mask)^2 = |d out / d mask|^2.
    """
    watched = _Watched(unet)
    schedule = recipe.schedule
    scheduler = choose_scheduler(pipeline.scheduler, schedule.scheduler)
    pipeline = with_modules(pipeline, {"unet": watched.unet, "scheduler": scheduler})
    pipeline.to(accelerator().device)
    said = prompts.drawer(settings.prompts, recipe)(np.random.default_rng(0), settings.samples)
    channels, size = unet.config.in_channels, latent_size(pipeline, recipe.height, recipe.width)
    steps, scale = min(schedule.steps, DRAW_STEPS), schedule.guidance_scale
    try:
        about = f"{type(scheduler).__name__} {sorted(scheduler.config.items())} {steps} {scale}"
        inputs = digest_of(unet, pipeline.text_encoder, f"{about} {size}")
        with journal("importance", inputs) as figure:
            for number, prompt in enumerate(
                tqdm(said, desc="importance", mininterval=2, leave=False)
            ):

                def one(number: int = number, prompt: str = prompt) -> dict[str, Any]:
                    generator = torch.Generator().manual_seed(number)
                    noise = torch.randn(1, channels, *size, generator=generator)
                    noise = noise.to(watched.unet.device)
                    watched.begin(number)
                    drawn.sample(pipeline, watched, [prompt], noise, steps, scale, generator)
                    return watched.told()

                watched.add(figure(f"{number} {prompt}", one))
    finally:
        pipeline.to("cpu")
    return watched.mean()


class _Watched:
    """A UNet that notes at each call how its output hangs on each block of channels."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet: Any = share_structure(unet, lambda tensor: tensor.detach())
        self.groups = groups(unet)
        keys = {group.read_by.key for group in self.groups.values()}
        self.weights = {key: w for key, w in self.unet.named_parameters() if key in keys}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.total = self._nothing()
        self.all_calls = 0
        self.begin(0)

    def _nothing(self) -> dict[str, Tensor]:
        return {
            path: torch.zeros(group.width // group.block, dtype=torch.float64)
            for path, group in self.groups.items()
        }

    def begin(self, number: int) -> None:
        """Begin with the picture of this number."""
        self.sums, self.calls = self._nothing(), 0
        self.generator = torch.Generator().manual_seed(number)

    def told(self) -> dict[str, Any]:
        """What was noted since, as JSON holds it."""
        sums = {path: values.tolist() for path, values in self.sums.items()}
        return {"calls": self.calls, "sums": sums}

    def add(self, told: dict[str, Any]) -> None:
        """Count a picture's notes."""
        self.all_calls += told["calls"]
        for path, values in told["sums"].items():
            self.total[path] += torch.tensor(values, dtype=torch.float64)

    def __call__(self, *inputs: Any) -> SimpleNamespace:
        with torch.enable_grad():
            out = self.unet(*inputs).sample
            towards = torch.randn(out.shape, generator=self.generator).to(out)
            gradients = torch.autograd.grad((out * towards).sum(), list(self.weights.values()))
        terms = {
            key: weight.detach() * gradient
            for (key, weight), gradient in zip(self.weights.items(), gradients, strict=True)
        }
        for path, group in self.groups.items():
            self.sums[path] += per_block(group, [group.read_by], terms.__getitem__).square()
        self.calls += 1
        return SimpleNamespace(sample=out.detach())

    def mean(self) -> dict[str, Tensor]:
        """Over all calls."""
        return {path: total / self.all_calls for path, total in self.total.items()}
