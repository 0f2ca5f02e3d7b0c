"""Runtimes against each other: equal bits, decibels, or why there is nothing to compare."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import run_cli
from mobile_runtime.matrix import Column, as_markdown, pairs_of
from tests.bundles import make_bundle


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("matrix") / "bundle")


def moved(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    if name == "unet":
        (tensor,) = (each for each in model.graph.initializer if each.name == "conv")
        array = numpy_helper.to_array(tensor) * np.float32(1.001)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return model


def run(*argv: Any) -> int:
    return run_cli(main, ["matrix", *map(str, argv)])


def test_two_bundles_of_a_recipe_are_compared(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    other = make_bundle(tmp_path / "other", change_model=moved)
    file = tmp_path / "matrix.json"
    assert run(bundle.path, other.path, "--json", file) == 0
    told = capsys.readouterr().out
    assert "| text_encoder | onnx: onnxruntime #2 |" in told
    pairs = {pair["component"]: pair for pair in json.loads(file.read_text())}
    assert pairs["text_encoder"]["equal"]
    assert pairs["text_encoder"]["snr_db"] is None
    assert not pairs["unet"]["equal"]
    assert 30 < pairs["unet"]["snr_db"] < 100
    assert pairs["vae_decoder"]["equal"]


def test_a_file_of_figures_is_replaced_only_with_force_and_as_a_whole(
    bundle: Bundle, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "matrix.json"
    file.write_text("mine")
    argv = [bundle.path, bundle.path, "--json", file]
    assert run(*argv) == 2
    told = capsys.readouterr()
    assert "matrix.json already exists; choose another --json, or add --force" in told.err
    assert told.out == ""

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        assert run(*argv, "--force") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir() if path.is_file()] == [
        ("matrix.json", "mine")
    ]
    assert run(*argv, "--force") == 0
    assert len(json.loads(file.read_text())) == 3


def test_devices_are_compared(bundle: Bundle, tmp_path: Path, capsys: Any) -> None:
    phone = f"folder:{tmp_path / 'phone'}"
    assert run(bundle.path, "--device", "local", "--device", phone) == 1
    assert "not run: onnxruntime on folder:" in capsys.readouterr().out
    from mobile_runtime.job_runner import run_job

    run_job(tmp_path / "phone/job", bundle, tmp_path / "phone/result")
    assert run(bundle.path, "--device", "local", "--device", phone) == 0
    assert capsys.readouterr().out.count("equal bits") == 3


def test_three_bundles_of_a_target_keep_their_cells(
    bundle: Bundle, tmp_path: Path, capsys: Any
) -> None:
    other = make_bundle(tmp_path / "other", change_model=moved)
    copied = make_bundle(tmp_path / "copied")
    file = tmp_path / "matrix.json"
    assert run(other.path, bundle.path, copied.path, "--json", file) == 0
    pairs = [pair for pair in json.loads(file.read_text()) if pair["component"] == "unet"]
    assert [pair["equal"] for pair in pairs] == [False, False, True]
    assert len({(pair["first"], pair["second"]) for pair in pairs}) == 3
    assert capsys.readouterr().out.count("| onnx: onnxruntime #1 |") == 3


def column(name: str, **outputs: Any) -> Column:
    return Column(
        name, {key: v if isinstance(v, str) else [{"x": v}] for key, v in outputs.items()}
    )


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("it does not run", "b: it does not run"),
        (np.ones((2, 2), np.float32), "x is float32 (2,) and float32 (2, 2)"),
        (np.array([1.0, np.nan], np.float32), "x is not finite"),
        (np.ones(2, np.float64), "x is float32 (2,) and float64 (2,)"),
    ],
)
def test_what_cannot_be_compared_is_told(second: Any, reason: str) -> None:
    (pair,) = pairs_of([column("a", unet=np.ones(2, np.float32)), column("b", unet=second)])
    assert reason in pair.reason
    assert "not run" in as_markdown([pair])


def test_the_first_of_a_pair_is_the_reference() -> None:
    a, b = np.array([1.0, 0.0], np.float32), np.array([1.0, 0.1], np.float32)
    (pair,) = pairs_of([column("a", unet=a), column("b", unet=b)])
    assert pair.snr_db == pytest.approx(10 * math.log10(1 / 0.01), rel=1e-3)
    three = pairs_of([column(name, unet=a) for name in "abc"])
    assert [(pair.first, pair.second) for pair in three] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_one_runtime_or_other_inputs_are_refused(
    bundle: Bundle, tmp_path: Path, capsys: Any
) -> None:
    assert run(bundle.path) == 2
    assert "name another bundle, or two --device" in capsys.readouterr().err

    def shifted(name: str, tensors: Any) -> Any:
        return {k: v + 1 if k == "0/in/sample" else v for k, v in tensors.items()}

    other = make_bundle(tmp_path / "other", change_golden=shifted)
    assert run(bundle.path, other.path) == 2
    assert "has other golden inputs of unet" in capsys.readouterr().err
