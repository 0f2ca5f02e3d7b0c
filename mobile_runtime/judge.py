"""From what a runtime gave, here or on a device, to checks, latency and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mobile_runtime.bundle import Bundle
from mobile_runtime.checks import Teller, check_component
from mobile_runtime.jobs import (
    Arrays,
    ComponentTask,
    PromptTask,
    Record,
    Result,
    ResultError,
    under,
)
from mobile_runtime.latency import BUDGET_S, Environment, Latency, Timing, plain, summary
from mobile_runtime.manifest import ComponentName
from mobile_runtime.pipeline_checks import check_prompt
from mobile_runtime.report import PIPELINE, Check, Pictures
from mobile_runtime.runs import ComponentRun, Made, NoRun, PromptRun, Runtime

CALLS = {"text_encoder": {1, 2}, "vae_decoder": {1}}
"""How often a picture calls them: the text encoder for the negative prompt, too."""


COARSEST_MS = 1.0
"""Of a device's clock."""


@dataclass
class Judged:
    """What a report is made of."""

    checks: list[Check] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    pictures: list[Pictures] = field(default_factory=list)

    def add(self, other: "Judged") -> None:
        """Take another's in, after what there is."""
        self.checks += other.checks
        self.latency += other.latency
        self.pictures += other.pictures


def judge_component(
    bundle: Bundle,
    component: ComponentName,
    runtime: Runtime,
    run: ComponentRun | NoRun,
    there: Environment | None = None,
) -> Judged:
    """Hold one component's run against its references.

    there: of the device that it ran on, where nothing was emulated.
    """
    checks = check_component(bundle, component, runtime, run, there)
    judged = Judged(checks)
    outputs = next(check for check in checks if check.kind == "outputs")
    # How long a wrong model takes is of no use.
    if isinstance(run, ComponentRun) and outputs.status == "pass":
        latency = summary(component, runtime.label, run.timing, run.peak_bytes)
        judged.latency += [latency] if latency else []
    return judged


def judge_prompts(
    bundle: Bundle, runtime: Runtime, runs: Mapping[int, PromptRun] | NoRun
) -> Judged:
    """Hold the golden prompts' runs, by their index, against their references."""
    tell = Teller(PIPELINE, runtime.label)
    if isinstance(runs, NoRun):
        return Judged([tell("outputs", runs.status, runs.reason)])
    if not runs:
        return Judged([tell("outputs", "not_run", "the bundle holds no golden prompt to run")])
    judged = Judged()
    for index, run in runs.items():
        checks, shown = check_prompt(bundle, runtime, index, run)
        judged.checks += checks
        judged.pictures += [shown] if shown else []
        if not isinstance(run.made, NoRun):
            latency = summary(PIPELINE, runtime.label, run.made.timing, run.made.peak_bytes)
            judged.latency += [latency] if latency else []
    return judged


def judge_result(
    bundle: Bundle, result: Result, runtime: Runtime, troubles: Mapping[str, NoRun]
) -> Judged:
    """Hold what a device gave against the bundle's references.

    troubles: of tasks without a sound record, why. A damaged record fails.
    """
    judged = Judged()
    there = _real_environment(result)
    for component, run in component_runs(result, troubles).items():
        judged.add(judge_component(bundle, component, runtime, run, there))
    runs = {task.index: _prompt_run(result, task, troubles) for task in result.job.prompts}
    judged.add(judge_prompts(bundle, runtime, runs))
    return judged


def _real_environment(result: Result) -> Environment | None:
    """Of the device; None where it is emulated, so that its bits are another processor's."""
    try:
        facts = result.device()
    except ResultError:
        return None
    return None if facts is None or facts.emulated else facts.environment


def component_runs(
    result: Result, troubles: Mapping[str, NoRun]
) -> dict[ComponentName, ComponentRun | NoRun]:
    """What each component gave."""
    return {
        task.component: _component_run(result, task, troubles) for task in result.job.components
    }


def _component_run(
    result: Result, task: ComponentTask, troubles: Mapping[str, NoRun]
) -> ComponentRun | NoRun:
    found = _sound(result, task, troubles)
    if isinstance(found, NoRun):
        return found
    record, timing, tensors = found
    outputs = tuple(under(f"{k}/", tensors) for k in range(task.cases))
    return ComponentRun(outputs, under("again/", tensors), timing, record.peak_bytes)


def _prompt_run(result: Result, task: PromptTask, troubles: Mapping[str, NoRun]) -> PromptRun:
    found = _sound(result, task, troubles)
    if isinstance(found, NoRun):
        return PromptRun(None, None, found)
    record, timing, tensors = found
    lacking = [name for name in ("ids", "noise", "trajectory", "picture") if name not in tensors]
    if lacking:
        told = f"{task.name} of the result has no tensor {lacking[0]}"
        return PromptRun(None, None, NoRun("fail", told))
    made = Made(tensors["trajectory"], tensors["picture"], timing, record.peak_bytes)
    return PromptRun(tensors["ids"], tensors["noise"], made)


def _sound(
    result: Result, task: ComponentTask | PromptTask, troubles: Mapping[str, NoRun]
) -> tuple[Record, Timing, Arrays] | NoRun:
    """A task's record, its times and its tensors, or why there are none.

    The times of an emulated device say nothing, and are left out.
    """
    try:
        record, facts = result.record(task.name), result.device()
        if record is None:
            return troubles.get(task.name) or NoRun("not_run", "the device gave no result for it")
        if record.status != "done":
            return NoRun(record.status, record.why)
        if record.timing is None:
            return NoRun("fail", f"{task.name} of the result tells no times")
        if facts is None:
            return NoRun("fail", "the result does not tell what device it is from")
        fault = _untimely(record.timing, task)
        if fault and not facts.emulated:
            return NoRun("fail", f"{task.name} of the result {fault}")
        tensors = result.tensors(record)
    except ResultError as error:
        return NoRun("fail", str(error))
    kept = () if facts.emulated else record.timing.times_ms
    return record, record.timing.model_copy(update={"times_ms": kept}), tensors


def _untimely(timing: Timing, task: ComponentTask | PromptTask) -> str | None:
    """How the times were not taken as the job asks, if so."""
    if not task.repeats:
        return None
    if not timing.times_ms:
        return "has no timed calls, and the job asks for some"
    if len(timing.times_ms) > task.repeats:
        return f"has {len(timing.times_ms)} timed calls, and the job asks for {task.repeats}"
    if len(timing.times_ms) < task.repeats and sum(timing.times_ms) < 900 * BUDGET_S:
        return (
            f"has {len(timing.times_ms)} timed calls, and the job asks for {task.repeats} or "
            f"{BUDGET_S:g} s of them"
        )
    if fault := _parts_fault(timing, task):
        return fault
    if isinstance(task, ComponentTask) and timing.warm_up < task.warm_up:
        return (
            f"was timed after {timing.warm_up} calls to warm up, and the job asks for "
            f"{task.warm_up}"
        )
    return None


def _parts_fault(timing: Timing, task: ComponentTask | PromptTask) -> str | None:
    """How the times of a picture's parts are not those of its model calls, if so."""
    calls = {} if isinstance(task, ComponentTask) else {"unet": {task.golden.steps}, **CALLS}
    for name, times in timing.parts_ms.items():
        if len(times) not in calls.get(name, ()):
            return f"tells {len(times)} times of {plain(name, 40)!r}, which is not what it calls"
    parts_ms, whole_ms = sum(map(sum, timing.parts_ms.values())), timing.times_ms[-1]
    if parts_ms > whole_ms + COARSEST_MS:
        return f"tells {parts_ms:g} ms of model calls in a picture of {whole_ms:g} ms"
    return None
