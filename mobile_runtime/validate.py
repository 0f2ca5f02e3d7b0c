"""Does a bundle compute what PyTorch computes? Checks the final files and writes the report.

Every component runs its golden inputs in the target's runtime and is held against two references:
the torch module after the stages ('same function', which gates the conversion) and the fp32
pipeline before them ('source', which gates the recipe). Then the whole pipeline runs the golden
prompts from their stored noise.

Core ML runs on Macs alone. Elsewhere the reference interpreter of ML programs runs the saved
package: in float32 (is the program right?) and, where the package computes in float16, in float16
too (is it right in the arithmetic that a phone uses?), each with its own gate. The pipeline runs
in the package's own arithmetic. Core ML itself is then told as not run.
"""

import argparse
import datetime
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mobile_runtime import backends, baseline, gates, report_markdown
from mobile_runtime.arguments import count, positive
from mobile_runtime.bundle import Bundle
from mobile_runtime.checks import check_unseen
from mobile_runtime.devices import DEFAULT_TIMEOUT_S
from mobile_runtime.errors import UserError, choices
from mobile_runtime.goldens import golden_cases, prompt_case
from mobile_runtime.judge import Judged, judge_component, judge_prompts
from mobile_runtime.latency import WARM_UP, environment
from mobile_runtime.machine import peak_memory
from mobile_runtime.manifest import ComponentName
from mobile_runtime.progress import AFTER_S, told
from mobile_runtime.reference import stored
from mobile_runtime.report import (
    PIPELINE,
    Check,
    DeviceRun,
    Report,
    Size,
    check_replaceable,
    check_writable,
    conclude,
    format_table,
    with_checks,
    write_report,
)
from mobile_runtime.runs import (
    ComponentRun,
    NoRun,
    PromptRun,
    Runtime,
    Step,
    load_pipeline,
    run_component,
    run_prompt,
)

UNTIMED = ("mil",)
"""An interpreter's time says nothing about a device."""
DEFAULT_REPEATS = 5
MARKDOWN = (".md", ".markdown", ".txt", "")
"""What a summary is added to; GitHub's own file has no suffix."""


def runtimes(
    bundle: Bundle, backend: str | None = None, options: Mapping[str, Any] | None = None
) -> list[Runtime]:
    """What the bundle's models are run in; the last one runs the whole pipeline, too.

    backend: None takes the target's own. Raises UserError for an unknown one, or an option that it
    has not.
    """
    arithmetic = bundle.manifest.arithmetic
    name = backends.default_backend(bundle.manifest.target) if backend is None else backend
    # The others read no bundle: torch opens a diffusers folder.
    if name not in backends.FORMATS:
        raise choices("backend", name, list(backends.FORMATS))
    own = dict(options or {})
    backends.check_options(name, own)
    if name != "mil" or "arithmetic" in own:
        return [Runtime(name, own.get("arithmetic", arithmetic), own)]
    kinds: tuple[Literal["float32", "float16"], ...] = ("float32",)
    if arithmetic == "float16":
        kinds = ("float32", "float16")
    return [Runtime(name, kind, {**own, "arithmetic": kind}) for kind in kinds]


def validate(
    bundle: Bundle,
    *,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    prompts: int | None = None,
    repeats: int = DEFAULT_REPEATS,
    progress: bool = True,
) -> Report:
    """Check an opened bundle. Writes nothing; see `report.write_report`.

    backend: None takes the target's own; options are its. prompts: only the first so many; the
    report tells how many were left out. repeats: timed calls of each component, 0 for none.
    Raises UserError for an unknown backend. A backend that is not available here, and a model
    that does not run, are told in the report, whose verdict is then not 'pass'.
    """
    manifest = bundle.manifest
    chosen = runtimes(bundle, backend, options)
    wanted = list(range(len(manifest.golden.prompts)))[:prompts]
    judged = Judged()
    with _bar(_count_steps(bundle, chosen, wanted, repeats), progress) as step:
        for entry in manifest.components:
            for runtime in chosen:
                run = run_here(bundle, entry.name, runtime, repeats=repeats, step=step)
                found = judge_component(bundle, entry.name, runtime, run)
                step(f"{entry.name} in {runtime.label}: look inside")
                found.checks += check_unseen(bundle, entry.name, runtime, found.checks)
                judged.add(found)
        runs = draw_here(bundle, chosen[-1], wanted, repeats=repeats, step=step)
        judged.add(judge_prompts(bundle, chosen[-1], runs))
    left_out = len(manifest.golden.prompts) - len(wanted)
    judged.checks += told_elsewhere(bundle, chosen, left_out)
    return report_of(bundle, judged).model_copy(update={"options": dict(options or {})})


def run_here(
    bundle: Bundle, component: ComponentName, runtime: Runtime, *, repeats: int, step: Step
) -> ComponentRun | NoRun:
    """Run a component's golden cases on this machine. repeats: timed calls, 0 for none."""
    inputs = [case.inputs for case in golden_cases(bundle, component)]
    if runtime.backend in UNTIMED:
        repeats = 0
    warm_up = WARM_UP if repeats else 0
    with peak_memory() as peak:
        run = run_component(
            bundle, component, runtime, inputs, warm_up=warm_up, repeats=repeats, step=step
        )
        return run if isinstance(run, NoRun) else replace(run, peak_bytes=peak())


def draw_here(
    bundle: Bundle, runtime: Runtime, prompts: Sequence[int], *, repeats: int, step: Step
) -> dict[int, PromptRun] | NoRun:
    """Run the golden prompts of these indices on this machine; the first is timed, too."""
    if not prompts:
        return {}
    loaded = load_pipeline(bundle, runtime, step)
    if isinstance(loaded, NoRun):
        return loaded
    if runtime.backend in UNTIMED:
        repeats = 0
    runs = {}
    for index in prompts:
        case = prompt_case(bundle, index)
        timed = repeats if index == prompts[0] else 0
        with peak_memory() as peak:
            run = run_prompt(
                loaded, case.golden, case.noise, case.fresh_noise, repeats=timed, step=step
            )
            if not isinstance(run.made, NoRun):
                run = replace(run, made=replace(run.made, peak_bytes=peak()))
        runs[index] = run
    return runs


def report_of(bundle: Bundle, judged: Judged, devices: Sequence[DeviceRun] = ()) -> Report:
    """The report on a bundle, made here."""
    verdict, summary = conclude(tuple(judged.checks))
    return Report(
        verdict=verdict,
        summary=summary,
        bundle=bundle.manifest.name,
        target=bundle.manifest.target,
        manifest_sha256=bundle.manifest_sha256,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=environment(),
        devices=tuple(devices),
        checks=tuple(judged.checks),
        latency=tuple(judged.latency),
        sizes=tuple(
            Size(
                component=entry.name,
                parameters=entry.parameters,
                bytes=entry.bytes,
                macs=entry.macs,
                scheme=entry.scheme,
            )
            for entry in bundle.manifest.components
        ),
        quantization=bundle.manifest.quantization,
        pictures=tuple(judged.pictures),
    )


def told_elsewhere(bundle: Bundle, chosen: Sequence[Runtime], left_out: int) -> list[Check]:
    """What was not run and does not decide the verdict: told, so that nobody takes it as done."""

    def tell(component: str, runtime: str, reason: str) -> Check:
        return Check(
            kind="elsewhere",
            component=component,
            runtime=runtime,
            status="not_run",
            gated=False,
            reason=reason,
        )

    checks = []
    if left_out:
        reason = f"{left_out} of {len(bundle.manifest.golden.prompts)} golden prompts left out"
        checks.append(tell(PIPELINE, chosen[-1].label, reason))
    if bundle.manifest.target == "coreml" and all(r.backend != "coreml" for r in chosen):
        on_mac = sys.platform == "darwin"
        reason = "another backend was asked for" if on_mac else "Core ML needs a Mac"
        checks.append(tell("every model", "coreml", reason))
    return checks


def _count_steps(bundle: Bundle, chosen: list[Runtime], prompts: list[int], repeats: int) -> int:
    """How many times the checks tell a step, if all goes well."""
    golden = bundle.manifest.golden
    per_model = sum(3 + (golden.cases.get(e.name) or 0) for e in bundle.manifest.components)
    timed = sum(r.backend not in UNTIMED and repeats > 0 for r in chosen) * len(
        bundle.manifest.components
    )
    return per_model * len(chosen) + timed + 1 + sum(1 + golden.prompts[k].steps for k in prompts)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Step]:
    """A progress bar on stderr, where that is a terminal, that names what is being run."""
    # disable=None: no bar where the output is not a terminal.
    disable = None if progress else True
    with tqdm(total=total, disable=disable, delay=AFTER_S, leave=False, unit="run") as bar:
        running = False

        def step(text: str) -> None:
            nonlocal running
            bar.update(int(running))  # what ran until now is done
            running = True
            bar.set_description(text, refresh=False)

        yield step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m mobile_runtime validate`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "--backend", metavar="NAME", help="one of mobile_runtime's (default: the target's own)"
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME",
        help="run it there instead, as in local, folder:DIR; several can be named (see devices)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the backend, as in threads=2",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="with --device: give it up after so many seconds without a result "
        f"(default: {DEFAULT_TIMEOUT_S:g})",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="with --device: each layer with quantized activations alone there and here, too",
    )
    parser.add_argument(
        "--prompts", type=positive, metavar="N", help="only the first N golden prompts"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="where report.json and report.html go (default: into the bundle)",
    )
    parser.add_argument(
        "--repeats",
        type=count,
        default=DEFAULT_REPEATS,
        metavar="N",
        help=f"timed calls of each component, 0 for none (default: {DEFAULT_REPEATS})",
    )
    parser.add_argument("--gate", action="append", default=[], metavar="NAME=DB", help=gates.HELP)
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="fail where accuracy or size is worse than stored there",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="show the desktop pipeline beside it: what `reference bench --bundle` has kept there",
    )
    parser.add_argument(
        "--save-baseline", type=Path, metavar="FILE", help="store this report's figures there"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help='a summary for pull requests, say "$GITHUB_STEP_SUMMARY"; added to what is there',
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _asked(args: argparse.Namespace) -> tuple[str, ...]:
    """The options that say what is checked, and how, to be given again."""
    words = []
    for option, values in (
        ("--backend", [args.backend]),
        ("--device", args.device),
        ("--option", args.option),
        ("--prompts", [args.prompts]),
        ("--repeats", [args.repeats if args.repeats != DEFAULT_REPEATS else None]),
        ("--gate", args.gate),
    ):
        words += [word for value in values if value is not None for word in (option, str(value))]
    return (*words, *(["--layers"] if args.layers else []))


def _here(bundle: Bundle, args: argparse.Namespace) -> Report:
    if args.layers:
        raise UserError("--layers goes with --device; name one, say --device local")
    return validate(
        bundle,
        backend=args.backend,
        options=backends.parse_options(args.option),
        prompts=args.prompts,
        repeats=args.repeats,
    )


def _on_devices(bundle: Bundle, args: argparse.Namespace, whole: list[Path]) -> Report:
    from mobile_runtime.on_devices import Asked, validate_on

    options = backends.parse_options(args.option)
    name = args.backend or backends.default_backend(bundle.manifest.target)
    backends.check_options(name, options)
    asked = Asked(name, options, args.prompts, args.repeats, args.timeout, args.layers)
    with told() as tell:
        return validate_on(bundle, args.device, asked, tell, whole)


def _check_markdown(path: Path, bundle: Bundle) -> None:
    """Refuse to add a summary to what is no Markdown."""
    if path.suffix.lower() not in MARKDOWN or path.resolve().is_relative_to(bundle.path.resolve()):
        raise UserError(f"--markdown {path} is no place for a summary; name a .md outside BUNDLE")


def run(args: argparse.Namespace) -> int:
    """Validate, write the report, print it. Returns 0 if the verdict is 'pass', else 1.

    Raises UserError where nothing could be run at all, a missing library say; nothing is written
    then, so that an earlier report stays.
    """
    asked = gates.parse_gates(args.gate)
    bundle = gates.with_gates(Bundle.open(args.bundle), asked)
    # A validation may take minutes; a report that cannot be kept is told before.
    check_writable(args.output or bundle.path)
    if args.output:
        check_replaceable(args.output)
    if args.save_baseline and args.save_baseline.is_file():
        baseline.read(args.save_baseline)  # anything else that lies there is not replaced
    for option, path in (("--save-baseline", args.save_baseline), ("--markdown", args.markdown)):
        if path is not None and (path.is_dir() or not path.name):
            raise UserError(f"{option} {str(path)!r} is no file; name one")
        if path:
            check_writable(path.absolute().parent, option)
    if args.markdown:
        _check_markdown(args.markdown, bundle)
    if args.reference:
        stored.read(args.reference, bundle)
    before = baseline.read(args.baseline) if args.baseline else None
    if before:
        baseline.check_bundle(bundle, before)
    whole: list[Path] = []
    report = _on_devices(bundle, args, whole) if args.device else _here(bundle, args)
    report = report.model_copy(update={"asked_gates": asked, "asked": _asked(args)})
    models = [check for check in report.checks if check.kind == "outputs"]
    if all(check.status == "not_run" for check in models):
        raise UserError(models[0].reason if models else f"{bundle.path} holds nothing to check")
    if before:
        report = with_checks(report, baseline.compare(bundle, report.checks, before))
    if args.reference:
        report = stored.beside(report, bundle, args.reference)
    _, html = write_report(report, args.output or bundle.path)
    if whole:
        from mobile_runtime.on_devices import forget

        forget(whole)
    if args.save_baseline and report.verdict == "pass":
        baseline.write(args.save_baseline, baseline.of(bundle, report.checks))
    elif args.save_baseline:
        # Else the next run would be held to what just failed.
        print(f"{args.save_baseline} is left as it is: only a pass is stored", file=sys.stderr)
    if args.markdown:
        with args.markdown.open("a+b") as stream:
            stream.seek(0)
            apart = b"" if stream.read()[-1:] in (b"", b"\n") else b"\n\n"
            stream.write(apart + report_markdown.render(report).encode())
    if args.json:
        print(report.model_dump_json(indent=1, exclude={"pictures"}))
    else:
        print(f"{format_table(report)}\nreport: {html}")
    return 0 if report.verdict == "pass" else 1
