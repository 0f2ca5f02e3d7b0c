"""Quantization of a pipeline so small that tests can run it."""

from pathlib import Path
from typing import Any

import torch

from recipes import schema


def recipe(prompts: Path | str, schedule: Any = None, **settings: Any) -> schema.Recipe:
    calibration = {"prompts": str(prompts), "samples": 2, **settings.pop("calibration", {})}
    quantize = {"activations": "int8_static", "calibration": calibration, **settings}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 16,
            "schedule": schedule or {"steps": 2, "guidance_scale": 1.0},
            "stages": [{"quantize": quantize}],
        }
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([999.0]),
        torch.randn(1, 16, 32, generator=generator),
    )


def snr_db(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))
