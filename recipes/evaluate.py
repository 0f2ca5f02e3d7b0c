"""What each stage of a recipe does to the pictures: `python -m recipes.evaluate --help`.

The recipe's stages run one after the other, and after each that changes the function, and after the
last, the pipeline is evaluated (evaluation.py). With a resolution stage the pictures before it have
the size that it starts from, and the first row after it is the reference of the later ones.
"""

if __name__ == "__main__":
    # Before the imports below, which would chatter.
    from recipes.quiet import import_torch

    import_torch("torch", "evaluating")

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.pictures import sheet_scale, write_png
from mobile_runtime.report import check_writable
from recipes import overrides, prompts, schema, stages
from recipes.evaluation import SHOWN, Evaluation, Judges, reference_schedule
from recipes.evaluation_table import as_table, stage_sheet
from recipes.faults import collected
from recipes.features import Features, Folder, Network, open_clip, open_network
from recipes.paths import user_path
from recipes.pocket.evaluate import held_out_scenes
from recipes.pocket.scenes import Scene
from recipes.schedulers import choose_scheduler, with_steps
from recipes.schema import Recipe, SchedulerName
from recipes.sources import check_resolution, open_source
from recipes.work import Done, default_cache


def main(argv: list[str]) -> int:
    """Run a recipe's stages and evaluate the pipeline along the way."""
    arguments = _parser().parse_args(argv)
    recipe = schema.load(arguments.recipe, overrides.from_arguments(arguments))
    _check(arguments, recipe)
    wanted = Folder(arguments.pictures) if arguments.pictures else None
    chosen, scenes, origin = _prompts(arguments, recipe)
    schedule = reference_schedule(
        recipe,
        arguments.reference_steps,
        arguments.reference_guidance,
        arguments.reference_scheduler,
    )
    model, revision = recipe.source.model, recipe.source.revision
    outline = open_source(model, revision, weights=False).pipeline
    check_resolution(outline, recipe.height, recipe.width)
    with_steps(choose_scheduler(outline.scheduler, schedule.scheduler), schedule.steps)
    stages.check(outline, recipe)
    judges = _judges(arguments, chosen, scenes, wanted)
    source = open_source(model, revision)
    kept = Done.before(source.pipeline, recipe, None, keeps=True).kept(recipe.stages)
    trains = [stages.STAGES[stage.name].trained for stage in recipe.stages]
    if any(trained and not found for trained, found in zip(trains, kept, strict=True)):
        check_writable(default_cache(), "POCKET_DIFFUSION_CACHE")
    head = {
        "recipe": recipe.resolved(),
        "source": source.info,
        "seed": arguments.seed,
        "prompts_from": origin,
        "prompts_sha256": hashlib.sha256("\n".join(chosen).encode()).hexdigest(),
        "prompts": chosen,
        "clip": judges.clip.info if judges.clip else None,
        "features": judges.features.info if judges.features else None,
        "pictures": {"count": len(wanted)} if wanted else None,
        "tools": _tools(),
    }
    evaluation = Evaluation(recipe, judges, schedule, head, arguments.json, arguments.save_pictures)
    evaluation.add(-1, source.pipeline)
    applied = stages.apply(
        source.pipeline,
        recipe,
        progress=lambda name: print(f"stage {name}", flush=True),
        seen=evaluation.after,
    )
    evaluation.write(complete=True, records=applied.records)
    print(as_table(evaluation.rows, len(chosen), judges.features))
    if arguments.sheet:
        labels = [row["stage"] for row in evaluation.rows]
        scale = sheet_scale(max(row["size"][0] for row in evaluation.rows))
        write_png(arguments.sheet, stage_sheet(evaluation.shown, labels, chosen[:SHOWN], scale))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evaluate",
        description="Run a recipe's stages, and tell what each does to the pictures.",
        epilog="examples:\n"
        "  python -m recipes.evaluate --recipe pocket_turbo --sheet stages.png\n"
        "  python -m recipes.evaluate --recipe sd_turbo_int8 --prompts my_prompts.txt "
        "--clip openai/clip-vit-large-patch14 --json figures.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="or a .yaml file")
    overrides.add_arguments(parser)
    group = parser.add_argument_group("what is drawn")
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, each drawn once; default: for the embedded model held-out captions, "
        "which it is judged by, else the package's prompts",
    )
    group.add_argument("--captions", type=int, default=512, help="prompts at most (512)")
    group.add_argument("--pairs", action="store_true", help="held-out captions of two objects")
    group.add_argument("--seed", type=int, default=0, help="of the noise and the captions (0)")
    group = parser.add_argument_group(
        "the reference, which is the pipeline before any stage (default: the recipe's schedule; "
        "where it distills, 25 steps with the guidance that is folded in)"
    )
    group.add_argument("--reference-steps", type=int, metavar="N")
    group.add_argument("--reference-guidance", type=float, metavar="SCALE")
    group.add_argument("--reference-scheduler", choices=get_args(SchedulerName))
    group = parser.add_argument_group("figures beside PSNR, SSIM and latent SNR")
    group.add_argument(
        "--clip",
        metavar="MODEL",
        help="a CLIPModel, folder or hub id (safetensors): CLIP score, CMMD",
    )
    group.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="PNG and JPEG files to compare the distribution with: FID, KID; and CMMD, which is "
        "else against the reference",
    )
    group.add_argument(
        "--features",
        type=Path,
        metavar="FILE.onnx",
        help="the network of FID and KID (N, 3, H, W) in 0..255 -> (N, D), Inception say; "
        "default: the image tower of --clip, whose figures are on another scale",
    )
    group = parser.add_argument_group("what is written")
    group.add_argument("--json", type=Path, metavar="FILE", help="everything, after each stage")
    group.add_argument("--sheet", type=Path, metavar="FILE.png", help="a row of pictures a stage")
    group.add_argument("--save-pictures", type=Path, metavar="FOLDER", help="a new folder")
    group.add_argument("--force", action="store_true", help="replace a file that exists")
    return parser


def _check(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse what cannot be used, all faults told."""
    faults = []
    limits = (("captions", 1, None), ("seed", 0, 2**31), ("reference_steps", 1, 1000))
    for name, least, most in limits:
        value = getattr(arguments, name)
        if value is not None and (value < least or (most is not None and value > most)):
            span = f"{least} or more" if most is None else f"{least} to {most}"
            faults.append(f"--{name.replace('_', '-')} {value} should be {span}")
    scale = arguments.reference_guidance
    if scale is not None and not 0 <= scale <= 100:
        faults.append(f"--reference-guidance {scale} should be 0 to 100")
    if arguments.pairs and (arguments.prompts or recipe.source.model != "embedded"):
        faults.append("--pairs goes with the embedded model's own captions; remove it")
    if arguments.pictures and not (arguments.clip or arguments.features):
        faults.append("--pictures needs a network to compare by; give --clip or --features")
    if arguments.features and not arguments.pictures:
        faults.append("--features is for FID and KID; give --pictures, too")
    for name in ("json", "sheet", "save_pictures"):
        path = getattr(arguments, name)
        option = f"--{name.replace('_', '-')}"
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            faults.append(f"{option}: there is no folder {path.parent}; make it first")
        elif name == "save_pictures" and path.exists():
            faults.append(f"{option}: {path} already exists; choose another folder")
        elif path.is_dir():
            faults.append(f"{option}: {path} is a folder; name a file")
        elif path.exists() and not arguments.force:
            faults.append(f"{option}: {path} already exists; choose another, or add --force")
        else:
            with collected(faults):
                check_writable(path.absolute().parent, option)
    if arguments.sheet and arguments.sheet.suffix.lower() != ".png":
        faults.append(f"--sheet: {arguments.sheet} should end in .png")
    if faults:
        raise UserError("; ".join(faults))


def _prompts(
    arguments: argparse.Namespace, recipe: Recipe
) -> tuple[list[str], list[Scene] | None, str]:
    """The prompts, their scenes where a judge can tell them, and where they are from."""
    if arguments.prompts is not None:
        found = prompts.read(user_path(str(arguments.prompts)))[: arguments.captions]
        return found, None, arguments.prompts.name
    if recipe.source.model == "embedded":
        cases = held_out_scenes(arguments.captions, arguments.seed, arguments.pairs)
        return [text for text, _ in cases], [scene for _, scene in cases], "held-out captions"
    found = prompts.read(prompts.DEFAULT)[: arguments.captions]
    return found, None, f"the package's {prompts.DEFAULT.name}"


def _judges(
    arguments: argparse.Namespace,
    chosen: list[str],
    scenes: list[Scene] | None,
    wanted: Folder | None,
) -> Judges:
    """Open the networks, and look at the folder's pictures."""
    network: Network | None = open_network(arguments.features) if arguments.features else None
    clip = open_clip(arguments.clip) if arguments.clip else None
    wanted_clip = clip.pictures(wanted, len(wanted)) if clip and wanted else None
    features: Features | None = None
    wanted_features = None
    if wanted:
        features = network or clip
        wanted_features = network.pictures(wanted, len(wanted)) if network else wanted_clip
    return Judges(
        prompts=chosen,
        scenes=scenes,
        clip=clip,
        features=features,
        texts=clip.texts(chosen) if clip else None,
        wanted_clip=wanted_clip,
        wanted=wanted_features,
        seed=arguments.seed,
    )


def _tools() -> dict[str, str]:
    import diffusers
    import transformers

    modules: Sequence[Any] = (torch, diffusers, transformers, np)
    return {module.__name__: module.__version__ for module in modules}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
