"""For a fixed schedule, the UNet's whole time path is a small table: one row for each timestep.

A resnet adds to its channels what its `time_emb_proj` makes of the timestep's embedding, and the
embedding depends on nothing but the timestep. So for the timesteps of the recipe's schedules the
sums are numbers, computed here once with the UNet's own modules: nothing is approximated, and the
sinusoid of 999, which float16 cannot compute, is gone.

The input `timestep` stays. The folded UNet compares it, in float32, with every timestep of the
schedules, and picks the row of the equal one. A graph cannot raise an error, so **off the schedule
every value of the output is NaN**, which every check of finiteness catches.

diffusers has no configuration for such a UNet: `unfolded` gives the ordinary one back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from torch import Tensor, nn
from torch.nn import functional as F

from mobile_runtime.errors import UserError
from recipes.measure import count_parameters, share_structure, with_modules
from recipes.schedulers import choose_scheduler, every_timestep
from recipes.schema import Recipe
from recipes.settings import FoldSettings
from recipes.work import Outcome, Work

# The keys of a UNet's configuration that put more than the timestep into its time path, and the
# values that leave it alone.
PLAIN = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
}


class ChosenStep(nn.Module):
    """Which of the schedule's timesteps the given one is."""

    def __init__(self, timesteps: Sequence[float]) -> None:
        super().__init__()
        # Numbers, no buffer: they stay float32 where the weights become float16.
        self.timesteps = tuple(timesteps)

    def forward(self, timestep: Tensor | float) -> Tensor:
        """timestep: a number, (), (1,) or (B,) -> (1 or B, steps) float32, a row of one 1.

        Off the schedule the row is all zero. Equal means equal in float32.
        """
        given = torch.as_tensor(timestep).to(torch.float32).reshape(-1, 1)
        known = torch.tensor(self.timesteps, dtype=torch.float32, device=given.device)
        return (given == known).to(torch.float32)


class AsItIs(nn.Module):
    """Stands where the time embedding was, which is in the table."""

    def forward(self, step: Tensor, condition: None = None) -> Tensor:
        """(B, steps) -> the same."""
        return step


class TimeRows(nn.Module):
    """What a resnet adds to its channels at each step."""

    def __init__(self, rows: Tensor) -> None:
        """rows: (steps, channels)."""
        super().__init__()
        self.columns = nn.Parameter(rows.T.contiguous(), requires_grad=False)

    def forward(self, step: Tensor) -> Tensor:
        """(B, steps), a row of one 1 -> (B, channels), exactly the row of that step."""
        return F.linear(step, self.columns)


@dataclass(frozen=True)
class Removed:
    """The time path of a UNet that was folded, by module path; outside of its tree of modules."""

    modules: dict[str, nn.Module]
    skip_time_act: dict[str, bool]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Removed":
        return self  # never changed, so copies of the UNet share it


class FoldedUNet(UNet2DConditionModel):
    """A UNet whose time path is a table. Made by `fold` alone; diffusers cannot save it."""

    removed: Removed

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As UNet2DConditionModel, and all NaN for a timestep off the schedule."""
        step = self.time_proj(timestep).to(sample.device)
        (out,) = super().forward(
            sample, step, encoder_hidden_states, *args, return_dict=False, **kwargs
        )
        found = step.sum(1)[:, None, None, None].to(out.dtype)
        out = out * (found / found)  # 1 / 1, or 0 / 0
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def get_time_embed(self, sample: Tensor, timestep: Any) -> Tensor:
        """timestep: the chosen step, which takes the embedding's place up to the resnets."""
        return timestep.to(sample.dtype)


def check(pipeline: Any, settings: FoldSettings, recipe: Recipe) -> None:
    """Refuse a UNet whose time path depends on more than the timestep."""
    unet = pipeline.unet
    if type(unet) is not UNet2DConditionModel:
        raise UserError(
            f"the time path of a {type(unet).__name__} cannot be folded, only that of a "
            "UNet2DConditionModel; leave the stage fold out"
        )
    found = [
        f"{key}: {unet.config[key]!r}"
        for key, plain in PLAIN.items()
        if unet.config.get(key, plain) != plain
    ]
    if not found and any(isinstance(part, ResnetBlockCondNorm2D) for part in unet.modules()):
        found = ["a norm that is conditioned on time"]
    if found:
        raise UserError(
            f"the UNet's time path has more in it than the timestep ({', '.join(found)}), which a "
            "table of the schedule's steps cannot hold; leave the stage fold out"
        )
    _timesteps(pipeline, recipe)


def reshape(pipeline: Any, settings: FoldSettings, recipe: Recipe) -> Any:
    """The pipeline with the shapes of a folded UNet."""
    return with_modules(pipeline, {"unet": fold(pipeline.unet, _timesteps(pipeline, recipe))})


def run(pipeline: Any, settings: FoldSettings, work: Work) -> Outcome:
    """Fold the UNet for all schedules of the recipe.

    The record: the timesteps, and the parameters of the time path and of the table in its place.
    Raises UserError where the table is not finite.
    """
    timesteps = _timesteps(pipeline, work.recipe)
    folded = fold(pipeline.unet, timesteps)
    tables = [part for part in folded.modules() if isinstance(part, TimeRows)]
    if not all(bool(table.columns.isfinite().all()) for table in tables):
        raise UserError(
            "the UNet's time path makes NaN or Inf of the schedule's timesteps; the source's files "
            "are damaged"
        )
    record = {
        "timesteps": list(timesteps),
        "time_path_parameters": sum(map(count_parameters, folded.removed.modules.values())),
        "table_parameters": sum(map(count_parameters, tables)),
    }
    return Outcome(with_modules(pipeline, {"unet": folded}), record=record)


def fold(unet: UNet2DConditionModel, timesteps: Sequence[float]) -> FoldedUNet:
    """A copy of the UNet, sharing its tensors, that knows these timesteps alone."""
    folded: Any = share_structure(unet)
    removed = Removed({"time_proj": folded.time_proj, "time_embedding": folded.time_embedding}, {})
    resnets: dict[str, Any] = {
        path: part for path, part in folded.named_modules() if isinstance(part, ResnetBlock2D)
    }
    weight = folded.time_embedding.linear_1.weight
    with torch.no_grad():
        given = torch.tensor(timesteps, dtype=torch.float32, device=weight.device)
        embedding = folded.time_embedding(folded.time_proj(given).to(weight.dtype))
        for path, resnet in resnets.items():
            if resnet.time_emb_proj is not None:
                removed.modules[f"{path}.time_emb_proj"] = resnet.time_emb_proj
                removed.skip_time_act[path] = resnet.skip_time_act
                seen = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
                resnet.time_emb_proj = TimeRows(resnet.time_emb_proj(seen))
                resnet.skip_time_act = True
    folded.time_proj = ChosenStep(timesteps)
    folded.time_embedding = AsItIs()
    folded.removed = removed
    folded.__class__ = FoldedUNet  # the same attributes, another forward
    return folded


def unfolded(module: nn.Module) -> nn.Module:
    """The ordinary UNet that a folded one was made of, sharing its tensors; others as they are."""
    if not isinstance(module, FoldedUNet):
        return module
    unet: Any = share_structure(module)
    for path, part in unet.removed.modules.items():
        unet.set_submodule(path, part)
    for path, skip in unet.removed.skip_time_act.items():
        unet.get_submodule(path).skip_time_act = skip
    del unet.removed
    unet.__class__ = UNet2DConditionModel
    return unet


def _timesteps(pipeline: Any, recipe: Recipe) -> tuple[float, ...]:
    scheduler = choose_scheduler(pipeline.scheduler, recipe.schedule.scheduler)
    return every_timestep(scheduler, recipe.schedule.every_steps)
