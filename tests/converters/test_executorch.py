"""The `.pte` files run in ExecuTorch and compute what torch computes, in one delegate."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from converters import components, executorch, rewrites
from converters.components import Component
from converters.lowered import Lowered
from mobile_runtime.errors import UserError
from recipes import quantize
from recipes.schema import QuantizeSettings
from tests.converters.small import build, make_small_pipeline
from tests.converters.test_rewrites import snr_db

pytest.importorskip("executorch")

FLOAT32_DB = 100.0


def lower(component: Component, folder: Path) -> Lowered:
    rewritten = replace(component, module=rewrites.apply(component.module, executorch.REWRITES))
    return executorch.lower(rewritten, components.export(rewritten), folder)


def run(path: Path, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Python interface may change
        from executorch.runtime import Runtime, Verification

        program = Runtime.get().load_program(path, verification=Verification.Minimal)
        method = program.load_method("forward")
    (out,) = method.execute([*inputs.values()])
    return out.clone()


def figures(component: Component, folder: Path) -> tuple[float, Lowered]:
    """The SNR of the final file against the torch module, and what lowering said of it."""
    inputs = component.example_inputs()
    lowered = lower(component, folder)
    return snr_db(component.module(*inputs.values()), run(lowered.path, inputs)), lowered


def quantized_pipeline(activations: str, **settings: Any) -> Any:
    pipeline, _ = quantize.quantize(
        make_small_pipeline(),
        QuantizeSettings(activations=activations, embedding_min_saving=0.0, **settings),
    )
    return pipeline


def test_a_unet_of_four_levels_is_one_delegate_and_equals_torch(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    component = components.build(tiny_pipeline, "unet", height=64, width=64, batch=2)
    snr, lowered = figures(component, tmp_path)
    assert snr > FLOAT32_DB
    assert lowered.path == tmp_path / "unet.pte"
    assert lowered.format == "pte"
    assert lowered.details["delegate_calls"] == 1
    assert lowered.details["nondelegated"] == {}
    assert lowered.details["macs_delegated_fraction"] == 1.0
    assert lowered.details["lowering_seconds"] > 0


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_the_autoencoder_is_one_delegate_and_equals_torch(name: str, tmp_path: Path) -> None:
    snr, lowered = figures(build(make_small_pipeline(), name), tmp_path)
    assert snr > FLOAT32_DB
    assert lowered.details["delegate_calls"] == 1
    assert lowered.details["nondelegated"] == {}


def test_only_the_lookup_of_tokens_stays_outside_the_delegate(tmp_path: Path) -> None:
    snr, lowered = figures(build(make_small_pipeline(), "text_encoder"), tmp_path)
    assert snr > FLOAT32_DB
    assert lowered.details["delegate_calls"] == 1
    assert lowered.details["nondelegated"] == {"embedding.default": 1}
    assert lowered.details["macs_delegated_fraction"] == 1.0


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_int8_weights_beside_float_activations_equal_torch(name: str, tmp_path: Path) -> None:
    component = build(quantized_pipeline("none"), name)
    snr, lowered = figures(component, tmp_path)
    assert snr > FLOAT32_DB
    assert lowered.details["delegate_calls"] == 1
    assert lowered.details["macs_delegated_fraction"] == 1.0
    data = lowered.path.read_bytes()
    for layer in component.module.modules():
        if isinstance(layer, quantize.QuantizedConv2d):
            rows, columns = layer.kernel_size
            taps = [layer.weight_int8[:, :, i, j] for i in range(rows) for j in range(columns)]
            assert all(tap.numpy().tobytes() in data for tap in taps)
        if isinstance(layer, quantize.QuantizedEmbedding) and layer.num_embeddings == 600:
            assert layer.weight_int8.numpy().tobytes() in data


class OneLayer(nn.Module):
    """A convolution between two others, so that its layout is the delegate's own affair."""

    def __init__(self, layer: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.outer, self.layer = outer, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.layer(self.outer(x)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (3, 5), "padding": (1, 0), "stride": (3, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("activations", ["none", "int8_dynamic"])
def test_every_kind_of_convolution_keeps_its_integers_and_its_function(
    options: dict[str, Any], activations: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, **options)
    layer = quantize.QuantizedConv2d(conv, *quantize.quantize_weight(conv.weight), activations)
    module = OneLayer(layer, nn.Conv2d(6, 6, 1)).eval().requires_grad_(False)
    x = {"x": torch.randn(2, 6, 7, 8)}
    program = torch.export.export(module, tuple(x.values()))
    component = Component("unet", module, (), ())
    lowered = executorch.lower(component, program, tmp_path)
    assert lowered.details["delegate_calls"] == 1
    assert lowered.details["nondelegated"] == {}
    # A quantized activation may flip by a step where the first convolution rounds otherwise.
    assert snr_db(module(*x.values()), run(lowered.path, x)) > 60.0


def test_each_dynamically_quantized_layer_equals_torch_on_the_same_input() -> None:
    component = build(quantized_pipeline("int8_dynamic"), "vae_decoder")
    inputs = {name: tensor.numpy() for name, tensor in component.example_inputs().items()}
    told: list[str] = []
    snr = executorch.layer_check(component, inputs, told.append)
    dynamic = {
        name
        for name, module in component.module.named_modules()
        if isinstance(module, quantize.QuantizedConv2d | quantize.QuantizedLinear)
    }
    assert set(snr) == dynamic
    assert "vae_decoder.decoder.conv_in" in snr
    assert min(snr.values()) > FLOAT32_DB
    assert len(told) == len(snr)


def test_the_layer_check_tells_a_layer_that_computes_something_else() -> None:
    component = build(quantized_pipeline("int8_dynamic"), "text_encoder")
    name = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    layer = component.module.get_submodule(name)
    honest = type(layer).forward

    class Dishonest(type(layer)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return honest(self, x) * (1.0 if torch.compiler.is_exporting() else 1.01)

    layer.__class__ = Dishonest
    inputs = {"input_ids": np.arange(16, dtype=np.int32)[None]}
    snr = executorch.layer_check(component, inputs, layers=[name])
    assert list(snr) == [name]
    assert snr[name] == pytest.approx(40.0, abs=1.0)


def test_a_constant_that_is_part_of_a_larger_storage_is_saved_alone(tmp_path: Path) -> None:
    conv = nn.Conv2d(4, 4, 1).eval().requires_grad_(False)
    conv.weight = nn.Parameter(torch.randn(64, 4, 1, 1)[8:12], requires_grad=False)
    x = {"x": torch.randn(1, 4, 5, 5)}
    program = torch.export.export(conv, tuple(x.values()))
    lowered = executorch.lower(Component("unet", conv, (), ()), program, tmp_path)
    assert snr_db(conv(x["x"]), run(lowered.path, x)) > FLOAT32_DB


def test_executorchs_own_lowering_is_put_back_afterwards() -> None:
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.backends.xnnpack.operators import node_visitor

    from converters import xnnpack

    def state() -> tuple[Any, dict[str, Any]]:
        return xnnpack_preprocess.XNNPACKPassManager, dict(node_visitor._node_visitor_dict)

    before = state()
    with xnnpack.extended():
        assert state() != before
    assert state() == before


def test_without_executorch_the_refusal_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pocket-diffusion\[executorch\]"):
        executorch.prepare(None, None)  # type: ignore[arg-type]
