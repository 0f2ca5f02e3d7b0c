"""A stored report's figures, so that a change for the worse fails in CI.

Accuracy and size are held: no figure in dB may fall by more than TOLERANCE_DB (above CAP_DB they
differ by rounding alone), no model may get larger, nothing that was measured may be missing. Times
are not: they belong to a machine, and are compared in turns in one run (bench.py).
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError
from mobile_runtime.jobs import write_json
from mobile_runtime.manifest import Strict
from mobile_runtime.report import Check

TOLERANCE_DB = 0.5
CAP_DB = 100.0


class Figure(Strict):
    """One figure of a report, in dB."""

    kind: str
    component: str
    runtime: str
    prompt: int | None
    value_db: float = Field(description=f"at most {CAP_DB:g}, which also stands for equal")

    @property
    def place(self) -> tuple[str, str, str, int | None]:
        """What it is a figure of."""
        return self.kind, self.component, self.runtime, self.prompt


class Baseline(Strict):
    """`baseline.json`, schema 1."""

    schema_version: Literal[1] = 1
    bundle: str
    target: str
    model_bytes: dict[str, int]
    figures: tuple[Figure, ...]

    @property
    def places(self) -> tuple[str, ...]:
        """The components that it holds, and the pipeline."""
        named = [figure.component for figure in self.figures]
        return tuple(dict.fromkeys([*self.model_bytes, *named]))


def of(bundle: Bundle, checks: tuple[Check, ...]) -> Baseline:
    """What a report says, as a baseline."""
    return Baseline(
        bundle=bundle.manifest.name,
        target=bundle.manifest.target,
        model_bytes={entry.name: entry.bytes for entry in bundle.manifest.components},
        figures=tuple(figure for check in checks if (figure := _figure(check)) is not None),
    )


def _figure(check: Check) -> Figure | None:
    if check.unit != "dB" or (check.value is None and not check.equal):
        return None
    value = math.inf if check.equal or check.value is None else check.value
    return Figure(
        kind=check.kind,
        component=check.component,
        runtime=check.runtime,
        prompt=check.prompt,
        value_db=round(min(value, CAP_DB), 2),
    )


def read(path: Path) -> Baseline:
    """A stored baseline; UserError where it is none."""
    try:
        found = Baseline.model_validate_json(path.read_bytes())
        if not (found.figures and found.model_bytes):
            raise UserError(f"{path} holds no figures; make it again with --save-baseline")
        return found
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path} is no baseline: {where}: {fault['msg']}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); make it with --save-baseline"
        ) from error


def write(path: Path, baseline: Baseline) -> None:
    """Store a baseline, whole or not at all."""
    write_json(path, baseline)


def check_bundle(bundle: Bundle, before: Baseline) -> None:
    """Raise UserError for the baseline of another recipe or target."""
    name, target = bundle.manifest.name, bundle.manifest.target
    if (name, target) != (before.bundle, before.target):
        raise UserError(
            f"the baseline is of {before.bundle} for {before.target}, and this bundle is "
            f"{name} for {target}; save one of its own with --save-baseline"
        )


def compare(bundle: Bundle, checks: tuple[Check, ...], before: Baseline) -> list[Check]:
    """One gated check a component, and one for the pipeline: is anything worse than before?

    Raises UserError for the baseline of another recipe or target.
    """
    check_bundle(bundle, before)
    now = of(bundle, checks)
    mine = {figure.place: figure.value_db for figure in now.figures}
    worse: dict[str, list[str]] = {}
    for figure in before.figures:
        found = mine.get(figure.place)
        label = figure.kind.replace("_", " ")
        if figure.prompt is not None:
            label += f" of prompt {figure.prompt}"
        told = worse.setdefault(figure.component, [])
        if found is None:
            told.append(f"{label} in {figure.runtime} was measured, and is not now")
        elif not found >= figure.value_db - TOLERANCE_DB:
            told.append(
                f"{label} in {figure.runtime} fell from {figure.value_db:g} to {found:g} dB"
            )
    for name, size in before.model_bytes.items():
        told = worse.setdefault(name, [])
        if name not in now.model_bytes:
            told.append("it is gone")
        elif now.model_bytes[name] > size:
            told.append(f"it grew from {size:,} to {now.model_bytes[name]:,} bytes")
    return [
        Check(
            kind="baseline",
            component=name,
            runtime="baseline",
            status="fail" if told else "pass",
            gated=True,
            reason="; ".join(told) or "nothing is worse than in the baseline",
        )
        for name, told in worse.items()
    ]
