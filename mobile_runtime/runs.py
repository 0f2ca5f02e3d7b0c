"""Running the golden cases of a bundle in one runtime of this machine: what came out, unjudged.

A device fills in the same records (jobs.py), so that checks.py and pipeline_checks.py judge
both alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mobile_runtime import backends
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError, GateError, UserError
from mobile_runtime.goldens import Arrays, Case, golden_cases, prompt_case
from mobile_runtime.latency import Latency, measure
from mobile_runtime.manifest import ComponentName, Gates
from mobile_runtime.noise import Noise
from mobile_runtime.parity import check_outputs
from mobile_runtime.pipeline import Pipeline

Step = Callable[[str], None]


@dataclass(frozen=True)
class Runtime:
    """A backend as it is checked: its name, its options, and what it computes in."""

    backend: str
    arithmetic: Literal["float32", "float16"]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in a report."""
        return f"{self.backend} {self.arithmetic}" if self.options else self.backend

    def gate_db(self, gates: Gates) -> float | None:
        """The same-function gate of a component in this arithmetic."""
        return gates.component_snr_db if self.arithmetic == "float32" else gates.float16_snr_db


@dataclass(frozen=True)
class NoRun:
    """Why there is no run: it failed, or the runtime is not there."""

    status: Literal["fail", "not_run"]
    reason: str


@dataclass(frozen=True)
class ComponentRun:
    """What one component gave.

    outputs: of each golden case. again: of the first case once more, after the others. latency:
    None where it was not asked for, or the outputs have a fault.
    """

    outputs: tuple[Arrays, ...]
    again: Arrays
    latency: Latency | None = None


@dataclass(frozen=True)
class Made:
    """From a prompt's stored noise: trajectory (n + 1, C, h, w) float32, picture (H, W, 3) uint8.

    C, h, w: the latents' size; n: steps.
    """

    trajectory: np.ndarray
    picture: np.ndarray


@dataclass(frozen=True)
class PromptRun:
    """What came of one golden prompt.

    ids: of the prompt, (1, L) int32. noise: what the seed gives there, (1, C, h, w) float32.
    """

    ids: np.ndarray
    noise: np.ndarray
    made: Made | NoRun


def run_component(
    bundle: Bundle, component: ComponentName, runtime: Runtime, *, repeats: int, step: Step
) -> ComponentRun | NoRun:
    """Run every golden case of a component.

    repeats: timed calls; 0 measures no latency. step: told what is being run.
    """
    cases = golden_cases(bundle, component)
    if not cases:
        return NoRun("not_run", "the bundle holds no golden cases for it")
    step(f"{component} in {runtime.label}: load")
    try:
        start = time.perf_counter()
        run = backends.load(bundle, component, backend=runtime.backend, **runtime.options)
        load_ms = (time.perf_counter() - start) * 1000
    except BundleError as error:
        return NoRun("fail", str(error))
    except UserError as error:
        return NoRun("not_run", str(error))
    except Exception as error:  # the runtimes' own errors share no class
        return NoRun("fail", f"the model does not load: {brief(error)}")
    try:
        outputs = []
        for k, case in enumerate(cases):
            step(f"{component} in {runtime.label}: case {k + 1} of {len(cases)}")
            outputs.append(_call(run, case.inputs))
        # After the others, so that a state that leaks from one call to the next shows as well.
        step(f"{component} in {runtime.label}: case 1 again")
        again = _call(run, cases[0].inputs)
        latency = None
        if repeats and not outputs_fault(cases, outputs):
            step(f"{component} in {runtime.label}: latency")
            latency = measure(
                run,
                cases[0].inputs,
                component=component,
                runtime=runtime.label,
                load_ms=load_ms,
                repeats=repeats,
            )
    except Exception as error:
        return NoRun("fail", f"the model does not run: {brief(error)}")
    return ComponentRun(tuple(outputs), again, latency)


def outputs_fault(cases: list[Case], outputs: list[Arrays] | tuple[Arrays, ...]) -> str | None:
    """The first fault of form (name, shape, dtype, finiteness), with its case; None if sound."""
    for k, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        for verdict in check_outputs(case.same_function, output):
            if not verdict.sound:
                return f"{verdict.reason} (case {k})"
    return None


def _call(run: Callable[[Arrays], Arrays], inputs: Arrays) -> Arrays:
    """Run on copies, and copy what comes back: a runtime may reuse its buffers."""
    outputs = run({name: array.copy() for name, array in inputs.items()})
    return {name: np.array(value) for name, value in outputs.items()}


def load_pipeline(bundle: Bundle, runtime: Runtime, step: Step) -> Pipeline | NoRun:
    """The whole pipeline in a runtime, or why it cannot be had."""
    step(f"pipeline in {runtime.label}: load")
    try:
        return Pipeline.from_bundle(bundle, backend=runtime.backend, **runtime.options)
    except BundleError as error:
        return NoRun("fail", str(error))
    except UserError as error:
        return NoRun("not_run", str(error))
    except Exception as error:  # the runtimes' own errors share no class
        return NoRun("fail", f"a model does not load: {brief(error)}")


def run_prompt(
    bundle: Bundle, index: int, pipeline: Pipeline, runtime: Runtime, step: Step
) -> PromptRun:
    """Run one golden prompt."""
    case = prompt_case(bundle, index)
    golden = case.golden
    ids, noise = pipeline.tokenizer.encode(golden.prompt), Noise(golden.seed).draw(case.noise.shape)
    label = f"prompt {index} in {runtime.label}"
    step(label)
    try:
        result = pipeline(
            golden.prompt,
            negative_prompt=golden.negative_prompt,
            steps=golden.steps,
            guidance_scale=golden.guidance_scale,
            noise=case.noise,
            fresh_noise=case.fresh_noise,
            on_step=lambda done, steps, latents: step(f"{label}: step {done} of {steps}"),
        )
    except GateError as error:
        return PromptRun(ids, noise, NoRun("fail", str(error)))
    except Exception as error:  # the runtimes' own errors share no class
        return PromptRun(ids, noise, NoRun("fail", f"it does not run: {brief(error)}"))
    return PromptRun(ids, noise, Made(result.trajectory, result.picture))


def brief(error: Exception) -> str:
    """An error of a runtime in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
