"""Distillation learns from the teacher, resumes, is kept, and leaves the teacher alone."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import nn

from mobile_runtime.errors import UserError, run_cli
from recipes import distill, drawn, evaluation, losses, schema, stages, trainer, work
from recipes.faults import RecipeError
from recipes.losses import Noise
from recipes.pocket.evaluate import held_out_scenes, score
from tests.conftest import make_tiny_pipeline

CPU = torch.device("cpu")
SMALL = {
    "iterations": 3,
    "batch": 2,
    "warmup": 0,
    "pictures": 4,
    "draw_steps": 2,
    "save_every": 1,
    "watch_every": 2,
    "precision": "float32",
    "learning_rate": 1e-4,
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\na tent\n\na stone\n")
    return path


def recipe(prompts: Path, **settings: Any) -> schema.Recipe:
    settings = {"steps": 1, **SMALL, "prompts": str(prompts), **settings}
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 64,
            "schedule": {"steps": settings["steps"], "guidance_scale": 0.0},
            "stages": [{"distill": settings}],
        }
    )


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


def noise_of(scheduler: Any) -> Noise:
    return Noise.of(scheduler, CPU)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_step_is_what_diffusers_makes_of_it(prediction: str, steps: int) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    noise = noise_of(scheduler)
    grid = noise.grid(steps)
    assert grid[:-1].tolist() == scheduler.timesteps.tolist()
    x, out = torch.randn(2, 1, 4, 8, 8)
    for index in range(steps):
        t, after = grid[index : index + 1], grid[index + 1 : index + 2]
        mine = noise.ddim(x, noise.x0(x, out, t), t, after)
        theirs = scheduler.step(out, int(t), x)
        torch.testing.assert_close(mine, theirs.prev_sample, rtol=1e-4, atol=1e-4)
        back = noise.x0_of_step(x, mine, t, after)
        torch.testing.assert_close(back, theirs.pred_original_sample, rtol=1e-3, atol=1e-3)


def test_a_student_that_does_two_steps_in_one_has_no_loss() -> None:
    """With a model that knows the picture, two DDIM steps and one lead to the same place."""
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    noise = noise_of(scheduler)
    x0, eps = torch.randn(2, 3, 4, 8, 8)
    at = torch.tensor([0, 1, 3])

    def knowing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x0

    def ignorant(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    assert float(losses.progressive(noise, knowing, knowing, x0, eps, 4, at)) < 1e-5
    assert float(losses.progressive(noise, ignorant, knowing, x0, eps, 4, at)) > 0.5


def test_the_consistency_function_is_diffusers_own() -> None:
    scheduler = LCMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(4)
    noise = noise_of(scheduler)
    x, out = torch.randn(2, 1, 4, 8, 8)
    for t in scheduler.timesteps:
        theirs = scheduler.step(out, t, x).denoised
        mine = losses.consistency(noise, x, out, t[None])
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    start = losses.consistency(noise, x, out, torch.tensor([0]))
    torch.testing.assert_close(start, x)


def test_a_consistent_student_has_no_consistency_loss() -> None:
    noise = noise_of(LCMScheduler(prediction_type="sample", clip_sample=False))
    x0, eps = torch.randn(2, 3, 4, 8, 8)

    def knowing(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x0

    def wrong(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x0 + t[:, None, None, None] / 1000

    at = torch.tensor([0, 5, 20])
    for student, expected in ((knowing, True), (wrong, False)):
        loss = losses.latent_consistency(noise, student, student, knowing, x0, eps, 50, at)
        assert (float(loss) < 1e-4) == expected


def test_block_outputs_of_equal_unets_have_no_loss() -> None:
    unet: Any = make_tiny_pipeline().unet
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with losses.Features(unet) as first, torch.no_grad():
        unet(x, 5, text)
    with losses.Features(unet) as second, torch.no_grad():
        unet(x, 900, text)
    assert len(first.seen) == len(unet.down_blocks) + len(unet.up_blocks) + 1
    assert float(losses.feature_loss(first, first)) == 0
    assert float(losses.feature_loss(second, first)) > 0
    assert not any(block._forward_hooks for block in unet.modules())


def test_a_teacher_of_other_text_is_refused() -> None:
    from diffusers import UNet2DConditionModel

    teacher = make_tiny_pipeline().unet
    config = {**teacher.config, "cross_attention_dim": 64}
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(config)
    with pytest.raises(UserError, match="cross_attention_dim 32 and the student's 64"):
        losses.check_fit(teacher, student)


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


def test_other_settings_other_prompts_and_other_weights_are_another_training(
    prompts: Path, tmp_path: Path
) -> None:
    def key(asked: schema.Recipe, pipeline: Any) -> str:
        done = work.Done.before(pipeline, asked, tmp_path, keeps=True)
        with done.work(asked.stages[0], ("unet",), pipeline.unet) as found:
            return found.key

    pipeline = make_tiny_pipeline()
    asked = recipe(prompts, method="lcm")
    first = key(asked, pipeline)
    assert key(asked, make_tiny_pipeline()) == first
    keys = {first, key(recipe(prompts, method="lcm", seed=1), pipeline)}
    prompts.write_text("something else\n")
    keys.add(key(asked, pipeline))
    pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    keys.add(key(asked, pipeline))
    assert len(keys) == 4


def test_what_a_training_draws_by_is_a_part_of_its_key(prompts: Path, tmp_path: Path) -> None:
    """A decoder learns from what the schedule draws, and no prompts mean the source's own."""

    def key(**changes: Any) -> str:
        data = {"steps": 2, "model": "embedded", "prompts": str(prompts), **changes}
        stage = {"decoder": {"iterations": 1, "prompts": data["prompts"]}}
        asked = schema.parse(
            {
                "name": "x",
                "source": {"model": data["model"]},
                "resolution": 64,
                "schedule": {"steps": data["steps"], "guidance_scale": 0.0},
                "stages": [stage],
            }
        )
        return work.Done(asked, tmp_path, []).add(asked.stages[0])[0]

    assert key() == key()
    assert key() != key(steps=4)
    assert key() == key(model="somewhere/else")
    assert key(prompts=None) != key(prompts=None, model="somewhere/else")


def test_two_processes_do_not_train_the_same_thing(prompts: Path, tmp_path: Path) -> None:
    asked = recipe(prompts, method="lcm")
    pipeline = make_tiny_pipeline()
    first, second = (work.Done.before(pipeline, asked, tmp_path, keeps=True) for _ in range(2))
    with (
        first.work(asked.stages[0], ("unet",), None),
        pytest.raises(UserError, match="another process is at this training"),
        second.work(asked.stages[0], ("unet",), None),
    ):
        pass


def found(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it is told where the result was kept and the stages before it were skipped."""
    assert record["snr_db"]
    return {**record, "trained": "earlier, found in the cache"}


def test_a_result_that_only_led_to_a_kept_one_is_not_needed(prompts: Path, tmp_path: Path) -> None:
    first = {"method": "progressive", "steps": 2, "teacher_steps": 4, **SMALL}
    second = {"method": "progressive", "steps": 1, "teacher_steps": 2, **SMALL}
    data = recipe(prompts, method="lcm").resolved()
    data["stages"] = [{"distill": {**one, "prompts": str(prompts)}} for one in (first, second)]
    asked = schema.parse(data)
    cache = tmp_path / "cache"
    whole = stages.apply(make_tiny_pipeline(), asked, cache=cache)
    for folder in cache.iterdir():
        if folder.name == whole.records[0]["result"]:
            shutil.rmtree(folder)
    again = stages.apply(make_tiny_pipeline(), asked, cache=cache)
    assert again.records[0] == {**whole.records[0], "trained": stages.SUPERSEDED}
    assert again.records[1] == found(whole.records[1])
    assert [folder.name for folder in cache.iterdir()] == [whole.records[1]["result"]]
    for name, value in again.pipeline.unet.state_dict().items():
        assert torch.equal(value, whole.pipeline.unet.state_dict()[name])


def listed(prompts: Path, *those: dict[str, Any]) -> schema.Recipe:
    """A recipe of these stages, without guidance in one step."""
    data = recipe(prompts, method="output", iterations=1).resolved()
    return schema.parse({**data, "stages": list(those)})


def student(prompts: Path, **settings: Any) -> dict[str, Any]:
    own = {**SMALL, "iterations": 1, "steps": 1, "method": "output", "prompts": str(prompts)}
    return {"distill": {**own, **settings}}


def test_the_records_of_stages_that_are_not_needed_are_those_of_the_first_run(
    prompts: Path, tmp_path: Path
) -> None:
    narrow = {"channels": {"macs": 0.2, "importance": "magnitude"}}
    those = ({"prune": {"blocks": "bk_small"}}, {"prune": narrow}, student(prompts))
    asked = listed(prompts, *those, {"fold": {}})
    first = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    assert first.records[0]["blocks_removed"]
    again = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    assert again.records[:2] == [
        {**record, "trained": stages.SUPERSEDED} for record in first.records[:2]
    ]
    assert again.records[2] == found(first.records[2])
    assert again.records[2]["before"]["unet"] != again.records[0]["before"]["unet"]
    assert again.records[3] == first.records[3]


def test_a_stage_that_runs_between_is_measured_as_in_the_first_run(
    prompts: Path, tmp_path: Path
) -> None:
    """A decoder that is opened: it replaces nothing that the distillation brings."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny: Any = AutoencoderTiny(
        encoder_block_out_channels=(1,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    tiny.save_pretrained(tmp_path / "tiny")
    opened = {"decoder": {"model": str(tmp_path / "tiny"), "held_out": 0}}
    asked = listed(prompts, {"prune": {"blocks": "bk_small"}}, opened, student(prompts))
    runs = [stages.apply(make_tiny_pipeline(), asked, cache=tmp_path / "c") for _ in range(2)]
    sizes = [[(r["before"], r["after"]) for r in run.records] for run in runs]
    assert runs[1].records[0]["trained"] == stages.SUPERSEDED
    assert sizes[1] == sizes[0]


def test_a_result_that_was_kept_without_records_of_what_led_to_it_is_still_found(
    prompts: Path, tmp_path: Path
) -> None:
    asked = listed(prompts, {"prune": {"blocks": "bk_small"}}, student(prompts))
    first = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    file = tmp_path / first.records[1]["result"] / work.RECORD
    kept = json.loads(file.read_text())
    del kept["earlier"]
    file.write_text(json.dumps(kept))
    del kept["record"]["snr_db"]
    file.write_text(json.dumps(kept))
    again = stages.apply(make_tiny_pipeline(), asked, cache=tmp_path)
    # Nothing is there to hold the student against but what came before the stage that is skipped.
    assert again.records[1]["snr_db"].keys() == first.records[1]["snr_db"].keys()
    assert again.records[1]["snr_db_against"] == "source"
    assert again.records[0] == {"stage": "prune", "trained": stages.SUPERSEDED}
    assert again.records[1]["after"] == first.records[1]["after"]


def test_a_lora_of_a_stage_that_is_not_needed_may_be_gone(
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    stages.save(make_tiny_pipeline(), [], tmp_path / "source")
    data = listed(prompts, *(student(prompts, lora_rank=2, seed=seed) for seed in (0, 1)))
    data = schema.parse({**data.resolved(), "source": {"model": str(tmp_path / "source")}})
    (tmp_path / "mine.yaml").write_text(data.to_yaml())

    def run(output: str) -> set[str]:
        argv = ["--recipe", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / output)]
        assert run_cli(distill.main, argv) == 0, capsys.readouterr().err
        return {path.name for path in (tmp_path / output).glob("*.safetensors")}

    assert len(run("first")) == 2
    told = json.loads((tmp_path / "first" / stages.RECORDS).read_text())
    assert [record["stage"] for record in told] == ["distill", "distill"]
    assert all({"before", "after", "optimizer_steps"} <= record.keys() for record in told[1:])
    (gone,) = [
        folder
        for folder in (tmp_path / "cache").iterdir()
        if not json.loads((folder / work.RECORD).read_text())["earlier"]
    ]
    shutil.rmtree(gone)
    assert len(run("second")) == 1


def test_a_kept_result_that_is_damaged_is_told_with_its_folder(
    prompts: Path, tmp_path: Path
) -> None:
    asked = recipe(prompts, method="output", iterations=1)
    cache = tmp_path / "cache"
    stages.apply(make_tiny_pipeline(), asked, cache=cache)
    (kept,) = cache.iterdir()
    weights = kept / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{kept.name} has changed since it was made; delete it"):
        stages.apply(make_tiny_pipeline(), asked, cache=cache)
    # One that was kept before there were hashes.
    record = json.loads((kept / work.RECORD).read_text())
    del record["sha256"]
    (kept / work.RECORD).write_text(json.dumps(record))
    weights.write_bytes(content[:-1000])
    with pytest.raises(UserError, match=rf"{kept.name}/unet cannot be read .* delete it"):
        stages.apply(make_tiny_pipeline(), asked, cache=cache)


def test_a_damaged_record_of_a_kept_result_is_told(prompts: Path, tmp_path: Path) -> None:
    asked = recipe(prompts, method="output", iterations=1)
    cache = tmp_path / "cache"
    stages.apply(make_tiny_pipeline(), asked, cache=cache)
    (kept,) = cache.iterdir()
    for damage in ("{", "[]", '{"key": "another", "record": {}}'):
        (kept / work.RECORD).write_text(damage)
        with pytest.raises(UserError, match=r"is damaged, or the result of other inputs .* delete"):
            stages.apply(make_tiny_pipeline(), asked, cache=cache)
    (kept / work.RECORD).unlink()  # as if somebody had begun to delete it: trained again
    stages.apply(make_tiny_pipeline(), asked, cache=cache)
    assert (kept / work.RECORD).is_file()


@pytest.mark.parametrize("name", [name for name in schema.names() if name.startswith("pocket")])
def test_what_the_shipped_recipes_train_is_in_the_package(name: str, tmp_path: Path) -> None:
    """A change of a setting or of the source's weights needs `recipes.pocket.ship` again."""
    from recipes.sources import open_source

    asked = schema.load(name)
    pipeline = open_source("embedded").pipeline
    applied = stages.apply(pipeline, asked, stages.changing(asked), cache=tmp_path / "cache")
    trained = [record for record in applied.records if stages.STAGES[record["stage"]].trained]
    told = {"earlier, found in the package", stages.SUPERSEDED}
    assert all(record["trained"] in told for record in trained)
    assert not (tmp_path / "cache").exists()


def test_the_shipped_few_step_model_draws_what_captions_say(tmp_path: Path) -> None:
    from recipes.sources import open_source

    asked = schema.load("pocket_turbo")
    applied = stages.apply(open_source("embedded").pipeline, asked, cache=tmp_path)
    assert applied.records[-1]["trained"] == "earlier, found in the package"
    cases = held_out_scenes(16, seed=1)
    words, scenes = [text for text, _ in cases], [scene for _, scene in cases]
    _, pictures = evaluation.draw(applied.pipeline, asked.schedule, words, (64, 64), 0, "test")
    result = score(pictures, scenes)
    assert result["by"]["together"]["right"] >= 13, result["failed"]


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
