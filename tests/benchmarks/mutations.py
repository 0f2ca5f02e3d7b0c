"""The harness itself: what it says of damaged bundles, and of fifty undamaged ones.

    python -m tests.benchmarks.mutations
    python -m tests.benchmarks.mutations --seeds 10
    python -m tests.benchmarks.mutations --device local      # as --device judges it

Prints a table of the damages (what was named as the first layer to diverge, and whether anything
but the values inside told), how many small ones are found that INT8 activations could hide, and
what undamaged bundles of pipelines with other weights got. The bundles are a small pipeline's with
seeded weights, and the embedded model's, where much damage does not reach the output. Exits with 1
where a damage was missed or misplaced, or an undamaged bundle rejected.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from tqdm import tqdm

from converters import cli
from mobile_runtime import taps
from mobile_runtime.bundle import Bundle
from mobile_runtime.checks import check_unseen
from mobile_runtime.judge import judge_component
from mobile_runtime.manifest import ComponentName, Target
from mobile_runtime.on_devices import Asked, validate_on
from mobile_runtime.report import NAMING, Check, Report
from mobile_runtime.validate import run_here, runtimes
from tests.benchmarks.machine import describe
from tests.converters.small import make_small_pipeline
from tests.damages import Damage, Graph, damaged, on_graph, on_weight
from tests.test_mutations import DAMAGES, PACKAGE_DAMAGES, RECIPE, checked
from tests.test_unseen_damage import LAYER, scaled_column, slightly_wrong, small_recipe

Checked = Callable[[Path], Report]
FOLDED = [
    Damage("a timestep's row a hundredth too large", on_weight(LAYER, scaled_column(2)), LAYER)
]


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50, metavar="N", help="undamaged bundles")
    parser.add_argument("--device", metavar="NAME", help="run the bundles there (see devices)")
    args = parser.parse_args()
    judge = checked if args.device is None else partial(_checked_on, args.device)
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        missed = _damages(folder, judge) + _rounding_hides(folder)
        rejected = _undamaged(folder, args.seeds, judge)
    return int(bool(missed or rejected))


def _checked_on(device: str, folder: Path) -> Report:
    """The report of a device."""
    return validate_on(Bundle.open(folder), [device], Asked(repeats=0))


def _converted(folder: Path, target: Target, recipe: str) -> Path:
    """The bundle of a recipe."""
    argv = ["--recipe", recipe, "--output", str(folder / "bundle"), "--no-validate"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(target, argv)
    assert code == 0
    return folder / "bundle"


def _small(folder: Path, seed: int) -> str:
    """The recipe of a small pipeline with weights of that seed."""
    folder.mkdir()
    make_small_pipeline(seed).save_pretrained(folder / "model")
    (folder / "small.yaml").write_text(RECIPE.format(model=folder / "model"))
    return str(folder / "small.yaml")


def _other(folder: Path, steps: int) -> str:
    """The recipe of a small float pipeline; of nine steps, with its time path folded."""
    folder.mkdir()
    return str(small_recipe(folder, steps, "{fold: {}}" if steps == 9 else ""))


def _hidden(folder: Path) -> list[Damage]:
    """What is above every gate, in a file that does not show its inside."""
    return [Damage("a bias a two-thousandth too large", slightly_wrong(folder / "model"))]


def _fits(damage: Damage, bundle: Bundle) -> bool:
    """Whether a damage changes what this bundle computes, at a layer that the target has kept."""
    if "guidance" in damage.name and bundle.manifest.generation.guidance_scale <= 1:
        return False
    if damage.layer is None:
        return True
    known = taps.read(bundle, bundle.component(damage.layer.split(".")[0]).name)
    return known is not None and damage.layer in {tap.layer for tap in known.taps}


def _damages(folder: Path, judge: Checked) -> int:
    """Damage bundles in every way; returns how many were missed or misplaced."""
    missed = 0
    print("\n| bundle | damage | verdict | first layer that diverges | told by |")
    print("|---|---|---|---|---|")
    rows: list[tuple[str, Target, str, list[Damage]]] = [
        ("small, ONNX", "onnx", _small(folder / "small-onnx", 0), DAMAGES),
        ("small, Core ML", "coreml", _small(folder / "small-coreml", 0), PACKAGE_DAMAGES),
        ("small with nine folded timesteps, ONNX", "onnx", _other(folder / "folded", 9), FOLDED),
        ("small, ExecuTorch", "executorch", _other(folder / "et", 2), _hidden(folder / "et")),
        ("pocket_turbo_int8, ONNX", "onnx", "pocket_turbo_int8", DAMAGES),
        ("pocket_turbo_w8a8, ONNX", "onnx", "pocket_turbo_w8a8", DAMAGES),
    ]
    for name, target, recipe, damages in rows:
        bundle = _converted(folder / name, target, recipe)
        fitting = [damage for damage in damages if _fits(damage, Bundle.open(bundle))]
        for k, damage in enumerate(tqdm(fitting, desc=name, leave=False)):
            report = judge(damaged(bundle, damage, folder / f"{name}-{k}"))
            named, others = _told(report)
            right = report.verdict == "fail" and named == damage.layer
            missed += not right
            place = named or "-"
            told = f"{len(others)} checks" if others else "the values inside alone"
            wrong = "" if right else f": WRONG, {damage.layer}"
            tqdm.write(f"| {name} | {damage.name} | {report.verdict} | {place}{wrong} | {told} |")
            shutil.rmtree(folder / f"{name}-{k}")
    return missed


def _told(report: Report) -> tuple[str | None, list[Check]]:
    """The layer that a report names first, and the other checks that failed."""
    failed = [check for check in report.checks if check.gated and check.status == "fail"]
    return _named(failed), [check for check in failed if check.kind not in NAMING]


def _named(failed: list[Check]) -> str | None:
    """The layer that the surest of the checks that failed names."""
    named = [c for kind in NAMING for c in failed if c.kind == kind and "layer" in c.details]
    return named[0].details["layer"] if named else None


def _rounding_hides(folder: Path) -> int:
    """Damage small layers of INT8 activations; returns how many biases were missed.

    Each bias of the text encoder, zeroed and rolled by one, and every second zero point of the
    decoder, moved (which changes something only where values saturate).
    """
    bundle = folder / "pocket_turbo_w8a8, ONNX" / "bundle"
    kept = [taps.open_taps(path).taps for path in bundle.glob("golden/*.layers.safetensors")]
    least = min(tap.snr_db["float32"] for own in kept for tap in own)
    print(f"\n{sum(map(len, kept))} quantized layers alone, the least like it: {least:.1f} dB")
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "zeroed": np.zeros_like,
        "rolled": partial(np.roll, shift=1),
    }
    names = [name for name in _constants(bundle, "text_encoder") if name.endswith(".bias")]
    missed = 0
    for what, change in changes.items():
        told = [_first(bundle, "text_encoder", name, change, folder) for name in names]
        missed += told.count(None)
        right = sum(
            layer == name.removesuffix(".bias") for name, layer in zip(names, told, strict=True)
        )
        print(f"biases {what}: {len(told) - told.count(None)} of {len(told)} fail, {right} named")
    graph = onnx.load(bundle / "vae_decoder/model.onnx").graph
    read = [node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"]
    points = list(dict.fromkeys(read))[::2]
    for steps in (30, -60, 100):
        move = partial(_moved, steps=steps)
        told = [_first(bundle, "vae_decoder", name, move, folder) for name in points]
        print(f"zero points moved by {steps}: {len(told) - told.count(None)} of {len(told)} fail")
    return missed


def _moved(point: np.ndarray, steps: int) -> np.ndarray:
    return np.clip(point.astype(np.int32) + steps, -128, 127)


def _constants(bundle: Path, component: ComponentName) -> list[str]:
    return [one.name for one in onnx.load(bundle / component / "model.onnx").graph.initializer]


def _first(
    bundle: Path,
    component: ComponentName,
    name: str,
    change: Callable[[np.ndarray], np.ndarray],
    folder: Path,
) -> str | None:
    """What a component's checks name first with one constant changed; None where none fails."""

    def apply(graph: Graph) -> None:
        before = graph.constant(name)
        graph.set_constant(name, change(before).astype(before.dtype))

    place = damaged(bundle, Damage(name, on_graph(component, apply)), folder / "rounding")
    opened = Bundle.open(place)
    (runtime,) = runtimes(opened)
    run = run_here(opened, component, runtime, repeats=0, step=lambda text: None)
    checks = judge_component(opened, component, runtime, run).checks
    checks += check_unseen(opened, component, runtime, checks)
    shutil.rmtree(place)
    failed = [check for check in checks if check.gated and check.status == "fail"]
    layer = _named(failed)
    return layer or ("no layer" if failed else None)


def _undamaged(folder: Path, seeds: int, judge: Checked) -> int:
    """Convert pipelines of many weights; returns how many were rejected."""
    figures: dict[str, list[float]] = {}
    rejected = 0
    for seed in tqdm(range(1, seeds + 1), desc="undamaged", leave=False):
        place = folder / f"seed-{seed}"
        report = judge(_converted(place, "onnx", _small(place, seed)))
        if report.verdict != "pass":
            rejected += 1
            tqdm.write(f"seed {seed}: {report.summary}")
        for check in report.checks:
            if check.kind == "same_function" and check.value is not None:
                figures.setdefault(check.component, []).append(check.value)
    print(f"\nundamaged: {seeds - rejected} of {seeds} passed; same function, lowest and highest:")
    for component, values in figures.items():
        print(f"  {component}: {min(values):.1f} to {max(values):.1f} dB")
    return rejected


if __name__ == "__main__":
    raise SystemExit(main())
