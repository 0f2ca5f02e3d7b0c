"""`python -m mobile_runtime reference generate | bench | profile`."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobile_runtime.arguments import check_new_file
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError
from mobile_runtime.latency import environment
from mobile_runtime.pictures import contact_sheet, sheet_scale, write_png
from mobile_runtime.reference import rows as planning
from mobile_runtime.reference import stored, tables
from mobile_runtime.reference.parts import Parts, opener
from mobile_runtime.reference.pipeline import told_memory
from mobile_runtime.reference.switches import (
    EXACT,
    SWITCHES,
    Machine,
    Settings,
    fast_names,
    machine_of,
    named,
    settings_of,
)
from mobile_runtime.report import check_writable

EXAMPLES = """examples:
  python -m mobile_runtime reference generate "a large red star on white" -o star.png --fast
  python -m mobile_runtime reference bench --ablation -o ablation
  python -m mobile_runtime reference bench --recipe sd_turbo_int8 --model random:sd_turbo --ablation
  python -m mobile_runtime reference profile --with compile --with channels_last

switches:
"""
TRACED_PICTURES = 3
KEPT = "ablation.json"
TABLES = (KEPT, "ablation.md", "ablation.html")
SHEET = "contact_sheet.png"
STRENGTH = 0.8
MOST_COMPARED = 1000


def main(argv: list[str]) -> int:
    """Run one of the three commands; returns its exit code."""
    width = max(map(len, SWITCHES))
    lines = [
        f"  {name:{width}}  {switch.about}{' (by name only)' if switch.asked else ''}\n"
        for name, switch in SWITCHES.items()
    ]
    texts: dict[str, Any] = {
        "epilog": EXAMPLES + "".join(lines),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(
        prog="python -m mobile_runtime reference",
        description="The desktop pipeline, exact as the yardstick or fast: draw, time, profile.",
        **texts,
    )
    commands = parser.add_subparsers(metavar="generate | bench | profile", required=True)
    for name, about, run, add in (
        ("generate", "draw pictures", generate, _add_generate),
        ("bench", "time the pipeline, or all switches in a table", bench, _add_bench),
        ("profile", "PyTorch's profile of one picture", profile, _add_profile),
    ):
        command = commands.add_parser(name, help=about, description=about, **texts)
        add(command)
        command.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU)")
        command.add_argument(
            "--tiny-decoder",
            metavar="SOURCE",
            help="an AutoencoderTiny: folder, hub id, or random (untrained, for speed)",
        )
        opener().add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    args.command = "python -m mobile_runtime reference " + shlex.join(argv)
    with told_memory(EXACT, args.device or "this machine"):
        return int(args.run(args))


def _add_switches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fast", action="store_true", help="every switch that keeps the picture and is here"
    )
    parser.add_argument(
        "--with", action="append", default=[], dest="on", metavar="SWITCH", help="switch one on"
    )
    parser.add_argument(
        "--without", action="append", default=[], dest="off", metavar="SWITCH", help="leave one out"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="a .png, or a folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first picture")
    parser.add_argument("--scheduler", metavar="NAME", help="in place of the recipe's")
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="start from this picture, of the pipeline's own size",
    )
    parser.add_argument(
        "--strength", type=float, help=f"with --image: the share of steps ({STRENGTH})"
    )
    parser.add_argument("--force", action="store_true", help="replace pictures that exist")
    _add_switches(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ablation", action="store_true", help="the whole table: one more each, each alone, steps"
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="NAME",
        help="with --ablation: only rows of this kind or name; may be repeated",
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed pictures (10)")
    parser.add_argument(
        "--compared", type=int, default=4, metavar="N", help="pictures for PSNR and SSIM (4)"
    )
    parser.add_argument(
        "--judged", type=int, default=0, metavar="N", help="pictures for the embedded model's judge"
    )
    parser.add_argument(
        "--bundle",
        metavar="BUNDLE",
        help="its golden prompts, by its own recipe, kept in -o DIR for validate --reference",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="for ablation.json, .md and .html"
    )
    parser.add_argument("--force", action="store_true", help="replace figures that are there")
    _add_switches(parser)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("trace.json"), metavar="FILE", help="the trace"
    )
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="operators to show (20)")
    parser.add_argument("--force", action="store_true", help="replace a trace that is there")
    _add_switches(parser)


def _chosen(
    args: argparse.Namespace, machine: Machine, parts: Parts
) -> tuple[Settings, tuple[str, ...]]:
    """The settings that the options ask for; what is missing is told on stderr, line by line."""
    for name in (*args.on, *args.off):
        named(name)
    wanted = [*(fast_names(machine) if args.fast else ()), *args.on]  # what is missing is told
    if args.tiny_decoder and "tiny_decoder" not in wanted:
        wanted.append("tiny_decoder")
    wanted = [name for name in dict.fromkeys(wanted) if name not in args.off]
    names, told = planning.usable(
        wanted, parts, machine, parts.generation.default_steps, args.tiny_decoder
    )
    names, more = planning.without_conflicts(names)
    told |= more
    for name, why in told.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    return settings_of(names, machine, args.tiny_decoder), names


def generate(args: argparse.Namespace) -> int:
    """Draw, and write the pictures."""
    from mobile_runtime.reference.pipeline import ReferencePipeline

    machine = machine_of(args.device)
    several = len(args.prompts) > 1
    output = args.output or Path("reference" if several else "reference.png")
    if several == (output.suffix.lower() == ".png"):
        form = "a folder for several prompts" if several else "a .png for one prompt"
        raise UserError(f"--output {output} should be {form}")
    paths = [output / f"{k}.png" for k in range(len(args.prompts))] if several else [output]
    _check_free([*paths, *([output / SHEET] if several else [])], args.force)
    if args.strength is not None and not args.image:
        raise UserError("--strength goes with --image; name a picture, or leave it out")
    check_writable(output.absolute() if several else output.absolute().parent, "--output")
    image = _read_image(args.image) if args.image else None
    parts = opener().open_asked(args)
    settings, names = _chosen(args, machine, parts)
    pipeline = ReferencePipeline(parts, settings, args.device)
    with tqdm(disable=None, delay=2, leave=False, unit="step") as bar:

        def count(step: int, steps: int, latents: Any) -> None:
            bar.update()

        drawn = pipeline(
            args.prompts,
            seed=args.seed,
            negative_prompt=args.negative,
            scheduler=args.scheduler,
            image=image,
            strength=STRENGTH if args.strength is None else args.strength,
            on_step=count,
        )
    about = {"switches": ", ".join(names) or "exact", "device": machine.name}
    for k, (path, picture, prompt) in enumerate(
        zip(paths, drawn.pictures, args.prompts, strict=True)
    ):
        write_png(path, picture, {"prompt": prompt, "seed": str(args.seed + k), **about})
    if several:
        sheet = contact_sheet(
            list(drawn.pictures), args.prompts, scale=sheet_scale(drawn.pictures.shape[1])
        )
        write_png(output / SHEET, sheet)
    print(
        f"{output}: {len(paths)} of {parts.name} in {drawn.seconds:.2f} s on {machine.name}, "
        f"{about['switches']}"
    )
    return 0


def _check_free(paths: Iterable[Path], force: bool) -> None:
    taken = [path for path in paths if path.exists()]
    if taken and not force:
        raise UserError(f"{taken[0]} already exists; choose another --output, or add --force")


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from error


def bench(args: argparse.Namespace) -> int:
    """Time one set of switches beside `exact`, or the whole table."""
    from mobile_runtime.reference.bench import Bench

    if args.rounds < 2:
        raise UserError(f"--rounds {args.rounds} should be 2 or more")
    if not 1 <= args.compared <= MOST_COMPARED:
        raise UserError(f"--compared {args.compared} should be from 1 to {MOST_COMPARED}")
    if args.judged < 0:
        raise UserError(f"--judged {args.judged} should be 0 or more")
    if args.rows and not args.ablation:
        raise UserError("--rows goes with --ablation")
    if args.ablation and (args.fast or args.on or args.off):
        raise UserError("--ablation runs every switch; leave out --fast, --with and --without")
    if args.output:
        check_writable(args.output.absolute(), "--output")
        kept = [stored.REFERENCE, stored.PICTURES] if args.bundle else list(TABLES)
        _check_free([args.output / name for name in kept], args.force)
    machine = machine_of(args.device)
    if args.bundle:
        return _bench_bundle(args, machine)
    parts = opener().open_asked(args)
    if args.judged and parts.judge is None:
        raise UserError(f"--judged: {parts.name} has no judge; only the embedded model has one")
    if args.judged and parts.judge and args.judged > len(parts.judge.prompts):
        raise UserError(f"--judged {args.judged}: there are {len(parts.judge.prompts)} captions")
    if args.tiny_decoder:
        parts.open_tiny(args.tiny_decoder)  # one that cannot be opened is told before any row
    steps = parts.generation.default_steps
    if args.ablation:
        plan = planning.plan(
            parts, machine, steps=steps, tiny_decoder=args.tiny_decoder, only=args.rows
        )
    else:
        _, names = _chosen(args, machine, parts)
        asked = planning.Row("yardstick", ", ".join(names) or "exact", names)
        plan = planning.Plan((asked,), {})
    data = _about(args.command, parts, machine, plan, steps)
    with tqdm(total=len(plan.rows), disable=None, leave=False, unit="row") as bar:
        named_row = ""

        def tell(text: str) -> None:
            bar.set_description(f"{named_row}: {text}")

        bar.set_description("open")
        work = Bench(
            parts,
            machine,
            steps=steps,
            tiny_decoder=args.tiny_decoder,
            rounds=args.rounds,
            judged=args.judged,
            compared=args.compared,
            tell=tell,
        )
        for row in plan.rows:
            named_row = row.name
            found = work.measure(row)
            settings = settings_of(row.switches, machine, args.tiny_decoder)
            found.floor_s = _floor(row, settings, parts, found.steps, data)
            data["rows"].append(found.as_dict())
            if args.output:  # after each row: a killed run keeps what it measured
                _keep(args.output, data)
            bar.update()
    print(tables.markdown(data))
    if args.output:
        print(f"kept in {args.output}: ablation.json, ablation.md, ablation.html")
    return 0


def _bench_bundle(args: argparse.Namespace, machine: Machine) -> int:
    """Draw and time a bundle's golden prompts, exact and fast, and keep them."""
    if args.output is None:
        raise UserError("--bundle needs -o DIR, where the pictures and times are kept")
    if args.ablation:
        raise UserError("--bundle goes without --ablation")
    if args.judged or opener().asked_for(args):
        raise UserError(
            "--bundle draws its own prompts by its own recipe; leave out --recipe, what changes "
            "it, and --judged"
        )
    bundle = Bundle.open(args.bundle)
    parts = opener().open_recipe(bundle.manifest.recipe)
    if not (args.fast or args.on):
        args.fast = True
    settings, names = _chosen(args, machine, parts)
    runs = stored.exact_and(names, settings)
    with tqdm(disable=None, bar_format="{desc} {elapsed}", delay=2, leave=False) as line:
        made = stored.measure(
            bundle, parts, machine, runs, args.output, args.rounds, line.set_description
        )
    for run in made.runs:
        told = ", ".join(run.switches) or "no switch"
        print(f"{run.name:6} {run.latency.median_ms:10.2f} ms a picture  ({told})")
    print(
        f"kept in {args.output}; show it with: python -m mobile_runtime validate {bundle.path} "
        f"--reference {args.output}"
    )
    return 0


def _about(
    command: str, parts: Parts, machine: Machine, plan: planning.Plan, steps: int
) -> dict[str, Any]:
    """What stands above the table."""
    import torch

    from mobile_runtime.reference.floors import rates

    kinds = sorted({settings_of(row.switches, machine).arithmetic for row in plan.rows})
    speed = rates(machine, kinds)
    own = parts.generation
    return {
        "name": parts.name,
        "height": own.height,
        "width": own.width,
        "steps": steps,
        "scheduler": parts.schedule(steps, None).scheduler,
        "machine": machine.name,
        "threads": torch.get_num_threads(),
        "libraries": {**environment().libraries, "diffusers": _version("diffusers")},
        "command": command,
        "rates": {"macs": speed.macs, "bytes": speed.bytes},
        "left_out": plan.left_out,
        "rows": [],
    }


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _floor(
    row: planning.Row, settings: Settings, parts: Parts, steps: int, data: dict[str, Any]
) -> float | None:
    from mobile_runtime.reference.floors import Rates, floor_s

    return floor_s(row, settings, parts, steps, Rates(**data["rates"]))


def _keep(folder: Path, data: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        (KEPT, json.dumps(data, indent=1) + "\n"),
        ("ablation.md", tables.markdown(data)),
        ("ablation.html", tables.page(data)),
    ):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def profile(args: argparse.Namespace) -> int:
    """torch.profiler's table of one picture's operators, and the trace."""
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} should be 1 or more")
    check_new_file(args.output, "--output", args.force)
    machine = machine_of(args.device)
    parts = opener().open_asked(args)
    settings, names = _chosen(args, machine, parts)
    print(f"{parts.name} on {machine.name}: {', '.join(names) or 'exact'}, one picture")
    print(_profiled(parts, settings, args.device, args.rows, args.output))
    print(f"trace: {args.output} (open it in https://ui.perfetto.dev)")
    return 0


def _profiled(parts: Parts, settings: Settings, device: str | None, rows: int, output: Path) -> str:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from mobile_runtime.reference.pipeline import ReferencePipeline

    pipeline = ReferencePipeline(parts, settings, device)
    prompts: Sequence[str] = parts.prompts
    for k in range(TRACED_PICTURES):  # what compiles and what warms up is not of interest
        pipeline.forget()
        pipeline(prompts[k % len(prompts)], seed=k)
    activities = [ProfilerActivity.CPU]
    if pipeline.machine.cuda:
        activities.append(ProfilerActivity.CUDA)
    pipeline.forget()
    with profiled(activities=activities) as seen:
        pipeline(prompts[0], seed=TRACED_PICTURES)
    output.parent.mkdir(parents=True, exist_ok=True)
    # By its suffix the profiler decides the form; what is whole is moved to its place.
    partial = output.with_name(f".partial-{output.name}")
    try:
        seen.export_chrome_trace(str(partial))
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    by = "self_cuda_time_total" if pipeline.machine.cuda else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=48))
