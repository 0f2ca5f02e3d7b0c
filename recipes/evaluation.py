"""The rows of an evaluation: after each stage, the same prompts drawn from the same noise.

The noise of picture i depends on (seed, i) alone. Every figure is measured, or says why it was not
run.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mobile_runtime.errors import UserError
from mobile_runtime.parity import SSIM_WINDOW
from mobile_runtime.pictures import write_png
from recipes import drawn, quality, schema
from recipes.features import Clip, Features
from recipes.losses import snr_db
from recipes.measure import latent_size, measure, with_modules
from recipes.pocket.evaluate import score
from recipes.pocket.scenes import Scene
from recipes.pocket.training import step_generator
from recipes.schedulers import choose_scheduler, with_steps
from recipes.schema import Recipe, Schedule
from recipes.stages import Applied
from recipes.trainer import accelerator

SHOWN = 8
"""Prompts on the sheet."""
PIXELS = 2**20
"""Of the pictures that are drawn together."""
NOISE, FRESH_NOISE = 7, 8
"""Streams of random numbers; the first is the one that recipes.pocket.evaluate draws from."""

REFERENCE = "this is the reference"

Figure = dict[str, Any]
"""{"value": number}, {"value": None, "equal": True} for infinite dB, or {"value": None,
"not_run": reason}; with what else belongs to the number."""


@dataclass(frozen=True)
class Judges:
    """What every row is measured with: opened, and tried, before any work."""

    prompts: list[str]
    scenes: list[Scene] | None
    clip: Clip | None
    features: Features | None
    texts: np.ndarray | None
    wanted_clip: np.ndarray | None
    wanted: np.ndarray | None
    seed: int


@dataclass(frozen=True)
class Drawn:
    """What one pipeline made of the prompts: latents (N, C, h, w), pictures (N, H, W, 3)."""

    latents: torch.Tensor
    pictures: np.ndarray
    clip: np.ndarray | None
    features: np.ndarray | None


def reference_schedule(
    recipe: Recipe, steps: int | None, guidance: float | None, scheduler: str | None
) -> Schedule:
    """The schedule that the pipeline draws with before any stage; None: the recipe's.

    Where the recipe distills, its schedule is the student's: the reference then has the guidance
    that is folded in, and 25 steps, or with method output as many as the student. LCM's scheduler
    without a distillation is for a LoRA: the reference then has 25 steps with guidance.
    """
    given = {"steps": steps, "guidance_scale": guidance, "scheduler": scheduler}
    chosen: dict[str, Any] = recipe.schedule.model_dump(exclude={"other_steps"})
    students = [stage.distill for stage in recipe.stages if stage.distill]
    if students:
        scale = students[0].guidance
        chosen["guidance_scale"] = max(scale) if isinstance(scale, tuple) else scale
        own = students[0].steps if students[0].method == "output" else Schedule().steps
        chosen["steps"] = own
    elif recipe.schedule.scheduler == "lcm":
        # A LoRA in the recipe makes it draw so; without it the pipeline draws as others do.
        chosen |= Schedule().model_dump(include={"scheduler", "steps", "guidance_scale"})
    return Schedule(**chosen | {key: value for key, value in given.items() if value is not None})


def schedule_after(recipe: Recipe, index: int, reference: Schedule) -> Schedule:
    """The schedule to draw with once the stages up to index have run."""
    students = [stage.distill for stage in recipe.stages if stage.distill]
    if not students:
        own = index >= 0 or recipe.schedule.scheduler != "lcm"
        return recipe.schedule if own else reference
    so_far = [stage.distill for stage in recipe.stages[: index + 1] if stage.distill]
    if not so_far:
        return reference
    return Schedule(scheduler="source", steps=so_far[-1].steps, guidance_scale=0.0)


def size_after(recipe: Recipe, index: int) -> tuple[int, int]:
    """Height and width to draw at once the stages up to index have run.

    Before a resolution stage the pipeline knows only the size that this stage starts from.
    """
    for stage in recipe.stages[index + 1 :]:
        if stage.resolution:
            return stage.resolution.drawn_at
    return recipe.height, recipe.width


def seen_stages(recipe: Recipe) -> list[int]:
    """The stages after which pictures are drawn: those that change the function, and the last."""
    last = len(recipe.stages) - 1
    return [
        index
        for index, stage in enumerate(recipe.stages)
        if index == last or stage.name not in schema.PRESERVING
    ]


def draw(
    pipeline: Any, schedule: Schedule, words: list[str], size: tuple[int, int], seed: int, told: str
) -> tuple[torch.Tensor, np.ndarray]:
    """Latents (N, C, h, w), float32 on the CPU, and pictures (N, H, W, 3) uint8, of prompts.

    size: height and width of a picture. Raises UserError where latents are not finite.
    """
    scheduler = choose_scheduler(pipeline.scheduler, schedule.scheduler)
    pipeline = with_modules(pipeline, {"scheduler": scheduler})
    device = accelerator().device
    shape = (pipeline.unet.config.in_channels, *latent_size(pipeline, *size))
    together = max(1, min(64, PIXELS // (size[0] * size[1])))
    latents, pictures = [], []
    pipeline.to(device)
    try:
        with tqdm(total=len(words), desc=told, unit="picture", delay=2) as bar:
            for start in range(0, len(words), together):
                rows = range(start, min(start + together, len(words)))
                noise = [torch.randn(shape, generator=step_generator(seed, i, NOISE)) for i in rows]
                # A list: each picture has a generator of its own (diffusers' randn_tensor).
                fresh: Any = [step_generator(seed, i, FRESH_NOISE) for i in rows]
                made = drawn.sample(
                    pipeline,
                    pipeline.unet,
                    [words[i] for i in rows],
                    torch.stack(noise).to(device),
                    schedule.steps,
                    schedule.guidance_scale,
                    fresh,
                )
                if not bool(made.isfinite().all()):
                    raise UserError(
                        f"{told}: the latents of prompt {start + 1} or one of the next "
                        f"{len(rows) - 1} hold NaN or Inf, so there is no picture to judge; look "
                        "at this stage's settings"
                    )
                latents.append(made.float().cpu())
                pictures.append(drawn.pictures(pipeline, made))
                bar.update(len(rows))
    finally:
        pipeline.to("cpu")
    return torch.cat(latents), np.concatenate(pictures)


def figures(judges: Judges, made: Drawn, reference: Drawn | None) -> dict[str, Figure]:
    """Every figure of a row. reference: None where the row is the reference."""
    return {
        "judged": _judged(judges, made),
        **_against(made, reference),
        "clip_score": _clip_score(judges, made),
        "cmmd": _cmmd(judges, made, reference),
        **_distances(judges, made),
    }


def not_run(reason: str) -> Figure:
    """A figure that there is not."""
    return {"value": None, "not_run": reason}


def _decibels(value: float) -> Figure:
    return {"value": None, "equal": True} if math.isinf(value) else {"value": value}


def _judged(judges: Judges, made: Drawn) -> Figure:
    if judges.scenes is None:
        return not_run("only the embedded model's own captions have a judge")
    result = score(made.pictures, judges.scenes)
    together = result["by"]["together"]
    return {"value": together["share"], "interval_95": list(together["interval_95"]), **result}


def _against(made: Drawn, reference: Drawn | None) -> dict[str, Figure]:
    names = ("psnr_db", "ssim", "latent_snr_db")
    if reference is None:
        return dict.fromkeys(names, not_run(REFERENCE))
    found = {"psnr_db": _decibels(quality.psnr_db(reference.pictures, made.pictures))}
    if min(made.pictures.shape[1:3]) < SSIM_WINDOW:
        found["ssim"] = not_run(f"the pictures are smaller than {SSIM_WINDOW} pixels")
    else:
        found["ssim"] = {"value": quality.ssim(reference.pictures, made.pictures)}
    found["latent_snr_db"] = _decibels(snr_db(reference.latents, made.latents))
    return found


def _clip_score(judges: Judges, made: Drawn) -> Figure:
    if made.clip is None or judges.texts is None:
        return not_run("give --clip")
    return {"value": quality.clip_score(made.clip, judges.texts)}


def _cmmd(judges: Judges, made: Drawn, reference: Drawn | None) -> Figure:
    if made.clip is None:
        return not_run("give --clip")
    if judges.wanted_clip is not None:
        value = quality.cmmd(made.clip, judges.wanted_clip)
        return {
            "value": value,
            "against": "pictures",
            "n": [len(made.clip), len(judges.wanted_clip)],
        }
    if reference is None or reference.clip is None:
        return not_run(REFERENCE)
    value = quality.cmmd(made.clip, reference.clip)
    return {"value": value, "against": "reference", "n": [len(made.clip), len(reference.clip)]}


def _distances(judges: Judges, made: Drawn) -> dict[str, Figure]:
    if made.features is None or judges.wanted is None or judges.features is None:
        return dict.fromkeys(("fid", "kid"), not_run("give --pictures, and --clip or --features"))
    if len(made.features) < 2:
        return dict.fromkeys(("fid", "kid"), not_run("takes two pictures at least"))
    kid = quality.kid(made.features, judges.wanted, judges.seed)
    basis = {
        "features": judges.features.info["id"],
        "dimensions": made.features.shape[1],
        "n": [len(made.features), len(judges.wanted)],
    }
    spread = {key: value for key, value in asdict(kid).items() if key != "mean"}
    return {
        "fid": {"value": quality.fid(made.features, judges.wanted), **basis},
        "kid": {"value": kid.mean, **spread, **basis},
    }


@dataclass
class Evaluation:
    """The rows so far, and the means to make the next."""

    recipe: Recipe
    judges: Judges
    reference_schedule: Schedule
    head: dict[str, Any]
    json: Path | None = None
    pictures_in: Path | None = None

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.references: dict[tuple[int, int], tuple[dict[str, Any], Drawn]] = {}
        """By size: the first row that was drawn at it, which later ones are held against."""
        self.shown: list[np.ndarray] = []

    def after(self, applied: Applied) -> None:
        """Draw and measure after the stages that have run, if their last is one to be seen."""
        index = len(applied.records) - 1
        if index in seen_stages(self.recipe):
            self.add(index, applied.pipeline)

    def add(self, index: int, pipeline: Any) -> None:
        """Draw and measure after stage `index`; -1: before any."""
        name = self.recipe.stages[index].name if index >= 0 else "source"
        schedule = self.reference_schedule
        if index >= 0:
            schedule = schedule_after(self.recipe, index, schedule)
        size = size_after(self.recipe, index)
        judges = self.judges
        latents, pictures = draw(pipeline, schedule, judges.prompts, size, judges.seed, name)
        made = Drawn(latents, pictures, *self._features(pictures))
        row = {
            "stage": name,
            "stages": [stage.name for stage in self.recipe.stages[: index + 1]],
            "size": list(size),
            "schedule": _told(pipeline, schedule),
            **_sizes(pipeline, size, schedule),
        }
        first, reference = self.references.get(size, (row, None))
        row["figures"] = figures(judges, made, reference)
        row["same_schedule"] = row["schedule"] == first["schedule"]
        self.references.setdefault(size, (row, made))
        self.rows.append(row)
        self.shown.append(pictures[:SHOWN].copy())
        self._save(pictures, f"{len(self.rows) - 1}-{name}")
        self.write()

    def _features(self, pictures: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        clip, features = self.judges.clip, self.judges.features
        of_clip = None if clip is None else clip.pictures(pictures, len(pictures))
        if features is None or features is clip:
            return of_clip, None if features is None else of_clip
        return of_clip, features.pictures(pictures, len(pictures))

    def _save(self, pictures: np.ndarray, name: str) -> None:
        if self.pictures_in is None:
            return
        for number, picture in enumerate(tqdm(pictures, desc="save pictures", delay=2)):
            text = {"prompt": self.judges.prompts[number], "seed": str(self.judges.seed)}
            write_png(self.pictures_in / name / f"{number:05d}.png", picture, text)

    def write(self, **more: Any) -> None:
        """The rows so far, so that a killed evaluation leaves those that it had."""
        if self.json is None:
            return
        data = {**self.head, "complete": False, "rows": self.rows, **more}
        text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        partial = self.json.with_name(f".{self.json.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.json)
        finally:
            partial.unlink(missing_ok=True)


def _told(pipeline: Any, schedule: Schedule) -> dict[str, Any]:
    scheduler = choose_scheduler(pipeline.scheduler, schedule.scheduler)
    return {
        "scheduler": type(scheduler).__name__,
        "steps": schedule.steps,
        "timesteps": with_steps(scheduler, schedule.steps).timesteps.tolist(),
        "guidance_scale": schedule.guidance_scale if schedule.guidance_scale > 1 else 0.0,
    }


def _sizes(pipeline: Any, size: tuple[int, int], schedule: Schedule) -> dict[str, Any]:
    guided = schedule.guidance_scale > 1
    components = measure(pipeline, *size, guided)
    macs = {name: part["macs"] for name, part in components.items()}
    return {
        "parameters": sum(part["parameters"] for part in components.values()),
        "macs_per_picture": (2 if guided else 1) * macs["text_encoder"]
        + schedule.steps * macs["unet"]
        + macs["vae_decoder"],
    }
