"""Every stage that trains learns from the prompts that are emphasized, and measures on all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobile_runtime.errors import UserError
from recipes import prompts, schema, stages
from recipes.faults import RecipeError
from tests.converters.small import make_small_pipeline

TRAINING = {"iterations": 1, "warmup": 0, "batch": 2, "precision": "float32"}
EMPHASIS = {"matching": "stone", "share": 1.0}
QUANTIZE = {"activations": "int8_static", "components": ["unet"], "calibration": {"samples": 1}}
STAGES: dict[str, dict[str, Any]] = {
    "resolution": {"drawn_at": 32, "pictures": 2, "draw_steps": 1},
    "distill-output": {"method": "output", "steps": 1},
    "distill-progressive": {
        "method": "progressive",
        "steps": 1,
        "teacher_steps": 2,
        "pictures": 2,
        "draw_steps": 1,
    },
    "decoder": {"channels": 8, "blocks": 1, "pictures": 2, "held_out": 2},
    "finetune": {},
}
MEASURING = ("resolution", "decoder", "finetune")


def recipe(stage: str, named: Path, **changes: Any) -> schema.Recipe:
    settings = {**TRAINING, **STAGES[stage], "prompts": str(named), "emphasis": EMPHASIS}
    calibration = {**QUANTIZE["calibration"], "prompts": str(named)}
    after = [{"quantize": {**QUANTIZE, "calibration": calibration}}] if stage == "finetune" else []
    return schema.parse(
        {
            "name": "x",
            "source": {"model": "embedded"},
            "resolution": 16,
            "schedule": {"steps": 1, "guidance_scale": 0.0},
            "stages": [{stage.split("-")[0]: {**settings, **changes}}, *after],
        }
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_draws_emphasized_prompts(
    stage: str, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[str]] = {"emphasized": [], "drawer": []}

    def watched(name: str) -> Any:
        make = getattr(prompts, name)

        def made(*args: Any) -> prompts.Draw:
            draw = make(*args)

            def draw_and_tell(rng: np.random.Generator, n: int) -> list[str]:
                said: list[str] = draw(rng, n)
                drawn[name] += said
                return said

            return draw_and_tell

        return made

    asked = recipe(stage, prompts_file)
    for name in drawn:
        monkeypatch.setattr(prompts, name, watched(name))
    stages.apply(make_small_pipeline(), asked, asked.stages[:1], cache=tmp_path / "cache")
    assert set(drawn["emphasized"]) == {"a stone"}
    # `emphasized` begins with what `drawer` gives, so what is measured on is told by its length.
    if stage in MEASURING:
        assert len(drawn["drawer"]) > len(drawn["emphasized"])


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a tent\na stone\n" + "a hut\n" * 30)
    return path


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("matching", "told"), [("cloud", "none of 32"), ("a", "every one of 32")])
def test_an_emphasis_on_all_prompts_or_none_is_told_before_any_work(
    stage: str, matching: str, told: str, prompts_file: Path
) -> None:
    asked = recipe(stage, prompts_file, emphasis={"matching": matching, "share": 0.5})
    with pytest.raises(UserError, match=f"emphasis.matching: '{matching}' is found in {told}"):
        stages.check(make_small_pipeline(), asked)


def test_a_rare_prompt_of_a_file_is_found(prompts_file: Path) -> None:
    with prompts_file.open("a") as file:
        file.write("a hut\n" * 20_000)
    asked = recipe("distill-output", prompts_file)
    settings = asked.stages[0].distill
    assert settings is not None
    prompts.check_training(settings, asked)
    drawn = prompts.emphasized(settings, asked)(np.random.default_rng(0), 9)
    assert drawn == ["a stone"] * 9


@pytest.mark.parametrize(
    ("emphasis", "told"),
    [
        ({"matching": "(", "share": 0.5}, r"emphasis\.matching: '\(' is no regular expression"),
        ({"matching": "a{" + "9" * 20 + "}", "share": 0.5}, "is no regular expression"),
        ({"matching": "(" * 3000 + ")" * 3000, "share": 0.5}, "is no regular expression"),
        ({"matching": "a", "share": 0.0}, "greater than 0"),
        ({"matching": "a", "share": 1.5}, "less than or equal to 1"),
        ({"matching": "", "share": 0.5}, "matching"),
        ({"share": 0.5}, "matching"),
    ],
)
def test_an_emphasis_that_cannot_be_is_refused(
    emphasis: dict[str, Any], told: str, prompts_file: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe("distill-output", prompts_file, emphasis=emphasis)


@pytest.mark.filterwarnings("error")
def test_an_expression_that_another_python_may_read_otherwise_makes_no_noise(
    prompts_file: Path,
) -> None:
    asked = recipe("distill-output", prompts_file, emphasis={"matching": "[[s]to", "share": 0.5})
    stages.check(make_small_pipeline(), asked)


def test_without_a_training_there_is_nothing_to_emphasize(prompts_file: Path) -> None:
    with pytest.raises(RecipeError, match="emphasis: nothing is trained without iterations"):
        recipe("decoder", prompts_file, iterations=0, model="somewhere", channels=None, blocks=None)
