"""A device that somebody else has: the job goes there, and the result comes back, by hand."""

from dataclasses import dataclass
from pathlib import Path

from mobile_runtime.devices import Troubles, Work
from mobile_runtime.jobs import Result, ResultError, open_job
from mobile_runtime.runs import NoRun


@dataclass(frozen=True)
class FolderDevice:
    """folder/job and folder/result."""

    folder: Path

    @property
    def name(self) -> str:
        """As users name it."""
        return f"folder:{self.folder}"

    @property
    def job(self) -> Path:
        """Where the job lies that goes to the device."""
        return self.folder / "job"

    @property
    def result(self) -> Path:
        """Where what comes back is put."""
        return self.folder / "result"

    def obstacle(self) -> str | None:
        """Nothing keeps a folder from being read."""
        return None

    def run(self, work: Work) -> Troubles:
        """Nothing runs here; each task without a sound record is told, with what is wrong."""
        job, _ = open_job(work.job)
        result, troubles = Result(work.result, job), Troubles()
        lacking = [task.name for task in job.tasks if not result.has(task.name)]
        others = f" (nor those of {', '.join(lacking[1:])})" if len(lacking) > 1 else ""
        for task in job.tasks:
            try:
                record = result.record(task.name)
                if record is None:
                    told = others if task.name == lacking[0] else ""
                    troubles[task.name] = NoRun(
                        "not_run",
                        f"there is no {work.result / task.name}.json{told}; run the job in "
                        f"{work.job} on the device, and put its result there",
                    )
                elif record.tensors_sha256:
                    result.tensors(record)
            except ResultError as error:
                troubles[task.name] = NoRun("fail", str(error))
        return troubles
