"""The command that the three targets share: `python -m converters.TARGET --recipe NAME`."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from mobile_runtime.errors import run_cli
from mobile_runtime.manifest import Target
from recipes import overrides, schema
from recipes.quiet import IMPORT_CHATTER, import_torch, quiet

TITLES: dict[Target, str] = {
    "coreml": "Core ML packages (.mlpackage, ML programs)",
    "onnx": "ONNX models for ONNX Runtime Mobile; the bundle also opens in Optimum",
    "executorch": "ExecuTorch programs (.pte) for the XNNPACK delegate",
}
EXAMPLES = """examples:
  python -m converters.{target} --recipe pocket_int8
  python -m converters.{target} --recipe sd_turbo_int8 --output bundles/turbo
  python -m converters.{target} --recipe sd_turbo_int8 --model ./my-finetune --resolution 384
  python -m converters.{target} --recipe sd_turbo_int8 --model random:sd_turbo --dry-run
{own}"""
OWN_EXAMPLES: dict[Target, str] = {
    "coreml": "  python -m converters.coreml --recipe pocket_int8 "
    "--set targets.coreml.deployment_target=iOS18\n"
    "  python -m converters.coreml --recipe pocket_turbo --set targets.coreml.palettes.bits=6\n",
    "onnx": "  python -m converters.onnx --recipe pocket_int8 --set targets.onnx.ort_format=true\n",
    "executorch": "",
}


def parser_for(target: Target) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog=f"python -m converters.{target}",
        description=f"Convert a pipeline by a recipe to {TITLES[target]}, and validate the result.",
        epilog=EXAMPLES.format(target=target, own=OWN_EXAMPLES[target]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe", required=True, metavar="NAME", help="see `python -m recipes list`; or a file"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help=f"the bundle's folder (default: bundles/RECIPE-{target})",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")
    parser.add_argument(
        "--vae-encoder", action="store_true", help="also convert the VAE encoder (image to image)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be made, with sizes; write nothing"
    )
    parser.add_argument(
        "--no-validate", action="store_true", help="leave out the validation of the final files"
    )
    parser.add_argument(
        "--save-pipeline",
        type=Path,
        metavar="DIR",
        help="also save the pipeline after the stages, as a diffusers folder",
    )
    overrides.add_arguments(parser)
    return parser


def main(target: Target, argv: list[str]) -> int:
    """Convert, validate, tell; the exit code is 1 when the bundle misses a gate."""
    arguments = parser_for(target).parse_args(argv)
    recipe = schema.load(arguments.recipe, _changes(arguments))
    # Only a request that is right so far is worth the seconds that these take.
    import_torch(target, "converting")
    with quiet(*IMPORT_CHATTER):
        import converters.convert  # noqa: F401
    from converters.convert import Request, convert, dry_run
    from converters.progress import Progress

    output = arguments.output or Path("bundles") / f"{recipe.name}-{target}"
    request = Request(recipe, target, output, arguments.force, arguments.save_pipeline)
    if arguments.dry_run:
        print(dry_run(request))
        return 0
    with Progress() as progress:
        bundle = convert(request, progress)
    print(f"bundle: {bundle.path} ({_mb(sum(entry.bytes for entry in bundle.manifest.files))})")
    if arguments.no_validate:
        print(f"not validated; do it with: python -m mobile_runtime validate {bundle.path}")
        return 0
    from mobile_runtime.report import format_table, write_report
    from mobile_runtime.validate import validate

    report = validate(bundle)
    _, html = write_report(report, bundle.path)
    print(f"{format_table(report)}\nreport: {html}")
    return 0 if report.verdict == "pass" else 1


def _changes(arguments: argparse.Namespace) -> dict[str, object]:
    changes = overrides.from_arguments(arguments)
    if arguments.vae_encoder:
        # Of the changes only this one: the others may name the encoder, which is not there yet.
        own = {key: value for key, value in changes.items() if key == "components"}
        recipe = schema.load(arguments.recipe, own)
        changes["components"] = [*recipe.components, *({"vae_encoder"} - set(recipe.components))]
        for stage in recipe.stages:
            if stage.quantize and set(stage.quantize.components) == set(recipe.components):
                # A recipe that quantizes everything means the encoder, too.
                changes.setdefault("stages.quantize.components", changes["components"])
    return changes


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def run(target: Target) -> NoReturn:
    """What each target's module does when it is run."""
    sys.exit(run_cli(lambda argv: main(target, argv)))
