"""From what a runtime gave, here or on a device, to checks, latency and pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mobile_runtime.bundle import Bundle
from mobile_runtime.checks import Teller, check_component
from mobile_runtime.latency import Latency, summary
from mobile_runtime.manifest import ComponentName
from mobile_runtime.pipeline_checks import check_prompt
from mobile_runtime.report import PIPELINE, Check, Pictures
from mobile_runtime.runs import ComponentRun, NoRun, PromptRun, Runtime


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
    bundle: Bundle, component: ComponentName, runtime: Runtime, run: ComponentRun | NoRun
) -> Judged:
    """Hold one component's run against its references."""
    checks = check_component(bundle, component, runtime, run)
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
