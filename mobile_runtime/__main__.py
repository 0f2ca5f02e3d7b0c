"""`python -m mobile_runtime`: generate pictures from a bundle, look into it, validate it."""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobile_runtime import backends, devices
from mobile_runtime.backends import BACKENDS
from mobile_runtime.bundle import MANIFEST, Bundle
from mobile_runtime.errors import UserError, run_cli
from mobile_runtime.parity import picture_psnr_db
from mobile_runtime.pictures import contact_sheet, sheet_scale, side_by_side, write_png
from mobile_runtime.pipeline import Pipeline, Result, find_schedule
from mobile_runtime.report import check_writable, told_verdict
from mobile_runtime.tokenizer import ClipTokenizer

# The first of each stands in the help of all.
EXAMPLES = {
    "generate": (
        'generate bundles/pocket_int8-onnx "a large red star" -o star.png',
        'generate BUNDLE "a red star" "a blue ring" --seeds 0-3 -o pictures',
        'generate BUNDLE "a red star" --compare recipes/pocket/weights',
    ),
    "info": ("info BUNDLE",),
    "validate": (
        "validate BUNDLE --device local",
        "validate BUNDLE --prompts 2 --repeats 0 --gate picture_psnr_db=30 -o report",
    ),
    "bench": (
        "bench BUNDLE OTHER --option threads=2",
        "bench BUNDLE --rounds 50 --json times.json",
    ),
    "profile": (
        "profile BUNDLE --component unet -o traces",
        "profile BUNDLE --option threads=2 --repeats 50 --slowest 30",
    ),
    "compare": ("compare BUNDLE OTHER -o compare.html",),
    "layers": ("layers BUNDLE --component unet --worst 10", "layers BUNDLE --device arm64"),
    "matrix": (
        "matrix BUNDLE OTHER --json figures.json",
        "matrix BUNDLE --device local --device arm64",
    ),
    "reference": ("reference bench --ablation -o ablation",),
    "devices": (
        "devices",
        "devices --setup arm64",
        "devices --clean adb:SERIAL",
    ),
}

MAX_SEEDS = 10_000
# A file's name has at most 255 bytes; the seed, the number and a partial file's ending come on top.
MAX_SLUG_BYTES = 120
# As much of a text as a message shows.
SHOWN_LETTERS = 80
OTHER_PICTURES = (".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".tif", ".tiff", ".webp")


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    from mobile_runtime import bench, compare, layers, matrix, profiling, validate
    from mobile_runtime.reference import command as reference

    if argv[:1] == ["reference"]:
        # Its options are also those of what opens pipelines, which no bundle needs.
        return reference.main(argv[1:])

    parser = argparse.ArgumentParser(
        prog="python -m mobile_runtime",
        description="From a bundle's files to pictures, and the proof.",
        epilog=_told_examples([examples[0] for examples in EXAMPLES.values()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, about: str, run: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=_told_examples(EXAMPLES[name]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    _add_generate_arguments(add("generate", "make pictures from prompts", generate))
    info_parser = add("info", "tell what a bundle holds", info)
    info_parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    validate.add_arguments(
        add("validate", "check that a bundle computes what it should", validate.run)
    )
    bench.add_arguments(add("bench", "time a bundle, or two in turns", bench.run))
    profiling.add_arguments(add("profile", "find where the time goes", profiling.run))
    compare.add_arguments(add("compare", "put several reports on one page", compare.run))
    layers.add_arguments(add("layers", "compare the values inside with PyTorch's", layers.run))
    matrix.add_arguments(add("matrix", "compare runtimes with each other", matrix.run))
    add("reference", "the desktop GPU pipeline: draw, time, profile", reference.main)
    devices_parser = add("devices", "list where bundles can be validated", list_devices)
    devices_parser.add_argument(
        "--setup",
        choices=["arm64"],
        help="fetch what it takes, some 100 MB",
    )
    devices_parser.add_argument(
        "--clean",
        metavar="DEVICE",
        help="remove the bundles, jobs and results that lie there, as in adb:SERIAL or ssh:HOST",
    )
    args = parser.parse_args(argv)
    return int(args.run(args))


def _told_examples(examples: Sequence[str]) -> str:
    lines = [f"  python -m mobile_runtime {example}" for example in examples]
    return "\n".join(["examples:", *lines])


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to draw")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    seeds.add_argument(
        "--seeds", type=_seeds, metavar="LIST", help="several, as in 0-3,7: each prompt with each"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="one of those compiled (see info)")
    parser.add_argument("--guidance", type=_guidance, metavar="G", help="guidance scale; 1: none")
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw")
    parser.add_argument("--backend", choices=sorted(set(BACKENDS) - {"torch"}), help="the runtime")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the backend, as in threads=2, exact=false or arithmetic=float16",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="a .png for one picture, a folder for several (default: named after the prompt)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="PATH",
        help="a bundle or a diffusers folder: show its picture and the difference beside this one",
    )
    parser.add_argument("--force", action="store_true", help="replace pictures that exist")


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is no seed and no range; write 0-3,7")
        first = int(match[1])
        found = range(first, int(match[2] or first) + 1)
        if not found:
            raise argparse.ArgumentTypeError(f"{part!r} names no seed; write 0-3,7")
        # Asked before the range becomes a list, which may not fit into the memory.
        if found[-1] - first >= MAX_SEEDS - len(seeds):
            raise argparse.ArgumentTypeError(f"{text!r} names more than {MAX_SEEDS} seeds")
        seeds += found
    return seeds


def _guidance(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number; write 7.5, say")
    return scale


def generate(args: argparse.Namespace) -> int:
    """Make pictures: one file, or a folder of them with a contact sheet."""
    seeds = args.seeds or [args.seed]
    jobs = [(prompt, seed) for prompt in args.prompts for seed in seeds]
    for text in [*args.prompts, args.negative or ""]:
        _check_text(text)
    outputs, sheet_path = _outputs(args.output, jobs)
    _check_free([*outputs, *([sheet_path] if sheet_path else [])], args.force)
    bundle = Bundle.open(args.bundle)
    options = backends.parse_options(args.option)
    name = args.backend or backends.default_backend(bundle.manifest.target)
    backends.check_options(name, options)
    if args.steps is not None:  # told before models load, which can take long
        find_schedule(bundle.manifest.schedules, args.steps)
    pipeline = Pipeline.from_bundle(bundle, args.backend, **options)
    reference = _reference(args.compare, bundle) if args.compare else None
    # Wrong steps are told before any picture is made.
    tables = [one.schedule(args.steps) for one in (pipeline, reference) if one is not None]
    tokenizer = ClipTokenizer.from_bundle(bundle)
    for prompt in args.prompts:
        if dropped := tokenizer.dropped(prompt):
            told = f"{_short(prompt)!r} is too long and loses {_short(dropped)!r}"
            print(f"warning: {told}", file=sys.stderr)
    if args.negative and _guidance_scale(bundle, args) <= 1:
        print("warning: --negative has no effect without guidance", file=sys.stderr)
    pictures: list[np.ndarray] = []
    count = len(jobs) * sum(table.steps for table in tables)
    # disable=None: no bar where the output is not a terminal.
    with tqdm(total=count, unit="step", disable=None, leave=False) as bar:
        for (prompt, seed), output in zip(jobs, outputs, strict=True):
            result = _draw(pipeline, prompt, seed, args, bar)
            picture, told = result.picture, f"{result.timings_ms['total']:.0f} ms"
            if reference is not None:
                other = _draw(reference, prompt, seed, args, bar).picture
                if other.shape != picture.shape:
                    raise UserError(
                        f"{args.compare} makes pictures of {other.shape[:2]}, "
                        f"this bundle of {picture.shape[:2]}; they cannot be compared"
                    )
                told += f", {picture_psnr_db(other, picture):.2f} dB from the reference"
                picture = side_by_side(other, picture)
            write_png(output, picture, _metadata(bundle, prompt, seed, tables[0].steps, args))
            pictures.append(picture)
            bar.write(f"{output}: {_short(prompt)!r}, seed {seed}, {told}", sys.stdout)
    if sheet_path is not None:
        captions = [f"{prompt} ({seed})" if len(seeds) > 1 else prompt for prompt, seed in jobs]
        columns = 1 if args.compare else len(seeds) if len(seeds) > 1 else None
        scale = 1 if args.compare else sheet_scale(pictures[0].shape[0])
        write_png(sheet_path, contact_sheet(pictures, captions, columns, scale))
        print(sheet_path)
    return 0


def _draw(pipeline: Pipeline, prompt: str, seed: int, args: argparse.Namespace, bar: Any) -> Result:
    return pipeline(
        prompt,
        seed=seed,
        steps=args.steps,
        guidance_scale=args.guidance,
        negative_prompt=args.negative,
        on_step=lambda *_: bar.update(),
    )


def _reference(path: Path, bundle: Bundle) -> Pipeline:
    """The pipeline to compare with: another bundle's, or a diffusers folder's in PyTorch."""
    if (path / MANIFEST).is_file():
        return Pipeline.from_bundle(Bundle.open(path))
    if (path / "model_index.json").is_file():
        return Pipeline.from_bundle(bundle, "torch", folder=path)
    raise UserError(
        f"{path} is neither a bundle ({MANIFEST}) nor a diffusers folder (model_index.json)"
    )


def _outputs(
    output: Path | None, jobs: Sequence[tuple[str, int]]
) -> tuple[list[Path], Path | None]:
    """Where each picture goes, and the contact sheet if there are several."""
    names = [f"{_slug(prompt)}-{seed}.png" for prompt, seed in jobs]
    suffix = output.suffix.lower() if output else ""
    if suffix in OTHER_PICTURES:
        raise UserError(f"pictures are PNG files; name a .png file or a folder, not {output}")
    if len(jobs) > 1:
        folder = output or Path("pictures")
        if suffix == ".png":
            raise UserError(f"{folder} is one picture and {len(jobs)} are asked for; name a folder")
        numbered = [folder / f"{index:03d}-{name}" for index, name in enumerate(names)]
        return numbered, folder / "contact_sheet.png"
    if output is None:
        return [Path(names[0])], None
    return [output if suffix == ".png" else output / names[0]], None


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-").encode()
    # A character that the cut has split is left out.
    return words[:MAX_SLUG_BYTES].decode(errors="ignore").rstrip("-") or "picture"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."


def _check_text(text: str) -> None:
    """Refuse what no text is: Python's stand-ins for the bytes of an argument that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt {_short(text)!a} is not UTF-8; check the terminal's encoding"
        ) from error


def _check_free(paths: Sequence[Path], force: bool) -> None:
    for path in paths:
        if path.exists() and not force:
            raise UserError(f"{path} already exists; choose another --output, or add --force")
    for folder in {path.parent for path in paths}:
        check_writable(folder)


def _metadata(
    bundle: Bundle, prompt: str, seed: int, steps: int, args: argparse.Namespace
) -> dict[str, str]:
    guidance = _guidance_scale(bundle, args)
    own = bundle.manifest.generation.negative_prompt
    negative = own if args.negative is None else args.negative
    return {
        "prompt": prompt,
        # Without guidance it has no part in the picture.
        **({"negative_prompt": negative} if guidance > 1 else {}),
        "seed": str(seed),
        "steps": str(steps),
        "guidance_scale": str(guidance),
        "bundle": f"{bundle.manifest.name} {bundle.manifest_sha256}",
    }


def _guidance_scale(bundle: Bundle, args: argparse.Namespace) -> float:
    own = bundle.manifest.generation.guidance_scale
    return own if args.guidance is None else float(args.guidance)


def list_devices(args: argparse.Namespace) -> int:
    """Print the devices that there are, and what keeps the others; or set one up, or clean one."""
    if args.setup:
        from mobile_runtime.devices.arm64 import set_up

        set_up(lambda text: print(text, flush=True))
        return 0
    if args.clean:
        print(devices.clean(args.clean))
        return 0
    for device in devices.there():
        obstacle = device.obstacle()
        print(f"{device.name:24} {f'not available: {obstacle}' if obstacle else 'ready'}")
    print("\nkinds, for --device:")
    for kind, what in devices.KINDS.items():
        print(f"{kind:24} {what}")
    return 0


def info(args: argparse.Namespace) -> int:
    """Print what a bundle holds."""
    bundle = Bundle.open(args.bundle)
    manifest = bundle.manifest
    generation = manifest.generation
    total = sum(entry.bytes for entry in manifest.files)
    print(f"{manifest.name}: {manifest.target}, {manifest.arithmetic}, {total / 1e6:.1f} MB")
    print(f"manifest  sha256 {bundle.manifest_sha256}")
    print(
        f"pictures  {generation.width} x {generation.height}, "
        f"guidance {generation.guidance_scale:g}, {generation.default_steps} steps by default"
    )
    counts: dict[str, list[int]] = {}
    for table in manifest.schedules:
        counts.setdefault(f"{table.scheduler} ({table.prediction_type})", []).append(table.steps)
    for scheduler, steps in counts.items():
        print(f"schedule  {scheduler}, steps: {', '.join(map(str, sorted(steps)))}")
    for entry in manifest.components:
        print(
            f"{entry.name:13} {entry.path:32} {entry.scheme:12} "
            f"{entry.parameters / 1e6:8.2f} M parameters {entry.macs / 1e9:8.2f} GMACs "
            f"{entry.bytes / 1e6:8.1f} MB"
        )
    for note in manifest.notes:
        print(f"note      {note}")
    print(f"validated: {told_verdict(bundle)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
