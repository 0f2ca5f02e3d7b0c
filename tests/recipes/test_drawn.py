"""The pictures that a teacher draws are diffusers' own, and drawing resumes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobile_runtime.errors import UserError
from recipes import drawn


def test_the_drawn_pictures_are_diffusers_own(tiny_pipeline: Any) -> None:
    """Guidance, scheduler and scaling as StableDiffusionPipeline has them."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    words = ["a tent", "a stone"]
    mine = drawn.sample(tiny_pipeline, tiny_pipeline.unet, words, noise, 3, 2.5)
    tiny_pipeline.set_progress_bar_config(disable=True)
    theirs = tiny_pipeline(
        words,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=2.5,
        output_type="latent",
    ).images
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_drawing_goes_on_where_it_was_killed(
    tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn, "CHUNK", 2)
    calls: list[int] = []

    def say(rng: np.random.Generator, n: int) -> list[str]:
        return [f"tent {rng.integers(100)}" for _ in range(n)]

    def sample(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return args[3]

    monkeypatch.setattr(drawn, "sample", sample)
    options: dict[str, Any] = {"steps": 1, "scale": 1.0, "seed": 3, "folder": tmp_path, "key": "k"}
    with pytest.raises(KeyboardInterrupt):
        drawn.draw(tiny_pipeline, say, 5, (8, 8), **options)
    said, latents = drawn.draw(tiny_pipeline, say, 5, (8, 8), **options)
    assert len(calls) == 4  # the first chunk was drawn once
    assert (len(said), latents.shape) == (5, (5, 4, 8, 8))
    with pytest.raises(UserError, match="pictures of another training"):
        drawn.draw(tiny_pipeline, say, 5, (8, 8), **{**options, "key": "other"})
