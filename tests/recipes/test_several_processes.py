"""`accelerate launch` trains on several processes what one would on the batches of all."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import schema, stages, trainer
from tests.conftest import make_tiny_pipeline


def test_two_processes_train_what_one_does_on_both_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    source, prompts = tmp_path / "tiny", tmp_path / "prompts.txt"
    stages.save(make_tiny_pipeline(), [], source)
    prompts.write_text("a tent\na stone\n")
    settings = {
        "method": "lcm",
        "steps": 1,
        "guidance": [1.0, 3.0],
        "iterations": 2,
        "batch": 1,
        "warmup": 0,
        "pictures": 4,
        "draw_steps": 1,
        "precision": "float32",
        "learning_rate": 1e-3,
        "lora_rank": 2,
        "prompts": str(prompts),
    }
    data: dict[str, Any] = {
        "name": "mine",
        "source": {"model": str(source)},
        "resolution": 64,
        "schedule": {"steps": 1, "guidance_scale": 0.0},
        "stages": [{"distill": settings}],
    }
    path = tmp_path / "mine.yaml"
    path.write_text(schema.parse(data).to_yaml())
    # What `accelerate launch` runs on several GPUs; on CPUs it would want MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "recipes.distill"]
    done = subprocess.run(
        [sys.executable, *launch, "--recipe", path, "--output", tmp_path / "two"],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "POCKET_DIFFUSION_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage distill") == 1
    assert "the pipeline is in" in done.stdout

    batch = trainer.Batch  # one process with two parts, whose numbers are those of two processes

    def swapped(seed: int, step: int, part: int, process: int, *rest: Any) -> trainer.Batch:
        return batch(seed, step, process, part, *rest)

    monkeypatch.setattr(trainer, "Batch", swapped)
    data["stages"] = [{"distill": {**settings, "accumulate": 2}}]
    one = stages.apply(make_tiny_pipeline(), schema.parse(data), cache=tmp_path / "alone")
    two = UNet2DConditionModel.from_pretrained(tmp_path / "two" / "unet").state_dict()
    before, path_ = make_tiny_pipeline().unet.state_dict(), "mid_block.resnets.0.conv1.weight"
    for name, value in one.pipeline.unet.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(two[path_], before[path_], rtol=1e-4, atol=1e-6)
