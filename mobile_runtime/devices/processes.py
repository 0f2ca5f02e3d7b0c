"""Devices that are a Python on this machine: the machine itself, or an emulated one."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mobile_runtime.devices import Troubles, Work
from mobile_runtime.devices.attempts import Fault, attempts
from mobile_runtime.job_runner import facts_here, forget_another
from mobile_runtime.jobs import Result, open_job, writing
from mobile_runtime.runs import NoRun

POLL_S = 0.1
STOP_S = 5.0
"""A process that was asked to end and does not is killed after this."""
SHOWN_LETTERS = 300


def local() -> "ProcessDevice":
    """This machine."""
    return ProcessDevice("local", (sys.executable,))


@dataclass(frozen=True)
class ProcessDevice:
    """A Python that sees this machine's files. python: the command that starts it."""

    name: str
    python: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    emulated: bool = False

    def obstacle(self) -> str | None:
        """Why it cannot run."""
        if shutil.which(self.python[0]) is None:
            return f"there is no {self.python[0]}"
        return None

    def run(self, work: Work) -> Troubles:
        """Run what is missing; a task that kills its process, or hangs, keeps no other from it."""
        with writing(work.result):
            work.result.mkdir(parents=True, exist_ok=True)
        if self.python == local().python:
            # A result that is whole already starts no process that would look at whose it is.
            job, _ = open_job(work.job)
            forget_another(Result(work.result, job), facts_here(job))
        return attempts(work, self.name, self._process)

    def _process(self, work: Work, result: Result, tasks: Sequence[str]) -> Fault | None:
        """Run one process for these tasks."""
        code = Path(__file__).resolve().parents[2]
        # An emulated Python has libraries of its own, and shares none with this one.
        beside = self.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        path = os.pathsep.join(part for part in (str(code), beside) if part)
        command = [*self.python, "-m", "mobile_runtime.job_runner"]
        command += [str(work.job.absolute()), str(work.bundle.path.absolute())]
        command += ["--output", str(work.result.absolute()), "--parent", str(os.getpid())]
        command += ["--only", *tasks]
        command += ["--emulated"] if self.emulated else []
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, "PYTHONPATH": path},
            )
            try:
                hung = self._wait(process, work, result, tasks)
            finally:
                _stop(process)
            log.seek(0)
            said = " ".join(log.read().split())[-SHOWN_LETTERS:]
        if hung:
            told = f"{self.name} gave no result for {work.timeout_s:g} s and was stopped"
            return Fault(NoRun("fail", told))
        if process.returncode < 0:
            told = f"{self.name}: the process was ended by signal {-process.returncode}"
            return Fault(NoRun("fail", told))
        # Code 1 says that a task failed, which its record tells.
        if process.returncode > 1 or (process.returncode and not result.has(tasks[0])):
            told = f"{self.name} ended with code {process.returncode}: {said}"
            return Fault(NoRun("not_run", told), for_all=not result.has(tasks[0]))
        return None

    def _wait(
        self, process: subprocess.Popen[bytes], work: Work, result: Result, tasks: Sequence[str]
    ) -> bool:
        """Wait until the process ends; True if it gave nothing for too long."""
        heard, done = time.monotonic(), 0
        while process.poll() is None:
            time.sleep(POLL_S)
            now = sum(result.has(task) for task in tasks)
            if now > done:
                heard, done = time.monotonic(), now
            following = tasks[done] if done < len(tasks) else "the end"
            work.tell(f"{self.name}: {following}")
            if time.monotonic() - heard > work.timeout_s:
                return True
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
