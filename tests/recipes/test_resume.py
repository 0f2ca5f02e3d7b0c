"""A training that was stopped goes on, or says which of its files is damaged."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mobile_runtime.errors import UserError
from recipes import drawn, trainer
from recipes.settings import DistillSettings

KEY = "the training's own"


def words(rng: np.random.Generator, n: int) -> list[str]:
    return [f"tent {rng.integers(100)}" for _ in range(n)]


@pytest.fixture
def draw(
    tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], torch.Tensor]:
    """Draws three pictures in chunks of two; what is drawn is the noise."""
    monkeypatch.setattr(drawn, "CHUNK", 2)
    monkeypatch.setattr(drawn, "sample", lambda *args: args[3])
    options: dict[str, Any] = {"steps": 1, "scale": 1.0, "seed": 3, "folder": tmp_path, "key": KEY}
    return lambda: drawn.draw(tiny_pipeline, words, 3, (8, 8), **options)[1]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def zeros(*shape: int) -> Callable[[Path], None]:
    return lambda file: torch.save(torch.zeros(*shape), file)


def no_tensor(file: Path) -> None:
    torch.save([1, 2], file)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("drawn.json", emptied),
        ("drawn.json", cut),
        ("drawn.json", lambda file: file.write_bytes(b"\xff\xfe")),
        ("drawn-000000.pt", emptied),
        ("drawn-000000.pt", cut),
        ("drawn-000002.pt", cut),
        ("drawn-000000.pt", zeros(1, 4, 8, 8)),
        ("drawn-000002.pt", zeros(2, 4, 8, 8)),
        ("drawn-000000.pt", zeros(2, 4, 8, 4)),
        ("drawn-000000.pt", no_tensor),
    ],
)
def test_drawn_pictures_that_are_damaged_are_named_and_once_deleted_drawn_again(
    draw: Callable[[], torch.Tensor], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    whole, file = draw(), tmp_path / name
    damage(file)
    with pytest.raises(UserError, match=rf"{name} is damaged .*; delete it"):
        draw()
    file.unlink()
    assert torch.equal(draw(), whole)


def test_the_note_of_what_is_drawn_is_written_once_and_whole(
    draw: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    draw()
    note = tmp_path / "drawn.json"
    os.utime(note, (1, 1))
    written = note.stat()
    draw()
    assert (note.stat().st_ino, note.stat().st_mtime) == (written.st_ino, 1)
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def job(tmp_path: Path) -> trainer.Job:
    torch.manual_seed(0)
    settings = DistillSettings(
        method="output", steps=1, iterations=2, warmup=0, precision="float32", learning_rate=0.1
    )

    def loss(module: nn.Module, batch: trainer.Batch) -> torch.Tensor:
        return module(torch.ones(1, 2)).square().mean()

    return trainer.Job("job", nn.Linear(2, 2), loss, settings, tmp_path, KEY)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return damage


def key_alone(file: Path) -> None:
    torch.save({"key": KEY}, file)


def key_and_processes(file: Path) -> None:
    torch.save({"key": KEY, "processes": 1}, file)


def weights_of_another_shape(state: dict[str, Any]) -> None:
    state["module"]["weight"] = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (emptied, "is damaged"),
        (cut, "is damaged"),
        (no_tensor, "is a checkpoint of another training"),
        (key_alone, "delete it"),
        (key_and_processes, "is damaged"),
        (edited(weights_of_another_shape), "is damaged"),
        (edited(lambda state: state.pop("average")), "is damaged"),
        (edited(lambda state: state.update(optimizer={})), "is damaged"),
        (edited(lambda state: state.update(history=[3])), "is damaged"),
        (
            edited(lambda state: state.update(processes=2)),
            "was trained by 2 processes, and there are 1",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(
    job: trainer.Job, damage: Callable[[Path], None], told: str
) -> None:
    trainer.train(job)
    file = job.folder / "job.ckpt"
    damage(file)
    with pytest.raises(UserError, match=rf"job\.ckpt .*{told}") as caught:
        trainer.train(job)
    assert str(file) in str(caught.value)
    assert "delete it" in str(caught.value)


class KilledError(Exception):
    """Of a training."""


def overflowing(folder: Path, stop_at: int | None = None) -> Any:
    """Train in float16 on a loss that is too large for the scale that it begins with."""
    torch.manual_seed(0)
    settings = DistillSettings(
        method="output", steps=1, iterations=12, warmup=0, precision="float16", save_every=4
    )

    def loss(module: nn.Module, batch: trainer.Batch) -> torch.Tensor:
        if batch.step == stop_at:
            raise KilledError
        x = torch.randn(2, 4, generator=batch.generator())
        return module(x).float().square().sum() * 20

    return trainer.train(trainer.Job("job", nn.Linear(4, 4), loss, settings, folder, KEY))


def test_a_killed_training_in_float16_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    """The scale of the gradients is a part of its state: it falls where they overflow."""
    whole = overflowing(tmp_path / "whole")
    with pytest.raises(KilledError):
        overflowing(tmp_path / "killed", stop_at=5)
    state = torch.load(tmp_path / "killed/job.ckpt", weights_only=True)
    assert state["scaler"]["scale"] < 65536
    again = overflowing(tmp_path / "killed")
    assert torch.equal(whole.weight, again.weight)


def test_accelerates_own_settings_change_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe names the precision, and the key of the result holds it."""
    script = (
        "from recipes.trainer import accelerator; a = accelerator(); "
        "print(a.mixed_precision, a.gradient_accumulation_steps)"
    )
    changes = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | changes,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["no", "1"]
