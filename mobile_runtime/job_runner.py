"""Runs a job folder in this process: `python -m mobile_runtime.job_runner --help`.

What a device does that has Python; a phone's app does the same by JOBS.md. It needs numpy,
pydantic, safetensors, and the runtime that the job names.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mobile_runtime import machine
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, choices, run_cli
from mobile_runtime.jobs import (
    DEVICE,
    Arrays,
    ComponentTask,
    DeviceFacts,
    Job,
    PromptTask,
    Record,
    Result,
    ResultError,
    open_job,
    under,
    write_json,
    writing,
)
from mobile_runtime.latency import environment
from mobile_runtime.runs import (
    LoadedPipeline,
    NoRun,
    Runtime,
    load_pipeline,
    run_component,
    run_prompt,
)

PARENT_POLL_S = 1.0


def run_job(
    folder: Path,
    bundle: Bundle,
    output: Path,
    *,
    only: Sequence[str] | None = None,
    emulated: bool = False,
    tell: Callable[[Record], None] = lambda record: None,
) -> Result:
    """Run what a result folder lacks of a job. A task that fails is told in its record.

    only: the tasks of these names. emulated: told in the result. tell: of each task when it is
    done. Raises UserError where the bundle is not the job's.
    """
    job, inputs = open_job(folder)
    if bundle.manifest_sha256 != job.manifest_sha256:
        raise UserError(
            f"{bundle.path} is not the bundle that the job in {folder} was made for (its manifest "
            "differs); give that one, or make the job anew"
        )
    names = [task.name for task in job.tasks]
    if unknown := [name for name in only or () if name not in names]:
        raise choices("task", unknown[0], names)
    result = Result(output, job)
    facts = facts_here(job, emulated)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        forget_another(result, facts)
        write_json(output / DEVICE, facts)
    missing = set(result.missing())
    tasks = [t for t in job.tasks if t.name in missing and (only is None or t.name in only)]
    runner = _Tasks(job, bundle)
    # disable=None: no bar where the output is not a terminal.
    for task in tqdm(tasks, unit="task", disable=None, delay=2, leave=False):
        own = under(f"{task.name}/", inputs)
        with machine.peak_memory() as peak:
            values, tensors = (
                runner.component(task, own)
                if isinstance(task, ComponentTask)
                else runner.prompt(task, own)
            )
            values["peak_bytes"] = None if emulated else peak()
        record = Record(
            job=job.id,
            manifest_sha256=bundle.manifest_sha256,
            task=task.name,
            thermal=machine.thermal_state(),
            **values,
        )
        result.write(record, tensors)
        tell(record)
    return result


def facts_here(job: Job, emulated: bool = False) -> DeviceFacts:
    """What this process runs a job on."""
    return DeviceFacts(
        job=job.id,
        device=machine.model(),
        emulated=emulated,
        memory_bytes=machine.memory_bytes(),
        environment=environment(),
    )


def forget_another(result: Result, facts: DeviceFacts) -> None:
    """Remove what another machine, or another version of its runtime, left in a result."""
    try:
        same = result.device() in (None, facts)
    except ResultError:
        same = False
    for task in () if same else result.job.tasks:
        for ending in (".json", ".safetensors"):
            (result.folder / f"{task.name}{ending}").unlink(missing_ok=True)


class _Tasks:
    """Runs single tasks; the pipeline stays loaded from one prompt to the next."""

    def __init__(self, job: Job, bundle: Bundle) -> None:
        self.bundle = bundle
        self.runtime = Runtime(job.backend, bundle.manifest.arithmetic, job.options)
        self.pipeline: LoadedPipeline | NoRun | None = None

    def component(self, task: ComponentTask, inputs: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Values of the record, and tensors."""
        cases = [under(f"{k}/", inputs) for k in range(task.cases)]
        run = run_component(
            self.bundle,
            task.component,
            self.runtime,
            cases,
            warm_up=task.warm_up if task.repeats else 0,
            repeats=task.repeats,
            step=_quiet,
        )
        if isinstance(run, NoRun):
            return _why(run), {}
        places = {str(k): outputs for k, outputs in enumerate(run.outputs)} | {"again": run.again}
        tensors = {
            f"{place}/{name}": value
            for place, outputs in places.items()
            for name, value in outputs.items()
        }
        return {"status": "done", "timing": run.timing}, tensors

    def prompt(self, task: PromptTask, inputs: Arrays) -> tuple[dict[str, Any], Arrays]:
        """Values of the record, and tensors."""
        if self.pipeline is None:
            self.pipeline = load_pipeline(self.bundle, self.runtime, _quiet)
        if isinstance(self.pipeline, NoRun):
            return _why(self.pipeline), {}
        run = run_prompt(
            self.pipeline,
            task.golden,
            inputs["noise"],
            inputs.get("fresh_noise"),
            repeats=task.repeats,
            step=_quiet,
        )
        if isinstance(run.made, NoRun):
            return _why(run.made), {}
        assert run.ids is not None
        assert run.noise is not None
        tensors = {
            "ids": run.ids,
            "noise": run.noise,
            "trajectory": run.made.trajectory,
            "picture": run.made.picture,
        }
        return {"status": "done", "timing": run.made.timing}, tensors


def _why(run: NoRun) -> dict[str, Any]:
    return {"status": run.status, "reason": run.reason}


def _quiet(text: str) -> None:
    """The tasks are told."""


def _end_without(parent: int) -> None:
    """End this process with its parent: nobody would wait for what it writes."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def main(argv: list[str]) -> int:
    """Run a job; 0 if every task was done, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m mobile_runtime.job_runner",
        description="Run a job folder on this machine; what its result has already is kept.",
        epilog="example: python -m mobile_runtime.job_runner job BUNDLE --output result",
    )
    parser.add_argument("job", type=Path, metavar="JOB", help="the job's folder")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="RESULT", help="the result's folder"
    )
    parser.add_argument("--only", nargs="+", metavar="TASK", help="these tasks alone")
    parser.add_argument(
        "--emulated", action="store_true", help="tell that this machine's times say nothing"
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="end as soon as this is not the parent any more"
    )
    args = parser.parse_args(argv)
    if args.parent is not None:
        threading.Thread(target=_end_without, args=(args.parent,), daemon=True).start()
    bundle = Bundle.open(args.bundle)
    worst = 0

    def tell(record: Record) -> None:
        nonlocal worst
        why = f" ({record.reason})" if record.reason else ""
        tqdm.write(f"{record.task}: {record.status}{why}")
        sys.stdout.flush()
        worst = max(worst, int(record.status != "done"))

    run_job(args.job, bundle, args.output, only=args.only, emulated=args.emulated, tell=tell)
    return worst


if __name__ == "__main__":
    sys.exit(run_cli(main))
