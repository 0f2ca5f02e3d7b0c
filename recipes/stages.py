"""The table of stages, and `apply`: torch in, torch out, in the recipe's order.

A stage is a row here, a settings type in settings.py, and the module of its name. Its result is an
ordinary pipeline that `save` writes as a diffusers folder, the quantization plan beside it.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mobile_runtime.bundle import open_to_others
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes import (
    adapters,
    component_folder,
    decoder,
    distill,
    finetune,
    fold,
    probe,
    prune,
    quantize,
    resolution,
)
from recipes.measure import latent_size, measure, outline, with_modules
from recipes.quantized_layers import dequantized
from recipes.schedulers import choose_scheduler, every_timestep
from recipes.schema import PRESERVING, Recipe, Stage
from recipes.work import Done, Outcome, Work

PLAN, RECORDS = "quantization_plan.json", "stages.json"
SUPERSEDED = "not needed: what was trained from it is kept"


def _nothing_to_check(pipeline: Any, settings: Any, recipe: Recipe) -> None:
    """For a stage that takes every pipeline."""


def _same_shape(pipeline: Any, settings: Any, recipe: Recipe) -> Any:
    """For a stage that changes no shape."""
    return pipeline


@dataclass(frozen=True)
class StageFunctions:
    """What a stage does. `check` and `reshape` are cheap, and work on the meta device.

    check(pipeline, settings, recipe) raises UserError. reshape(pipeline, settings, recipe) gives
    the pipeline with the shapes and the scheduler that `run` would leave. run(pipeline, settings,
    work) may work for hours, and leaves the modules that it was given as they were unless the stage
    is the quantization.
    trained: the components that a stage trains; its result is kept (work.py), and found again.
    changes: of another stage, the components that it changes and that a later training may replace.
    """

    run: Callable[[Any, Any, Work], Outcome]
    check: Callable[[Any, Any, Recipe], None] = _nothing_to_check
    reshape: Callable[[Any, Any, Recipe], Any] = _same_shape
    trained: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


STAGES: dict[str, StageFunctions] = {
    "adapters": StageFunctions(
        check=adapters.check, run=adapters.run, changes=("unet", "text_encoder")
    ),
    "prune": StageFunctions(
        check=prune.check, reshape=prune.reshape, run=prune.run, changes=("unet",)
    ),
    "resolution": StageFunctions(
        check=resolution.check, run=resolution.run, trained=("unet", "vae")
    ),
    "distill": StageFunctions(
        check=distill.check,
        reshape=distill.reshape,
        run=distill.run,
        trained=("unet", "scheduler"),
    ),
    "decoder": StageFunctions(
        check=decoder.check, reshape=decoder.reshape, run=decoder.run, trained=("vae",)
    ),
    "finetune": StageFunctions(check=finetune.check, run=finetune.run, trained=("unet",)),
    "fold": StageFunctions(check=fold.check, reshape=fold.reshape, run=fold.run),
    "quantize": StageFunctions(
        check=quantize.check,
        run=lambda pipeline, settings, work: Outcome(
            *quantize.run(pipeline, settings, work.recipe)
        ),
    ),
}


def check(pipeline: Any, recipe: Recipe, chosen: Sequence[Stage] | None = None) -> Any:
    """Check every stage before any of them works, each on what those before it would leave.

    chosen: some of the recipe's stages; all of them by default. Returns that pipeline, on the meta
    device, after all stages. UserError tells all faults, up to the first stage that would change
    shapes and cannot.
    """
    pipeline = outline(pipeline)
    faults = []
    for index, stage in enumerate(recipe.stages if chosen is None else chosen):
        functions = STAGES[stage.name]
        try:
            functions.check(pipeline, stage.settings, recipe)
            pipeline = functions.reshape(pipeline, stage.settings, recipe)
        except UserError as error:
            faults.append(f"stages.{index}.{stage.name}: {error}")
            if functions.reshape is not _same_shape:
                break
    if faults:
        raise UserError("; ".join(faults))
    return pipeline


def plan(pipeline: Any, recipe: Recipe) -> list[LayerPlan]:
    """What the quantization would decide for each layer of the pipeline that `check` returns."""
    return [
        entry
        for stage in recipe.stages
        if stage.quantize
        for entry in quantize.make_plan(pipeline, stage.quantize, recipe)
    ]


def changing(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages whose result computes something else, and has to be judged by its quality."""
    return tuple(stage for stage in recipe.stages if stage.name not in PRESERVING)


def preserving(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages whose result should compute the same; they come last."""
    return tuple(stage for stage in recipe.stages if stage.name in PRESERVING)


@dataclass
class Applied:
    """A pipeline after stages: the records of each, and the quantization plan."""

    pipeline: Any
    records: list[dict[str, Any]] = field(default_factory=list)
    plans: list[LayerPlan] = field(default_factory=list)


def apply(
    pipeline: Any,
    recipe: Recipe,
    chosen: Sequence[Stage] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    cache: Path | None = None,
    seen: Callable[[Applied], object] | None = None,
) -> Applied:
    """Run stages in order, on a pipeline that may be changed in place.

    chosen: some of the recipe's stages, in its order, where those before them have run; all of
    them by default. progress: called with each stage's name before it runs. cache: where trained
    results are kept, and found again (work.py has the default). seen: called after each stage with
    what there is so far; later stages may change its pipeline. Unless somebody looks, a stage is
    skipped whose result only led to a trained one that is kept. Raises UserError before any stage
    works.
    """
    chosen = recipe.stages if chosen is None else chosen
    check(pipeline, recipe, chosen)
    applied = Applied(pipeline)
    keeps = any(STAGES[stage.name].trained for stage in chosen)
    done = Done.before(pipeline, recipe, cache, keeps)
    teacher = pipeline.unet
    before = _measure(pipeline, recipe)
    looked = (-1, "source", _look(pipeline, recipe)) if chosen else None
    kept = done.kept(chosen) if keeps else [False] * len(chosen)
    needless = _needless(chosen, kept) if seen is None else set()
    done.check_ready(
        chosen,
        [
            bool(STAGES[stage.name].trained) and not kept[index] and index not in needless
            for index, stage in enumerate(chosen)
        ],
    )
    for index, stage in enumerate(chosen):
        progress(stage.name)
        functions = STAGES[stage.name]
        if index in needless:
            done.add(stage)
            applied.records.append({"stage": stage.name, "trained": SUPERSEDED})
            continue
        with done.work(stage, functions.trained, teacher) as work:
            found = work.found(applied.pipeline)
            outcome = found or functions.run(applied.pipeline, stage.settings, work)
            seen_now = _look(outcome.pipeline, recipe)
            record = _with_quality(outcome.record, looked, seen_now, index)
            outcome = replace(outcome, record=record)
            if found is None:
                work.keep(outcome, applied.records)
        for place, told in enumerate(outcome.earlier):
            # A stage that was skipped did the same when this result was made; one that ran after
            # it was measured without what the skipped one left.
            if applied.records[place].get("trained") == SUPERSEDED:
                applied.records[place] = {**told, "trained": SUPERSEDED}
            elif "before" in told:
                applied.records[place] |= {key: told[key] for key in ("before", "after")}
            before = told.get("after", before)
        applied.pipeline = outcome.pipeline
        applied.plans += outcome.plans
        after = _measure(outcome.pipeline, recipe)
        record = {"stage": stage.name, **outcome.record, "before": before, "after": after}
        looked = (index, stage.name, seen_now)
        if work.kept is not None:
            record["result"] = work.kept.name
        applied.records.append(record)
        before = after
        if stage.distill or stage.resolution:
            teacher = outcome.pipeline.unet
        if seen is not None:
            seen(applied)
    return applied


def _with_quality(
    record: Mapping[str, Any], before: tuple[int, str, probe.Seen] | None, now: probe.Seen, at: int
) -> dict[str, Any]:
    """The record of the stage at index `at`, with the SNR of each component's output to before it.

    before: the index and name of the last stage that ran, and what came of it. Where others lie
    between, which a kept result made needless, that result's own figures stay, if it has any; else
    `snr_db_against` names what its outputs are held against.
    """
    next_to_it = before is not None and before[0] == at - 1
    if before is None or ("snr_db" in record and not next_to_it):
        return dict(record)
    told = {key: value for key, value in record.items() if key != "snr_db_against"}
    told["snr_db"] = probe.compare(before[2], now)
    return told if next_to_it else {**told, "snr_db_against": before[1]}


def _needless(chosen: Sequence[Stage], kept: Sequence[bool]) -> set[int]:
    """The stages all of whose components are replaced by a kept result later.

    kept: for each stage, whether its own result is kept.
    """
    found, replaced = set(), set[str]()
    for index in reversed(range(len(chosen))):
        functions = STAGES[chosen[index].name]
        changes = set(functions.changes or functions.trained)
        if changes and changes <= replaced:
            found.add(index)
        elif kept[index]:
            replaced |= changes
        elif functions.trained:
            replaced.clear()  # it will be trained, on all that comes before
    return found


def _measure(pipeline: Any, recipe: Recipe) -> dict[str, dict[str, int]]:
    return measure(pipeline, recipe.height, recipe.width, recipe.guided)


def _look(pipeline: Any, recipe: Recipe) -> probe.Seen:
    """One small call of each component, at the schedule's first step."""
    scheduler = choose_scheduler(pipeline.scheduler, recipe.schedule.scheduler)
    timestep = every_timestep(scheduler, recipe.schedule.every_steps)[0]
    size = latent_size(pipeline, recipe.height, recipe.width)
    return probe.look(pipeline, recipe.golden_prompts[0], size, timestep)


def save(
    pipeline: Any,
    plans: Sequence[LayerPlan],
    folder: Path,
    records: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the pipeline as an ordinary diffusers folder.

    `quantization_plan.json` in it has the plan, `stages.json` the record of each stage.

    Quantized layers are saved as the float32 weights that their integers stand for, and a folded
    UNet with its time path, so that `DiffusionPipeline.from_pretrained` opens the folder. The
    folder appears whole or not at all.
    """
    if folder.exists():
        raise UserError(f"{folder} already exists; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipeline = with_modules(pipeline, {"unet": fold.unfolded(pipeline.unet)})
    partial = Path(
        tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent)
    )
    try:
        for name in ("text_encoder", "unet", "vae"):
            # One component at a time, so that only one float copy is in memory.
            component: Any = dequantized(getattr(pipeline, name))
            component_folder.save(component, partial / name)
        pipeline.tokenizer.save_pretrained(partial / "tokenizer")
        pipeline.scheduler.save_pretrained(partial / "scheduler")
        pipeline.save_config(partial)
        plan = [entry.model_dump(mode="json") for entry in plans]
        for name, told in ((PLAN, plan), (RECORDS, list(records))):
            text = json.dumps(told, indent=1) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        open_to_others(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
