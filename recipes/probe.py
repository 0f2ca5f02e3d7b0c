"""What a stage changed in what a pipeline computes: one small call of each component, held beside
the same call before the stage.

A quick look for the record, on latents of at most 16 x 16 from a fixed seed; `recipes.evaluate`
judges pictures.
"""

import math
from typing import Any

import torch
from torch import Tensor

from recipes import losses

LATENTS = 16
SEED = 0
EQUAL = "equal"

Seen = dict[str, Tensor]


def look(pipeline: Any, prompt: str, size: tuple[int, int], timestep: float) -> Seen:
    """Outputs of the text encoder, the UNet and the decoder on the CPU, in float32.

    size: the latents' height and width, of which at most LATENTS are taken.
    """
    generator = torch.Generator().manual_seed(SEED)
    unet, vae = pipeline.unet, pipeline.vae
    height, width = (min(side, LATENTS) for side in size)
    ids = pipeline.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    noise = torch.randn(1, unet.config.in_channels, height, width, generator=generator)
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids)[0]
        out = unet(noise, torch.tensor([timestep]), hidden, return_dict=False)[0]
        picture = vae.decode(noise / vae.config.scaling_factor, return_dict=False)[0]
    return {"text_encoder": hidden, "unet": out, "vae_decoder": picture}


def compare(before: Seen, after: Seen) -> dict[str, float | str]:
    """SNR in dB of each component's output against the one before, or that it is equal."""
    told: dict[str, float | str] = {}
    for name, reference in before.items():
        given = after[name]
        if given.shape != reference.shape:
            continue
        snr_db = losses.snr_db(reference, given)
        if snr_db == math.inf:
            told[name] = EQUAL
        elif math.isfinite(snr_db):
            told[name] = round(snr_db, 1)
    return told
