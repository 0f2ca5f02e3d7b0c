"""Train the embedded model from nothing: `python -m recipes.pocket.train --help`.

Five stages, each seeded, checkpointed and resumed where it stood: the autoencoder in two phases,
the text encoder's warm start, the denoiser in two phases. Nothing is downloaded: the training data
are drawn.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below, which would chatter.
    from recipes.quiet import import_torch

    import_torch("train", "training")

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mobile_runtime.errors import UserError, run_cli
from recipes.pocket.folder import write_folder
from recipes.pocket.model import build_scheduler, build_text_encoder, build_unet, build_vae
from recipes.pocket.sampling import Parts
from recipes.pocket.tokenizer import build_tokenizer
from recipes.pocket.train_text import train_text
from recipes.pocket.train_unet import PHASES as UNET_PHASES
from recipes.pocket.train_unet import train_unet
from recipes.pocket.train_vae import PHASES as VAE_PHASES
from recipes.pocket.train_vae import normalize_latents, train_vae

STEPS = {"vae": 1800, "vae_fine": 1600, "text": 400, "unet": 3800, "unet_fine": 3000}
"""The stages in their order, with the steps that made the shipped weights."""


def fresh_parts(folder: Path, seed: int) -> Parts:
    """The untrained pipeline. Each part has its own seeding, so that stages do not entangle."""
    tokenizer = build_tokenizer(folder / "tokenizer")

    def seeded(build: Callable[[], Any]) -> Any:
        torch.manual_seed(seed)
        return build()

    return Parts(
        tokenizer,
        seeded(lambda: build_text_encoder(tokenizer)),
        seeded(build_unet),
        seeded(build_vae),
        build_scheduler(),
    )


def _claim(folder: Path, seed: int) -> None:
    """One folder, one seed: a resumed run must go on with what it began with."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "run.json"
    if note.exists():
        begun = json.loads(note.read_text())["seed"]
        if begun != seed:
            raise UserError(
                f"{folder} holds a training begun with --seed {begun}; give that seed, "
                "or another --output"
            )
    note.write_text(json.dumps({"seed": seed}) + "\n")


def _finished(folder: Path, stage: str) -> dict:
    """The checkpoint of an earlier stage."""
    path = folder / f"{stage}.ckpt"
    if not path.exists():
        raise UserError(
            f"{folder} holds no checkpoint of the stage {stage!r}, which comes first; "
            f"run --stage {stage} before, or --stage all"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["step"] < state["steps"]:
        raise UserError(
            f"the stage {stage!r} in {folder} stands at step {state['step']} of {state['steps']}; "
            f"finish it first: --stage {stage}, or --stage all"
        )
    return state


def _load_vae_and_text(parts: Parts, folder: Path, seed: int) -> None:
    """What the denoiser builds on: the autoencoder with normal latents, and the text encoder."""
    parts.vae.load_state_dict(_finished(folder, "vae_fine")["module"])
    normalize_latents(parts.vae, seed)
    prefix = "text_encoder."
    states = _finished(folder, "text")["module"].items()
    parts.text_encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in states if k.startswith(prefix)}
    )


def train(output: Path, stage: str = "all", steps: int | None = None, seed: int = 0) -> Path:
    """Run one stage or all; returns the folder of the model once the UNet has been trained.

    Checkpoints lie in `output/checkpoints`, the diffusers folder in `output/model`.
    """
    if stage != "all" and stage not in STEPS:
        raise UserError(f"unknown stage {stage!r}; choose one of: {', '.join(['all', *STEPS])}")
    if steps is not None and (stage == "all" or steps < 1):
        raise UserError("--steps needs one --stage, and at least 1 step")
    folder = output / "checkpoints"
    _claim(folder, seed)
    model = output / "model"
    for name in STEPS if stage == "all" else [stage]:
        began = time.monotonic()
        count = steps or STEPS[name]
        parts = fresh_parts(folder, seed)
        if name == "vae":
            train_vae(parts.vae, VAE_PHASES[0], folder, seed, count)
        elif name == "vae_fine":
            parts.vae.load_state_dict(_finished(folder, "vae")["module"])
            train_vae(parts.vae, VAE_PHASES[1], folder, seed, count)
        elif name == "text":
            torch.manual_seed(seed)
            parts.text_encoder = build_text_encoder(parts.tokenizer)
            train_text(parts.text_encoder, parts.tokenizer, folder, seed, count)
        else:
            _load_vae_and_text(parts, folder, seed)
            if name == "unet_fine":
                parts.unet.load_state_dict(_finished(folder, "unet")["average"])
            phase = next(phase for phase in UNET_PHASES if phase.name == name)
            train_unet(parts, phase, folder, seed, count)
            write_folder(parts, model)
        print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes")
    return model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.pocket.train",
        description="Train the embedded model. A run that was stopped goes on where it stood.",
        epilog="example: python -m recipes.pocket.train --output runs/pocket",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="checkpoints and model go here"
    )
    parser.add_argument("--stage", default="all", help=f"all (default), {', '.join(STEPS)}")
    parser.add_argument("--steps", type=int, help="steps of the one stage, in place of its own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file; name a folder")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative; give 0 or more")
    model = train(args.output, args.stage, args.steps, args.seed)
    if model.exists():
        print(f"the model is in {model}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
