"""Quantized layers alone: cut out of the bundle's own file, on the same inputs on two machines."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobile_runtime import layers_alone
from mobile_runtime.__main__ import main
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import run_cli
from mobile_runtime.layers_alone import cut_out
from tests.converters.small import convert_quantized
from tests.mobile_runtime.test_progress import a_terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline with INT8 activations, converted for ONNX."""
    folder = tmp_path_factory.mktemp("layers")
    convert_quantized(folder)
    return folder


def told(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
    code = run_cli(main, ["layers", *(str(word) for word in argv)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_every_quantized_layer_is_cut_out_and_gives_what_it_gives_in_its_place(folder, tmp_path):
    from mobile_runtime.validate import validate

    bundle = Bundle.open(folder / "bundle")
    small, layers = cut_out(bundle, tmp_path / "small")
    planned = {plan.layer for plan in bundle.manifest.quantization if plan.activations != "none"}
    assert {name for names in layers.values() for name in names} == planned
    report = validate(small, repeats=0, prompts=0, progress=False)
    for check in report.checks:
        if check.kind == "same_function":
            # The integer kernels beside every operator computed by itself.
            assert check.equal or check.value > 45


def test_each_golden_prompt_is_held_on_every_seed(folder):
    from mobile_runtime.validate import validate

    bundle = Bundle.open(folder / "bundle")
    told = [(golden.prompt, golden.seed) for golden in bundle.manifest.golden.prompts]
    assert told == [("a red tent", seed) for seed in range(3)]
    report = validate(bundle, repeats=0, progress=False)
    assert report.verdict == "pass"
    for kind in ("picture", "trajectory", "noise", "sampler"):
        assert {check.prompt for check in report.checks if check.kind == kind} == {0, 1, 2}


def test_a_process_of_its_own_gives_the_same_bits(folder, capsys):
    code, text = told(capsys, folder / "bundle", "--device", "local")
    assert code == 0
    plans = Bundle.open(folder / "bundle").manifest.quantization
    count = sum(plan.activations != "none" for plan in plans)  # an embedding has none
    assert f"{count} of {count} quantized layers are equal in every bit" in text


def test_layers_alone_tell_on_a_terminal_what_runs(folder, monkeypatch):
    terminal = a_terminal(monkeypatch)
    assert run_cli(main, ["layers", str(folder / "bundle"), "--device", "local"]) == 0
    for text in ("cut the quantized layers out", "layers here", "layers on local"):
        assert text in terminal.getvalue()


def test_a_devices_report_tells_its_layers_alone(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("POCKET_DIFFUSION_CACHE", str(tmp_path / "cache"))
    argv = ["validate", str(folder / "bundle"), "--layers", "--prompts", "1", "--repeats", "0"]
    assert run_cli(main, argv) == 2
    assert "--layers goes with --device" in capsys.readouterr().err
    argv += ["--device", "local", "--output", str(tmp_path)]
    assert run_cli(main, argv) == 0
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    told = [check for check in checks if check["kind"] == "layers"]
    assert [check["component"] for check in told] == ["text_encoder", "unet", "vae_decoder"]
    assert {(check["status"], check["equal"]) for check in told} == {("pass", True)}


def test_a_machine_that_rounds_otherwise_is_told_by_layer(folder, capsys, monkeypatch):
    run_on = layers_alone.run_on

    def other(*args: Any) -> Any:
        runtime, runs = run_on(*args)
        unet = runs["unet"]
        changed = dict(unet.outputs[0])
        first = next(iter(changed))
        changed[first] = changed[first].copy()
        changed[first].flat[0] += np.abs(changed[first]).max()
        return runtime, runs | {"unet": dataclasses.replace(unet, outputs=(changed,))}

    monkeypatch.setattr(layers_alone, "run_on", other)
    code, text = told(capsys, folder / "bundle", "--device", "local", "--json")
    differing = [row for row in json.loads(text) if not row["equal"]]
    assert [row["component"] for row in differing] == ["unet"]
    assert differing[0]["layer"] == "unet.time_embedding.linear_1"
    assert code == int(differing[0]["snr_db"] < 45)


def test_values_inside_quantized_models_are_looked_at(folder, capsys):
    code, text = told(capsys, folder / "bundle", "--component", "unet", "--worst", "3")
    assert code == 0
    assert "first that diverges: none" in text
    assert len(text.splitlines()) == 7


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--component", "unett"], "choose one of: text_encoder, unet"),
        (["--backend", "mil"], "cannot be looked at in mil"),
        (["--device", "local", "--component", "unet"], "leave out the rest"),
        (["--device", "toaster"], "toaster"),
        (["--device", "folder:x"], "cannot be asked for layers alone"),
    ],
)
def test_what_cannot_be_told_is_said_in_one_sentence(folder, capsys, argv, sentence):
    code, text = told(capsys, folder / "bundle", *argv)
    assert code == 2
    assert text.count("error:") == 1
    assert sentence.lower() in text.lower()


def test_a_bundle_in_float_has_no_such_layers(tmp_path, capsys):
    from tests.bundles import make_bundle

    make_bundle(tmp_path / "bundle")
    code, text = told(capsys, tmp_path / "bundle", "--device", "local")
    assert code == 2
    assert "no layer with quantized activations" in text
    code, text = told(capsys, tmp_path / "bundle")
    assert code == 2
    assert "convert it again" in text
