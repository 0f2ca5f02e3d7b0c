"""Core ML itself, on a Mac; elsewhere the backend `mil` interprets the same packages."""

import sys
from typing import TYPE_CHECKING

import numpy as np

from mobile_runtime.backends import Arrays, Runner
from mobile_runtime.errors import UserError, choices, missing_backend

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle

COMPUTE_UNITS = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")


def load(bundle: "Bundle", component: str, *, compute_units: str = "ALL") -> Runner:
    """Load an `.mlpackage`. compute_units: which processors may run it, as Core ML names them."""
    if compute_units not in COMPUTE_UNITS:
        raise choices("compute_units", compute_units, list(COMPUTE_UNITS))
    if sys.platform != "darwin":
        raise UserError(
            "Core ML runs on a Mac only; choose the backend mil, which interprets the same package"
        )
    try:
        import coremltools
    except ImportError as error:
        raise missing_backend("coremltools", "coreml", "the backend coreml") from error
    entry = bundle.component(component)
    model = coremltools.models.MLModel(
        str(bundle.file(entry.path)), compute_units=coremltools.ComputeUnit[compute_units]
    )

    def run(feeds: Arrays) -> Arrays:
        outputs = model.predict(feeds)
        return {spec.name: np.asarray(outputs[spec.name]) for spec in entry.outputs}

    return run
