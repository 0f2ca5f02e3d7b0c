"""What each stage costs and gives on the embedded model: the table of the small recipes.

    python -m tests.benchmarks.small                    # 512 captions a row
    python -m tests.benchmarks.small --captions 64 --rows teacher 2-step

Every row is a bundle for ONNX Runtime, made by the command, and drawn from in ONNX Runtime:
caption k from seed k. What a row's recipe trains is kept (recipes/work.py), so the first run takes
hours and the next some minutes a row; a run that was killed goes on. Milliseconds are medians of
rounds in which every row draws one picture.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from converters import cli
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError
from mobile_runtime.parity import measure, picture_psnr_db
from mobile_runtime.pictures import write_png
from mobile_runtime.pipeline import Pipeline
from recipes import schema
from recipes.evaluation_table import stage_sheet
from recipes.pocket import evaluate
from tests.benchmarks.machine import describe

SHOWN = 6
ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """A recipe, what is different in this row, and the row that it is held against."""

    recipe: str
    stages: int | None = None
    """The first so many of the recipe's stages; all by default."""
    more: tuple[dict[str, Any], ...] = ()
    """Stages after those."""
    changes: dict[str, Any] = field(default_factory=dict)
    beside: str | None = None
    """The row that it was made from."""
    points: float | None = None
    """The aim: at most so many points of accuracy below that row."""


def _again(**settings: Any) -> dict[str, Any]:
    """A distillation as the shipped ones are."""
    usual = {
        "batch": 32,
        "learning_rate": 3.0e-4,
        "warmup": 50,
        "average_decay": 0.99,
    }
    return {"distill": usual | settings}


ONE_STEP = _again(
    method="progressive", steps=1, teacher_steps=2, pictures=1024, draw_steps=2, iterations=400
)
AFTER_BLOCKS = _again(
    method="output", steps=2, iterations=2000, learning_rate=6.0e-4, feature_weight=0.1
)
AFTER_CHANNELS = _again(
    method="output", steps=2, iterations=800, learning_rate=5.0e-4, feature_weight=0.1
)
TINY_DECODER = {
    "decoder": {
        "channels": 16,
        "blocks": 2,
        "iterations": 20_000,
        "batch": 16,
        "learning_rate": 2.0e-3,
        "warmup": 200,
        "average_decay": 0.999,
        "pictures": 2048,
        "held_out": 64,
        "save_every": 1000,
        "watch_every": 4000,
    }
}
FINETUNE = {
    "iterations": 60,
    "batch": 32,
    "learning_rate": 1.0e-5,
    "warmup": 10,
    "average_decay": 0.9,
    "precision": "float32",
}
STATIC = {"weights": "int8", "activations": "int8_static", "calibration": {"samples": 16}}

ROWS: dict[str, Row] = {
    "teacher": Row("pocket_fp32"),
    "teacher-int8": Row("pocket_int8", beside="teacher", points=0.5),
    "4-step": Row(
        "pocket_turbo", stages=1, changes={"schedule.steps": 4}, beside="teacher", points=1
    ),
    "2-step": Row("pocket_turbo", beside="teacher", points=2),
    "1-step": Row(
        "pocket_turbo",
        more=(ONE_STEP,),
        changes={"schedule.steps": 1},
        beside="teacher",
        points=4,
    ),
    "2-step-int8": Row("pocket_turbo_int8", beside="2-step", points=0.5),
    "2-step-fold": Row("pocket_turbo", more=({"fold": {}},), beside="2-step", points=0),
    "2-step-w8a8-naive": Row("pocket_turbo", more=({"quantize": STATIC},), beside="2-step"),
    "2-step-w8a8-finetuned": Row(
        "pocket_turbo", more=({"finetune": FINETUNE}, {"quantize": STATIC}), beside="2-step"
    ),
    "2-step-w8a8": Row("pocket_turbo_w8a8", beside="2-step", points=1.5),
    "2-step-w8a8-uint8": Row(
        "pocket_turbo_w8a8", changes={"targets.onnx.activations": "uint8"}, beside="2-step"
    ),
    "2-step-4bit-plain": Row(
        "pocket_turbo_4bit", changes={"stages.quantize.int4.rank": 0}, beside="2-step"
    ),
    "2-step-4bit": Row("pocket_turbo_4bit", beside="2-step", points=2),
    "2-step-blocks": Row(
        "pocket_turbo",
        more=({"prune": {"blocks": "bk_small"}}, AFTER_BLOCKS),
        beside="2-step",
        points=3,
    ),
    "2-step-channels": Row(
        "pocket_turbo",
        more=({"prune": {"channels": {"macs": 0.4, "spread": "importance"}}}, AFTER_CHANNELS),
        beside="2-step",
        points=3,
    ),
    "2-step-tiny-decoder": Row("pocket_turbo", more=(TINY_DECODER,), beside="2-step", points=1),
    "1-step-56-pixels": Row("pocket_turbo_mini", stages=2, beside="teacher"),
    "mini": Row("pocket_turbo_mini", beside="teacher", points=6),
}


def recipe_of(name: str, row: Row, folder: Path) -> Path:
    """The row's recipe as a file."""
    data = schema.load(row.recipe).resolved()
    data["name"] = name
    data["stages"] = [*data["stages"][: row.stages], *row.more]
    recipe = schema.parse(data, row.changes)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(recipe.to_yaml())
    return path


def with_one_step(row: Row) -> Row:
    """The row with its trainings cut to an optimizer step, which changes nothing of its times."""
    own = schema.load(row.recipe).resolved()["stages"][: row.stages] if row.stages else []

    def short(stage: dict[str, Any]) -> dict[str, Any]:
        ((name, settings),) = stage.items()
        less = {
            "iterations": 1,
            "decoder_iterations": 1,
            "pictures": 32,
            "held_out": 0,
            "warmup": 0,
        }
        if name == "prune":
            return stage
        return {name: {**settings, **{k: v for k, v in less.items() if settings.get(k)}}}

    return replace(row, stages=0 if own else None, more=tuple(map(short, (*own, *row.more))))


def convert(name: str, row: Row, folder: Path, *more: str) -> Bundle:
    """The row's bundle; the one that is there, if it was made from the same recipe."""
    output, path = folder / name, recipe_of(name, row, folder)
    if output.exists():
        try:
            bundle = Bundle.open(output)
        except UserError:
            pass
        else:
            if bundle.manifest.recipe == yaml.safe_load(path.read_text()):
                return bundle
    if cli.main("onnx", ["--recipe", str(path), "--output", str(output), "--force", *more]):
        print(f"{output} missed a gate", file=sys.stderr)
    return Bundle.open(output)


@dataclass(frozen=True)
class Drawn:
    """A row's pictures (N, H, W, 3) uint8 and latents (N, C, h, w) of the captions."""

    pictures: np.ndarray
    latents: np.ndarray


def draw(bundle: Bundle, texts: Sequence[str], folder: Path) -> Drawn:
    """The captions' pictures, kept beside the bundle."""
    name = bundle.manifest.name
    what = (bundle.path / "manifest.json").read_text() + "\n".join(texts)
    kept = folder / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.npz"
    if kept.exists():
        with np.load(kept) as file:
            return Drawn(file["pictures"], file["latents"])
    pipeline = Pipeline.from_bundle(bundle)
    results = [pipeline(text, seed=k) for k, text in enumerate(tqdm(texts, desc=name))]
    drawn = Drawn(
        np.stack([result.picture for result in results]),
        np.concatenate([result.latents for result in results]),
    )
    partial = kept.with_suffix(".partial.npz")
    np.savez(partial, pictures=drawn.pictures, latents=drawn.latents)
    partial.replace(kept)
    return drawn


def milliseconds(bundles: dict[str, Bundle], text: str) -> dict[str, list[float]]:
    """The times of a picture; rows take turns, so that a change of the machine hits all."""
    pipelines = {name: Pipeline.from_bundle(bundle) for name, bundle in bundles.items()}
    spent: dict[str, list[float]] = {name: [] for name in bundles}
    for turn in tqdm(range(ROUNDS + 1), desc="latency"):
        for name, pipeline in pipelines.items():
            started = time.perf_counter()
            pipeline(text, seed=turn)
            if turn:  # the first warms up
                spent[name].append(1000 * (time.perf_counter() - started))
    return spent


def print_times(spent: dict[str, list[float]]) -> None:
    """Each row's times, and as ratios to `2-step` in the same rounds."""
    print(f"{describe()}\n")
    print("| | ms a picture | of 2-step's | between the quartiles |\n|---|---|---|---|")
    for name, times in spent.items():
        pairs = zip(times, spent.get("2-step", times), strict=True)
        low, median, high = np.percentile([time / other for time, other in pairs], (25, 50, 75))
        print(f"| {name} | {statistics.median(times):.1f} | {median:.2f} | {low:.2f}-{high:.2f} |")


def work(bundle: Bundle) -> float:
    """Multiply-adds of a picture."""
    return sum(by_component(bundle).values())


def by_component(bundle: Bundle) -> dict[str, float]:
    """The same, of each component."""
    generation = bundle.manifest.generation
    prompts = 2 if generation.guidance_scale > 1 else 1
    calls = {"text_encoder": prompts, "unet": generation.default_steps, "vae_decoder": 1}
    return {entry.name: calls[entry.name] * entry.macs for entry in bundle.manifest.components}


def in_int8(bundle: Bundle) -> str:
    """The share of a picture's multiply-adds in INT8, attention's products included."""
    shares = [record["int8_macs"] for record in bundle.manifest.stages if "int8_macs" in record]
    if not shares:
        return ""
    macs = by_component(bundle)
    return f"{100 * sum(shares[-1][name] * macs[name] for name in macs) / work(bundle):.1f} %"


def against(other: Drawn | None, drawn: Drawn) -> str:
    """SNR of the latents and median PSNR of the pictures, in dB."""
    if other is None:
        return ""
    if other.latents.shape != drawn.latents.shape:
        return "another size"
    pairs = zip(other.pictures, drawn.pictures, strict=True)
    psnr_db = float(np.median([picture_psnr_db(*pair) for pair in pairs]))
    return f"{measure(other.latents, drawn.latents).snr_db:.1f} / {psnr_db:.1f}"


def verdict(bundle: Bundle) -> str:
    """What the bundle's report says."""
    report = bundle.path / "report.json"
    return str(json.loads(report.read_text())["verdict"]) if report.exists() else "not validated"


def main() -> int:
    """Convert, draw, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--folder", type=Path, default=Path("bundles/small"))
    parser.add_argument(
        "--only-latency",
        action="store_true",
        help="train next to nothing, judge nothing",
    )
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.only_latency:
        short = {name: with_one_step(ROWS[name]) for name in arguments.rows}
        timed = {name: convert(name, row, folder, "--no-validate") for name, row in short.items()}
        print_times(milliseconds(timed, evaluate.held_out_scenes(1)[0][0]))
        return 0
    bundles = {name: convert(name, ROWS[name], folder) for name in arguments.rows}
    cases = evaluate.held_out_scenes(arguments.captions)
    texts, scenes = [text for text, _ in cases], [scene for _, scene in cases]
    drawn = {name: draw(bundle, texts, folder) for name, bundle in bundles.items()}
    times = milliseconds(bundles, texts[0])
    print(f"{describe()}\n")
    print(
        "| | parameters M | GMACs a picture | of them INT8 | models MB | ms a picture | "
        "judged right | 95 % interval | points below (aim) | SNR / PSNR dB of that row | "
        "of the teacher | verdict |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    right: dict[str, float] = {}
    missed = []
    for name, bundle in bundles.items():
        row, parts = ROWS[name], bundle.manifest.components
        judged = evaluate.score(drawn[name].pictures, scenes)
        together = judged["by"]["together"]
        right[name] = 100 * together["share"]
        low, high = (f"{100 * bound:.1f}" for bound in together["interval_95"])
        below = ""
        if row.beside in right:
            aim = "" if row.points is None else f" ({row.points:g})"
            points = round(right[row.beside] - right[name], 1)
            below = f"{points} of {row.beside}{aim}"
            missed += [name] if row.points is not None and points > row.points else []
        teacher = drawn.get("teacher") if name != "teacher" else None
        parameters, size = (sum(getattr(p, of) for p in parts) for of in ("parameters", "bytes"))
        print(
            f"| {name} | {parameters / 1e6:.2f} | {work(bundle) / 1e9:.3f} | {in_int8(bundle)} | "
            f"{size / 1e6:.1f} | "
            f"{statistics.median(times[name]):.0f} | {right[name]:.1f} % | {low}-{high} | "
            f"{below} | "
            f"{against(drawn.get(row.beside or ''), drawn[name])} | "
            f"{against(teacher, drawn[name])} | {verdict(bundle)} |",
            flush=True,
        )
    path = folder / "sheet.png"
    shown = [made.pictures[:SHOWN] for made in drawn.values()]
    write_png(path, stage_sheet(shown, list(drawn), texts[:SHOWN], 2))
    print(f"\n{path}")
    if missed:
        print(f"aims missed: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
