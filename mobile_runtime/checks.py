"""What is checked of one component in one runtime.

A model that does not load or run is a failed check. A runtime that is not available here is a
check that was not run. Neither ever counts as passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mobile_runtime import backends, layer_goldens, taps, vocabulary
from mobile_runtime.bundle import Bundle
from mobile_runtime.goldens import Arrays, Case, golden_cases
from mobile_runtime.latency import Environment
from mobile_runtime.manifest import ComponentName
from mobile_runtime.parity import (
    Status,
    TensorVerdict,
    check_conditioning,
    check_outputs,
    check_repeat,
)
from mobile_runtime.report import Check, Kind
from mobile_runtime.runs import ComponentRun, NoRun, Runtime, outputs_fault

QUANTIZED_SNR_DB = 10.0
"""A component with quantized activations as a whole: the same function, if nothing more."""


@dataclass(frozen=True)
class Teller:
    """Makes the checks of one component in one runtime."""

    component: str
    runtime: str
    prompt: int | None = None

    def __call__(self, kind: Kind, status: Status, reason: str, **values: Any) -> Check:
        return Check(
            kind=kind,
            component=self.component,
            runtime=self.runtime,
            prompt=self.prompt,
            status=status,
            gated=status != "not_gated",
            reason=reason,
            **values,
        )


def component_kinds(bundle: Bundle, component: ComponentName, runtime: Runtime) -> list[Kind]:
    """The checks that a component of this bundle gets here, once its model runs."""
    kinds: list[Kind] = ["outputs", "same_function", "source", "repeat"]
    if component == "unet":
        kinds.append("conditioning")
    if bundle.quantized_layers(component):
        kinds.append("layers_at_conversion")
    if can_look_inside(bundle, component, runtime):
        kinds.append("inside")
    if _can_look_at_timesteps(bundle, component, runtime):
        kinds.append("timesteps")
    if _can_run_layers_alone(bundle, component, runtime):
        kinds.append("quantized_layers")
    if component == "text_encoder" and bundle.manifest.golden.vocabulary:
        kinds.append("vocabulary")
    return kinds


def check_component(
    bundle: Bundle,
    component: ComponentName,
    runtime: Runtime,
    run: ComponentRun | NoRun,
    there: Environment | None = None,
) -> list[Check]:
    """Hold what a component gave against its references.

    there: of the device that it ran on, where nothing was emulated.
    """
    tell = Teller(component, runtime.label)
    if isinstance(run, NoRun):
        return [tell("outputs", run.status, run.reason)]
    cases, outputs = golden_cases(bundle, component), run.outputs
    gates = bundle.manifest.gates
    fault = outputs_fault(cases, outputs)
    form = f"{len(cases)} cases have the names, shapes and dtypes of the reference, all finite"
    checks = [
        tell("outputs", "fail" if fault else "pass", fault or form),
        _same_function(tell, bundle, component, runtime, cases, outputs, there),
        _figures(tell, "source", cases, outputs, gates.source_component_snr_db),
        _repeat(tell, outputs[0], run.again),
    ]
    if component == "unet":
        checks.append(_conditioning(tell, bundle, cases, outputs))
    if bundle.quantized_layers(component):
        checks.append(_layers(tell, bundle, component))
    return checks


def failed(checks: Sequence[Check]) -> bool:
    """Whether any gated check failed."""
    return any(check.gated and check.status == "fail" for check in checks)


def check_unseen(
    bundle: Bundle, component: ComponentName, runtime: Runtime, others: Sequence[Check] = ()
) -> list[Check]:
    """What golden outputs do not show: values inside, timesteps, quantized layers, tokens.

    others: this component's other checks.
    """
    checks = check_inside(bundle, component, runtime, others)
    if _can_look_at_timesteps(bundle, component, runtime):
        checks.append(check_timesteps(bundle, runtime))
    if bundle.quantized_layers(component) and bundle.component(component).format == "onnx":
        checks.append(check_layers(bundle, component, runtime))
    return checks + ([check_vocabulary(bundle, runtime)] if component == "text_encoder" else [])


def check_inside(
    bundle: Bundle, component: ComponentName, runtime: Runtime, others: Sequence[Check] = ()
) -> list[Check]:
    """Hold the values inside a component against PyTorch's, and name the first that diverges.

    others: this component's other checks. Where the runtime does not show its values, that is told.
    """
    tell = Teller(component, runtime.label)
    wrong = failed(others)
    if not wrong and not can_look_inside(bundle, component, runtime):
        watchable = backends.WATCHABLE.get(runtime.backend, ())
        reason = "its values inside: the bundle was made without taps; convert it again"
        if bundle.component(component).format not in watchable:
            reason = f"its values inside: {runtime.backend} does not show them"
        return [tell("inside", "not_run", reason).model_copy(update={"gated": False})]
    figures = taps.measure(bundle, component, runtime)
    if isinstance(figures, NoRun):
        reason = f"the first layer that diverges cannot be told: {figures.reason}"
        if not wrong:  # nothing else tells that the file is not as it was
            return [tell("inside", figures.status, reason)]
        return [tell("inside", "not_run", reason).model_copy(update={"gated": False})]
    first = taps.first_that_diverges(figures)
    lost = [figure for figure in figures if figure.wrong]
    if first is None or not (lost or wrong):
        told = "" if first is None else f"; least like it is {taps.tell(first, runtime.arithmetic)}"
        reason = f"the {len(figures)} values inside are as they were at conversion{told}"
        return [tell("inside", "pass", reason)]
    details = {
        "layer": first.tap.layer,
        "op": first.tap.op,
        # A value that is not finite is nothing like its reference.
        "snr_db": [round(finite(one.snr_db) or 0.0, 1) for one in figures],
        "snr_db_at_conversion": [
            one.tap.snr_db.get(runtime.arithmetic, taps.CEILING_DB) for one in figures
        ],
    }
    reason = f"the first layer that diverges is {taps.tell(first, runtime.arithmetic)}"
    value = finite(first.snr_db)
    return [tell("inside", "fail", reason, value=value, unit="dB", details=details)]


def check_timesteps(bundle: Bundle, runtime: Runtime) -> Check:
    """Hold what the UNet makes of every timestep of the schedules against PyTorch's."""
    tell = Teller("unet", runtime.label)
    if bundle.manifest.golden.timesteps is None:
        reason = "every timestep: the bundle was made without them; convert it again"
        return tell("timesteps", "not_run", reason).model_copy(update={"gated": False})
    figures = taps.measure_timesteps(bundle, runtime)
    if isinstance(figures, NoRun):
        return tell("timesteps", figures.status, f"every timestep: {figures.reason}")
    wrong = [(timestep, figure) for timestep, figure in figures if figure.wrong]
    if not wrong:
        timesteps = len({timestep for timestep, _ in figures})
        reason = f"what the resnets make of {timesteps} timesteps is as it was at conversion"
        return tell("timesteps", "pass", reason)
    timestep, first = wrong[0]
    reason = f"at timestep {timestep:g}, {taps.tell(first, runtime.arithmetic)}"
    details = {"layer": first.tap.layer, "timesteps": sorted({timestep for timestep, _ in wrong})}
    value = finite(first.snr_db)
    return tell("timesteps", "fail", reason, value=value, unit="dB", details=details)


def check_layers(bundle: Bundle, component: ComponentName, runtime: Runtime) -> Check:
    """Hold each quantized layer alone against what it gave at conversion."""
    tell = Teller(component, runtime.label)
    if not _can_run_layers_alone(bundle, component, runtime):
        reason = "the quantized layers alone: the bundle was made without them; convert it again"
        return tell("quantized_layers", "not_run", reason).model_copy(update={"gated": False})
    figures = layer_goldens.measure(bundle, component, runtime)
    if isinstance(figures, NoRun):
        return tell(
            "quantized_layers", figures.status, f"the quantized layers alone: {figures.reason}"
        )
    wrong = [figure for figure in figures if figure.wrong]
    if not wrong:
        every = len(bundle.quantized_layers(component))
        reason = (
            f"{len(figures)} of {every} quantized layers, each alone, give what they gave at "
            "conversion"
        )
        return tell("quantized_layers", "pass", reason)
    reason = f"alone, {len(wrong)} of {len(figures)} quantized layers give something else; first "
    reason += taps.tell(wrong[0], runtime.arithmetic)
    details = {"layer": wrong[0].tap.layer, "layers": [figure.tap.layer for figure in wrong]}
    value = finite(wrong[0].snr_db)
    return tell("quantized_layers", "fail", reason, value=value, unit="dB", details=details)


def check_vocabulary(bundle: Bundle, runtime: Runtime) -> Check:
    """Hold every token against the conversion: its ids, and what the file makes of them."""
    tell = Teller("text_encoder", runtime.label)
    known = vocabulary.read(bundle)
    if known is None:
        reason = "every token: the bundle was made without its vocabulary; convert it again"
        return tell("vocabulary", "not_run", reason).model_copy(update={"gated": False})
    if fault := vocabulary.tokenizer_fault(bundle, known):
        return tell("vocabulary", "fail", fault)
    gate_db = runtime.gate_db(bundle.manifest.gates) or QUANTIZED_SNR_DB
    rows = vocabulary.measure(bundle, known, runtime, gate_db)
    if isinstance(rows, NoRun):
        return tell("vocabulary", rows.status, rows.reason)
    worst = min(rows.snr_db, key=lambda snr_db: (finite(snr_db) is not None, snr_db))
    figures: dict[str, Any] = {"value": finite(worst), "unit": "dB", "gate": rows.gate_db}
    what = "the embedding's rows" if rows.looked_up else "the outputs"
    if rows.wrong:
        first = known.ids[rows.wrong[0]]
        reason = (
            f"{what} differ from PyTorch's for some of the ids {first.min()} to {first.max()} "
            f"({worst:.1f} dB, gate {rows.gate_db:g}); so do {len(rows.wrong)} of {len(rows.rows)} "
            "such groups"
        )
        return tell("vocabulary", "fail", reason, **figures)
    ids = len(np.unique(known.ids[list(rows.rows)]))
    reason = (
        f"the tokenizer's tables are the conversion's, and {what} for {ids} of "
        f"{len(np.unique(known.ids))} ids are PyTorch's"
    )
    return tell("vocabulary", "pass", reason, **figures)


def can_look_inside(bundle: Bundle, component: ComponentName, runtime: Runtime) -> bool:
    """Whether the bundle has taps of a component, and the runtime shows its values here."""
    watchable = backends.WATCHABLE.get(runtime.backend, ())
    here = runtime.device is None and bundle.component(component).format in watchable
    return here and component in bundle.manifest.golden.taps


def _can_look_at_timesteps(bundle: Bundle, component: ComponentName, runtime: Runtime) -> bool:
    return component == "unet" and can_look_inside(bundle, component, runtime)


def _can_run_layers_alone(bundle: Bundle, component: ComponentName, runtime: Runtime) -> bool:
    kept = component in bundle.manifest.golden.layers
    return kept and can_look_inside(bundle, component, runtime)


def _same_function(
    tell: Teller,
    bundle: Bundle,
    component: str,
    runtime: Runtime,
    cases: Sequence[Case],
    outputs: Sequence[Arrays],
    there: Environment | None,
) -> Check:
    gates = bundle.manifest.gates
    had_db = _had_db(bundle, component, runtime, there)
    if not bundle.quantized_layers(component) or gates.layer_snr_db is None:
        gate_db = runtime.gate_db(gates)
        gate_db = gate_db if gate_db is None or had_db is None else max(gate_db, had_db)
        return _figures(tell, "same_function", cases, outputs, gate_db)
    gate_db = max(QUANTIZED_SNR_DB, had_db or 0.0)
    check = _figures(tell, "same_function", cases, outputs, gate_db)
    why = (
        "a low gate, because integer kernels round some quantized activations to the next step and "
        "depth amplifies that; layers and pictures have gates of their own"
    )
    return check.model_copy(update={"reason": f"{check.reason}; {why}"})


def _had_db(
    bundle: Bundle, component: str, runtime: Runtime, there: Environment | None
) -> float | None:
    """What the outputs must have where they were made: nobody can look at the inside there."""
    known = bundle.component(component).at_conversion
    if known is None or (runtime.device and there is None):
        return None
    if not taps.as_made(known.made_on, runtime, there):
        return None
    return known.snr_db - taps.SAME_MACHINE_DB


def _figures(
    tell: Teller,
    kind: Literal["same_function", "source"],
    cases: Sequence[Case],
    outputs: Sequence[Arrays],
    gate_db: float | None,
) -> Check:
    """All cases against one reference; the check tells the worst, `details` every case."""
    verdicts = [
        (k, verdict)
        for k, (case, output) in enumerate(zip(cases, outputs, strict=True))
        for verdict in check_outputs(getattr(case, kind), output, gate_db=gate_db)
    ]
    details = {"cases": [_case_row(k, verdict) for k, verdict in verdicts]}
    k, worst = min(verdicts, key=lambda item: rank(item[1]))
    status: Status = worst.status
    broken = _broken_reference(kind, cases)
    if broken is not None:
        return tell(kind, "fail", broken, gate=gate_db, details=details)
    if gate_db is None and status == "fail":
        # Without a gate the form is judged by the check of the outputs alone; the source may have
        # another form, where a stage changes it.
        status = "not_gated"
    reason = worst.reason if len(verdicts) == 1 else f"{worst.reason} (case {k}, the worst)"
    return tell(kind, status, reason, gate=gate_db, details=details, **figures_of(worst))


def _broken_reference(
    kind: Literal["same_function", "source"], cases: Sequence[Case]
) -> str | None:
    """The first reference that is not finite: it proves nothing, with a gate or without."""
    for k, case in enumerate(cases):
        for name, reference in getattr(case, kind).items():
            if not np.isfinite(reference).all():
                return f"{name} has a reference that is not finite (case {k})"
    return None


def rank(verdict: TensorVerdict) -> tuple[bool, bool, float]:
    """Failed ones first, those without figures before the others, then by SNR."""
    figures = verdict.figures
    return (verdict.status != "fail", figures is not None, figures.snr_db if figures else 0.0)


def figures_of(verdict: TensorVerdict) -> dict[str, Any]:
    """A verdict's figures as fields of a check; infinite decibels are told as `equal`."""
    figures = verdict.figures
    if figures is None:
        return {"unit": "dB"}
    return {
        "unit": "dB",
        "value": finite(figures.snr_db),
        "equal": figures.max_abs == 0,
        "max_abs": finite(figures.max_abs),
    }


def _case_row(k: int, verdict: TensorVerdict) -> dict[str, Any]:
    row: dict[str, Any] = {"case": k, "output": verdict.name, "status": verdict.status}
    if verdict.figures is not None:
        row |= {
            "snr_db": finite(verdict.figures.snr_db),
            "peak_db": finite(verdict.figures.peak_db),
            "max_abs": finite(verdict.figures.max_abs),
            "cosine": finite(verdict.figures.cosine),
        }
    return row


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and np.isfinite(value) else None


def _repeat(tell: Teller, first: Arrays, again: Arrays) -> Check:
    verdict = check_repeat(first, again)
    return tell("repeat", verdict.status, verdict.reason)


def _conditioning(
    tell: Teller, bundle: Bundle, cases: Sequence[Case], outputs: Sequence[Arrays]
) -> Check:
    pairs = bundle.manifest.golden.conditioning_pairs
    if not pairs:
        return tell("conditioning", "not_run", "the bundle holds no pair of cases for it")
    worst: tuple[TensorVerdict, float | None] | None = None
    for pair in pairs:
        for name in cases[pair[0]].same_function:
            if any(name not in outputs[k] for k in pair):
                return tell("conditioning", "fail", f"{name} is missing")
            wanted, given = (
                (arrays[pair[0]][name], arrays[pair[1]][name])
                for arrays in ([case.same_function for case in cases], outputs)
            )
            verdict, ratio = check_conditioning(wanted, given)
            if worst is None or verdict.status == "fail":
                worst = (verdict, ratio)
    assert worst is not None
    verdict, ratio = worst
    return tell(
        "conditioning", verdict.status, verdict.reason, value=finite(ratio), unit="ratio", gate=None
    )


def _layers(tell: Teller, bundle: Bundle, component: str) -> Check:
    """The layers' figures as the conversion recorded them; the plan says which there must be."""
    gate_db = bundle.manifest.gates.layer_snr_db
    kind: Kind = "layers_at_conversion"
    layers = bundle.quantized_layers(component)
    recorded: Any = bundle.component(component).details.get("layer_snr_db")
    if not isinstance(recorded, dict) or not recorded:
        return tell(kind, "not_run", "the conversion recorded no layer figures", gate=gate_db)
    missing = [layer for layer in layers if not isinstance(recorded.get(layer), int | float)]
    if missing:
        reason = f"{len(missing)} of {len(layers)} layers have no figure, {missing[0]} first"
        return tell(kind, "fail", reason, gate=gate_db)
    worst = min(layers, key=lambda layer: float(recorded[layer]))
    snr_db = float(recorded[worst])
    reason = f"the worst of {len(layers)} layers, {worst}, had {snr_db:.1f} dB at conversion"
    status: Status = "not_gated"
    if gate_db is not None:
        status = "pass" if all(float(recorded[name]) >= gate_db for name in layers) else "fail"
        reason += f" (gate {gate_db:g} dB)"
    return tell(kind, status, reason, value=finite(snr_db), unit="dB", gate=gate_db)
