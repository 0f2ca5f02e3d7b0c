"""The report of a validation: its types, its verdict, the table, and report.json on disk.

A report belongs to one bundle, by the SHA-256 of the bundle's manifest (which holds the hash of
every file). `read_report` refuses one that was made for another.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, NonNegativeInt, ValidationError

from mobile_runtime.bundle import REPORTS, Bundle
from mobile_runtime.errors import BundleError, UserError
from mobile_runtime.gates import told_gates
from mobile_runtime.latency import Environment, Latency
from mobile_runtime.manifest import LayerPlan, Strict, Target
from mobile_runtime.parity import Status

REPORT_JSON, REPORT_HTML = REPORTS

Verdict = Literal["pass", "fail", "not_run"]
Kind = Literal[
    "outputs",  # names, shapes, dtypes, finiteness of every case
    "same_function",  # against the torch module after the stages: gates the conversion
    "source",  # against the fp32 pipeline before the stages: gates the recipe
    "repeat",  # the same input twice gives the same bits
    "conditioning",  # the prompt changes the UNet's output as it changes the reference
    "layers_at_conversion",  # quantized layers on the same inputs; recorded, not measured again
    "layers",  # quantized layers alone, on a device and here, on the same inputs
    "quantized_layers",  # each alone, against what it gave at conversion
    "inside",  # every value inside, against PyTorch's; it names the first layer that diverges
    "timesteps",  # every timestep of the schedules: what the UNet's resnets make of it
    "vocabulary",  # every token: words to ids, and ids to rows of the embedding
    "tokens",  # prompt to ids
    "noise",  # seed to noise
    "sampler",  # schedule, guidance and scaling: a run replayed with PyTorch's model outputs
    "trajectory",  # latents by step
    "picture",  # against the same-function picture
    "source_picture",  # against the source's picture
    "elsewhere",  # what only another machine can check
    "baseline",  # whether anything is worse than in a stored report
    "reference",  # pictures against the desktop pipeline's
]
PIPELINE = "pipeline"
BESIDE: tuple[Kind, ...] = ("elsewhere", "baseline", "reference")
"""Checks of no runtime's outputs."""
NAMING: tuple[Kind, ...] = ("quantized_layers", "inside", "timesteps")
"""Checks that name a layer (`details["layer"]`), the surest first: depth hides no quantized one."""
# The comparisons that a bundle's gates hold, where they are set.
GATEABLE: tuple[Kind, ...] = (
    "same_function",
    "source",
    "layers_at_conversion",
    "trajectory",
    "picture",
    "source_picture",
)


class Check(Strict):
    """One thing that was checked, or could not be. Only gated checks decide the verdict."""

    kind: Kind
    component: str = Field(description="a component's name, or 'pipeline'")
    runtime: str = Field(description="the backend, with its arithmetic where it has a choice")
    prompt: int | None = Field(default=None, description="pipeline only: the golden prompt's index")
    status: Status
    gated: bool
    reason: str
    value: float | None = Field(
        default=None, description="the worst case's figure; null if equal or none"
    )
    unit: Literal["dB", "ratio"] | None = None
    gate: float | None = None
    equal: bool = Field(
        default=False, description="nothing differs, so the figure in dB is infinite"
    )
    max_abs: float | None = None
    details: dict[str, Any] = Field(default_factory=dict)


class Pictures(Strict):
    """The pictures of one golden prompt, (H, W, 3) uint8; shown in the HTML, not in the JSON."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    prompt: str
    seed: int
    runtime: str
    source: np.ndarray
    reference: np.ndarray
    output: np.ndarray
    desktop: tuple[tuple[str, np.ndarray], ...] = ()


class DeviceRun(Strict):
    """What ran a job, by the name that the runtimes of its checks end in."""

    name: str
    model: str
    emulated: bool
    memory_bytes: int | None
    environment: Environment
    options: dict[str, Any] = Field(default={}, description="of its backend, threads say")
    thermal: str | None = Field(default=None, description="the hottest that it told while it ran")


class Size(Strict):
    """What one component weighs. macs: multiply-adds of a call."""

    component: str
    parameters: NonNegativeInt
    bytes: NonNegativeInt
    macs: NonNegativeInt
    scheme: str


class Report(Strict):
    """`report.json`, schema 2."""

    schema_version: Literal[2] = 2
    verdict: Verdict
    summary: str = Field(description="one sentence; it names the first component that failed")
    bundle: str = Field(description="the manifest's name")
    target: Target
    manifest_sha256: str
    created: str = Field(description="UTC, ISO 8601")
    environment: Environment = Field(description="of the machine that judged")
    devices: tuple[DeviceRun, ...] = ()
    asked_gates: dict[str, float | None] = Field(
        default={}, description="in place of the bundle's own, from the command line"
    )
    options: dict[str, Any] = Field(default={}, description="of the backend on this machine")
    asked: tuple[str, ...] = Field(
        default=(), description="the command line's options, to run it again"
    )
    checks: tuple[Check, ...]
    latency: tuple[Latency, ...] = ()
    sizes: tuple[Size, ...] = ()
    quantization: tuple[LayerPlan, ...] = ()
    pictures: tuple[Pictures, ...] = Field(default=(), exclude=True, repr=False)

    model_config = ConfigDict(arbitrary_types_allowed=True)


def conclude(checks: tuple[Check, ...]) -> tuple[Verdict, str]:
    """The verdict on a bundle, and one sentence about it.

    pass: something ran, and every gated check passed. What could not run never counts as passed.
    The sentence of a pass also names what was not run, and what has no gate.
    """
    gated = [check for check in checks if check.gated]
    failed = next((check for check in gated if check.status == "fail"), None)
    if failed is not None:
        return "fail", f"{_place(failed)} failed: {failed.reason}{_place_inside(failed, gated)}"
    ran = any(check.kind == "outputs" and check.status == "pass" for check in gated)
    missing = next((check for check in gated if check.status != "pass"), None)
    if missing is not None:
        return "not_run", f"{_place(missing)} could not be checked: {missing.reason}"
    if not ran:
        return "not_run", "No model was run"
    skipped = [f"{_place(c)} ({c.reason})" for c in checks if c.status == "not_run"]
    note = f"; not run: {', '.join(skipped)}" if skipped else ""
    ungated = _not_gated(checks)
    note += f"; not gated: {', '.join(ungated)}" if ungated else ""
    return "pass", f"All {len(gated)} gated checks passed{note}"


def _place_inside(failed: Check, gated: Sequence[Check]) -> str:
    """Where inside the component that failed, if that was found; else where inside any."""
    found = [c for kind in NAMING for c in gated if (c.kind, c.status) == (kind, "fail")]
    mine = [c for c in found if (c.component, c.runtime) == (failed.component, failed.runtime)]
    return "".join(f"; {check.reason}" for check in (mine or found)[:1] if check is not failed)


def _not_gated(checks: tuple[Check, ...]) -> list[str]:
    """The comparisons that a gate could hold and none does; the places, if only some are open."""
    told = []
    for kind in GATEABLE:
        mine = [check for check in checks if check.kind == kind]
        places = [_place(check) for check in mine if check.status == "not_gated"]
        if places:
            name = kind.replace("_", " ")
            told.append(name if len(places) == len(mine) else f"{name} of {' and '.join(places)}")
    return told


def _place(check: Check) -> str:
    prompt = "" if check.prompt is None else f" (prompt {check.prompt})"
    return f"{check.component}{prompt} in {check.runtime}"


def with_checks(report: Report, more: Sequence[Check]) -> Report:
    """A report with more checks, and the verdict on all of them."""
    checks = (*report.checks, *more)
    verdict, summary = conclude(checks)
    return report.model_copy(update={"checks": checks, "verdict": verdict, "summary": summary})


def check_replaceable(folder: Path) -> None:
    """Refuse a folder whose report.json or report.html is none of ours, before any work."""
    ours = False
    path = folder / REPORT_JSON
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(path.read_bytes())
        ours = isinstance(data, dict) and {"verdict", "manifest_sha256"} <= data.keys()
    for name in REPORTS:
        if (folder / name).exists() and not ours:
            raise UserError(f"{folder / name} is no report of a bundle; choose another --output")


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into a folder, each whole or not at all.

    Raises UserError where the folder cannot be written, or the disk is full.
    """
    from mobile_runtime.report_html import render

    page = render(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        json_path = write_atomically(
            folder / REPORT_JSON, report.model_dump_json(indent=1, exclude={"pictures"}) + "\n"
        )
        return json_path, write_atomically(folder / REPORT_HTML, page)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder}: {error.strerror}; choose another --output"
        ) from error


def check_writable(folder: Path, option: str = "--output") -> None:
    """Raise UserError unless files can be made in a folder, which need not exist yet.

    option: what the sentence says to choose anew.
    """
    try:
        places = (folder.absolute(), *folder.absolute().parents)
        # Trying is the only sure test: rights say nothing of a file system that takes no files.
        with tempfile.TemporaryFile(dir=next(place for place in places if place.exists())):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} is no folder that can be written to ({error.strerror}); "
            f"choose another {option}"
        ) from error


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return path


def read_report(bundle: Bundle, folder: Path | None = None) -> Report:
    """The report that lies in the bundle (or in `folder`), if it was made for this very bundle."""
    path = (folder or bundle.path) / REPORT_JSON
    if not path.is_file():
        raise UserError(
            f"{bundle.path} has not been validated; run: "
            f"python -m mobile_runtime validate {bundle.path}"
        )
    report = load_report(path)
    if report.manifest_sha256 != bundle.manifest_sha256:
        raise BundleError(
            f"{path} was made for another bundle (its manifest differs); validate this one again"
        )
    return report


def load_report(path: Path) -> Report:
    """Read a report.json; BundleError where it is none."""
    try:
        report = Report.model_validate_json(path.read_bytes())
        below = any(
            check.status == "pass"
            and check.unit == "dB"
            and None not in (check.value, check.gate)
            and not check.value >= check.gate  # type: ignore[operator]
            for check in report.checks
        )
        if below or _lacks(report) or conclude(report.checks)[0] != report.verdict:
            raise BundleError(
                f"{path} says {report.verdict}, and its checks do not; validate the bundle again"
            )
        return report
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise BundleError(f"{path} is not a valid report: {where}: {fault['msg']}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def _lacks(report: Report) -> bool:
    """Whether a pass lacks a check that every component, and every picture, has."""
    if report.verdict != "pass":
        return False
    runtimes = {check.runtime for check in report.checks if check.kind == "outputs"}
    there = {(check.component, check.runtime, check.kind) for check in report.checks}
    wanted = [(size.component, "same_function") for size in report.sizes] + [(PIPELINE, "picture")]
    # Where one machine has two arithmetics, the pictures are drawn in the last.
    return not all(
        any((component, runtime, kind) in there for runtime in runtimes)
        for component, kind in wanted
    )


def told_verdict(bundle: Bundle) -> str:
    """What the report in the bundle says of this very bundle, in a line."""
    path = bundle.path / REPORT_JSON
    if not path.exists():
        return f"not validated yet; run: python -m mobile_runtime validate {bundle.path}"
    try:
        report = load_report(path)
    except BundleError:
        return "the report is unreadable (not validated)"
    if report.manifest_sha256 != bundle.manifest_sha256:
        return "the report is of another manifest (not validated)"
    if report.verdict == "pass":
        told = told_gates(report.asked_gates)
        return f"pass, {report.created}" + (
            f"; gates from the command line: {told}" if told else ""
        )
    word = {"fail": "FAILED", "not_run": "NOT RUN"}[report.verdict]
    return f"{word}: {report.summary}"


def decibel(check: Check | None) -> str:
    """A check's figure as people read it."""
    if check is None or (check.value is None and not check.equal):
        return "-"
    return "equal" if check.equal else f"{check.value:.1f} {check.unit}"


def component_rows(report: Report) -> list[dict[str, Check]]:
    """The checks of each component in each runtime, by kind, in the report's order."""
    rows: dict[tuple[str, str], dict[str, Check]] = {}
    for check in report.checks:
        if check.component != PIPELINE and check.kind not in BESIDE:
            rows.setdefault((check.component, check.runtime), {})[check.kind] = check
    return list(rows.values())


def prompt_rows(report: Report) -> list[dict[str, Check]]:
    """The checks of each golden prompt in each runtime, by kind, in the report's order."""
    rows: dict[tuple[int | None, str], dict[str, Check]] = {}
    for check in report.checks:
        if check.component == PIPELINE and check.kind not in BESIDE:
            rows.setdefault((check.prompt, check.runtime), {})[check.kind] = check
    return list(rows.values())


def row_status(row: dict[str, Check]) -> str:
    """What a row amounts to: its worst gated check."""
    statuses = {check.status for check in row.values() if check.gated}
    return next((status for status in ("fail", "not_run", "pass") if status in statuses), "not_run")


def format_table(report: Report) -> str:
    """The report as a short table for a terminal."""
    header = ("component", "runtime", "cases", "same function", "source", "max abs", "repeat")
    lines: list[tuple[str, ...]] = [(*header, "verdict")]
    for row in component_rows(report):
        first = next(iter(row.values()))
        same = row.get("same_function")
        repeat = row.get("repeat")
        lines.append(
            (
                first.component,
                first.runtime,
                str(len(same.details.get("cases", ()))) if same else "-",
                decibel(same),
                decibel(row.get("source")),
                f"{same.max_abs:.1e}" if same and same.max_abs is not None else "-",
                {"pass": "equal", "fail": "differs"}.get(repeat.status, "-") if repeat else "-",
                row_status(row),
            )
        )
    text = _columns(lines)
    prompts: list[tuple[str, ...]] = [
        ("prompt", "runtime", "picture", "source", "worst step", "verdict")
    ]
    for row in prompt_rows(report):
        first = next(iter(row.values()))
        prompts.append(
            (
                str(first.prompt) if first.prompt is not None else "-",
                first.runtime,
                decibel(row.get("picture")),
                decibel(row.get("source_picture")),
                decibel(row.get("trajectory")),
                row_status(row),
            )
        )
    if len(prompts) > 1:
        text += "\n\n" + _columns(prompts)
    notes = [
        f"not run: {check.component} in {check.runtime}: {check.reason}"
        for check in report.checks
        if check.status == "not_run"
    ]
    notes += [
        f"failed: {_place(check)}: {check.reason}"
        for check in report.checks
        if check.gated and check.status == "fail"
    ]
    if report.asked_gates:
        notes.append(f"gates from the command line: {told_gates(report.asked_gates)}")
    return "\n".join([text, "", *notes, f"{report.verdict.upper()}: {report.summary}"])


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
