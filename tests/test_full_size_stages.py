"""Every stage at SD-Turbo's real size (`pytest -m full_size`), and that its benchmark runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import schema, stages
from recipes.sources import open_source
from tests.benchmarks import full_size_stages, stage_rows
from tests.benchmarks.stage_rows import REAL, ROWS, Run
from tests.conftest import make_tiny_pipeline


@pytest.mark.full_size
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        ("prune", 0),
        ("channels", 0),
        ("fold", 0),
        ("decoder", 0),
        ("w8a8", 0),
        ("convert", 0),
        ("output", 2),
        ("lcm-lora", 2),
    ],
)
def test_a_stage_at_the_real_size(name: str, iterations: int, tmp_path: Path) -> None:
    row = full_size_stages.measure(name, tmp_path, iterations=iterations)
    assert row["faults"] == []
    if name == "prune":
        assert {key: row["figures"][key] for key in stage_rows.PUBLISHED} == stage_rows.PUBLISHED
    if name == "fold":
        assert row["figures"]["parameters_less"] == 27_855_360


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a pipeline of SD-Turbo's kind, two layers a level as it has, and tiny."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    pipeline = make_tiny_pipeline()
    torch.manual_seed(1)
    pipeline.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=2,
        use_linear_projection=True,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipeline.scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    folder = tmp_path_factory.mktemp("source") / "tiny"
    pipeline.save_pretrained(folder)
    return str(folder)


QUICK = [name for name in ROWS if name not in ("convert", "w8a8-keep")]


@pytest.mark.parametrize("name", QUICK)
def test_a_row_runs_on_a_tiny_source_and_is_as_it_should(
    name: str, source: str, tmp_path: Path
) -> None:
    run = Run(source, 64, tmp_path, iterations=3)
    figures = ROWS[name].run(run)
    assert stage_rows.faults(name, figures, run) == []
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    if "seconds_a_step" in figures:
        assert figures["optimizer_steps"] == 3
        assert figures["seconds_a_step"] > 0
        # A student's checkpoints are gigabytes.
        assert not (tmp_path / "cache").exists()


def test_the_recipe_that_is_converted_is_the_shipped_one_without_its_training(
    source: str, tmp_path: Path
) -> None:
    path = stage_rows.small_recipe(Run(source, 64, tmp_path))
    recipe = schema.load(str(path))
    names = [stage.name for stage in schema.load("sd_turbo_small_int8").stages]
    assert [stage.name for stage in recipe.stages] == [n for n in names if n != "distill"]
    after = stages.check(open_source(source, weights=False).pipeline, recipe)
    assert after.unet.mid_block is None
    assert type(after.vae).__name__ == "AutoencoderTiny"


@pytest.mark.parametrize(
    ("name", "figures", "said"),
    [
        ("prune", {**stage_rows.PUBLISHED, "bk_tiny": 1}, "bk_tiny is 1, should be 326825604"),
        ("prune", {**stage_rows.PUBLISHED, "bk_tiny_finite": False}, "bk_tiny_finite is False"),
        ("fold", {"parameters_less": 27_855_360, "snr_db": 99.0}, "snr_db is 99.0"),
        ("fold", {"parameters_less": 27_855_360, "snr_db": float("nan")}, "snr_db is nan"),
        ("fold", {"parameters_less": 0, "snr_db": 140.0}, "parameters_less is 0"),
        (
            "w8a8",
            {"int8_macs_of_layers": {"unet": 0.5}},
            "int8_macs_of_layers of the UNet are 0.5, below 0.95",
        ),
        ("convert", {"exit_code": 0, "verdict": "fail"}, "verdict is fail, should be pass"),
        ("output", {"optimizer_steps": 19, "finite": True}, "optimizer_steps is 19"),
        ("channels", {"macs_gone": 0.2, "finite": True}, "macs_gone is 0.2"),
    ],
)
def test_a_figure_that_is_not_as_it_should_is_a_fault(
    name: str, figures: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (fault,) = stage_rows.faults(name, figures, Run(REAL, 512, tmp_path))
    assert said in fault


def test_a_row_has_a_process_of_its_own_and_is_kept_for_the_same_request(
    source: str, tmp_path: Path
) -> None:
    asked = {"model": source, "resolution": 64, "iterations": 2}
    row = full_size_stages.measure("fold", tmp_path, **asked)
    assert row["faults"] == []
    assert row["figures"]["parameters_less"] > 0
    assert row["seconds"] > 1
    assert 1e8 < row["peak_bytes"] < 4e9
    again = full_size_stages.kept("fold", tmp_path, asked)
    assert again is not None
    assert {key: again[key] for key in row} == row
    assert full_size_stages.kept("fold", tmp_path, {**asked, "resolution": 128}) is None
    assert full_size_stages.kept("prune", tmp_path, asked) is None
    table = full_size_stages.as_table([row, {**row, "faults": ["snr_db is 3"]}]).splitlines()
    assert [line.split(" | ")[-1] for line in table[2:]] == ["yes |", "snr_db is 3 |"]
    assert len({line.count("|") for line in table}) == 1


def test_a_row_that_ends_early_is_a_fault_and_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    row = full_size_stages.measure("fold", tmp_path)
    assert row["faults"] == ["ended with exit code 1"]
    asked = {"model": REAL, "resolution": None, "iterations": 20}
    assert full_size_stages.kept("fold", tmp_path, asked) is None
