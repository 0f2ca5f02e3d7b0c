"""The whole story: a recipe and a target in, a bundle out."""

import gc
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np

from converters import components, golden, palette_plan, rewrites, support, taps
from converters.components import Component
from converters.lowered import Lowered
from converters.progress import Progress
from converters.schedule import compile_schedule
from mobile_runtime import layer_goldens
from mobile_runtime import taps as tapping
from mobile_runtime.bundle import Bundle, BundleWriter
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import (
    AtConversion,
    ComponentEntry,
    ComponentName,
    Generation,
    GoldenPrompt,
    LayerPlan,
    Manifest,
    ScheduleTable,
    Target,
    TokenizerFiles,
)
from mobile_runtime.pipeline import Pipeline
from mobile_runtime.report import check_writable
from mobile_runtime.tokenizer import ClipTokenizer
from recipes import int4_layers, measure, stages
from recipes.faults import RecipeError, collected
from recipes.palette_settings import PaletteSettings
from recipes.schedulers import choose_scheduler
from recipes.schema import Recipe
from recipes.sources import Source, check_resolution, open_source

TARGET_MODULES: dict[Target, str] = {
    "coreml": "converters.coreml",
    "onnx": "converters.onnx",
    "executorch": "converters.executorch",
}
TOOLS = (
    "pocket-diffusion",
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "coremltools",
    "executorch",
    "torchao",
)


@dataclass(frozen=True)
class Request:
    """What to convert: a checked recipe, a target, and where the bundle goes."""

    recipe: Recipe
    target: Target
    output: Path
    force: bool = False
    save_pipeline: Path | None = None
    cache: Path | None = None


def convert(request: Request, progress: Progress) -> Bundle:
    """Make the bundle. Validation is the caller's next step (`mobile_runtime.validate`).

    Raises UserError before any heavy work for what the target, the source or the output cannot do;
    whatever happens, nothing half made is left at the output.
    """
    recipe = request.recipe
    target = target_module(request.target)
    progress("check the request")
    checked = check(request)
    scheme, options = checked.scheme, checked.options
    generation, schedules = checked.generation, checked.schedules

    progress(f"open {recipe.source.model}")
    source = _open(recipe, weights=True)
    pipeline = source.pipeline
    del checked

    def stage(name: str) -> None:
        progress(f"stage {name}")

    with BundleWriter(request.output, request.force) as writer:
        tokenizer = write_tokenizer(pipeline, writer.path)
        make_pipeline = _pipeline_maker(tokenizer, writer.path, generation, schedules)
        changed = stages.apply(pipeline, recipe, stages.changing(recipe), stage, request.cache)
        pipeline = changed.pipeline
        pipeline.scheduler = choose_scheduler(pipeline.scheduler, recipe.schedule.scheduler)
        built = build_components(pipeline, recipe)
        cases = golden.record_source(built, make_pipeline, _golden_prompts(recipe), progress)

        kept = stages.apply(pipeline, recipe, stages.preserving(recipe), stage, request.cache)
        pipeline, plans, records = kept.pipeline, kept.plans, [*changed.records, *kept.records]
        if palettes := _palettes(request):
            progress("palettes")
            made = palette_plan.apply(pipeline, plans, recipe, palettes, scheme.arithmetic)
            plans, options = made.plans, replace(options, palettes=made.palettes)
            records.append(made.record)
        if request.save_pipeline:
            stages.save(pipeline, plans, request.save_pipeline, records)
        built = build_components(pipeline, recipe)
        vectors = golden.write(cases, built, make_pipeline, writer.path, progress)
        progress("golden vectors: every token")
        tokens = golden.every_token(built["text_encoder"], read_tokenizer(tokenizer, writer.path))

        if request.target == "onnx" and not options.ort_format:
            target.write_optimum_files(pipeline, writer.path, recipe.components, recipe.resolution)
        entries = []
        info = source.info
        del source, pipeline  # from here on each component is freed when it is done
        timesteps = sorted({row.timestep for s in schedules for row in s.rows}, reverse=True)
        for name in recipe.components:
            seen = _Seen(cases.inputs[name], timesteps if name == "unet" else [])
            entries.append(
                _lower(target, built.pop(name), seen, options, scheme, plans, writer, progress)
            )
            gc.collect()

        progress("write the bundle")
        tapped = _kept(tapping.path_of, recipe.components, writer.path)
        vectors = vectors.model_copy(
            update={
                "taps": tapped,
                "layers": _kept(layer_goldens.path_of, recipe.components, writer.path),
                "timesteps": _if_there(tapping.TIMESTEPS_PATH, writer.path),
                "vocabulary": golden.write_tokens(tokens, tapped, writer.path),
            }
        )
        return writer.commit(
            Manifest(
                name=recipe.name,
                target=request.target,
                arithmetic=scheme.arithmetic,
                tool_versions=tool_versions(),
                source=info,
                recipe=recipe.resolved(),
                stages=tuple(records),
                notes=tuple(note for note in (scheme.note,) if note),
                components=tuple(entries),
                tokenizer=tokenizer,
                generation=generation,
                schedules=schedules,
                quantization=tuple(plans),
                golden=vectors,
                gates=support.gates(recipe, scheme),
                files=writer.hash_files(),
            )
        )


def target_module(target: Target) -> Any:
    """The module of a target: REWRITES, prepare(), lower(), and layer_check() where needed."""
    return importlib.import_module(TARGET_MODULES[target])


@dataclass(frozen=True)
class Checked:
    """What the checks of a request found; the pipeline's modules are on the meta device."""

    scheme: support.Scheme
    options: Any
    pipeline: Any
    generation: Generation
    schedules: tuple[ScheduleTable, ...]


def check(request: Request) -> Checked:
    """Every check that needs no weights; UserError tells all that does not fit the source."""
    recipe = request.recipe
    scheme = support.scheme_for(request.target, recipe)
    options = target_module(request.target).prepare(recipe, scheme)
    _check_free(request)
    pipeline = _open(recipe, weights=False).pipeline
    faults: list[str] = []
    with collected(faults):
        check_resolution(pipeline, recipe.height, recipe.width)
    with collected(faults):
        pipeline = stages.check(pipeline, recipe)
        if palettes := _palettes(request):
            planned = stages.plan(pipeline, recipe)
            palette_plan.check(pipeline, planned, palettes, scheme.arithmetic)
    with collected(faults):
        pipeline.scheduler = choose_scheduler(pipeline.scheduler, recipe.schedule.scheduler)
        compiled = compile_generation(pipeline, recipe)
    if faults:
        raise RecipeError(f"recipe {recipe.name}", faults)
    build_components(pipeline, recipe)  # refuses a module that has no component's shape
    return Checked(scheme, options, pipeline, *compiled)


def _palettes(request: Request) -> PaletteSettings | None:
    """The palettes to make: Core ML's alone."""
    return request.recipe.targets.coreml.palettes if request.target == "coreml" else None


def _check_free(request: Request) -> None:
    """Refuse an output that is taken, and two outputs of which one would replace the other."""
    BundleWriter.check_free(request.output, request.force)
    saved = request.save_pipeline
    if saved is None:
        return
    one, other = request.output.resolve(), saved.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise UserError(
            f"--save-pipeline {saved} and --output {request.output} lie one in the other; choose "
            "two folders side by side"
        )
    if saved.exists() or saved.is_symlink():
        raise UserError(f"{saved} already exists; choose another --save-pipeline")
    check_writable(saved.absolute().parent, "--save-pipeline")


def _open(recipe: Recipe, weights: bool) -> Source:
    return open_source(recipe.source.model, recipe.source.revision, weights=weights)


def compile_generation(
    pipeline: Any, recipe: Recipe
) -> tuple[Generation, tuple[ScheduleTable, ...]]:
    """The manifest's sizes and defaults, and a schedule table for each number of steps."""
    factor = measure.vae_factor(pipeline.vae)
    generation = Generation(
        latent_channels=pipeline.unet.config.in_channels,
        latent_height=recipe.height // factor,
        latent_width=recipe.width // factor,
        height=recipe.height,
        width=recipe.width,
        scaling_factor=pipeline.vae.config.scaling_factor,
        guidance_scale=recipe.schedule.guidance_scale,
        default_steps=recipe.schedule.steps,
    )
    return generation, tuple(
        compile_schedule(pipeline.scheduler, steps) for steps in recipe.schedule.every_steps
    )


def build_components(pipeline: Any, recipe: Recipe) -> dict[str, Component]:
    """Every component that the recipe names, by its name."""
    sizes = {"height": recipe.height, "width": recipe.width, "batch": 2 if recipe.guided else 1}
    return {name: components.build(pipeline, name, **sizes) for name in recipe.components}


def write_tokenizer(pipeline: Any, folder: Path) -> TokenizerFiles:
    """Write `tokenizer/` as transformers saves it; its special tokens for the manifest."""
    tokenizer = pipeline.tokenizer
    tokenizer.save_pretrained(folder / "tokenizer")
    return TokenizerFiles(
        max_length=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def read_tokenizer(files: TokenizerFiles, folder: Path) -> ClipTokenizer:
    """The runtime's tokenizer of what `write_tokenizer` wrote."""
    return ClipTokenizer.from_files(
        folder / files.vocab, folder / files.merges, **files.model_dump(exclude={"vocab", "merges"})
    )


def _pipeline_maker(
    files: TokenizerFiles,
    folder: Path,
    generation: Generation,
    schedules: tuple[ScheduleTable, ...],
) -> Callable[[dict[str, golden.Runner]], Pipeline]:
    """The runtime's own pipeline over torch modules, so that both run the same code."""
    tokenizer = read_tokenizer(files, folder)
    return lambda runners: Pipeline(runners, tokenizer, generation, schedules)


def _golden_prompts(recipe: Recipe) -> tuple[GoldenPrompt, ...]:
    """Each prompt with seeds of its own, all of them different; the first by each other table."""
    default, *others = recipe.schedule.every_steps
    wanted = [(text, default) for text in recipe.golden_prompts for _ in range(recipe.golden_seeds)]
    wanted += [(recipe.golden_prompts[0], steps) for steps in others]
    return tuple(
        GoldenPrompt(
            prompt=prompt,
            seed=seed,
            steps=steps,
            guidance_scale=recipe.schedule.guidance_scale,
        )
        for seed, (prompt, steps) in enumerate(wanted)
    )


@dataclass(frozen=True)
class _Seen:
    """What a component will see: the inputs of its golden cases, and the schedules' timesteps."""

    cases: list[dict[str, np.ndarray]]
    timesteps: list[float]


def _lower(
    target: Any,
    component: Component,
    seen: _Seen,
    options: Any,
    scheme: support.Scheme,
    plans: list[LayerPlan],
    writer: BundleWriter,
    progress: Progress,
) -> ComponentEntry:
    """Rewrite, export once, lower; what the manifest says of the result."""
    mine = [plan for plan in plans if plan.layer.split(".")[0] == component.name]
    parameters, macs = components.count_parameters(component), components.count_macs(component)
    progress(f"export {component.name}")
    rewritten = replace(component, module=rewrites.apply(component.module, target.REWRITES))
    program = components.export(rewritten)
    progress(f"lower {component.name}")
    with writer.scratch():
        lowered = target.lower(rewritten, program, writer.path, options, progress.detail)
    details, first = dict(lowered.details), seen.cases[0]
    if lowered.watch:
        progress(f"look inside {component.name}")
        details["taps"] = _look_inside(component, program, seen, lowered, writer.path)
        _keep_layers(component, mine, first, lowered, writer.path)
    del program, rewritten
    at_conversion = None
    if lowered.run:
        progress(f"run {component.name}")
        made_on = tapping.machine(lowered.run.backend)
        snr_db = golden.worst_snr_db(component, seen.cases, lowered.run.call, writer.path)
        at_conversion = AtConversion(snr_db=snr_db, made_on=made_on)
    if any(plan.activations != "none" for plan in mine):
        progress(f"check {component.name} layer by layer")
        details["layer_snr_db"] = target.layer_check(component, first, options, progress.detail)
    return ComponentEntry(
        name=cast(ComponentName, component.name),
        path=lowered.path.relative_to(writer.path).as_posix(),
        format=lowered.format,
        inputs=component.inputs,
        outputs=component.outputs,
        scheme=_scheme_of(mine, scheme),
        parameters=parameters,
        macs=macs,
        bytes=size_bytes(lowered.path),
        at_conversion=at_conversion,
        details=details,
    )


def _look_inside(
    component: Component, program: Any, seen: _Seen, lowered: Lowered, folder: Path
) -> dict[str, int]:
    """Write the taps, of a golden case and of every timestep; how many were found."""
    assert lowered.watch is not None
    first, path, watch = seen.cases[0], lowered.path, lowered.watch
    operators = taps.computed(program, [first[spec.name] for spec in component.inputs])
    found = taps.record(component, operators, first, path, watch)
    tapping.write(found, folder / tapping.path_of(component.name))
    steps = seen.timesteps
    if steps and (
        every := taps.record_timesteps(program, component, first, steps, found, path, watch)
    ):
        tapping.write(every, folder / tapping.TIMESTEPS_PATH)
    return {"found": len(found.taps), "operators": len(operators)}


def _keep_layers(
    component: Component,
    plans: Sequence[LayerPlan],
    first: dict[str, np.ndarray],
    lowered: Lowered,
    folder: Path,
) -> None:
    """Write what the final file's quantized layers give alone, where they can be cut out of it."""
    layers = [plan.layer for plan in plans if plan.activations != "none"]
    known = folder / tapping.path_of(component.name)
    if layers and lowered.format == "onnx" and known.is_file():
        feeds = {spec.name: first[spec.name] for spec in component.inputs}
        outputs = [spec.name for spec in component.outputs]
        kept = folder / layer_goldens.path_of(component.name)
        layer_goldens.record(lowered.path, tapping.open_taps(known), layers, feeds, outputs, kept)


def _kept(
    path_of: Callable[[str], str], names: Iterable[ComponentName], folder: Path
) -> dict[ComponentName, str]:
    """Where the file lies of each component that has one."""
    paths = {name: _if_there(path_of(name), folder) for name in names}
    return {name: path for name, path in paths.items() if path}


def _if_there(path: str, folder: Path) -> str | None:
    return path if (folder / path).is_file() else None


def _scheme_of(plans: list[LayerPlan], scheme: support.Scheme) -> str:
    """What a component's file holds, e.g. `w8`, `palettes`, or `w8+palettes`."""
    kinds = {plan.weights for plan in plans}
    # A component of a 4-bit recipe may be INT8 as a whole.
    name = "w8" if scheme.name == "w4" and "int4" not in kinds else scheme.name
    parts = [name] if kinds & {"int8", "int4"} else []
    parts += ["palettes"] if "palette" in kinds else []
    return "+".join(parts) or scheme.arithmetic


def size_bytes(path: Path) -> int:
    """The bytes of a model: a package's files, or a file and the external data beside it."""
    folder = path if path.is_dir() else None
    files = folder.rglob("*") if folder else path.parent.glob(f"{path.stem}*")
    return sum(file.stat().st_size for file in files if file.is_file())


def tool_versions() -> dict[str, str]:
    """The installed versions of what had a part in the bundle."""
    versions = {}
    for tool in TOOLS:
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return versions


def dry_run(request: Request) -> str:
    """What `convert` would make: sizes, schemes and the support check, from configs alone."""
    recipe = request.recipe
    checked = check(request)
    scheme, pipeline, schedules = checked.scheme, checked.pipeline, checked.schedules
    plans = stages.plan(pipeline, recipe)
    int8 = {plan.layer for plan in plans if plan.weights == "int8"}
    int4 = {plan.layer: int4_layers.form_of(plan) for plan in plans if plan.weights == "int4"}
    palettes, bits = _palettes(request), dict[str, float]()
    if palettes:
        bits = palette_plan.stored_bits(pipeline, plans, palettes, scheme.arithmetic)
    lines = [f"{recipe.name} for {request.target}: {scheme.name}, computed in {scheme.arithmetic}"]
    lines += [f"note: {scheme.note}"] if scheme.note else []
    if palettes:
        mixed = "; their bits are planned from measurements, so MB are at most"
        lines.append(f"palettes for {len(bits)} layers{mixed if palettes.mixed else ''}")
    if training := [
        f"{stage.name} ({stage.settings.iterations} steps)"
        for stage in recipe.stages
        if stages.STAGES[stage.name].trained and stage.settings.iterations
    ]:
        lines.append(f"trains, unless the result is kept from before: {', '.join(training)}")
    lines += [f"4 bits for {len(int4)} layers"] if int4 else []
    if any(stage.quantize and stage.quantize.keeps_weights for stage in recipe.stages):
        lines.append("layers that stay in float are chosen by measurements, so MB are at least")
    lines.append(f"{'component':14}{'parameters':>16}{'GMACs':>14}{'int8 layers':>13}{'MB':>12}")
    total = 0.0
    for name, component in build_components(pipeline, recipe).items():
        size = 0.0
        for path, parameter in component.module.named_parameters():
            float_bytes = 2 if scheme.arithmetic == "float16" else 4
            layer = path.removesuffix(".weight") if path.endswith(".weight") else ""
            if layer in bits:
                size += bits[layer] / 8
            elif layer in int4:
                size += int4_layers.weight_bytes(tuple(parameter.shape), int4[layer])
            else:
                size += parameter.numel() * (1 if layer in int8 else float_bytes)
        parameters, macs = components.count_parameters(component), components.count_macs(component)
        more_parameters, more_macs = components.count_branches(component, int4)
        parameters, macs = parameters + more_parameters, macs + more_macs
        layers = sum(layer.split(".")[0] == name for layer in int8)
        lines.append(f"{name:14}{parameters:16,}{macs / 1e9:14.2f}{layers:13}{size / 1e6:12.1f}")
        total += size
    steps = ", ".join(str(table.steps) for table in schedules)
    lines.append(f"{'models':14}{total / 1e6:55.1f}")
    lines.append(f"{schedules[0].scheduler}, {steps} steps; {recipe.width}x{recipe.height} pixels")
    lines.append(f"would be written to {request.output}; nothing was written")
    return "\n".join(lines)
