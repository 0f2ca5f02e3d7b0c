"""Distillation: a student of few steps without guidance, or a pruned one, from the UNet before it.

Three methods: `progressive` (arXiv:2202.00512) halves the steps of the teacher's DDIM again and
again; `lcm` (arXiv:2310.04378) learns a consistency model; both noise pictures that the teacher
draws first. `output` takes an already few-step teacher along its own trajectory, and needs prompts
and noise only; with `feature_weight` the student's blocks learn from the teacher's (BK-SDM,
arXiv:2305.15798). With `lora_rank` the student is the UNet with a LoRA, which alone is trained
(LCM-LoRA, arXiv:2311.05556); the result has it in its weights, and it is kept as a file, too.

The command runs a recipe's stages alone, also on several GPUs or nodes:
`accelerate launch -m recipes.distill --recipe NAME --output FOLDER`.
"""

if __name__ == "__main__":
    # Before the imports below, which would chatter.
    from recipes.quiet import import_torch

    import_torch("train", "training")

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mobile_runtime.errors import UserError
from mobile_runtime.report import check_writable
from recipes import drawn, low_rank, prompts, widths
from recipes.component_folder import attend_as_opened
from recipes.losses import (
    Denoise,
    Noise,
    check_fit,
    latent_consistency,
    progressive,
)
from recipes.measure import latent_size, with_modules
from recipes.schedulers import with_steps
from recipes.schema import Recipe
from recipes.settings import DistillSettings
from recipes.trainer import Batch, Job, Loss, accelerator, beside, copied, train
from recipes.trajectory import Trajectory
from recipes.work import TRAINING, Outcome, Work, kept_at

SOLVER_STEPS, FINER_STEPS = 50, 40
WATCHED = 8


def check(pipeline: Any, settings: DistillSettings, recipe: Recipe) -> None:
    """Refuse, before any work, what cannot be distilled."""
    prompts.check_training(settings, recipe)
    noise = Noise.of(pipeline.scheduler, torch.device("cpu"))
    if settings.method == "output":
        own = type(pipeline.scheduler).__name__
        if own not in ("DDIMScheduler", "EulerDiscreteScheduler"):
            raise UserError(
                f"method output walks the teacher's own steps, and {own} adds noise or looks back "
                "at them; use progressive or lcm"
            )
    else:
        with_steps(pipeline.scheduler, settings.draw_steps)
    total = noise.last + 1
    divisors = {
        "steps": settings.steps,
        "teacher_steps": solver_steps(settings) if settings.method == "lcm" else 1,
    }
    for key, value in divisors.items():
        if total % value:
            raise UserError(f"{key}: {value} does not divide the schedule's {total} timesteps")
    if settings.method == "lcm" and solver_steps(settings) % settings.steps:
        raise UserError(
            f"teacher_steps: {solver_steps(settings)} is no multiple of steps "
            f"({settings.steps}); give {FINER_STEPS}"
        )
    if noise.prediction == "epsilon" and float(noise.alphas_cumprod[-1]) < 1e-6:
        raise UserError(
            "the pipeline predicts epsilon at a zero terminal SNR, which says nothing of the "
            "picture; it cannot be distilled"
        )


def solver_steps(settings: DistillSettings) -> int:
    """As the LCM's paper has it, or the next number below that steps of 4 and 8 divide, too."""
    usual = FINER_STEPS if SOLVER_STEPS % settings.steps else SOLVER_STEPS
    return settings.teacher_steps or usual


def reshape(pipeline: Any, settings: DistillSettings, recipe: Recipe) -> Any:
    """The pipeline with the scheduler that the student is trained for."""
    return with_modules(pipeline, {"scheduler": scheduler_after(pipeline.scheduler, settings)})


def scheduler_after(scheduler: Any, settings: DistillSettings) -> Any:
    """DDIM with trailing timesteps after `progressive`, LCM's after `lcm`, else as it was."""
    import diffusers

    if settings.method == "output":
        return scheduler
    own: dict[str, Any] = {"set_alpha_to_one": True, "clip_sample": False, "steps_offset": 1}
    if settings.method == "progressive":
        own["timestep_spacing"] = "trailing"
        return diffusers.DDIMScheduler.from_config(scheduler.config, **own)
    own |= {"timestep_spacing": "leading", "original_inference_steps": solver_steps(settings)}
    return diffusers.LCMScheduler.from_config(scheduler.config, **own)


def run(pipeline: Any, settings: DistillSettings, work: Work) -> Outcome:
    """Train the student; see the module's head for the methods.

    pipeline: its UNet is where the student begins (pruned, say); work.teacher is what it learns
    from. Returns the pipeline with the student's averaged weights and its scheduler.
    """
    check_fit(work.teacher, pipeline.unet)
    training = _Training(pipeline, settings, work)
    methods: dict[str, Callable[[], Any]] = {
        "progressive": training.by_halving,
        "lcm": training.by_consistency,
        "output": training.by_output,
    }
    try:
        student = methods[settings.method]()
    finally:
        # Where the next stage looks for them.
        training.pipeline.to("cpu")
        pipeline.to("cpu")
    lora = {}
    if settings.lora_rank is not None:
        if accelerator().is_main_process:
            low_rank.save(student, work.folder)
        lora = {"lora": {"rank": settings.lora_rank, "layers": len(low_rank.layers(student))}}
        student = low_rank.fused(student, pipeline.unet)
    attend_as_opened(student)
    student.requires_grad_(False)
    record = {
        "method": settings.method,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "optimizer_steps": settings.iterations,
        "batch": settings.batch * settings.accumulate,
        **lora,
        **widths.told(student),
    }
    modules = {"unet": student, "scheduler": scheduler_after(pipeline.scheduler, settings)}
    return Outcome(with_modules(pipeline, modules), record=record)


class _Training:
    """What the methods share: teacher, text, noise, pictures."""

    def __init__(self, pipeline: Any, settings: DistillSettings, work: Work) -> None:
        self.settings, self.work = settings, work
        self.device = accelerator().device
        self.pipeline = with_modules(pipeline, {"unet": work.teacher}).to(self.device)
        rank = settings.lora_rank
        self.trainable = low_rank.is_trained if rank else (lambda name: True)
        self.student: Any = (
            low_rank.added(pipeline.unet, rank, settings.seed)
            if rank
            else copy.deepcopy(pipeline.unet)
        )
        self.teacher: Any = work.teacher
        self.noise = Noise.of(pipeline.scheduler, self.device)
        self.size = latent_size(pipeline, work.recipe.height, work.recipe.width)
        self.draw_prompts = prompts.emphasized(settings, work.recipe)
        self.empty = drawn.text_states(self.pipeline, [""])
        self.scheduler = scheduler_after(pipeline.scheduler, settings)

    def by_halving(self) -> Any:
        """Rounds of progressive distillation; the first folds the guidance in."""
        teacher, guidance = self.teacher, _range(self.settings.guidance)[1]
        student, steps = self.student, self.settings.halve_from // 2
        data = self.pictures()
        while True:
            student = self.halve(teacher, guidance, student, steps, data)
            if steps == self.settings.steps:
                return student
            steps, guidance = steps // 2, 1.0
            teacher, student = student.to(self.device), copied(student, self.trainable)

    def halve(
        self, teacher: Any, guidance: float, student: Any, steps: int, data: tuple[Any, Any]
    ) -> Any:
        """One round, to a student of `steps` steps."""

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            x0, states, eps, rng = self.noised(batch, *data)
            at = torch.from_numpy(rng.integers(steps, size=batch.size)).to(self.device)
            theirs = self.guided(teacher, states, guidance)
            return progressive(self.noise, _calls(module, states), theirs, x0, eps, steps, at)

        return self.train(f"progressive-{steps}", student, loss, steps)

    def by_consistency(self) -> Any:
        """Latent consistency, whose target is the average of the weights.

        The paper tells its student the guidance scale w by an embedding, and so can draw with any.
        Here, as for LCM-LoRA, the student is told nothing: where w is drawn from a range, it
        settles in between, and draws with that one strength of guidance.
        """
        said, latents = self.pictures()
        solver = solver_steps(self.settings)

        def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
            x0, states, eps, rng = self.noised(batch, said, latents)
            at = torch.from_numpy(rng.integers(solver, size=batch.size)).to(self.device)
            low, high = _range(self.settings.guidance)
            drawn_scales = torch.from_numpy(rng.uniform(low, high, batch.size)).float()
            scale = drawn_scales.to(self.device)[:, None, None, None]
            teacher = self.guided(self.teacher, states, scale if high > 1 else 1.0)
            student, target = _calls(module, states), _calls(batch.average, states)
            return latent_consistency(self.noise, student, target, teacher, x0, eps, solver, at)

        return self.train("lcm", self.student, loss, self.settings.steps)

    def by_output(self) -> Any:
        """The teacher's output, and its blocks', along the teacher's own few steps."""
        trajectory = Trajectory(
            pipeline=self.pipeline,
            teacher=self.teacher,
            scheduler=self.scheduler,
            steps=(self.settings.steps,),
            size=self.size,
            draw_prompts=self.draw_prompts,
            teacher_guidance=_range(self.settings.guidance)[1],
            student_guidance=1.0,
        )
        loss = partial(trajectory.loss, feature_weight=self.settings.feature_weight)
        return self.train("output", self.student, loss, self.settings.steps)

    def pictures(self) -> tuple[list[str], torch.Tensor]:
        """Prompts, and the latents that the teacher draws of them."""
        with accelerator().main_process_first():
            return drawn.draw(
                self.pipeline,
                self.draw_prompts,
                self.settings.pictures,
                self.size,
                steps=self.settings.draw_steps,
                scale=max(_range(self.settings.guidance)),
                seed=self.settings.seed,
                folder=self.work.folder / "drawn",
                key=self.work.key,
            )

    def noised(
        self, batch: Batch, said: list[str], latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.random.Generator]:
        """x0, text states and noise of a batch, and the random numbers that come after."""
        rng = batch.rng()
        rows = rng.integers(len(said), size=batch.size)
        states = drawn.text_states(self.pipeline, [said[row] for row in rows])
        x0 = latents[torch.from_numpy(rows)].to(self.device)
        eps = torch.randn(x0.shape, generator=batch.generator()).to(self.device)
        return x0, states, eps, rng

    def guided(self, unet: Any, states: torch.Tensor, scale: float | torch.Tensor) -> Denoise:
        """A UNet under guidance; a scale of 1 or less: without."""
        without = isinstance(scale, float) and scale <= 1
        empty = None if without else self.empty
        return lambda x, t: drawn.guided(unet, x, t, states, empty, scale).float()

    def train(self, name: str, module: Any, loss: Loss, steps: int) -> Any:
        """Train one module, watched by pictures of the same prompts and noise."""
        from diffusers.models.attention_processor import AttnProcessor

        if self.settings.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        if self.device.type == "cpu":
            # The fused attention's backward pass costs more there than all else together.
            module.set_attn_processor(AttnProcessor())
        key, folder = self.work.key, self.work.folder
        show = partial(self.show, steps=steps)
        job = Job(name, module, loss, self.settings, folder, key, show, self.trainable)
        average = train(job)
        if self.settings.gradient_checkpointing:
            average.disable_gradient_checkpointing()
        return average

    def show(self, unet: Any, steps: int) -> np.ndarray:
        """The student's pictures above; below, the teacher's as it draws its own."""
        settings, generator = self.settings, torch.Generator().manual_seed(self.settings.seed)
        words = self.draw_prompts(np.random.default_rng([settings.seed, 22]), WATCHED)
        shape = (WATCHED, self.pipeline.unet.config.in_channels, *self.size)
        noise = torch.randn(shape, generator=generator).to(self.device)
        student = with_modules(self.pipeline, {"scheduler": self.scheduler})
        mine = drawn.sample(student, unet, words, noise, steps, 1.0, generator)
        scale = _range(settings.guidance)[1]
        own = settings.steps if settings.method == "output" else settings.draw_steps
        theirs = drawn.sample(self.pipeline, self.teacher, words, noise, own, scale, generator)
        return beside([drawn.pictures(self.pipeline, latents) for latents in (mine, theirs)])


def _calls(unet: nn.Module, states: torch.Tensor) -> Denoise:
    return lambda x, t: unet(x, t, states).sample


def _range(guidance: float | tuple[float, float]) -> tuple[float, float]:
    return guidance if isinstance(guidance, tuple) else (guidance, guidance)


def main(argv: list[str]) -> int:
    """Run a recipe's stages, and save the pipeline that they leave."""
    import argparse

    from recipes import overrides, schema, stages
    from recipes.sources import check_resolution, open_source

    parser = argparse.ArgumentParser(
        prog="python -m recipes.distill",
        description="Run a recipe's stages alone, and save the result as a diffusers folder.",
        epilog="examples:\n  python -m recipes.distill --recipe pocket_turbo --output turbo\n"
        "  accelerate launch -m recipes.distill --recipe my_recipe.yaml --output small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="or a .yaml file")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder"
    )
    overrides.add_arguments(parser)
    arguments = parser.parse_args(argv)
    recipe = schema.load(arguments.recipe, overrides.from_arguments(arguments))
    if arguments.output.exists():
        raise UserError(f"{arguments.output} already exists; choose another --output")
    check_writable(arguments.output.absolute().parent)
    source = recipe.source
    outline = open_source(source.model, source.revision, weights=False).pipeline
    check_resolution(outline, recipe.height, recipe.width)
    stages.check(outline, recipe)
    pipeline = open_source(source.model, source.revision).pipeline
    where = accelerator()
    applied = stages.apply(pipeline, recipe, progress=lambda name: where.print(f"stage {name}"))
    where.wait_for_everyone()  # who comes late finds no --output yet
    if where.is_main_process:
        stages.save(applied.pipeline, applied.plans, arguments.output, applied.records)
        print(
            f"the pipeline is in {arguments.output}, what each stage did in {stages.RECORDS} there"
        )
        if (arguments.output / "unet" / widths.FILE).is_file():
            print(f"its unet/{widths.FILE}: {widths.NOTE}")
        for file in _save_loras(applied.records, arguments.output):
            print(f"the LoRA that was trained, already in these weights, is in {file}")
    where.end_training()
    return 0


def _save_loras(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Copy what stages with a `lora_rank` trained into a folder, numbered from the second on."""
    results = [kept_at(record["result"]) for record in records if "lora" in record]
    # Of a stage that was not needed, the result may be gone.
    trained = [kept for kept in results if (kept / TRAINING / low_rank.FILE).is_file()]
    copies = []
    for number, kept in enumerate(trained, start=1):
        name = Path(low_rank.FILE)
        copy_to = folder / (f"{name.stem}_{number}{name.suffix}" if number > 1 else name)
        shutil.copyfile(kept / TRAINING / name, copy_to)
        copies.append(copy_to)
    return copies


if __name__ == "__main__":
    import sys

    from mobile_runtime.errors import run_cli

    sys.exit(run_cli(main))
