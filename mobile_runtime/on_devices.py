"""Validation on devices: a job for each, its result, and one report on all of them."""

import contextlib
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

from mobile_runtime import backends, devices
from mobile_runtime.backends import default_backend
from mobile_runtime.bundle import Bundle
from mobile_runtime.cache import cache_root
from mobile_runtime.checks import Teller, check_unseen
from mobile_runtime.devices import DEFAULT_TIMEOUT_S, Device, Troubles, Work
from mobile_runtime.devices.folder import FolderDevice
from mobile_runtime.errors import UserError, choices
from mobile_runtime.jobs import Job, Result, ResultError, make_job, open_job, writing
from mobile_runtime.judge import Judged, component_runs, judge_result
from mobile_runtime.machine import THERMAL, Thermal
from mobile_runtime.manifest import ComponentName
from mobile_runtime.report import PIPELINE, Check, DeviceRun, Report
from mobile_runtime.runs import ComponentRun, NoRun, Runtime
from mobile_runtime.validate import UNTIMED, report_of, runtimes, told_elsewhere

try:
    import fcntl
except ImportError:  # Windows, where two validations at a time are the user's to avoid
    fcntl = None  # type: ignore[assignment]


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
    whole: list[Path] | None = None,
) -> Report:
    """Run a bundle's golden cases on devices, one after the other, and judge what they give.

    What needs no device is checked here: the values inside the models, where the bundle's format
    shows them, and the sampler's replay. A device that cannot run, or stops on the way, is told in
    the report as not run; what it gave is kept, and the next validation asks it for the rest. What
    is whole is removed, so that the next one measures anew; or, where whole is given, its folders
    are added to that, for `forget`, once the report is safe.
    UserError for an unknown device, one that is named twice, and a backend that reads no bundle.
    """
    if asked.backend is not None and asked.backend not in backends.FORMATS:
        raise choices("backend", asked.backend, list(backends.FORMATS))
    if asked.layers and not any(
        bundle.quantized_layers(entry.name) for entry in bundle.manifest.components
    ):
        raise UserError(
            f"{bundle.path} has no layers with quantized activations to run alone; leave out "
            "--layers"
        )
    chosen = [devices.find(name) for name in names]
    for device in chosen:
        if isinstance(device, FolderDevice) and device.folder.resolve().is_relative_to(
            bundle.path.resolve()
        ):
            raise UserError(f"--device {device.name} lies in the bundle; name another folder")
    same = [device.name for device in chosen]
    if twice := [name for k, name in enumerate(same) if name in same[:k]]:
        raise UserError(f"--device {twice[0]} is named twice; name each once")
    judged, ran, done = Judged(), list[DeviceRun](), list[Path]()
    asked_of = [_runtime(bundle, device, asked) for device in chosen]
    for device, runtime in zip(chosen, asked_of, strict=True):
        found, facts = _on(bundle, device, runtime, asked, tell, done)
        judged.add(found)
        if asked.layers:
            tell(f"{device.name}: quantized layers alone")
            judged.checks += _layers(bundle, device, runtime, asked)
        ran += [facts] if facts else []
    judged.checks += _inside(bundle, tell)
    left_out = len(bundle.manifest.golden.prompts) - len(_prompts(bundle, asked))
    judged.checks += told_elsewhere(bundle, asked_of, left_out)
    report = report_of(bundle, judged, ran)
    if whole is None:
        forget(done)
    else:
        whole += done
    return report


def forget(folders: Sequence[Path]) -> None:
    """Remove the results of devices that are in a report now."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _inside(bundle: Bundle, tell: Callable[[str], None]) -> list[Check]:
    """The values inside each model, in the runtimes of this machine that show them."""
    checks: list[Check] = []
    for entry in bundle.manifest.components:
        tell(f"{entry.name} here: look inside")
        for runtime in runtimes(bundle):
            found = check_unseen(bundle, entry.name, runtime)
            label = {"runtime": f"{runtime.label} here"}
            checks += [check.model_copy(update=label) for check in found]
    return checks


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
        else:
            reason += (
                "; where the whole differs, the float operators between them do, whose last bits "
                "turn single quantized steps"
            )
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
    done: list[Path] = []
    with _done(bundle, device, runtime, asked, lambda text: None, done) as (result, troubles):
        runs = component_runs(result, troubles)
    forget(done)
    return runtime, runs


def _on(
    bundle: Bundle,
    device: Device,
    runtime: Runtime,
    asked: Asked,
    tell: Callable[[str], None],
    done: list[Path],
) -> tuple[Judged, DeviceRun | None]:
    with _done(bundle, device, runtime, asked, tell, done) as (result, troubles):
        return judge_result(bundle, result, runtime, troubles), _facts(device, result)


@contextmanager
def _done(
    bundle: Bundle,
    device: Device,
    runtime: Runtime,
    asked: Asked,
    tell: Callable[[str], None],
    done: list[Path],
) -> Iterator[tuple[Result, Troubles]]:
    """A job's result, as far as the device went; done: gets the folder of one that is whole."""
    by_hand = isinstance(device, FolderDevice)
    folder = device.folder if isinstance(device, FolderDevice) else _place(bundle, runtime, asked)
    repeats = (
        0 if runtime.backend in UNTIMED or getattr(device, "emulated", False) else asked.repeats
    )
    with contextlib.ExitStack() as stack:
        obstacle = device.obstacle()
        if obstacle:
            # Nothing will run there; what was kept of an earlier run stays for the next one.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            job = _make_job(bundle, Path(scratch) / "job", runtime, asked, repeats)
            result = Result(Path(scratch) / "result", job)
            yield result, {task.name: NoRun("not_run", obstacle) for task in job.tasks}
            return
        stack.enter_context(_alone(folder, device.name))
        if not by_hand and not _is_sound(folder / "job"):
            # A run that was killed left it so; nothing that it names could be trusted.
            shutil.rmtree(folder, ignore_errors=True)
        job = _job(bundle, folder / "job", runtime, asked, repeats)
        result = Result(folder / "result", job)
        troubles = device.run(Work(bundle, folder / "job", result.folder, asked.timeout_s, tell))
        yield result, troubles
        if not by_hand and not result.missing():
            done.append(folder)


@contextmanager
def _alone(folder: Path, device: str) -> Iterator[None]:
    """Hold a job's folder against another validation that asks the same at the same time."""
    # Not beside it: a folder: device lies among the user's own files.
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = cache_root() / "jobs" / f"{key}.lock"
    with writing(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        opened = lock.open("w")
    with opened as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"another validation of this bundle on {device} is running; wait until it is "
                    "done, and run this again"
                ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _place(bundle: Bundle, runtime: Runtime, asked: Asked) -> Path:
    """A folder for this bundle, device and request: an unfinished run of the same is found."""
    request = repr((runtime, asked.prompts, asked.repeats))
    key = hashlib.sha256(f"{bundle.manifest_sha256} {request}".encode()).hexdigest()[:16]
    words = re.sub(r"[^a-z0-9]+", "-", (runtime.device or "").lower()).strip("-")
    return cache_root() / "jobs" / f"{words[:40]}-{key}"


def _job(bundle: Bundle, folder: Path, runtime: Runtime, asked: Asked, repeats: int) -> Job:
    """The job that lies there, or a new one. UserError where it is not what is asked for."""
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
        with tempfile.TemporaryDirectory() as scratch:
            wanted = _make_job(bundle, Path(scratch) / "job", runtime, asked, repeats)
        # What it holds was made here, and may have been edited since.
        if job.model_copy(update={"id": wanted.id}) != wanted:
            raise UserError(
                f"{folder} is a job with another --backend, --option, --prompts or --repeats, or "
                "was edited; ask for the same, or choose another folder"
            )
        return job
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        job = _make_job(bundle, partial, runtime, asked, repeats)
        with writing(folder):
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return job


def _is_sound(folder: Path) -> bool:
    """Whether a job can be read, or none is there."""
    try:
        return not folder.exists() or bool(open_job(folder))
    except UserError:
        return False


def _make_job(bundle: Bundle, folder: Path, runtime: Runtime, asked: Asked, repeats: int) -> Job:
    prompts = _prompts(bundle, asked)
    return make_job(
        bundle, folder, runtime.backend, runtime.options, prompts=prompts, repeats=repeats
    )


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
        options=result.job.options,
        thermal=_hottest(result),
    )


def _hottest(result: Result) -> Thermal | None:
    """The worst thermal state that any task was done in, where one is told."""
    told: list[Thermal] = []
    for task in result.job.tasks:
        with contextlib.suppress(ResultError):
            record = result.record(task.name)
            told += [record.thermal] if record is not None and record.thermal else []
    return max(told, key=THERMAL.index, default=None)
