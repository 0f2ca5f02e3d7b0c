"""Going on after a task that a device does not survive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mobile_runtime.devices import Troubles, Work
from mobile_runtime.devices.transfers import LostError
from mobile_runtime.jobs import Result, open_job
from mobile_runtime.runs import NoRun


@dataclass(frozen=True)
class Fault:
    """Why an attempt stopped before its end. for_all: another attempt would fare no better."""

    why: NoRun
    for_all: bool = False


Attempt = Callable[[Work, Result, Sequence[str]], Fault | None]
"""Runs tasks in their order, as far as they go."""


def attempts(work: Work, name: str, attempt: Attempt) -> Troubles:
    """Attempt what is missing, again without the task at which an attempt stopped."""
    job, _ = open_job(work.job)
    result, troubles = Result(work.result, job), Troubles()
    while left := _left(result, troubles):
        fault = attempt(work, result, left)
        after = _left(result, troubles)
        if not after:
            break
        # Tasks run in order, so the first of those that are left is where it stopped.
        told = fault.why if fault else NoRun("fail", f"{name} ended without a result for it")
        stopped = after if fault and fault.for_all else after[:1]
        troubles |= dict.fromkeys(stopped, told)
    return troubles


def prepared_attempts(
    work: Work, name: str, prepare: Callable[[Result], None], attempt: Attempt
) -> Troubles:
    """Bring a device what it needs, by `prepare`, and attempt what is missing then.

    prepare: sends what is not there yet, and fetches what an earlier run has left.
    """
    work.result.mkdir(parents=True, exist_ok=True)
    job, _ = open_job(work.job)
    result = Result(work.result, job)
    work.tell(f"{name}: send the bundle")
    try:
        prepare(result)
    except (LostError, OSError) as error:
        return dict.fromkeys(result.missing(), NoRun("not_run", f"{name}: {error}"))
    return attempts(work, name, attempt)


def _left(result: Result, troubles: Troubles) -> list[str]:
    return [name for name in result.missing() if name not in troubles]
