"""A component's folder: what was damaged is told, and what to do about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobile_runtime.errors import UserError
from recipes import component_folder, widths
from tests.converters.small import make_small_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONV = "conv_in.weight"


@pytest.fixture(params=["whole", "narrowed"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    unet = make_small_pipeline().unet
    if request.param == "narrowed":
        group = widths.groups(unet)["down_blocks.0.resnets.0"]
        unet = widths.narrow(unet, {"down_blocks.0.resnets.0": range(group.width // 2)})
    component_folder.save(unet, tmp_path / "unet")
    assert (tmp_path / "unet" / widths.FILE).is_file() == (request.param == "narrowed")
    return tmp_path / "unet"


def cut(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_its_header(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:50])


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def gone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def without_its_class(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def no_mapping(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def of_a_config_cut_short(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CONV][0, 0, 0, 0] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_out.bias"][0] = float("-inf")


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[CONV] = tensors[CONV][:-1].clone()


def test_it_opens_as_it_was_saved(folder: Path) -> None:
    loaded = component_folder.load(folder)
    stored = load_file(folder / WEIGHTS)
    assert loaded.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in loaded.state_dict().items())


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "cut in its header": cut_in_its_header,
    "empty": empty,
    "gone": gone,
    "a tensor less": changed(lambda tensors: tensors.pop(CONV)),
    "NaN": changed(not_a_number),
    "Inf": changed(infinite),
    "another shape": changed(of_another_shape),
    "a config without its class": without_its_class,
    "a config cut short": of_a_config_cut_short,
    "a config that is a list": no_mapping,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_told_and_that_it_may_be_deleted(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder)
    with pytest.raises(UserError, match=r"unet.* if it is a kept result, delete it"):
        component_folder.load(folder)


def test_what_it_lacks_is_named(folder: Path) -> None:
    changed(lambda tensors: tensors.pop(CONV))(folder)
    with pytest.raises(UserError, match=r"conv_in\.weight"):
        component_folder.load(folder)


def test_a_damaged_scheduler_is_told(tmp_path: Path) -> None:
    scheduler: Any = make_small_pipeline().scheduler
    component_folder.save(scheduler, tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for text in ("{", "{}", json.dumps({**config, "beta_schedule": "none"})):
        file.write_text(text)
        with pytest.raises(UserError, match=r"scheduler.* if it is a kept result, delete it"):
            component_folder.load(tmp_path / "scheduler")
