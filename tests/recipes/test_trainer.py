"""The training loop resumes, refuses, and draws the same numbers whoever asks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobile_runtime.errors import UserError
from recipes import stages, trainer
from tests.conftest import make_tiny_pipeline
from tests.recipes.students import recipe

CPU = torch.device("cpu")


def test_a_killed_training_ends_where_an_uninterrupted_one_does(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(prompts, method="progressive", teacher_steps=2)
    whole = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "whole").pipeline.unet
    save, saved = trainer._save, []

    def save_and_die(*args: Any) -> None:
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "killed")
    monkeypatch.setattr(trainer, "_save", save)
    resumed = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "killed").pipeline.unet
    assert len(saved) == 2
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_training_is_refused(prompts: Path, tmp_path: Path) -> None:
    settings = recipe(prompts, method="output").stages[0].distill
    assert settings is not None
    module = nn.Linear(2, 2)

    def job(key: str) -> trainer.Job:
        def loss(module: nn.Module, batch: trainer.Batch) -> torch.Tensor:
            return module(torch.ones(1, 2)).square().mean()

        return trainer.Job("job", module, loss, settings, tmp_path, key)

    trainer.train(job("one"))
    with pytest.raises(UserError, match="checkpoint of another training"):
        trainer.train(job("two"))


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (0, "the loss is nan before anything was trained; the source's weights overflow"),
        (1, "the loss is nan at step 1; lower learning_rate"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_training(
    prompts: Path, tmp_path: Path, at: int, told: str
) -> None:
    settings = recipe(prompts, method="output", iterations=2).stages[0].distill
    assert settings is not None

    def loss(module: nn.Module, batch: trainer.Batch) -> torch.Tensor:
        return module(torch.full((1, 2), torch.nan if batch.step == at else 1.0)).sum()

    job = trainer.Job("job", nn.Linear(2, 2), loss, settings, tmp_path, "k")
    with pytest.raises(UserError, match=told):
        trainer.train(job)
    assert at or not list(tmp_path.glob("*.ckpt"))


def test_a_gradient_that_is_not_finite_stops_the_training(prompts: Path, tmp_path: Path) -> None:
    """Its loss is finite: at zero the square root has an infinite slope."""
    settings = recipe(prompts, method="output", iterations=2).stages[0].distill
    assert settings is not None

    def loss(module: nn.Module, batch: trainer.Batch) -> torch.Tensor:
        off = 0.0 if batch.step == 1 else 1.0
        return (module(torch.zeros(1, 2)) * 0 + off).sqrt().sum()

    job = trainer.Job("job", nn.Linear(2, 2), loss, settings, tmp_path, "k")
    with pytest.raises(UserError, match="job: the gradient is nan at step 1; lower learning_rate"):
        trainer.train(job)


def test_it_leaves_pictures_and_a_loss_curve_to_look_at(prompts: Path, tmp_path: Path) -> None:
    asked = recipe(prompts, method="output", iterations=2)
    stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    names = {path.name for path in (kept / "training").iterdir()}
    assert names == {"output-000002.png", "output-loss.csv", "output-loss.png"}
    table = (kept / "training" / "output-loss.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table] == ["step", "1", "2"]


def test_the_same_numbers_are_drawn_whoever_asks(prompts: Path, tmp_path: Path) -> None:
    """A batch is a function of its numbers, and no two are alike."""

    def values(**changes: int) -> list[float]:
        numbers = {"seed": 0, "step": 1, "part": 0, "process": 0, **changes}
        batch = trainer.Batch(**numbers, size=2, device=CPU, average=nn.Identity())
        drawn = torch.randn(2, generator=batch.generator())
        return [*drawn.tolist(), *batch.rng().normal(size=2).tolist()]

    assert values() == values()
    others = [values(**{name: 2}) for name in ("seed", "step", "part", "process")]
    assert len({tuple(row) for row in [values(), *others]}) == 5
