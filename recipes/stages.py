"""The table of stages, and `apply`: torch in, torch out, in the recipe's order.

A stage is a row here and a settings type in schema.py. Its result is an ordinary pipeline that
`save` writes as a diffusers folder, the quantization plan beside it.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_runtime.bundle import open_to_others
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes import quantize
from recipes.schema import Recipe, Stage

PLAN = "quantization_plan.json"


@dataclass(frozen=True)
class StageFunctions:
    """What a stage does. `check` and `plan` are cheap, and work on the meta device; `run` may
    work for hours.

    check(pipeline, settings) raises UserError. plan(pipeline, settings) tells what `run` would
    decide for each layer. run(pipeline, settings) returns the pipeline (it may change it in place),
    the plans of its layers, and its record (JSON).
    """

    check: Callable[[Any, Any], None]
    plan: Callable[[Any, Any], list[LayerPlan]]
    run: Callable[[Any, Any], tuple[Any, list[LayerPlan], dict[str, Any]]]


STAGES: dict[str, StageFunctions] = {
    "quantize": StageFunctions(check=quantize.check, plan=quantize.make_plan, run=quantize.run),
}


def check(pipeline: Any, recipe: Recipe) -> None:
    """Check every stage against the pipeline before any of them works; UserError tells all."""
    faults = []
    for index, stage in enumerate(recipe.stages):
        try:
            STAGES[stage.name].check(pipeline, stage.settings)
        except UserError as error:
            faults.append(f"stages.{index}.{stage.name}: {error}")
    if faults:
        raise UserError("; ".join(faults))


def plan(pipeline: Any, stage: Stage) -> list[LayerPlan]:
    """What a stage would decide for each layer, without doing it."""
    return STAGES[stage.name].plan(pipeline, stage.settings)


def apply(
    pipeline: Any, recipe: Recipe, progress: Callable[[str], None] | None = None
) -> tuple[Any, list[dict[str, Any]], list[LayerPlan]]:
    """Run the recipe's stages in order, on a pipeline that may be changed in place.

    progress: called with each stage's name before it runs. Returns the pipeline, one record a
    stage, and the quantization plan (empty without a quantize stage).
    """
    check(pipeline, recipe)
    records: list[dict[str, Any]] = []
    plans: list[LayerPlan] = []
    for stage in recipe.stages:
        if progress:
            progress(stage.name)
        pipeline, stage_plans, record = STAGES[stage.name].run(pipeline, stage.settings)
        plans += stage_plans
        records.append(record)
    return pipeline, records, plans


def save(pipeline: Any, plans: Sequence[LayerPlan], folder: Path) -> None:
    """Write the pipeline as an ordinary diffusers folder, with `quantization_plan.json` in it.

    Quantized layers are saved as the float32 weights that their integers stand for, so that
    `DiffusionPipeline.from_pretrained` opens the folder. The folder appears whole or not at all.
    """
    if folder.exists():
        raise UserError(f"{folder} already exists; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent)
    )
    try:
        for name in ("text_encoder", "unet", "vae"):
            # One component at a time, so that only one float copy is in memory.
            component: Any = quantize.dequantized(getattr(pipeline, name))
            component.save_pretrained(partial / name, safe_serialization=True)
        pipeline.tokenizer.save_pretrained(partial / "tokenizer")
        pipeline.scheduler.save_pretrained(partial / "scheduler")
        pipeline.save_config(partial)
        plan = [entry.model_dump(mode="json") for entry in plans]
        (partial / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        open_to_others(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
