"""How often a picture matches its caption: `python -m recipes.pocket.evaluate --help`.

`held_out_scenes` and `score` also serve pictures that come from elsewhere (a bundle, a phone).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobile_runtime.errors import UserError, run_cli
from recipes.pocket import WEIGHTS
from recipes.pocket.captions import caption
from recipes.pocket.judge import ATTRIBUTES, judge
from recipes.pocket.scenes import Scene, sample_scene

GUIDANCE = 2.0
"""The default guidance scale, chosen by measurement (see the model card)."""


def sample_scenes(
    n: int, seed: int, pairs: bool = False, split: str = "held_out"
) -> list[tuple[str, Scene]]:
    """n captions with their scenes from one split; the same seed gives the same list."""
    rng = np.random.default_rng([seed, 11, int(pairs)])
    scenes = [sample_scene(rng, split, pairs) for _ in range(n)]
    return [(caption(scene, rng), scene) for scene in scenes]


def held_out_scenes(n: int, seed: int = 0, pairs: bool = False) -> list[tuple[str, Scene]]:
    """n captions, with their scenes, of combinations that training never saw."""
    return sample_scenes(n, seed, pairs)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def score(pictures: np.ndarray | Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict:
    """Judge uint8 pictures (N, H, W, 3) against their scenes.

    Pictures of another size than 64x64 are resized to it first (bicubic; judge.at_side).
    Returns, for each attribute that a scene can miss and for "together", the count that is
    right, the share and its interval; and the numbers of the pictures that failed.
    """
    if len(pictures) != len(scenes):
        raise ValueError(f"{len(pictures)} pictures for {len(scenes)} scenes")
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    columns = {name: [getattr(v, name) for v in verdicts] for name in ATTRIBUTES}
    if not any(scene.relation for scene in scenes):
        del columns["relation"]
    if all(scene.relation for scene in scenes):
        del columns["place"]
    columns["together"] = [v.ok for v in verdicts]
    n = len(verdicts)
    table = {
        name: {
            "right": sum(column),
            "share": sum(column) / max(n, 1),
            "interval_95": wilson(sum(column), n),
        }
        for name, column in columns.items()
    }
    return {"n": n, "by": table, "failed": [i for i, v in enumerate(verdicts) if not v.ok]}


def shares(result: dict) -> str:
    """A score on one line, in percent."""
    return " ".join(f"{name} {100 * row['share']:.1f}" for name, row in result["by"].items())


def as_table(result: dict) -> str:
    """A score as a table for people."""
    lines = [f"{'attribute':<12}{'right':>10}{'percent':>9}   95 % interval"]
    for name, row in result["by"].items():
        low, high = row["interval_95"]
        lines.append(
            f"{name:<12}{row['right']:>5}/{result['n']:<4}{100 * row['share']:>9.1f}"
            f"   {100 * low:.1f} to {100 * high:.1f}"
        )
    return "\n".join(lines)


def contact_sheet(pictures: np.ndarray, columns: int = 16, gap: int = 2) -> np.ndarray:
    """Pictures (N, H, W, 3) side by side on white: one uint8 picture."""
    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.pocket.evaluate",
        description="Draw held-out captions and let the judge say how many pictures match.",
        epilog="example: python -m recipes.pocket.evaluate --captions 64 --sheet sheet.png",
    )
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="a diffusers folder")
    parser.add_argument("--captions", type=int, default=512, help="how many (512)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"scale ({GUIDANCE})")
    parser.add_argument("--pairs", action="store_true", help="two objects in a relation")
    parser.add_argument("--split", choices=["held_out", "train"], default="held_out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help="write the pictures here, as one PNG")
    args = parser.parse_args(argv)
    for name, least in (("captions", 1), ("steps", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} is too small; give {least} or more")
    if not (args.model / "model_index.json").is_file():
        raise UserError(f"{args.model} is no diffusers folder: it has no model_index.json")

    from tqdm import tqdm

    from recipes.pocket.folder import open_parts
    from recipes.pocket.sampling import generate

    cases = sample_scenes(args.captions, args.seed, args.pairs, args.split)
    with tqdm(total=len(cases), desc="pictures") as bar:
        pictures = generate(
            open_parts(args.model),
            [text for text, _ in cases],
            steps=args.steps,
            guidance=args.guidance,
            seed=args.seed,
            progress=bar.update,
        )
    result = score(pictures, [scene for _, scene in cases])
    print(as_table(result))
    if args.json:
        settings = {
            k: getattr(args, k) for k in ("captions", "steps", "guidance", "pairs", "split", "seed")
        }
        args.json.write_text(json.dumps({**settings, **result}, indent=2) + "\n")
    if args.sheet:
        from PIL import Image

        Image.fromarray(contact_sheet(pictures)).save(args.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
