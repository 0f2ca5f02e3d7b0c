"""A computer that ssh reaches: a Mac, an Arm board, a server.

It needs a Python of 3.11 or later with this project's dependencies and the runtime that is asked
for; the project's own code goes there with the job. What is sent lies below
~/.cache/pocket_diffusion there: the code and the bundles stay for the next time. Each task's result
is fetched as soon as it is done, so that a computer that vanishes takes nothing along.
"""

import contextlib
import hashlib
import os
import queue
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from mobile_runtime.devices import Troubles, Work
from mobile_runtime.devices.attempts import Fault, prepared_attempts
from mobile_runtime.devices.transfers import (
    SHOWN_LETTERS,
    LostError,
    files_of,
    keep,
    packed,
    said,
    unpacked,
    unpacking,
)
from mobile_runtime.errors import UserError
from mobile_runtime.jobs import DEVICE, Result, open_job
from mobile_runtime.runs import NoRun

COMMAND = "POCKET_DIFFUSION_SSH_COMMAND"
"""Environment: another ssh, or options for it, as git has GIT_SSH_COMMAND."""
PATIENCE = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
NEEDED = ("numpy", "pydantic", "safetensors", "tqdm", "regex")
ROOT = ".cache/pocket_diffusion"
CONNECTION_LOST = 255
PYTHON = "python3"
WRONG_REQUEST = 2
"""The runner's exit code for a bundle or a job that it cannot use."""
END_S = 30.0
POLL_S = 0.2


@dataclass(frozen=True)
class SshDevice:
    """host: as ssh takes it. python: the command there."""

    host: str
    python: str = PYTHON

    @classmethod
    def named(cls, text: str) -> "SshDevice":
        """HOST or HOST,python=PATH."""
        host, *more = text.split(",")
        options = dict(part.partition("=")[::2] for part in more)
        python = options.pop("python", PYTHON)
        if not host or host.startswith("-") or options or not python:
            raise UserError(f"ssh:{text} names no computer; write ssh:HOST or ssh:HOST,python=PATH")
        return cls(host, python)

    @property
    def name(self) -> str:
        """As users name it."""
        return f"ssh:{self.host}"

    def obstacle(self) -> str | None:
        """Whether it answers, and has what a job needs."""
        if shutil.which(_ssh()[0]) is None:
            return f"there is no {_ssh()[0]} here; install OpenSSH's client"
        imports = f"import sys; assert sys.version_info >= (3, 11); import {', '.join(NEEDED)}"
        try:
            done = self._call(f"{shlex.quote(self.python)} -c {shlex.quote(imports)}", timeout_s=60)
        except LostError as error:
            return str(error)
        if done.returncode == CONNECTION_LOST:
            return f"{self.host} cannot be reached: {said(done.stderr)}"
        if done.returncode:
            return (
                f"{self.python} on {self.host} lacks something ({said(done.stderr)}); there, run: "
                f"{self.python} -m pip install {' '.join(NEEDED)} onnxruntime, or name another "
                f"with ssh:{self.host},python=PATH"
            )
        return None

    def run(self, work: Work) -> Troubles:
        """Send what is not there yet, run it there, and fetch each task's result."""
        job, _ = open_job(work.job)

        def prepare(result: Result) -> None:
            self._send(_code(), self._code_there)
            self._send(work.bundle.files(), f"{ROOT}/bundles/{job.manifest_sha256}")
            self._send(files_of(work.job), f"{ROOT}/jobs/{job.id}")
            self._fetch(result, [task.name for task in job.tasks])

        troubles = prepared_attempts(work, self.name, prepare, self._attempt)
        if not Result(work.result, job).missing():
            # All is here; a computer that has just gone keeps its copy.
            with contextlib.suppress(LostError):
                self._call(f"rm -rf {ROOT}/jobs/{job.id}* {ROOT}/results/{job.id}")
        return troubles

    @cached_property
    def _code_there(self) -> str:
        digest = hashlib.sha256(b"".join(content for _, content in _code())).hexdigest()
        return f"{ROOT}/code/{digest[:32]}"

    def _attempt(self, work: Work, result: Result, tasks: Sequence[str]) -> Fault | None:
        job = result.job
        pid = f"jobs/{job.id}.pid"
        command = (
            f"cd {ROOT} && echo $$ > {pid} && PYTHONPATH=$HOME/{self._code_there} "
            f"exec {shlex.quote(self.python)} -u -m mobile_runtime.job_runner "
            f"jobs/{job.id} bundles/{job.manifest_sha256} "
            f"--output results/{job.id} --only {' '.join(tasks)}"
        )
        process = subprocess.Popen(
            [*_ssh(), *PATIENCE, *ALIVE, self.host, f'cd "$HOME" && {command}'],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        lines = _lines(process.stdout)
        heard, said = time.monotonic(), ""
        try:
            while (line := _next(lines)) is not None:
                if line == "":
                    if time.monotonic() - heard > work.timeout_s:
                        self._end(f"{ROOT}/{pid}")
                        told = f"{self.name} gave no result for {work.timeout_s:g} s"
                        return Fault(NoRun("fail", told))
                    continue
                heard, said = time.monotonic(), f"{said} {line.strip()}"[-SHOWN_LETTERS:]
                task = line.partition(":")[0]
                if task in tasks:
                    self._fetch(result, [task])
                    work.tell(f"{self.name}: {task} is done")
            code = process.wait()
            if code not in (0, 1, CONNECTION_LOST):  # 1: a task failed, which its record tells
                self._fetch(result, tasks)
        except (LostError, OSError) as error:
            return Fault(NoRun("not_run", f"{self.name}: {error}"), for_all=True)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if code == CONNECTION_LOST:
            why = NoRun("not_run", f"{self.name}: the connection was lost:{said}")
            return Fault(why, for_all=True)
        if code > 128:
            told = f"{self.name}: the process was ended by signal {code - 128}"
            return Fault(NoRun("fail", told))
        if code == WRONG_REQUEST:
            # Its copies are not what was sent: the next run sends them again.
            copies = f"{ROOT}/bundles/{job.manifest_sha256} {ROOT}/jobs/{job.id}"
            with contextlib.suppress(LostError):
                self._call(f"rm -rf {copies}")
            told = f"{self.name} could not use its copies, which are removed; run it again:{said}"
            return Fault(NoRun("not_run", told), for_all=True)
        if code and not result.has(tasks[0]):
            return Fault(NoRun("not_run", f"{self.name} ended with code {code}:{said}"), True)
        return None

    def clean(self) -> None:
        """Remove what was sent there, and what was made of it."""
        done = self._call(f"rm -rf {ROOT}")
        if done.returncode:
            raise LostError(f"{ROOT} cannot be removed: {said(done.stderr)}")

    def _end(self, pid_file: str) -> None:
        """End a task that hangs, and what it has started, so that nothing is timed beside it."""
        group = f"$(cat {pid_file})"
        with contextlib.suppress(LostError):
            self._call(f"kill -9 -- -{group} || kill -9 {group}", timeout_s=END_S)

    def _call(
        self, command: str, data: IO[bytes] | None = None, timeout_s: float = 600
    ) -> "subprocess.CompletedProcess[bytes]":
        try:
            return subprocess.run(
                [*_ssh(), *PATIENCE, *ALIVE, self.host, f'cd "$HOME" && {command}'],
                stdin=data or subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LostError(f"{self.host} did not answer for {timeout_s:g} s") from error

    def _send(self, files: Iterable[tuple[str, bytes | Path]], to: str) -> None:
        """Files as a folder there, whole or not at all, unless it is there already."""
        if self._call(f"test -d {to}").returncode == 0:
            return
        command, _ = unpacking(to)
        with packed(files) as spool:
            done = self._call(command, spool)
        if done.returncode:
            raise LostError(f"what a job needs could not be sent: {said(done.stderr)}")

    def _fetch(self, result: Result, tasks: Sequence[str]) -> None:
        """What is there of these tasks' results, each file whole; the records last."""
        missing = set(result.missing()) & set(tasks)
        names = [DEVICE, *(f"{name}.{end}" for name in missing for end in ("safetensors", "json"))]
        there = f"{ROOT}/results/{result.job.id}"
        command = (
            f"test -d {there} || exit 0; cd {there} && "
            f'set -- $(ls {" ".join(names)} 2>/dev/null); [ $# -eq 0 ] || tar -cf - "$@"'
        )
        done = self._call(command)
        if done.returncode:
            raise LostError(f"the result could not be fetched: {said(done.stderr)}")
        if not done.stdout:
            return
        keep(unpacked(done.stdout, set(names)), result.folder)


def _ssh() -> list[str]:
    return shlex.split(os.environ.get(COMMAND, "ssh"))


def _code() -> list[tuple[str, bytes]]:
    """This package's modules."""
    package = Path(__file__).resolve().parents[1]
    return [
        (str(path.relative_to(package.parent)), path.read_bytes())
        for path in sorted(package.rglob("*.py"))
    ]


def _lines(stream: IO[bytes]) -> "queue.Queue[str | None]":
    """Lines as they come; None at the end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line.decode(errors="replace"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _next(lines: "queue.Queue[str | None]") -> str | None:
    """The next line; an empty one where none came yet."""
    try:
        return lines.get(timeout=POLL_S)
    except queue.Empty:
        return ""
