"""An Android phone that adb reaches, with the sample app on it (or any that takes jobs, JOBS.md).

The app has to be debuggable: what it needs goes into its own folder by run-as, and its results come
back so. There it finds, below files/pocket_diffusion, `bundles/MANIFEST_SHA256`, `jobs/ID` and its
own `results/ID`. A bundle stays for the next time. Each task's result is fetched as soon as it is
there, so that a phone that is unplugged takes nothing along.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mobile_runtime.devices import Troubles, Work
from mobile_runtime.devices.attempts import Fault, prepared_attempts
from mobile_runtime.devices.transfers import (
    LostError,
    files_of,
    keep,
    packed,
    said,
    sums,
    unpacked,
    unpacking,
)
from mobile_runtime.errors import UserError
from mobile_runtime.jobs import DEVICE, Result, open_job
from mobile_runtime.runs import NoRun

APP = "org.pocketdiffusion.sample"
ACTIVITY = ".JobActivity"
ROOT = "files/pocket_diffusion"
POLL_S = 2.0  # a look takes the phone some milliseconds, which the times should not have
CALL_TIMEOUT_S = 120.0
SEND_TIMEOUT_S = 3600.0
STATES = {
    "authorizing": "allow USB debugging on its screen",
    "unauthorized": "allow USB debugging on its screen",
    "offline": "plug it in again, or run: adb reconnect",
    "no permissions": "see https://developer.android.com/tools/device for the udev rules",
}


@dataclass(frozen=True)
class AdbDevice:
    """serial: as `adb devices` tells it. app: the package that runs jobs."""

    serial: str
    app: str = APP

    @classmethod
    def named(cls, text: str) -> "AdbDevice":
        """SERIAL or SERIAL,app=PACKAGE; without a serial the only phone that there is."""
        serial, *more = text.split(",")
        options = dict(part.partition("=")[::2] for part in more)
        app = options.pop("app", APP)
        if serial.startswith("-") or options or not app.replace(".", "").replace("_", "").isalnum():
            raise UserError(
                f"adb:{text} names no phone; write adb:SERIAL or adb:SERIAL,app=PACKAGE"
            )
        return cls(serial or _only_one(), app)

    @property
    def name(self) -> str:
        """As users name it."""
        return f"adb:{self.serial}" + (f",app={self.app}" if self.app != APP else "")

    def obstacle(self) -> str | None:
        """Whether it answers, and has the app."""
        if shutil.which("adb") is None:
            return "there is no adb here; install Android's platform tools"
        state = devices().get(self.serial)
        if state != "device":
            return _state(self.serial, state)
        try:
            done = self._as_app("true")
        except LostError as error:
            return str(error)
        if done.returncode:
            return (
                f"{self.app} cannot be used on {self.serial} ({said(done.stderr + done.stdout)}); "
                "install a debug build of the sample app, or name another with ,app=PACKAGE"
            )
        return None

    def run(self, work: Work) -> Troubles:
        """Send what is not there yet, start the app, and fetch each task's result."""
        job, _ = open_job(work.job)

        def prepare(result: Result) -> None:
            self._send(work.bundle.files(), f"{ROOT}/bundles/{job.manifest_sha256}")
            self._send(files_of(work.job), f"{ROOT}/jobs/{job.id}")
            self._fetch(result)

        troubles = prepared_attempts(work, self.name, prepare, self._attempt)
        if not Result(work.result, job).missing():
            # All is here; a phone that was just unplugged keeps its copy.
            with contextlib.suppress(LostError, OSError):
                self._as_app(f"rm -rf {ROOT}/jobs/{job.id} {ROOT}/results/{job.id}")
        return troubles

    def _attempt(self, work: Work, result: Result, tasks: Sequence[str]) -> Fault | None:
        """Start the app, and wait until it has done these tasks, or is gone."""
        start = f"am start -S -W -n {self.app}/{ACTIVITY} --es job {result.job.id}"
        start += f" --es only {','.join(tasks)}"
        heard, done = time.monotonic(), -1
        try:
            started = self._shell(start)
            said_so = (started.stdout + started.stderr).splitlines()
            if started.returncode or any(line.startswith(b"Error") for line in said_so):
                why = said(started.stdout + started.stderr)
                told = f"{self.name}: {ACTIVITY} of {self.app} does not start: {why}"
                return Fault(NoRun("not_run", told), for_all=True)
            while True:
                alive = self._shell(f"pidof {self.app}").returncode == 0
                self._fetch(result)
                left = [task for task in tasks if not result.has(task)]
                if len(tasks) - len(left) > done:
                    heard, done = time.monotonic(), len(tasks) - len(left)
                    work.tell(f"{self.name}: {left[0] if left else 'the end'}")
                if not left:
                    self._shell(f"am force-stop {self.app}")
                    return None
                if not alive:
                    why = f"{self.name}: the app ended without a result for it"
                    return Fault(NoRun("fail", why))
                if time.monotonic() - heard > work.timeout_s:
                    self._shell(f"am force-stop {self.app}")
                    why = f"{self.name} gave no result for {work.timeout_s:g} s and was stopped"
                    return Fault(NoRun("fail", why))
                time.sleep(POLL_S)
        except (LostError, OSError) as error:
            return Fault(NoRun("not_run", f"{self.name}: {error}"), for_all=True)
        except BaseException:  # Ctrl-C, say: nobody would fetch what the app still makes
            with contextlib.suppress(LostError, OSError):
                self._shell(f"am force-stop {self.app}")
            raise

    def _as_app(
        self, command: str, data: IO[bytes] | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a command with the app's rights, in its folder."""
        return self._shell(f"run-as {self.app} sh -c {shlex.quote(command)}", data)

    def _shell(
        self, command: str, data: IO[bytes] | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a command there. LostError where the phone is gone."""
        limit_s = SEND_TIMEOUT_S if data else CALL_TIMEOUT_S
        try:
            done = subprocess.run(
                ["adb", "-s", self.serial, "shell", "-T", command],
                stdin=data or subprocess.DEVNULL,
                capture_output=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LostError(f"{self.serial} did not answer for {limit_s:g} s") from error
        # adb ends with 1 where it fails itself, as the command may have done; a phone that was just
        # unplugged can still be in its list.
        if done.returncode and done.stderr.startswith((b"error: ", b"adb: ")):
            raise LostError(f"{self.serial} is gone: {said(done.stderr)}")
        if done.returncode and (state := devices().get(self.serial)) != "device":
            raise LostError(_state(self.serial, state))
        return done

    def _send(self, files: Iterable[tuple[str, bytes | Path]], to: str) -> None:
        """Files as a folder there, whole or not at all, unless it is there already, undamaged."""
        files = list(files)
        if self._as_app(f"test -d {to}").returncode == 0:
            if self._sound(files, to):
                return
            self._as_app(f"rm -rf {to}")
        command, partial = unpacking(to)
        with packed(files) as spool:
            done = self._as_app(command, spool)
        if done.returncode:
            self._as_app(f"rm -rf {partial}")
            raise LostError(f"what a job needs could not be sent: {said(done.stderr)}")

    def _sound(self, files: Iterable[tuple[str, bytes | Path]], there: str) -> bool:
        """Whether a folder there holds these very files, as far as the phone can tell."""
        with sums(files) as spool:
            done = self._as_app(f"cd {there} && sha256sum -c -", spool)
        told = done.stdout + done.stderr
        # A phone too old for `sha256sum -c` leaves it to the app, which checks the hashes too.
        return not (done.returncode and (b"FAILED" in told or b"No such file" in told))

    def clean(self) -> None:
        """Remove what was sent to the app, and what it made."""
        self._shell(f"am force-stop {self.app}")
        done = self._as_app(f"rm -rf {ROOT}")
        if done.returncode:
            raise LostError(f"{ROOT} cannot be removed: {said(done.stderr)}")

    def _fetch(self, result: Result) -> None:
        """What is there of the missing tasks' results, each file whole."""
        missing = [f"{name}.{end}" for name in result.missing() for end in ("safetensors", "json")]
        names = {*missing} if (result.folder / DEVICE).is_file() else {DEVICE, *missing}
        there = f"{ROOT}/results/{result.job.id}"
        listed = self._as_app(f"ls {there} 2>/dev/null").stdout.decode(errors="replace").split()
        # A record says that its tensors are whole, so tensors without one are left for later.
        ready = [n for n in listed if n in names and f"{Path(n).stem}.json" in listed]
        if not ready:
            return
        done = self._as_app(f"cd {there} && tar -cf - {' '.join(map(shlex.quote, ready))}")
        if done.returncode:
            raise LostError(f"the result could not be fetched: {said(done.stderr)}")
        keep(unpacked(done.stdout, names), result.folder)


def devices() -> dict[str, str]:
    """The phones that adb knows, and their states; none where adb does not run."""
    if shutil.which("adb") is None:
        return {}
    try:
        done = subprocess.run(
            ["adb", "devices"], capture_output=True, timeout=60, check=False, env=os.environ
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.decode(errors="replace").splitlines()[1:]
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def _only_one() -> str:
    known = devices()
    if not known:
        raise UserError("adb knows no phone; plug one in, with USB debugging allowed on its screen")
    if len(known) > 1:
        raise UserError(f"adb knows several phones; name one: adb:{', adb:'.join(known)}")
    return next(iter(known))


def _state(serial: str, state: str | None) -> str:
    if state is None:
        return f"adb does not know {serial} any more, or never did; see: adb devices"
    advice = next((told for start, told in STATES.items() if state.startswith(start)), "see adb")
    return f"{serial} is {state.split(';')[0]}; {advice}"
