"""Stage 2: the text encoder learns to say what a caption says, before it guides a picture.

Linear heads read the scene from the end token and from every padding token after it. Their
states are what the UNet's cross attention sees first, so conditioning is there from its first
step; without this warm start, colour and place follow the caption late.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.pocket.captions import caption
from recipes.pocket.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SIZES,
    Object,
    Scene,
    leave_open,
    sample_scene,
)
from recipes.pocket.shapes import SHAPES
from recipes.pocket.tokenizer import MAX_TOKENS, tokenize
from recipes.pocket.training import Stage, autocast, fit, pick_device, step_rng

BATCH = 96
PEAK_RATE = 1e-3
PAIR_SHARE = 0.6
OPEN_SHARE = 0.08
UNSAID = -100
"""The label that cross entropy ignores: what a caption leaves open."""
_CHOICES: dict[str, list[str | None]] = {
    "background": list(BACKGROUNDS),
    "layout": [*PLACES, *RELATIONS],
    **{f"shape {i}": [*SHAPES, None] for i in (1, 2)},
    **{f"colour {i}": [*COLOURS, None] for i in (1, 2)},
    **{f"size {i}": [*SIZES, None] for i in (1, 2)},
    # The same objects by where they are: "A right of B" is B first, A second.
    **{f"shape at {i}": [*SHAPES, None] for i in (1, 2)},
    **{f"colour at {i}": [*COLOURS, None] for i in (1, 2)},
    **{f"size at {i}": [*SIZES, None] for i in (1, 2)},
}


def labels(scene: Scene) -> list[int]:
    """The scene as one class number for each head, `UNSAID` where the caption leaves it open."""
    first = scene.objects[0]
    named: dict[str, tuple[str | None, bool]] = {
        "background": (scene.background, bool(scene.background)),
        "layout": (scene.relation or first.place, bool(scene.relation or first.place)),
    }
    spoken: list[Object | None] = [*scene.objects, None][:2]
    placed = spoken[::-1] if scene.relation in ("right of", "below") else spoken
    for prefix, things in (("", spoken), ("at ", placed)):
        for slot, thing in enumerate(things, 1):
            named[f"shape {prefix}{slot}"] = (thing.shape if thing else None, True)
            named[f"colour {prefix}{slot}"] = (thing.colour if thing else None, True)
            said = thing is None or thing.size is not None
            named[f"size {prefix}{slot}"] = (thing.size if thing else None, said)
    return [
        options.index(named[head][0]) if named[head][1] else UNSAID
        for head, options in _CHOICES.items()
    ]


class Reader(nn.Module):
    """The text encoder with one linear head an attribute. The heads are left out afterwards."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.sizes = [len(options) for options in _CHOICES.values()]
        self.heads = nn.Linear(width, sum(self.sizes))

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Ids (B, T) -> for each head, logits (B, T, choices)."""
        states = self.text_encoder(ids).last_hidden_state
        return list(self.heads(states).split(self.sizes, dim=-1))


@dataclass(frozen=True)
class Captions:
    """A batch: ids (B, T), labels (B, heads), and where the whole caption has been read (B, T)."""

    ids: torch.Tensor
    labels: torch.Tensor
    read: torch.Tensor


def caption_batch(
    tokenizer: CLIPTokenizer, rng: np.random.Generator, count: int, split: str, device: torch.device
) -> Captions:
    """Captions of scenes of one split, with their labels."""
    scenes = [
        leave_open(sample_scene(rng, split, rng.random() < PAIR_SHARE), rng, OPEN_SHARE)
        for _ in range(count)
    ]
    ids = tokenize(tokenizer, [caption(scene, rng) for scene in scenes])
    ends = (ids == tokenizer.eos_token_id).argmax(1)
    read = np.arange(MAX_TOKENS)[None] >= ends[:, None]
    wanted = np.array([labels(scene) for scene in scenes])
    tensors = [torch.from_numpy(array).to(device) for array in (ids, wanted, read)]
    return Captions(*tensors)


def train_text(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    seed: int,
    steps: int,
    stop_after: int | None = None,
) -> CLIPTextModel:
    """Train in place."""
    device = pick_device()
    reader = Reader(text_encoder).to(device).train()
    unseen = caption_batch(tokenizer, np.random.default_rng([seed, 98]), 256, "held_out", device)

    def loss(step: int) -> torch.Tensor:
        batch = caption_batch(tokenizer, step_rng(seed, step, 1), BATCH, "train", device)
        with autocast(device):
            logits = reader(batch.ids)
        total = torch.zeros((), device=device)
        for head, values in enumerate(logits):
            wanted = batch.labels[:, head, None].expand(-1, MAX_TOKENS)[batch.read]
            total = total + nn.functional.cross_entropy(
                values[batch.read].float(), wanted, ignore_index=UNSAID
            )
        return total / len(logits)

    def watch(step: int) -> str:
        with torch.no_grad():
            logits = reader(unseen.ids)
        shares = []
        for head, (name, values) in enumerate(zip(_CHOICES, logits, strict=True)):
            wanted = unseen.labels[:, head, None].expand(-1, MAX_TOKENS)
            counted = unseen.read & (wanted != UNSAID)
            right = (values.argmax(-1) == wanted)[counted].float().mean()
            shares.append(f"{name} {100 * float(right):.1f}")
        return "held-out % right: " + ", ".join(shares)

    stage = Stage(
        "text",
        reader,
        loss,
        [{"params": list(reader.parameters()), "lr": PEAK_RATE}],
        steps,
        decay_steps=3 * steps,
        watch=watch,
    )
    fit(stage, folder, stop_after)
    return text_encoder.eval()
