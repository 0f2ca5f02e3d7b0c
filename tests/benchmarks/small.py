"""What each stage costs and gives on the embedded model: the table of the small recipes.

    python -m tests.benchmarks.small                    # 512 captions a row
    python -m tests.benchmarks.small --captions 64 --rows teacher 2-step

Every row is a bundle for ONNX Runtime, made by the command, and drawn from in ONNX Runtime: caption
k from seed k. Rows that stand beside each other are drawn in one run.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from converters import cli
from mobile_runtime.bundle import Bundle
from mobile_runtime.parity import picture_psnr_db
from mobile_runtime.pictures import contact_sheet
from mobile_runtime.pipeline import Pipeline
from recipes import schema
from recipes.pocket import evaluate
from tests.benchmarks.machine import describe

SHOWN = 6


@dataclass(frozen=True)
class Row:
    """A recipe, some of its stages, and the row that it is compared with."""

    recipe: str
    stages: int | None = None
    """The first so many of the recipe's stages; all by default."""
    beside: str | None = None
    """The row whose pictures these should be."""
    changes: dict[str, Any] = field(default_factory=dict)


ROWS: dict[str, Row] = {
    "teacher": Row("pocket_fp32"),
    "teacher-int8": Row("pocket_int8", beside="teacher"),
    "4-step": Row("pocket_turbo", 1, "teacher", {"schedule.steps": 4}),
    "2-step": Row("pocket_turbo", beside="teacher"),
    "2-step-int8": Row("pocket_turbo_int8", beside="2-step"),
}


def recipe_of(name: str, row: Row, folder: Path) -> Path:
    """The row's recipe as a file."""
    data = schema.load(row.recipe).resolved()
    data["name"] = name
    data["stages"] = data["stages"][: row.stages]
    recipe = schema.parse(data, row.changes)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False))
    return path


def convert(name: str, row: Row, folder: Path, keep: bool) -> Bundle:
    """The row's bundle."""
    output = folder / name
    if not (keep and output.exists()):
        path = recipe_of(name, row, folder)
        if cli.main("onnx", ["--recipe", str(path), "--output", str(output), "--force"]):
            print(f"{output} missed a gate", file=sys.stderr)
    return Bundle.open(output)


def draw(bundle: Bundle, cases: list[Any]) -> tuple[np.ndarray, float]:
    """The captions' pictures, and the median seconds of one."""
    pipeline = Pipeline.from_bundle(bundle)
    pictures, seconds = [], []
    for seed, (text, _) in enumerate(tqdm(cases, desc=bundle.manifest.name)):
        started = time.perf_counter()
        pictures.append(pipeline(text, seed=seed).picture)
        seconds.append(time.perf_counter() - started)
    return np.stack(pictures), statistics.median(seconds)


def work(bundle: Bundle) -> float:
    """Multiply-adds of a picture."""
    macs = {entry.name: entry.macs for entry in bundle.manifest.components}
    generation = bundle.manifest.generation
    prompts = 2 if generation.guidance_scale > 1 else 1
    steps = generation.default_steps
    return prompts * macs["text_encoder"] + steps * macs["unet"] + macs["vae_decoder"]


def main() -> int:
    """Convert, draw, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--keep", action="store_true", help="take the bundles that are there")
    parser.add_argument("--folder", type=Path, default=Path("bundles/small"))
    arguments = parser.parse_args()
    bundles = {
        name: convert(name, ROWS[name], arguments.folder, arguments.keep) for name in arguments.rows
    }
    cases = evaluate.held_out_scenes(arguments.captions)
    print(f"{describe()}\n")
    print(
        "| | parameters M | GMACs a picture | models MB | ms a picture | judged right | "
        "95 % interval | PSNR beside | verdict |\n|---|---|---|---|---|---|---|---|---|"
    )
    drawn: dict[str, np.ndarray] = {}
    for name, bundle in bundles.items():
        drawn[name], seconds = draw(bundle, cases)
        together = evaluate.score(drawn[name], [scene for _, scene in cases])["by"]["together"]
        low, high = (f"{100 * bound:.1f}" for bound in together["interval_95"])
        parts = bundle.manifest.components
        beside, told = ROWS[name].beside, ""
        if beside in drawn:
            pairs = zip(drawn[beside], drawn[name], strict=True)
            told = f"{np.median([picture_psnr_db(*pair) for pair in pairs]):.1f} dB of {beside}"
        verdict = "not validated"
        if (bundle.path / "report.json").exists():
            verdict = str(yaml.safe_load((bundle.path / "report.json").read_text())["verdict"])
        print(
            f"| {name} | {sum(part.parameters for part in parts) / 1e6:.2f} | "
            f"{work(bundle) / 1e9:.2f} | {sum(part.bytes for part in parts) / 1e6:.1f} | "
            f"{1000 * seconds:.0f} | {100 * together['share']:.1f} % | {low}-{high} | {told} | "
            f"{verdict} |",
            flush=True,
        )
    sheet = [picture for name in drawn for picture in drawn[name][:SHOWN]]
    words = [f"{name}: {text}" for name in drawn for text, _ in cases[:SHOWN]]
    path = arguments.folder / "sheet.png"
    Image.fromarray(contact_sheet(sheet, words, columns=SHOWN, scale=2)).save(path)
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
