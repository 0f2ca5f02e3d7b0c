"""Validation on devices: a job for each, its result, and one report on all of them."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_runtime import devices
from mobile_runtime.backends import default_backend
from mobile_runtime.bundle import Bundle
from mobile_runtime.cache import cache_root
from mobile_runtime.checks import Teller
from mobile_runtime.devices import DEFAULT_TIMEOUT_S, Device, Troubles, Work
from mobile_runtime.devices.folder import FolderDevice
from mobile_runtime.errors import UserError
from mobile_runtime.jobs import Job, Result, ResultError, make_job, open_job
from mobile_runtime.judge import Judged, component_runs, judge_result
from mobile_runtime.manifest import ComponentName
from mobile_runtime.report import PIPELINE, Check, DeviceRun, Report
from mobile_runtime.runs import ComponentRun, NoRun, Runtime
from mobile_runtime.validate import UNTIMED, report_of, told_elsewhere


@dataclass(frozen=True)
class Asked:
    """What devices are asked to run.

    backend: None takes the target's own. layers: each quantized layer alone, too.
    """

    backend: str | None = None
    options: dict[str, Any] | None = None
    prompts: int | None = None
    repeats: int = 10
    timeout_s: float = DEFAULT_TIMEOUT_S
    layers: bool = False


def validate_on(
    bundle: Bundle,
    names: Sequence[str],
    asked: Asked,
    tell: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run a bundle's golden cases on devices, one after the other, and judge what they give.

    A device that cannot run, or stops on the way, is told in the report as not run; what it gave
    is kept, and the next validation asks it for the rest. UserError for an unknown device.
    """
    chosen = [devices.find(name) for name in names]
    judged, ran = Judged(), list[DeviceRun]()
    runtimes = [_runtime(bundle, device, asked) for device in chosen]
    for device, runtime in zip(chosen, runtimes, strict=True):
        found, facts = _on(bundle, device, runtime, asked, tell)
        judged.add(found)
        if asked.layers:
            tell(f"{device.name}: quantized layers alone")
            judged.checks += _layers(bundle, device, runtime, asked)
        ran += [facts] if facts else []
    left_out = len(bundle.manifest.golden.prompts) - len(_prompts(bundle, asked))
    judged.checks += told_elsewhere(bundle, runtimes, left_out)
    return report_of(bundle, judged, ran)


def _layers(bundle: Bundle, device: Device, runtime: Runtime, asked: Asked) -> list[Check]:
    """Each quantized layer alone there and here; a check for each component that has any."""
    from mobile_runtime.layers_alone import compare_on

    gate_db = bundle.manifest.gates.layer_snr_db
    with tempfile.TemporaryDirectory() as folder:
        try:
            layers = compare_on(bundle, [device], Path(folder) / "layers", asked)
        except UserError as error:
            tell = Teller(PIPELINE, runtime.label)
            reason = f"the quantized layers alone: {error}"
            return [tell("layers", "not_run", reason)]
    checks = []
    for component in dict.fromkeys(layer.component for layer in layers):
        mine = [layer for layer in layers if layer.component == component]
        worst = min(mine, key=lambda layer: layer.snr_db)
        equal = sum(layer.equal for layer in mine)
        reason = f"{equal} of {len(mine)} quantized layers are equal in every bit to those here"
        if equal < len(mine):
            reason += f"; the furthest, {worst.layer}, has {worst.snr_db:.1f} dB"
        low = gate_db is not None and not worst.snr_db >= gate_db
        checks.append(
            Teller(component, runtime.label)(
                "layers",
                "fail" if low else "pass",
                reason,
                value=None if worst.equal else worst.snr_db,
                equal=worst.equal,
                unit="dB",
                gate=gate_db,
            )
        )
    return checks


def _runtime(bundle: Bundle, device: Device, asked: Asked) -> Runtime:
    """The runtime that is asked of a device; the interpreter computes in what the package does."""
    backend = asked.backend or default_backend(bundle.manifest.target)
    options = dict(asked.options or {})
    if backend == "mil":
        options.setdefault("arithmetic", bundle.manifest.arithmetic)
    arithmetic = options.get("arithmetic", bundle.manifest.arithmetic)
    return Runtime(backend, arithmetic, options, device=device.name)


def _prompts(bundle: Bundle, asked: Asked) -> list[int]:
    return list(range(len(bundle.manifest.golden.prompts)))[: asked.prompts]


def run_on(
    bundle: Bundle, device: Device, asked: Asked
) -> tuple[Runtime, dict[ComponentName, ComponentRun | NoRun]]:
    """What each component gave on a device, unjudged."""
    runtime = _runtime(bundle, device, asked)
    with _done(bundle, device, runtime, asked, lambda text: None) as (result, troubles):
        return runtime, component_runs(result, troubles)


def _on(
    bundle: Bundle, device: Device, runtime: Runtime, asked: Asked, tell: Callable[[str], None]
) -> tuple[Judged, DeviceRun | None]:
    with _done(bundle, device, runtime, asked, tell) as (result, troubles):
        return judge_result(bundle, result, runtime, troubles), _facts(device, result)


@contextmanager
def _done(
    bundle: Bundle, device: Device, runtime: Runtime, asked: Asked, tell: Callable[[str], None]
) -> Iterator[tuple[Result, Troubles]]:
    """A job's result, as far as the device went; one that is whole is removed afterwards."""
    by_hand = isinstance(device, FolderDevice)
    folder = device.folder if isinstance(device, FolderDevice) else _place(bundle, runtime, asked)
    job = _job(bundle, folder / "job", runtime, asked)
    result = Result(folder / "result", job)
    work = Work(bundle, folder / "job", result.folder, asked.timeout_s, tell)
    obstacle = device.obstacle()
    if obstacle:
        why = NoRun("not_run", obstacle)
        troubles = {task.name: why for task in job.tasks}
    else:
        troubles = device.run(work)
    yield result, troubles
    if not by_hand and not result.missing():
        # The next validation measures anew.
        shutil.rmtree(folder, ignore_errors=True)


def _place(bundle: Bundle, runtime: Runtime, asked: Asked) -> Path:
    """A folder for this bundle, device and request: an unfinished run of the same is found."""
    request = repr((runtime, asked.prompts, asked.repeats))
    key = hashlib.sha256(f"{bundle.manifest_sha256} {request}".encode()).hexdigest()[:16]
    words = re.sub(r"[^a-z0-9]+", "-", (runtime.device or "").lower()).strip("-")
    return cache_root() / "jobs" / f"{words[:40]}-{key}"


def _job(bundle: Bundle, folder: Path, runtime: Runtime, asked: Asked) -> Job:
    """The job that lies there, or a new one. UserError where it is not what is asked for."""
    prompts = _prompts(bundle, asked)
    repeats = 0 if runtime.backend in UNTIMED else asked.repeats
    if folder.exists():
        try:
            job, _ = open_job(folder)
        except UserError:
            job = None
        if job is None or job.manifest_sha256 != bundle.manifest_sha256:
            raise UserError(
                f"{folder} is damaged, or the job of another bundle; remove it, or choose another "
                "folder"
            )
        there = (job.backend, job.options, [task.index for task in job.prompts])
        same_repeats = all(task.repeats == repeats for task in job.components)
        if there != (runtime.backend, runtime.options, prompts) or not same_repeats:
            raise UserError(
                f"{folder} is a job with another --backend, --option, --prompts or --repeats; ask "
                "for the same, or choose another folder"
            )
        return job
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    job = make_job(
        bundle,
        partial,
        runtime.backend,
        runtime.options,
        prompts=prompts,
        repeats=repeats,
    )
    partial.rename(folder)
    return job


def _facts(device: Device, result: Result) -> DeviceRun | None:
    try:
        facts = result.device()
    except ResultError:
        return None
    if facts is None:
        return None
    return DeviceRun(
        name=device.name,
        model=facts.device,
        emulated=facts.emulated,
        memory_bytes=facts.memory_bytes,
        environment=facts.environment,
    )
