"""Running a bundle's models on this machine: what came out, unjudged.

Validation and jobs (job_runner.py) run them alike, and checks.py and pipeline_checks.py judge both
alike.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mobile_runtime import backends
from mobile_runtime.backends import Runner
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError, GateError, UserError
from mobile_runtime.goldens import Arrays, Case
from mobile_runtime.latency import Clock, Timing, repeated
from mobile_runtime.manifest import ComponentName, Gates, GoldenPrompt
from mobile_runtime.noise import Noise
from mobile_runtime.parity import check_outputs
from mobile_runtime.pipeline import Pipeline

Step = Callable[[str], None]


@dataclass(frozen=True)
class Runtime:
    """A backend as it is checked: its name, its options, what it computes in, and where."""

    backend: str
    arithmetic: Literal["float32", "float16"]
    options: dict[str, Any] = field(default_factory=dict)
    device: str | None = None

    @property
    def label(self) -> str:
        """The name in a report."""
        name = f"{self.backend} {self.arithmetic}" if "arithmetic" in self.options else self.backend
        return f"{name} on {self.device}" if self.device else name

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

    outputs: of each case. again: of the first case once more, after the others. peak_bytes: None
    where nobody measured it.
    """

    outputs: tuple[Arrays, ...]
    again: Arrays
    timing: Timing
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Made:
    """From a prompt's stored noise: trajectory (n + 1, C, h, w) float32, picture (H, W, 3) uint8.

    C, h, w: the latents' size; n: steps.
    """

    trajectory: np.ndarray
    picture: np.ndarray
    timing: Timing
    peak_bytes: int | None = None


@dataclass(frozen=True)
class PromptRun:
    """What came of one golden prompt.

    ids: of the prompt, (1, L) int32. noise: what the seed gives there, (1, C, h, w) float32. None
    where nothing was run.
    """

    ids: np.ndarray | None
    noise: np.ndarray | None
    made: Made | NoRun


def run_component(
    bundle: Bundle,
    component: ComponentName,
    runtime: Runtime,
    inputs: Sequence[Arrays],
    *,
    step: Step,
    repeats: int = 0,
    warm_up: int = 0,
    clock: Clock = time.perf_counter,
) -> ComponentRun | NoRun:
    """Run a component on every case, the first of them once more, then time that one.

    repeats, warm_up: timed calls, and calls right before them. step: told what is being run.
    """
    if not inputs:
        return NoRun("not_run", "the bundle holds no golden cases for it")
    step(f"{component} in {runtime.label}: load")
    began = clock()
    try:
        run = backends.load(bundle, component, backend=runtime.backend, **runtime.options)
    except BundleError as error:
        return NoRun("fail", str(error))
    except UserError as error:
        return NoRun("not_run", str(error))
    except Exception as error:  # the runtimes' own errors share no class
        return NoRun("fail", f"the model does not load: {brief(error)}")
    load_ms = 1000 * (clock() - began)
    try:
        outputs, first_ms = [], 0.0
        for k, feeds in enumerate(inputs):
            step(f"{component} in {runtime.label}: case {k + 1} of {len(inputs)}")
            began = clock()
            outputs.append(_call(run, feeds))
            first_ms = first_ms or 1000 * (clock() - began)
        # After the others, so that a state that leaks from one call to the next shows as well.
        step(f"{component} in {runtime.label}: case 1 again")
        again = _call(run, inputs[0])
        times: tuple[float, ...] = ()
        if repeats:
            step(f"{component} in {runtime.label}: latency")
            times = repeated(lambda: run(inputs[0]), warm_up, repeats, clock)
    except Exception as error:
        return NoRun("fail", f"the model does not run: {brief(error)}")
    timing = Timing(load_ms=load_ms, first_ms=first_ms, warm_up=warm_up, times_ms=times)
    return ComponentRun(tuple(outputs), again, timing)


def outputs_fault(cases: Sequence[Case], outputs: Sequence[Arrays]) -> str | None:
    """The first fault of form (name, shape, dtype, finiteness), with its case; None if sound."""
    for k, (case, output) in enumerate(zip(cases, outputs, strict=True)):
        for verdict in check_outputs(case.same_function, output):
            if not verdict.sound:
                return f"{verdict.reason} (case {k})"
    return None


def _call(run: Runner, inputs: Arrays) -> Arrays:
    """Run on copies, and copy what comes back: a runtime may reuse its buffers."""
    outputs = run({name: array.copy() for name, array in inputs.items()})
    return {name: np.array(value) for name, value in outputs.items()}


@dataclass(frozen=True)
class LoadedPipeline:
    """The whole pipeline in a runtime, and how long loading took."""

    pipeline: Pipeline
    runtime: Runtime
    load_ms: float


def load_pipeline(
    bundle: Bundle, runtime: Runtime, step: Step, clock: Clock = time.perf_counter
) -> LoadedPipeline | NoRun:
    """Load all models of the pipeline, or tell why not."""
    step(f"pipeline in {runtime.label}: load")
    began = clock()
    try:
        pipeline = Pipeline.from_bundle(bundle, backend=runtime.backend, **runtime.options)
    except BundleError as error:
        return NoRun("fail", str(error))
    except UserError as error:
        return NoRun("not_run", str(error))
    except Exception as error:  # the runtimes' own errors share no class
        return NoRun("fail", f"a model does not load: {brief(error)}")
    return LoadedPipeline(pipeline, runtime, 1000 * (clock() - began))


def run_prompt(
    loaded: LoadedPipeline,
    golden: GoldenPrompt,
    noise: np.ndarray,
    fresh_noise: np.ndarray | None,
    *,
    step: Step,
    repeats: int = 0,
    clock: Clock = time.perf_counter,
) -> PromptRun:
    """Draw one golden prompt from its noise (1, C, h, w), then `repeats` times more for the time.

    fresh_noise: (n, C, h, w) where the schedule takes any.
    """
    pipeline = loaded.pipeline
    ids, drawn = pipeline.tokenizer.encode(golden.prompt), Noise(golden.seed).draw(noise.shape)
    label = f"{golden.prompt!r} in {loaded.runtime.label}"
    parts: dict[str, list[float]] = {}

    def draw() -> Any:
        parts.clear()
        return watched(
            golden.prompt,
            **golden.call,
            noise=noise,
            fresh_noise=fresh_noise,
            on_step=lambda done, steps, latents: step(f"{label}: step {done} of {steps}"),
        )

    watched = _watched(pipeline, parts, clock)
    step(label)
    try:
        began = clock()
        result = draw()
        first_ms = 1000 * (clock() - began)
        times = repeated(draw, 0, repeats, clock) if repeats else ()
    except GateError as error:
        return PromptRun(ids, drawn, NoRun("fail", str(error)))
    except Exception as error:  # the runtimes' own errors share no class
        return PromptRun(ids, drawn, NoRun("fail", f"it does not run: {brief(error)}"))
    timing = Timing(
        load_ms=loaded.load_ms,
        first_ms=first_ms,
        warm_up=0,
        times_ms=times,
        parts_ms={name: tuple(values) for name, values in parts.items()},
    )
    return PromptRun(ids, drawn, Made(result.trajectory, result.picture, timing))


def _watched(pipeline: Pipeline, parts: dict[str, list[float]], clock: Clock) -> Pipeline:
    """A pipeline that notes the milliseconds of every call of each component."""

    def timed(name: str, run: Runner) -> Runner:
        def timed_run(feeds: Arrays) -> Arrays:
            began = clock()
            outputs = run(feeds)
            parts.setdefault(name, []).append(1000 * (clock() - began))
            return outputs

        return timed_run

    watched = copy.copy(pipeline)
    watched.components = {name: timed(name, run) for name, run in pipeline.components.items()}
    return watched


def brief(error: Exception) -> str:
    """An error of a runtime in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
