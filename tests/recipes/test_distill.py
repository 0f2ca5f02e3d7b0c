"""Distillation learns from the teacher, resumes, is kept, and leaves the teacher alone."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobile_runtime.errors import UserError, run_cli
from recipes import distill, schema, stages, trainer
from recipes.faults import RecipeError
from tests.conftest import make_tiny_pipeline
from tests.recipes.students import listed, recipe, student

METHODS: dict[str, dict[str, Any]] = {
    "progressive": {"teacher_steps": 4, "guidance": 2.0},
    "lcm": {"guidance": [1.0, 3.0], "steps": 2},
    "output": {"feature_weight": 1.0, "steps": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_trained_kept_and_found_again(
    method: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_tiny_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    asked = recipe(prompts, method=method, **METHODS[method])
    first = stages.apply(pipeline, asked, cache=tmp_path / "cache")
    student = first.pipeline.unet.state_dict()
    assert all(torch.equal(value, pipeline.unet.state_dict()[k]) for k, value in before.items())
    assert any(not torch.equal(value, student[name]) for name, value in before.items())
    (kept,) = (tmp_path / "cache").iterdir()  # what served to resume is gone
    assert (kept / "unet" / "diffusion_pytorch_model.safetensors").is_file()

    monkeypatch.setattr(trainer, "train", None)  # not needed any more
    again = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "cache")
    assert again.records[0]["trained"] == "earlier, found in the cache"
    for name, value in again.pipeline.unet.state_dict().items():
        assert torch.equal(value, student[name])
    assert type(again.pipeline.scheduler) is type(first.pipeline.scheduler)
    options = [
        {
            key: value
            for key, value in dict(applied.pipeline.scheduler.config).items()
            if key[0] != "_"
        }
        for applied in (first, again)
    ]
    assert options[0] == options[1]


def test_a_fresh_student_has_the_attention_of_one_that_is_opened(
    prompts: Path, tmp_path: Path
) -> None:
    """Or its export would hold other operations than that of the same student, found again."""
    asked = listed(prompts, student(prompts))
    fresh, found = (
        stages.apply(make_tiny_pipeline(), asked, cache=tmp_path).pipeline.unet for _ in range(2)
    )
    kinds = [
        {name: type(processor) for name, processor in unet.attn_processors.items()}
        for unet in (fresh, found)
    ]
    assert kinds[0] == kinds[1]


def test_blocks_learn_from_the_said_half_of_a_guided_teacher(prompts: Path, tmp_path: Path) -> None:
    asked = recipe(prompts, method="output", feature_weight=1.0, guidance=2.0, iterations=1)
    applied = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    record = (tmp_path / applied.records[0]["result"] / "training" / "output-loss.csv").read_text()
    loss = float(record.splitlines()[1].split(",")[1])

    # Without guidance student and teacher are equal before the first step, blocks and all: what is
    # left under guidance is of the output alone.
    plain = recipe(prompts, method="output", guidance=2.0, iterations=1)
    applied = stages.apply(make_tiny_pipeline(), plain, cache=tmp_path)
    record = (tmp_path / applied.records[0]["result"] / "training" / "output-loss.csv").read_text()
    assert loss > 0
    assert loss == pytest.approx(float(record.splitlines()[1].split(",")[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "progressive", "teacher_steps": 6}, "6 cannot be halved to 1"),
        ({"method": "progressive", "guidance": [1, 2]}, "a range goes with method lcm"),
        ({"method": "lcm", "guidance": [5, 2]}, r"\[low, high\]"),
        ({"method": "output", "teacher_steps": 4}, "teacher_steps: method output"),
        ({"method": "lcm", "feature_weight": 0.5}, "feature_weight: goes with method output"),
        ({"method": "progressive", "feature_weight": 0.5}, "and this is progressive"),
        ({"method": "lcm", "warmup": 9}, "9 steps are more than iterations"),
        ({"method": "best"}, "method"),
        ({"method": "lcm", "steps": 3}, "steps"),
    ],
)
def test_settings_that_do_not_fit_are_told(
    settings: dict[str, Any], told: str, prompts: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(prompts, **settings)


def test_a_schedule_that_was_not_trained_for_is_told(prompts: Path) -> None:
    good = recipe(prompts, method="lcm").resolved()
    for change, told in (
        ({"steps": 25}, "the distill stage trains for 1"),
        ({"other_steps": [2]}, "no other_steps"),
        ({"guidance_scale": 7.5}, "folds guidance in"),
        ({"scheduler": "euler"}, "brings the scheduler"),
    ):
        with pytest.raises(RecipeError, match=told):
            schema.parse({**good, "schedule": {**good["schedule"], **change}})


@pytest.mark.parametrize("text", ["", "\n# only a comment\n"])
def test_an_empty_prompt_file_is_told_before_any_work(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    asked = recipe(path, method="lcm")
    with pytest.raises(UserError, match=r"stages\.0\.distill: the prompt file .* holds no prompt"):
        stages.check(make_tiny_pipeline(), asked)


def test_a_missing_prompt_file_is_told(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "nothing.txt", method="lcm")
    with pytest.raises(UserError, match="there is no prompt file"):
        stages.check(make_tiny_pipeline(), asked)


def test_steps_that_the_teacher_cannot_draw_in_are_told_before_any_training(prompts: Path) -> None:
    """A consistency student is trained for a few steps of fifty."""
    first = student(prompts, method="lcm", steps=4)
    asked = listed(prompts, first, student(prompts, method="progressive", draw_steps=60))
    with pytest.raises(UserError, match=r"stages\.1\.distill: LCMScheduler cannot make 60 steps"):
        stages.check(make_tiny_pipeline(), asked)


def test_a_solver_that_does_not_divide_the_schedule_is_told(prompts: Path) -> None:
    with pytest.raises(UserError, match="33 does not divide the schedule's 1000 timesteps"):
        stages.check(make_tiny_pipeline(), recipe(prompts, method="lcm", teacher_steps=33))


@pytest.mark.parametrize(("steps", "solver"), [(1, 50), (2, 50), (4, 40), (8, 40)])
def test_the_solvers_usual_steps_are_a_multiple_of_the_students(
    steps: int, solver: int, prompts: Path
) -> None:
    asked = recipe(prompts, method="lcm", steps=steps)
    stages.check(make_tiny_pipeline(), asked)
    settings = asked.stages[0].distill
    assert settings is not None
    assert distill.solver_steps(settings) == solver
    with pytest.raises(UserError, match=r"125 is no multiple of steps \(2\); give 40"):
        stages.check(
            make_tiny_pipeline(), recipe(prompts, method="lcm", steps=2, teacher_steps=125)
        )


class Elsewhere:
    """A device other than the CPU, as far as moves between the two are concerned."""

    is_main_process = True
    device = torch.device("cpu:0")
    main_process_first = staticmethod(contextlib.nullcontext)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Where each module of a pipeline was moved to, by its id."""
    from diffusers import DiffusionPipeline

    seen: dict[int, list[str]] = {}

    def to(self: Any, device: Any) -> Any:
        for part in self.components.values():
            if isinstance(part, nn.Module):
                seen.setdefault(id(part), []).append(str(device))
        return self

    monkeypatch.setattr(DiffusionPipeline, "to", to)
    monkeypatch.setattr(distill, "accelerator", Elsewhere)
    return seen


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_was_moved_to_train_is_moved_back(
    method: str,
    raises: bool,
    places: dict[int, list[str]],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(job: trainer.Job) -> Any:
        if raises:
            raise RuntimeError("out of memory")
        return job.module

    monkeypatch.setattr(distill, "train", train)
    pipeline = make_tiny_pipeline()
    asked = recipe(prompts, method=method, **METHODS[method])
    expected = pytest.raises(RuntimeError) if raises else contextlib.nullcontext()
    with expected:
        stages.apply(pipeline, asked, cache=tmp_path)
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.unet):
        assert places[id(part)][0] == "cpu:0"
    assert {moves[-1] for moves in places.values()} == {"cpu"}


@pytest.mark.parametrize("name", ["pocket_turbo", "pocket_turbo_mini"])
def test_a_resolution_that_cannot_be_is_refused_before_any_stage(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "apply", None)
    argv = ["--recipe", name, "--resolution", "58", "--output", str(tmp_path / "x")]
    assert run_cli(distill.main, argv) == 2
    assert "a height of 58 pixels is no multiple of 4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_is_refused_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "apply", None)
    (tmp_path / "file").write_text("mine")
    for output in ("file/x", "file/deeper/x"):
        argv = ["--recipe", "pocket_turbo", "--output", str(tmp_path / output)]
        assert run_cli(distill.main, argv) == 2
        told = capsys.readouterr().err
        assert "is no folder that can be written to" in told
        assert "choose another --output" in told
    assert (tmp_path / "file").read_text() == "mine"
