"""Quantization-aware fine-tuning: the UNet's float weights, trained for the integers to come.

The stage makes the plan and the calibration of the `quantize` stage that follows it, on a copy, and
trains the UNet while it computes through that rounding (straight_through.py), to give what the
float UNet gave along the steps of the recipe's schedule (trajectory.py). What it leaves is an
ordinary float UNet; the quantize stage then plans and calibrates anew. Of the components only the
UNet is tuned: it runs once a step, and its errors add up; the text encoder and the decoder, which
run once, are quantized as they are.
"""

import copy
import fnmatch
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mobile_runtime.errors import UserError
from recipes import drawn, fold, prompts, quantize
from recipes.component_folder import attend_as_opened
from recipes.losses import snr_db
from recipes.measure import latent_size, share_structure, with_modules
from recipes.schedulers import choose_scheduler
from recipes.schema import Recipe
from recipes.settings import FinetuneSettings, QuantizeSettings
from recipes.straight_through import plain, round_as
from recipes.trainer import Batch, Job, accelerator, beside, train
from recipes.trajectory import Trajectory
from recipes.work import Outcome, Work

WATCHED = 8
MEASURED = 4
"""Batches of WATCHED pictures each, on which the output's SNR is measured before and after."""


def check(pipeline: Any, settings: FinetuneSettings, recipe: Recipe) -> None:
    """Refuse, before any work, a quantization without a gradient, or with nothing to tune."""
    prompts.check_training(settings, recipe)
    asked = _quantization(recipe)
    if "int4" in asked.every_weights:
        # Their float branch is made anew of the tuned weights, which undoes what was trained.
        raise UserError(
            "it trains for int8 weights, and the quantize stage asks for int4; leave finetune out, "
            "or quantize to int8"
        )
    if "unet" not in asked.components:
        raise UserError(
            "it tunes the UNet, which the components of the quantize stage leave out; add unet "
            "there, or leave finetune out"
        )
    pipeline = _folded(pipeline, recipe)
    plans = quantize.make_plan(pipeline, _of_the_unet(pipeline, asked), recipe)
    if all(plan.weights == "float32" for plan in plans):
        raise UserError(
            "it tunes the UNet, of which the quantize stage's rules keep every layer in float; "
            "leave finetune out"
        )


def _quantization(recipe: Recipe) -> QuantizeSettings:
    """The settings of the stage that it trains for, which every recipe with it has (schema.py)."""
    (found,) = [stage.quantize for stage in recipe.stages if stage.quantize]
    return found


def _of_the_unet(pipeline: Any, settings: QuantizeSettings) -> QuantizeSettings:
    """The same, for the UNet alone."""
    layers = quantize.quantizable_layers(pipeline, ["unet"])
    rules = tuple(rule for rule in settings.rules if fnmatch.filter(layers, rule.layers))
    return settings.model_copy(update={"components": ("unet",), "rules": rules})


def _folded(pipeline: Any, recipe: Recipe) -> Any:
    """The pipeline after the recipe's fold stage, if it has one, sharing tensors.

    The time path is then in a table and stays float; all other layers keep their paths.
    """
    for stage in recipe.stages:
        if stage.fold:
            fold.check(pipeline, stage.fold, recipe)
            pipeline = fold.reshape(pipeline, stage.fold, recipe)
    return pipeline


def run(pipeline: Any, settings: FinetuneSettings, work: Work) -> Outcome:
    """Train a copy of the UNet; the pipeline's own is the teacher, and stays as it is.

    The record has the SNR in dB of the rounded UNet's output against the teacher's, before and
    after, over calls that the training does not draw, with the scales that it trained with.
    """
    student: Any = copy.deepcopy(pipeline.unet)
    layers = round_as(student, _quantized_unet(pipeline, work.recipe))
    device = accelerator().device
    pipeline.to(device)
    try:
        lesson = _Lesson(pipeline, settings, work)
        before = lesson.snr_db(student.to(device))
        tuned = lesson.train(student)
        after = lesson.snr_db(tuned.to(device))
    finally:
        pipeline.to("cpu")
    plain(tuned.to("cpu"))
    record = {
        "optimizer_steps": settings.iterations,
        "batch": settings.batch * settings.accumulate,
        "layers": layers,
        "output_snr_db_before": before,
        "output_snr_db_after": after,
    }
    return Outcome(
        with_modules(pipeline, {"unet": tuned.requires_grad_(False).eval()}), record=record
    )


def _quantized_unet(pipeline: Any, recipe: Recipe) -> Any:
    """What the quantize stage would make of the UNet as it is now."""
    pipeline = _folded(pipeline, recipe)
    own = with_modules(pipeline, {"unet": share_structure(pipeline.unet)})
    quantized, _, _ = quantize.run(own, _of_the_unet(own, _quantization(recipe)), recipe)
    return quantized.unet


class _Lesson:
    """The teacher's steps, and the training along them."""

    def __init__(self, pipeline: Any, settings: FinetuneSettings, work: Work) -> None:
        self.settings, self.work, self.recipe = settings, work, work.recipe
        self.device = accelerator().device
        self.schedule = work.recipe.schedule
        self.scheduler = choose_scheduler(pipeline.scheduler, self.schedule.scheduler)
        self.pipeline = with_modules(pipeline, {"scheduler": self.scheduler})
        self.trajectory = Trajectory(
            pipeline=self.pipeline,
            teacher=pipeline.unet,
            scheduler=self.scheduler,
            steps=self.schedule.every_steps,
            size=latent_size(pipeline, self.recipe.height, self.recipe.width),
            draw_prompts=prompts.emphasized(settings, self.recipe),
            teacher_guidance=self.schedule.guidance_scale,
            student_guidance=self.schedule.guidance_scale,
        )

    def train(self, student: Any) -> Any:
        """The average of the trained weights, in a UNet that still rounds."""
        from diffusers.models.attention_processor import AttnProcessor

        settings, work = self.settings, self.work
        if settings.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if self.device.type == "cpu":
            # The fused attention's backward pass costs more there than all else together.
            student.set_attn_processor(AttnProcessor())
        loss = partial(self.trajectory.loss, feature_weight=settings.feature_weight)
        tuned = train(Job("finetune", student, loss, settings, work.folder, work.key, self.show))
        if settings.gradient_checkpointing:
            tuned.disable_gradient_checkpointing()
        attend_as_opened(tuned)
        return tuned

    @torch.no_grad()
    def snr_db(self, student: Any) -> float:
        """Of the student's output, all along the schedule, on pictures that are not trained on."""
        theirs, mine = [], []
        usual = prompts.drawer(self.settings.prompts, self.recipe)
        trajectory = replace(self.trajectory, draw_prompts=usual)
        places = trajectory.places
        for step in range(MEASURED):
            batch = Batch(self.settings.seed + 1, step, 0, 0, WATCHED, self.device, student)
            call = trajectory.call(batch, places[step * len(places) // MEASURED])
            theirs.append(call.out)
            mine.append(trajectory.answer(student, call))
        return round(snr_db(torch.cat(theirs), torch.cat(mine)), 2)

    def show(self, unet: Any) -> np.ndarray:
        """Pictures of the UNet that rounds above, of the float one below."""
        settings = self.settings
        words = self.trajectory.draw_prompts(np.random.default_rng([settings.seed, 22]), WATCHED)
        shape = (WATCHED, unet.config.in_channels, *self.trajectory.size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
        rows = []
        for one in (unet, self.trajectory.teacher):
            generator = torch.Generator().manual_seed(settings.seed + 1)
            latents = drawn.sample(
                self.pipeline,
                one,
                words,
                noise.to(self.device),
                self.schedule.steps,
                self.schedule.guidance_scale,
                generator,
            )
            rows.append(drawn.pictures(self.pipeline, latents))
        return beside(rows)
