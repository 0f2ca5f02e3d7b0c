"""Each backend runs a component's file as its reference computes it, and refuses what is wrong."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mobile_runtime import backends
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError, UserError
from tests.bundles import Arrays, make_bundle, unet, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


def cases(bundle: Bundle, component: str) -> list[tuple[Arrays, Arrays]]:
    """The golden (inputs, outputs) of a component."""
    tensors = bundle.golden(bundle.manifest.golden.components[component])  # type: ignore[index]
    found = []
    for case in range(bundle.manifest.golden.cases[component]):  # type: ignore[index]
        pair = tuple(
            {
                name.removeprefix(f"{case}/{kind}/"): value
                for name, value in tensors.items()
                if name.startswith(f"{case}/{kind}/")
            }
            for kind in ("in", "out")
        )
        found.append(pair)
    return found  # type: ignore[return-value]


def snr_db(actual: np.ndarray, reference: np.ndarray) -> float:
    noise = ((actual.astype(np.float64) - reference) ** 2).mean()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).mean() / noise))


def with_file(bundle: Bundle, component: str, path: str, kind: str) -> Bundle:
    """The bundle with another model file for one component, unhashed."""
    entries = tuple(
        entry.model_copy(update={"path": path, "format": kind})
        if entry.name == component
        else entry
        for entry in bundle.manifest.components
    )
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"components": entries}), "")


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_onnxruntime_computes_the_reference(bundle: Bundle, component: str) -> None:
    run = backends.load(bundle, component, threads=1)
    for feeds, expected in cases(bundle, component):
        outputs = run(feeds)
        assert list(outputs) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name], value, atol=1e-6)


def test_onnxruntime_reads_the_ort_format(tmp_path: Path) -> None:
    import onnxruntime

    made = make_bundle(tmp_path / "bundle")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(made.path / "unet/model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(made.path / "unet/model.onnx"), options)
    run = backends.load(with_file(made, "unet", "unet/model.ort", "ort"), "unet", threads=1)
    feeds, expected = cases(made, "unet")[0]
    np.testing.assert_allclose(run(feeds)["out_sample"], expected["out_sample"], atol=1e-6)


def quantized_context() -> tuple[np.ndarray, np.ndarray]:
    """The UNet's context weights as int8 and their scale for each output channel."""
    context = weights()["context"]
    scale = (np.abs(context).max(axis=0) / 127).astype(np.float32)
    return np.round(context / scale).astype(np.int8), scale


def quantize_context(component: str, model: onnx.ModelProto) -> onnx.ModelProto:
    if component != "unet":
        return model
    integers, scale = quantized_context()
    kept = [item for item in model.graph.initializer if item.name != "context"]
    del model.graph.initializer[:]
    zero = np.zeros(scale.shape, np.int8)
    named = {"context_int8": integers, "context_scale": scale, "context_zero": zero}
    model.graph.initializer.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in named.items())
    node = helper.make_node("DequantizeLinear", list(named), ["context"], axis=1)
    model.graph.node.insert(0, node)
    return model


def test_int8_weights_are_exact_by_default_and_rounded_activations_are_a_choice(
    tmp_path: Path,
) -> None:
    made = make_bundle(tmp_path / "bundle", change_model=quantize_context)
    integers, scale = quantized_context()
    w = weights() | {"context": integers.astype(np.float32) * scale}
    feeds, _ = cases(made, "unet")[0]
    expected = unet(w, feeds)["out_sample"]
    exact = backends.load(made, "unet", threads=1)(feeds)["out_sample"]
    as_apps_run = backends.load(made, "unet", threads=1, exact=False)(feeds)["out_sample"]
    assert snr_db(exact, expected) > 110
    # If this one rises, ONNX Runtime has changed its default and `exact` may have lost its use.
    assert snr_db(as_apps_run, expected) < 70


def test_a_damaged_model_file_is_told_by_its_name(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle")
    (made.path / "unet/model.onnx").write_bytes(b"not a model")
    with pytest.raises(BundleError, match=r"unet/model\.onnx is no ONNX model"):
        backends.load(made, "unet")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"backend": "tensorrt"}, r"unknown backend 'tensorrt'.*coreml, executorch, mil, onnxr"),
        ({"backend": "executorch"}, r"executorch does not read .*model\.onnx.*onnxruntime"),
        ({"thread": 2}, r"unknown option of the backend onnxruntime 'thread'.*threads"),
        ({"providers": ["QuantumProvider"]}, r"'QuantumProvider'.*CPUExecutionProvider"),
        ({"threads": "abc"}, "option threads of the backend onnxruntime cannot be 'abc'"),
        ({"threads": -3}, "threads of the backend onnxruntime cannot be -3: .*equal to 0"),
        ({"threads": 10**30}, "threads of the backend onnxruntime cannot be 10000"),
        ({"threads": True}, "threads of the backend onnxruntime cannot be True"),
        ({"exact": "maybe"}, "exact of the backend onnxruntime cannot be 'maybe': .*boolean"),
        ({"providers": "CPUExecutionProvider"}, "providers of the backend onnxruntime cannot be"),
        ({"backend": "torch"}, "needs the option folder"),
    ],
)
def test_a_wrong_request_lists_what_there_is(
    bundle: Bundle, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        backends.load(bundle, "unet", **options)


@pytest.mark.parametrize(
    ("backend", "options", "complaint"),
    [
        ("onnxruntime", {"bundle": 1}, "unknown option of the backend onnxruntime 'bundle'"),
        ("executorch", {"threads": 1}, "the backend executorch has no options"),
        ("mil", {"arithmetic": "int8"}, "arithmetic of the backend mil cannot be 'int8'"),
        ("coreml", {"compute_units": 1}, "compute_units of the backend coreml cannot be 1"),
        ("torch", {"folder": 1}, "folder of the backend torch cannot be 1"),
        ("tensorrt", {}, "unknown backend 'tensorrt'"),
    ],
)
def test_options_are_checked_without_a_bundle(
    backend: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        backends.check_options(backend, options)


def test_an_unknown_component_lists_the_bundles_own(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="text_encoder, unet, vae_decoder"):
        backends.load(bundle, "vae_encoder")


def test_a_missing_library_says_how_to_install_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'pocket-diffusion\[runtime\]'"):
        backends.load(bundle, "unet")


def test_wrong_inputs_are_told_all_at_once(bundle: Bundle) -> None:
    run = backends.load(bundle, "unet", threads=1)
    feeds, _ = cases(bundle, "unet")[0]
    wrong = {
        "sample": feeds["sample"][:1],
        "timestep": feeds["timestep"].astype(np.float64),
        "context": feeds["encoder_hidden_states"],
    }
    with pytest.raises(UserError) as error:
        run(wrong)
    for part in (
        "wrong inputs for unet",
        "encoder_hidden_states is missing",
        "context is unknown",
        "sample is float32 (1, 4, 8, 8), not float32 (2, 4, 8, 8)",
        "timestep is float64 (1,), not float32 (1,)",
    ):
        assert part in str(error.value)


def test_core_ml_off_the_mac_points_to_the_interpreter(bundle: Bundle) -> None:
    package = with_file(bundle, "unet", "Unet.mlpackage", "mlpackage")
    with pytest.raises(UserError, match="unknown compute_units 'TPU'"):
        backends.load(package, "unet", backend="coreml", compute_units="TPU")
    if sys.platform == "darwin":
        pytest.skip("the rest is about other systems")
    with pytest.raises(UserError, match="on a Mac only; choose the backend mil"):
        backends.load(package, "unet", backend="coreml")


def test_a_diffusers_folder_opens_in_torch_without_a_word(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    made = make_bundle(tmp_path / "bundle")
    script = f"""
from mobile_runtime import backends
from mobile_runtime.bundle import Bundle
bundle = Bundle.open({str(made.path)!r})
for name in ("text_encoder", "unet", "vae_decoder"):
    backends.load(bundle, name, backend="torch", folder={str(ROOT / "recipes/pocket/weights")!r})
"""
    # In a process of its own, because the libraries chatter once, when they are imported.
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_tiny_decoder_of_a_diffusers_folder_runs_in_torch(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import torch
    from diffusers import AutoencoderTiny

    tiny: Any = AutoencoderTiny(
        encoder_block_out_channels=(1, 1),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 0),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "vae")
    run = backends.load(bundle, "vae_decoder", backend="torch", folder=tmp_path)
    spec = bundle.component("vae_decoder").inputs[0]
    latents = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)
    with torch.no_grad():
        wanted = tiny.decode(torch.from_numpy(latents)).sample.numpy()
    np.testing.assert_allclose(run({spec.name: latents})["sample"], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "platform", "name"),
    [
        ("onnx", "linux", "onnxruntime"),
        ("executorch", "linux", "executorch"),
        ("coreml", "linux", "mil"),
        ("coreml", "darwin", "coreml"),
    ],
)
def test_each_target_has_its_own_default(
    target: str, platform: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert backends.default_backend(target) == name


def test_executorch_computes_the_reference_with_inputs_by_name(tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime")
    import torch
    from executorch.exir import to_edge_transform_and_lower

    made = make_bundle(tmp_path / "bundle")
    w = {name: torch.from_numpy(value) for name, value in weights().items()}

    class Unet(torch.nn.Module):
        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor
        ) -> torch.Tensor:
            mixed = torch.nn.functional.conv2d(sample, w["conv"])
            told = (context.mean(1) @ w["context"]).reshape(sample.shape)
            return torch.tanh(mixed + told + w["time"] * (timestep * 0.001))

    feeds, expected = cases(made, "unet")[0]
    names = ("sample", "timestep", "encoder_hidden_states")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export and executorch warn about their own code
        program = torch.export.export(
            Unet(), tuple(torch.from_numpy(feeds[name]) for name in names)
        )
        lowered = to_edge_transform_and_lower(program).to_executorch()
    (made.path / "unet/model.pte").write_bytes(lowered.buffer)
    run = backends.load(
        with_file(made, "unet", "unet/model.pte", "pte"), "unet", backend="executorch"
    )
    backwards = dict(reversed(feeds.items()))
    first = run(backwards)["out_sample"]
    np.testing.assert_allclose(first, expected["out_sample"], atol=1e-6)
    # A later call leaves an earlier one's arrays alone.
    kept = first.copy()
    run(feeds | {"sample": -feeds["sample"]})
    np.testing.assert_array_equal(first, kept)


def test_a_damaged_executorch_program_is_told_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime")
    made = make_bundle(tmp_path / "bundle")
    (made.path / "unet/model.pte").write_bytes(b"not a program" * 100)
    with pytest.raises(BundleError, match=r"executorch cannot load .*unet/model\.pte"):
        backends.load(
            with_file(made, "unet", "unet/model.pte", "pte"), "unet", backend="executorch"
        )
