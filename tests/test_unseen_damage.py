"""Damage that golden cases do not show: at a timestep between them, and in a file that shows no
value of its inside.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from converters import cli
from mobile_runtime import taps
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError
from mobile_runtime.on_devices import Asked, validate_on
from mobile_runtime.report import Report
from mobile_runtime.validate import validate
from tests.converters.small import make_small_pipeline
from tests.damages import Damage, damaged, in_manifest, on_package, on_weight

RECIPE = """
name: small
source: {{model: {model}}}
resolution: 16
schedule: {{steps: {steps}, guidance_scale: 1.0}}
stages: [{stages}]
golden_prompts: [a red tent]
"""
LAYER = "unet.mid_block.resnets.1.time_emb_proj"


def small_recipe(folder: Path, steps: int, stages: str) -> Path:
    """A recipe of a small pipeline, in a folder beside its `model`."""
    make_small_pipeline().save_pretrained(folder / "model")
    text = RECIPE.format(model=folder / "model", steps=steps, stages=stages)
    (folder / "small.yaml").write_text(text)
    return folder / "small.yaml"


def converted(folder: Path, target: str, steps: int, stages: str) -> Path:
    recipe = small_recipe(folder, steps, stages)
    argv = ["--recipe", str(recipe), "--output", str(folder / target), "--no-validate"]
    assert cli.main(target, argv) == 0
    return folder / target


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles with a table of nine timesteps, of which three have golden cases."""
    make = tmp_path_factory.mktemp
    return {
        target: converted(make(target), target, 9, "{fold: {}}") for target in ("onnx", "coreml")
    }


@pytest.fixture(scope="module")
def executorch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("executorch")
    return converted(tmp_path_factory.mktemp("executorch"), "executorch", 2, "")


def checked(folder: Path) -> Report:
    return validate(Bundle.open(folder), repeats=0, progress=False)


def golden_timesteps(folder: Path) -> set[float]:
    tensors = load_file(folder / "golden/unet.safetensors")
    return {float(value[0]) for name, value in tensors.items() if name.endswith("/in/timestep")}


def every_timestep(folder: Path) -> list[float]:
    (table,) = json.loads((folder / "manifest.json").read_text())["schedules"]
    return [row["timestep"] for row in table["rows"]]


def scaled_column(column: int):
    """One timestep's column of a table, a hundredth too large."""

    def change(array: np.ndarray) -> np.ndarray:
        table = array.reshape(-1, 9)  # channels by timesteps, flat in a package
        if array.shape[0] == 9:  # ONNX keeps it transposed
            table = array.T
        table[:, column] *= 1.01
        return array

    return change


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_an_undamaged_table_of_timesteps_passes(folded, target):
    report = checked(folded[target])
    told = [check for check in report.checks if check.kind == "timesteps"]
    assert report.verdict == "pass"
    assert {check.status for check in told} == {"pass"}
    assert all("9 timesteps" in check.reason for check in told)
    assert len(golden_timesteps(folded[target])) == 3


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_a_small_error_at_a_timestep_without_a_golden_case_is_named(folded, target, tmp_path):
    timesteps = every_timestep(folded[target])
    (column, timestep), *_ = (
        (k, t)
        for k, t in enumerate(sorted(timesteps, reverse=True))
        if t not in golden_timesteps(folded[target])
    )
    change = scaled_column(column)
    apply = (
        on_weight(LAYER, change) if target == "onnx" else on_package(LAYER, "weight", "val", change)
    )
    report = checked(damaged(folded[target], Damage("a column", apply), tmp_path / "bundle"))
    assert report.verdict == "fail"
    wrong = [check for check in report.checks if check.kind == "timesteps"]
    assert {check.status for check in wrong} == {"fail"}
    assert {check.details["layer"] for check in wrong} == {LAYER}
    assert {tuple(check.details["timesteps"]) for check in wrong} == {(timestep,)}
    assert f"at timestep {timestep:g}, {LAYER}" in report.summary


def test_timesteps_that_do_not_fit_their_taps_are_refused(folded, tmp_path):
    def apply(folder: Path) -> None:
        path = folder / taps.TIMESTEPS_PATH
        with safe_open(path, "numpy") as file:
            assert file.get_tensor("timesteps").shape == (9,)
        found = taps.open_taps(path)
        one_more = taps.Taps(found.taps, found.sketches, found.made_on, (*found.timesteps, 1.0))
        taps.write(one_more, path)

    folder = damaged(folded["onnx"], Damage("one more", apply), tmp_path / "bundle")
    with pytest.raises(BundleError, match="taps of 10 timesteps"):
        checked(folder)


def test_each_timestep_of_a_short_schedule_has_a_golden_case(tmp_path):
    folder = converted(tmp_path, "onnx", 7, "")
    assert golden_timesteps(folder) == set(every_timestep(folder))


def slightly_wrong(model: Path):
    """A two-thousandth more in the decoder's last bias: above the gate of 60 dB."""

    def apply(folder: Path) -> None:
        path = folder / "vae_decoder.pte"
        content = path.read_bytes()
        tensors = load_file(model / "vae/diffusion_pytorch_model.safetensors")
        weight = tensors["decoder.conv_out.bias"]
        assert content.count(weight.tobytes()) == 1
        path.write_bytes(content.replace(weight.tobytes(), (weight * 1.0005).tobytes()))

    return apply


def checked_in_a_process(folder: Path) -> Report:
    return validate_on(Bundle.open(folder), ["local"], Asked(repeats=0))


@pytest.mark.parametrize("judge", [checked, checked_in_a_process])
def test_executorch_outputs_are_held_to_what_they_were_where_they_were_made(
    executorch, judge, tmp_path
):
    assert judge(executorch).verdict == "pass"
    damage = Damage("slightly", slightly_wrong(executorch.parent / "model"))
    folder = damaged(executorch, damage, tmp_path / "bundle")
    report = judge(folder)
    (wrong,) = [check for check in report.checks if check.gated and check.status == "fail"]
    assert (wrong.component, wrong.kind) == ("vae_decoder", "same_function")
    assert 60 < wrong.value < wrong.gate

    def other_machine(manifest):
        for component in manifest["components"]:
            component["at_conversion"]["made_on"] = "another processor"

    in_manifest(other_machine)(folder)
    assert judge(folder).verdict == "pass"  # rounds otherwise, so that only the gate counts
