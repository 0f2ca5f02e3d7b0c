"""What the desktop pipeline drew for a bundle's golden prompts, to stand beside a phone's.

`python -m mobile_runtime reference bench --bundle BUNDLE -o FOLDER` makes it, on the machine with
the GPU; `validate BUNDLE --reference FOLDER` shows it, on any machine, without PyTorch.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mobile_runtime.bundle import Bundle, sha256
from mobile_runtime.errors import UserError
from mobile_runtime.goldens import PromptCase, prompt_case
from mobile_runtime.jobs import write_json
from mobile_runtime.latency import WARM_UP, Environment, Latency, Timing, environment, summary
from mobile_runtime.manifest import Strict
from mobile_runtime.parity import check_picture
from mobile_runtime.reference.bench import allocated, peak
from mobile_runtime.reference.parts import Parts
from mobile_runtime.reference.pipeline import ReferencePipeline
from mobile_runtime.reference.switches import EXACT, Machine, Settings
from mobile_runtime.report import PIPELINE, Check, Report

REFERENCE, PICTURES = "reference.json", "reference.safetensors"


class StoredRun(Strict):
    """One set of switches; none: `exact`."""

    name: str
    switches: tuple[str, ...]
    latency: Latency


class Stored(Strict):
    """`reference.json`, schema 1. Pictures are `NAME/PROMPT`, (H, W, 3) uint8."""

    schema_version: Literal[1] = 1
    manifest_sha256: str
    machine: str
    environment: Environment
    runs: tuple[StoredRun, ...] = Field(min_length=1)
    pictures_sha256: str


def measure(
    bundle: Bundle,
    parts: Parts,
    machine: Machine,
    chosen: Sequence[tuple[str, Sequence[str], Settings]],
    folder: Path,
    rounds: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Stored:
    """Draw a bundle's golden prompts, each from its stored noise, and keep pictures and times.

    chosen: name, switches and settings of each run; they take turns. Raises UserError for parts of
    another size than the bundle's.
    """
    if parts.generation.model_copy(update={"scaling_factor": 1}) != (
        bundle.manifest.generation.model_copy(update={"scaling_factor": 1})
    ):
        raise UserError(
            f"{parts.name} draws other pictures than {bundle.path}; give its own recipe"
        )
    cases = [prompt_case(bundle, k) for k in range(len(bundle.manifest.golden.prompts))]
    if not cases:
        raise UserError(f"{bundle.path} holds no golden prompts; convert it with some")
    pictures: dict[str, np.ndarray] = {}
    draws, begun = [], []
    for name, _, settings in chosen:
        tell(f"{name}: open, first picture")
        before = allocated(machine)
        began = time.perf_counter()
        pipeline = ReferencePipeline(parts, settings, machine.device)
        load_ms = 1000 * (time.perf_counter() - began)
        draws.append(_drawer(pipeline))
        _, first_s = draws[-1](cases[0])
        with peak(machine) as most:
            for k, case in enumerate(cases):
                pictures[f"{name}/{k}"] = draws[-1](case)[0]
            used = None if before is None or (top := most()) is None else max(0, top - before)
        begun.append((load_ms, 1000 * first_s, used))
    times: list[list[float]] = [[] for _ in chosen]
    rng = np.random.default_rng(0)
    for turn in range(rounds + WARM_UP):
        tell(f"times, {turn + 1} of {rounds + WARM_UP}")
        for index in rng.permutation(len(draws)):
            _, seconds = draws[index](cases[turn % len(cases)])
            if turn >= WARM_UP:
                times[index].append(1000 * seconds)
    runs = []
    for (name, switches, _), own, (load_ms, first_ms, used) in zip(
        chosen, times, begun, strict=True
    ):
        timing = Timing(load_ms=load_ms, first_ms=first_ms, warm_up=WARM_UP, times_ms=tuple(own))
        latency = summary(PIPELINE, f"desktop {name} on {machine.name}", timing, used)
        assert latency is not None
        runs.append(StoredRun(name=name, switches=tuple(switches), latency=latency))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{PICTURES}.partial"
    save_file(pictures, partial)
    partial.replace(folder / PICTURES)
    stored = Stored(
        manifest_sha256=bundle.manifest_sha256,
        machine=machine.name,
        environment=environment(),
        runs=tuple(runs),
        pictures_sha256=sha256(folder / PICTURES),
    )
    write_json(folder / REFERENCE, stored)
    return stored


def _drawer(pipeline: ReferencePipeline) -> Callable[[PromptCase], tuple[np.ndarray, float]]:
    def draw(case: PromptCase) -> tuple[np.ndarray, float]:
        golden = case.golden
        pipeline.forget()
        drawn = pipeline(
            golden.prompt,
            **golden.call,
            noise=case.noise,
            fresh_noise=None if case.fresh_noise is None else case.fresh_noise[:, None],
        )
        return drawn.pictures[0], drawn.seconds

    return draw


def read(folder: Path, bundle: Bundle) -> tuple[Stored, dict[str, np.ndarray]]:
    """What lies in a folder; UserError where it is damaged, or of another bundle."""
    path = folder / REFERENCE
    try:
        stored = Stored.model_validate_json(path.read_bytes())
        if stored.manifest_sha256 != bundle.manifest_sha256:
            raise UserError(
                f"{path} was made for another bundle; make it anew with: "
                f"python -m mobile_runtime reference bench --bundle {bundle.path} -o {folder}"
            )
        if sha256(folder / PICTURES) != stored.pictures_sha256:
            raise UserError(f"{folder / PICTURES} is not what {REFERENCE} says; make it anew")
        pictures = load_file(folder / PICTURES)
        own = bundle.manifest.generation
        for run in stored.runs:
            for k in range(len(bundle.manifest.golden.prompts)):
                picture = pictures[f"{run.name}/{k}"]
                if (picture.dtype, picture.shape) != (np.uint8, (own.height, own.width, 3)):
                    told = f"{run.name}/{k} is {picture.dtype} {picture.shape}"
                    raise UserError(f"{folder / PICTURES}: {told}; make it anew")
    except (ValidationError, SafetensorError, KeyError, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} holds no reference that can be read: {told}") from error
    return stored, pictures


def beside(report: Report, bundle: Bundle, folder: Path) -> Report:
    """A report with the desktop pipeline's pictures and times, and the distances, not gated."""
    stored, kept = read(folder, bundle)
    checks, shown = [], []
    first = stored.runs[0]
    numbers = {(g.prompt, g.seed): k for k, g in enumerate(bundle.manifest.golden.prompts)}
    for pictures in report.pictures:
        k = numbers[pictures.prompt, pictures.seed]
        desktop = tuple((run.latency.runtime, kept[f"{run.name}/{k}"]) for run in stored.runs)
        shown.append(pictures.model_copy(update={"desktop": desktop}))
        for run in stored.runs:
            wanted = kept[f"{run.name}/{k}"]
            checks.append(_distance(pictures.runtime, run.name, k, wanted, pictures.output))
    for run in stored.runs[1:]:
        for k in range(len(bundle.manifest.golden.prompts)):
            wanted, made = kept[f"{first.name}/{k}"], kept[f"{run.name}/{k}"]
            checks.append(_distance(f"desktop {run.name}", first.name, k, wanted, made))
    return report.model_copy(
        update={
            "checks": (*report.checks, *checks),
            "latency": (*report.latency, *(run.latency for run in stored.runs)),
            "pictures": tuple(shown),
        }
    )


def _distance(
    runtime: str, against: str, prompt: int, wanted: np.ndarray, made: np.ndarray
) -> Check:
    verdict, psnr_db = check_picture(wanted, made)
    equal = psnr_db == np.inf
    return Check(
        kind="reference",
        component=PIPELINE,
        runtime=runtime,
        prompt=prompt,
        status="not_gated",
        gated=False,
        reason=f"against the desktop's {against}: {verdict.reason}",
        value=None if equal else psnr_db,
        equal=equal,
        unit="dB",
        details={"against": against},
    )


def exact_and(
    names: Sequence[str], settings: Settings
) -> list[tuple[str, Sequence[str], Settings]]:
    """The runs of a bundle's reference: `exact`, and `fast` where any switch is on."""
    runs: list[tuple[str, Sequence[str], Settings]] = [("exact", (), EXACT)]
    return runs if settings.exact else [*runs, ("fast", names, settings)]
