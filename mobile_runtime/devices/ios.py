"""An iPhone or iPad with the sample app (or any that takes jobs: JOBS.md), from a Mac with Xcode.

`xcrun devicectl` (Xcode 15 or later) copies into the app's own folder, starts the app and copies
its results back. There the app finds, below Documents/pocket_diffusion, `bundles/MANIFEST_SHA256`,
`jobs/ID` and its own `results/ID`; a file `bundles/MANIFEST_SHA256.whole` says that all of a bundle
has come. Nothing is removed there: devicectl cannot. Each task's result is fetched as soon as it is
there, so that a phone that is unplugged takes nothing along.

Written after devicectl's documentation and tested against a stand-in: never on a Mac yet.
"""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobile_runtime.devices import Troubles, Work
from mobile_runtime.devices.attempts import Fault, prepared_attempts
from mobile_runtime.devices.transfers import LostError, keep, said
from mobile_runtime.errors import UserError
from mobile_runtime.jobs import DEVICE, Result
from mobile_runtime.runs import NoRun

APP = "org.pocketdiffusion.sample"
ROOT = "Documents/pocket_diffusion"
POLL_S = 2.0
CALL_TIMEOUT_S = 3600.0  # a bundle of gigabytes over a slow cable
STOP_S = 5.0


@dataclass(frozen=True)
class IosDevice:
    """udid: as `xcrun devicectl list devices` tells it. app: the app that runs jobs."""

    udid: str
    app: str = APP

    @classmethod
    def named(cls, text: str) -> "IosDevice":
        """UDID or UDID,app=BUNDLE_ID."""
        udid, *more = text.split(",")
        options = dict(part.partition("=")[::2] for part in more)
        app = options.pop("app", APP)
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z-]*", udid) or options or not _is_id(app):
            raise UserError(f"ios:{text} is no phone; write ios:UDID or ios:UDID,app=BUNDLE_ID")
        return cls(udid, app)

    @property
    def name(self) -> str:
        """As users name it."""
        return f"ios:{self.udid}" + (f",app={self.app}" if self.app != APP else "")

    def obstacle(self) -> str | None:
        """Whether there is devicectl, and the phone answers it."""
        if shutil.which("xcrun") is None:
            return "iPhones are reached from a Mac with Xcode 15 or later; there is no xcrun here"
        try:
            done = self._devicectl("device", "info", "details")
        except LostError as error:
            return str(error)
        if done.returncode:
            return (
                f"{self.udid} does not answer ({said(done.stderr)}); plug it in, unlock it, and "
                "see: xcrun devicectl list devices"
            )
        return None

    def run(self, work: Work) -> Troubles:
        """Send what is not there yet, start the app, and fetch each task's result."""

        def prepare(result: Result) -> None:
            self._send(work.bundle.path, f"{ROOT}/bundles/{result.job.manifest_sha256}")
            self._send(work.job, f"{ROOT}/jobs/{result.job.id}")
            for task in result.missing():
                self._fetch(result, task)

        return prepared_attempts(work, self.name, prepare, self._attempt)

    def _attempt(self, work: Work, result: Result, tasks: Sequence[str]) -> Fault | None:
        """Start the app, and wait until it has done these tasks, or is gone."""
        with tempfile.TemporaryFile() as log:
            # With --console it lasts as long as the app.
            command = [*self._command("device", "process", "launch"), "--terminate-existing"]
            command += ["--console", self.app, "--job", result.job.id, "--only", ",".join(tasks)]
            app = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                fault = self._wait(app, work, result, tasks)
            except (LostError, OSError) as error:
                return Fault(NoRun("not_run", f"{self.name}: {error}"), for_all=True)
            finally:
                app.terminate()
                try:
                    app.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    app.kill()
                    app.wait()
            log.seek(0)
            told = log.read()
        if fault and b"ERROR" in told:  # devicectl's own: locked, unplugged, no such app
            why = NoRun("not_run", f"{self.name}: the app does not run: {said(told)}")
            return Fault(why, for_all=True)
        return fault

    def _wait(
        self, app: "subprocess.Popen[bytes]", work: Work, result: Result, tasks: Sequence[str]
    ) -> Fault | None:
        heard = time.monotonic()
        left = list(tasks)
        while left:
            ended = app.poll() is not None
            work.tell(f"{self.name}: {left[0]}")
            if self._fetch(result, left[0]):
                heard = time.monotonic()
                left.pop(0)
                continue
            if ended:
                return Fault(NoRun("fail", f"{self.name}: the app ended without a result for it"))
            if time.monotonic() - heard > work.timeout_s:
                told = f"{self.name} gave no result for {work.timeout_s:g} s and was stopped"
                return Fault(NoRun("fail", told))
            time.sleep(POLL_S)
        return None

    def _fetch(self, result: Result, task: str) -> bool:
        """One task's record and tensors, if the record is there; it is written last."""
        there = f"{ROOT}/results/{result.job.id}"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if not self._copy_back(f"{there}/{task}.json", folder / f"{task}.json"):
                return False
            self._copy_back(f"{there}/{DEVICE}", folder / DEVICE)
            tensors = f"{task}.safetensors"
            if not self._copy_back(f"{there}/{tensors}", folder / tensors) and _has_tensors(
                folder / f"{task}.json"
            ):
                raise LostError(f"the tensors of {task} could not be fetched")
            keep({path.name: path.read_bytes() for path in folder.iterdir()}, result.folder)
        return True

    def _send(self, folder: Path, to: str) -> None:
        """A folder, unless all of it is there already."""
        with tempfile.TemporaryDirectory() as name:
            mark = Path(name) / "whole"
            if self._copy_back(f"{to}.whole", mark):
                return
            mark.write_bytes(b"")
            for source, destination in ((folder, to), (mark, f"{to}.whole")):
                done = self._devicectl(
                    *("device", "copy", "to"),
                    *("--source", str(source.resolve()), "--destination", destination),
                    *self._in_app,
                )
                if done.returncode:
                    raise LostError(f"what a job needs could not be sent: {said(done.stderr)}")

    def _copy_back(self, source: str, to: Path) -> bool:
        """Whether a file was there; devicectl writes over nothing, so `to` is a new name."""
        done = self._devicectl(
            *("device", "copy", "from", "--source", source, "--destination", str(to)),
            *self._in_app,
        )
        return done.returncode == 0 and to.is_file()

    @property
    def _in_app(self) -> tuple[str, ...]:
        return ("--domain-type", "appDataContainer", "--domain-identifier", self.app)

    def _command(self, *words: str) -> list[str]:
        return ["xcrun", "devicectl", *words, "--device", self.udid]

    def _devicectl(self, *words: str) -> "subprocess.CompletedProcess[bytes]":
        verb, rest = words[:3], words[3:]
        try:
            return subprocess.run(
                [*self._command(*verb), *rest],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=CALL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LostError(f"{self.udid} did not answer for {CALL_TIMEOUT_S:g} s") from error


def _has_tensors(record: Path) -> bool:
    """Whether a record tells of tensors; a damaged one tells of none, and is refused later."""
    try:
        return json.loads(record.read_bytes()).get("tensors_sha256") is not None
    except (ValueError, AttributeError):
        return False


def _is_id(text: str) -> bool:
    """Whether it is a bundle identifier, as in org.example.app."""
    return re.fullmatch(r"[\w-]+(\.[\w-]+)+", text) is not None
