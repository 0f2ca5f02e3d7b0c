"""Gates from the command line, in place of a bundle's own: `--gate picture_psnr_db=35`."""

import math
from collections.abc import Sequence

from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, choices
from mobile_runtime.manifest import Gates

NONE = "none"
HELP = f"another gate than the bundle's, as in picture_psnr_db=35; {NONE} switches one off"


def parse_gates(pairs: Sequence[str]) -> dict[str, float | None]:
    """NAME=DB pairs. UserError for an unknown name, or a value that is no gate."""
    gates: dict[str, float | None] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in Gates.model_fields:
            raise choices("gate", name, list(Gates.model_fields))
        try:
            value = None if text == NONE else float(text)
        except ValueError:
            value = math.nan
        # At 0 dB the error is as large as the signal.
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--gate {pair} is no gate; write --gate {name}=DECIBELS, above 0")
        gates[name] = value
    return gates


def with_gates(bundle: Bundle, gates: dict[str, float | None]) -> Bundle:
    """The same bundle, held to these gates where they are given; UserError for one without use."""
    if not gates:
        return bundle
    if "float16_snr_db" in gates and bundle.manifest.arithmetic != "float16":
        raise UserError(
            f"--gate float16_snr_db: {bundle.path} computes in {bundle.manifest.arithmetic}, whose "
            "gate is component_snr_db"
        )
    changed = bundle.manifest.gates.model_copy(update=gates)
    manifest = bundle.manifest.model_copy(update={"gates": changed})
    return Bundle(bundle.path, manifest, bundle.manifest_sha256)


def told_gates(gates: dict[str, float | None]) -> str:
    """The gates in words."""
    return ", ".join(
        f"{name} {'off' if value is None else f'{value:g} dB'}" for name, value in gates.items()
    )
