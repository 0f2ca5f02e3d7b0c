"""Job folders and result folders: what a device is asked to run, and what it gives back.

JOBS.md tells the format for those who write an app that runs jobs. A job is made from a bundle and
holds its golden inputs; a result has one record a task, written when the task is done, so that what
was measured before a device vanished is kept, and a second run does only what is missing. Every
record names its job and the bundle by the hash of its manifest: a stale result is no result.
"""

import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mobile_runtime.bundle import Bundle, sha256
from mobile_runtime.errors import BundleError, UserError
from mobile_runtime.goldens import golden_cases, prompt_case
from mobile_runtime.latency import WARM_UP, Environment, Timing, Word, plain
from mobile_runtime.machine import Thermal
from mobile_runtime.manifest import ComponentName, GoldenPrompt, Strict

JOB, INPUTS, DEVICE = "job.json", "inputs.safetensors", "device.json"
LONGEST_REASON = 1000
Count = Annotated[int, Field(ge=0, le=2**62)]
Arrays = dict[str, np.ndarray]
T = TypeVar("T", bound=Strict)


class ResultError(BundleError):
    """A result folder that is damaged, or belongs to another job or bundle."""


class ComponentTask(Strict):
    """Run one model on `cases` golden inputs, the first of them once more, then time it."""

    component: ComponentName
    cases: PositiveInt
    warm_up: Count = Field(default=WARM_UP, description="calls right before those that are timed")
    repeats: Count = Field(default=10, description="timed calls; 0: none")

    @property
    def name(self) -> str:
        """Of its record and its tensors."""
        return self.component


class PromptTask(Strict):
    """Draw one golden prompt from its stored noise."""

    index: Count
    golden: GoldenPrompt
    fresh_noise: bool = Field(description="whether the schedule adds noise, which is stored too")
    repeats: Count = Field(default=0, description="timed pictures after the first")

    @property
    def name(self) -> str:
        """Of its record and its tensors."""
        return f"prompt-{self.index}"


class Job(Strict):
    """`job.json`, schema 1."""

    schema_version: Literal[1] = 1
    id: str = Field(pattern=r"^[0-9a-f]{32}$", description="random; every record repeats it")
    bundle: str = Field(description="the manifest's name")
    manifest_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    backend: str = Field(description="the runtime: onnxruntime, coreml, executorch, ...")
    options: dict[str, Any] = Field(default_factory=dict, description="threads, providers, ...")
    components: tuple[ComponentTask, ...]
    prompts: tuple[PromptTask, ...]
    inputs_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description=f"of {INPUTS}")

    @model_validator(mode="after")
    def _tasks_differ(self) -> "Job":
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError("a task is listed twice")
        return self

    @property
    def tasks(self) -> tuple[ComponentTask | PromptTask, ...]:
        """All tasks, in the order in which they run."""
        return (*self.components, *self.prompts)


class Record(Strict):
    """`TASK.json`: how a task went. Its tensors are in `TASK.safetensors`."""

    job: str
    manifest_sha256: str = Field(description="of the bundle as the device has it")
    task: str
    status: Literal["done", "fail", "not_run"]
    reason: Annotated[str, BeforeValidator(partial(plain, longest=LONGEST_REASON))] = ""
    timing: Timing | None = None
    peak_bytes: Annotated[int, Field(gt=0, le=2**62)] | None = Field(
        default=None, description="the most memory that the process held during the task"
    )
    thermal: Thermal | None = Field(default=None, description="where known")
    tensors_sha256: str | None = None

    @property
    def why(self) -> str:
        """Why it is not done."""
        return self.reason or "the device does not say why"


class DeviceFacts(Strict):
    """`device.json`: what ran the job."""

    job: str
    device: Word = Field(description="the model, as people name it")
    emulated: bool = Field(default=False, description="then its times say nothing")
    memory_bytes: Count | None = None
    environment: Environment


def make_job(
    bundle: Bundle,
    folder: Path,
    backend: str,
    options: dict[str, Any] | None = None,
    *,
    prompts: Iterable[int] | None = None,
    repeats: int = 10,
    warm_up: int = WARM_UP,
) -> Job:
    """Write a job for all golden cases of a bundle into a new folder.

    prompts: indices of golden prompts; None: all. repeats: timed calls of each component, and
    timed pictures of the first prompt.
    """
    tensors: Arrays = {}
    components = []
    for entry in bundle.manifest.components:
        cases = golden_cases(bundle, entry.name)
        if cases:
            components.append(
                ComponentTask(
                    component=entry.name, cases=len(cases), warm_up=warm_up, repeats=repeats
                )
            )
        for k, case in enumerate(cases):
            tensors |= {f"{entry.name}/{k}/{name}": case.inputs[name] for name in case.inputs}
    tasks: list[PromptTask] = []
    for index in range(len(bundle.manifest.golden.prompts)) if prompts is None else prompts:
        prompt = prompt_case(bundle, index)
        tensors[f"prompt-{index}/noise"] = prompt.noise
        if prompt.fresh_noise is not None:
            tensors[f"prompt-{index}/fresh_noise"] = prompt.fresh_noise
        tasks.append(
            PromptTask(
                index=index,
                golden=prompt.golden,
                fresh_noise=prompt.fresh_noise is not None,
                repeats=0 if tasks else repeats,
            )
        )
    with writing(folder):
        folder.mkdir(parents=True)
        save_file(tensors, folder / INPUTS)
    job = Job(
        id=secrets.token_hex(16),
        bundle=bundle.manifest.name,
        manifest_sha256=bundle.manifest_sha256,
        backend=backend,
        options=options or {},
        components=tuple(components),
        prompts=tuple(tasks),
        inputs_sha256=sha256(folder / INPUTS),
    )
    with writing(folder):
        write_json(folder / JOB, job)
    return job


def open_job(folder: Path) -> tuple[Job, Arrays]:
    """A job and its inputs. BundleError where it is damaged."""
    job = _read(folder / JOB, Job)
    path = folder / INPUTS
    if not path.is_file() or sha256(path) != job.inputs_sha256:
        raise BundleError(f"{path} is missing or not what {JOB} says; make the job again")
    return job, _tensors(path)


class Result:
    """A result folder, as far as it goes.

    Raises ResultError for what belongs to another job or bundle and for what is damaged; a task
    that is not there is None.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self.job = job

    def has(self, task: str) -> bool:
        """Whether there is a record of a task, sound or not."""
        return (self.folder / f"{task}.json").is_file()

    def record(self, task: str) -> Record | None:
        """How a task went; None: not (yet) run."""
        path = self.folder / f"{task}.json"
        if not self.has(task):
            return None
        record = _read(path, Record)
        for what, given, wanted in (
            ("job", record.job, self.job.id),
            ("bundle", record.manifest_sha256, self.job.manifest_sha256),
            ("task", record.task, task),
        ):
            if given != wanted:
                raise ResultError(f"{path} is the result of another {what}; run the job anew")
        return record

    def tensors(self, record: Record) -> Arrays:
        """What a task gave."""
        path = self.folder / f"{record.task}.safetensors"
        if not path.is_file() or sha256(path) != record.tensors_sha256:
            raise ResultError(f"{path} is missing or not what its record says; run the job anew")
        return _tensors(path)

    def device(self) -> DeviceFacts | None:
        """What ran the job; None: it did not say (yet)."""
        path = self.folder / DEVICE
        if not path.is_file():
            return None
        facts = _read(path, DeviceFacts)
        if facts.job != self.job.id:
            raise ResultError(f"{path} is of another job; run the job anew")
        return facts

    def missing(self) -> list[str]:
        """The tasks that have no sound record, in the job's order."""
        names = []
        for task in self.job.tasks:
            try:
                record = self.record(task.name)
                if record is not None and record.tensors_sha256:
                    self.tensors(record)
            except ResultError:
                record = None
            if record is None:
                names.append(task.name)
        return names

    def write(self, record: Record, tensors: Arrays) -> None:
        """Add a task's record, its tensors first, each file whole or not at all.

        UserError where the folder cannot be written, or its disk is full.
        """
        with writing(self.folder):
            if tensors:
                path = self.folder / f"{record.task}.safetensors"
                partial = path.with_name(f".{path.name}.{os.getpid()}")
                try:
                    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
                record = record.model_copy(update={"tensors_sha256": sha256(path)})
            write_json(self.folder / f"{record.task}.json", record)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says against writing to a folder, or safetensors, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot write to {folder}: {why}; free space, and run it again") from error


def under(prefix: str, tensors: Arrays) -> Arrays:
    """The tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def write_json(path: Path, model: Strict) -> None:
    """A record as a file, whole or not at all."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(model.model_dump_json(indent=1) + "\n")
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        told = ": ".join(part for part in (where, fault["msg"]) if part)
        told = f"{path} is no sound {kind.__name__.lower()}: {told}"
        raise ResultError(told) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _tensors(path: Path) -> Arrays:
    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from error
