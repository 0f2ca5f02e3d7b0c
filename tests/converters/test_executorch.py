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
from recipes import quantize, quantized_layers
from recipes.settings import QuantizeSettings
from tests.converters.small import (
    build,
    make_small_pipeline,
    make_small_tiny_pipeline,
    make_static_pipeline,
)
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


def test_a_tiny_decoder_is_one_delegate_and_equals_torch(tmp_path: Path) -> None:
    snr, lowered = figures(build(make_small_tiny_pipeline(), "vae_decoder"), tmp_path)
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
        if isinstance(layer, quantized_layers.QuantizedConv2d):
            rows, columns = layer.kernel_size
            taps = [layer.weight_int8[:, :, i, j] for i in range(rows) for j in range(columns)]
            assert all(tap.numpy().tobytes() in data for tap in taps)
        if isinstance(layer, quantized_layers.QuantizedEmbedding) and layer.num_embeddings == 600:
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
    layer = quantized_layers.QuantizedConv2d(
        conv, *quantized_layers.quantize_weight(conv.weight), activations
    )
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
    snr = executorch.layer_check(component, inputs, progress=told.append)
    dynamic = {
        name
        for name, module in component.module.named_modules()
        if isinstance(module, quantized_layers.QuantizedConv2d | quantized_layers.QuantizedLinear)
    }
    assert set(snr) == dynamic
    assert "vae_decoder.decoder.conv_in" in snr
    assert min(snr.values()) > FLOAT32_DB
    assert told == ["layer 1 of 21"]


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_static_activations_are_one_delegate_and_the_same_integers(
    name: str, tmp_path: Path
) -> None:
    component = build(make_static_pipeline(), name)
    snr, lowered = figures(component, tmp_path)
    assert snr > 40.0
    assert lowered.details["delegate_calls"] == 1
    assert lowered.details["macs_delegated_fraction"] == 1.0
    data = lowered.path.read_bytes()
    for layer in component.module.modules():
        if isinstance(layer, quantized_layers.QuantizedConv2d | quantized_layers.QuantizedLinear):
            integers = layer.weight_int8
            # XNNPACK keeps the channels of a kernel's pixel together.
            stored = integers.permute(0, 2, 3, 1) if integers.dim() == 4 else integers
            assert stored.contiguous().numpy().tobytes() in data
    inputs = {key: tensor.numpy() for key, tensor in component.example_inputs().items()}
    assert min(executorch.layer_check(component, inputs).values()) > 60.0


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


def executorchs_own() -> tuple[Any, ...]:
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.backends.xnnpack.operators import node_visitor
    from executorch.exir.pass_base import ExportPass

    return (
        xnnpack_preprocess.XNNPACKPassManager,
        dict(node_visitor._node_visitor_dict),
        ExportPass.call,
    )


def test_executorchs_own_lowering_is_put_back_afterwards_and_after_an_error() -> None:
    from converters import xnnpack

    before = executorchs_own()
    with xnnpack.extended():
        inside = executorchs_own()
    assert all(own is not old for own, old in zip(inside, before, strict=True))
    assert inside[1] != before[1]
    assert executorchs_own() == before
    with pytest.raises(ZeroDivisionError), xnnpack.extended():
        raise ZeroDivisionError
    assert executorchs_own() == before


class Mixed(nn.Module):
    """Operators whose core form is written by us, and scalars that a pass makes tensors of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.conv(x)) * 0.5
        return self.linear(x.permute(0, 2, 3, 1).reshape(1, 30, 8)).softmax(-1) + 1.0


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.filterwarnings("ignore")  # the library's own, of torch's pytrees
def test_a_graph_in_core_aten_is_the_edge_program_that_executorch_makes(
    decomposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executorch.exir import EdgeCompileConfig
    from executorch.exir import to_edge as library_to_edge

    from converters import edge, xnnpack

    module, x = Mixed().eval().requires_grad_(False), torch.randn(1, 4, 5, 6)
    config = EdgeCompileConfig(
        _check_ir_validity=False, preserve_ops=[torch.ops.aten.linear.default]
    )
    expected = library_to_edge(torch.export.export(module, (x,)), compile_config=config)
    if decomposed:
        monkeypatch.setattr(edge, "is_core", lambda graph_module: False)
    else:
        monkeypatch.delattr(edge, "library_to_edge")
    with xnnpack.extended():
        given = edge.to_edge(torch.export.export(module, (x,)))

    def written(manager: Any) -> list[tuple[Any, ...]]:
        nodes = list(manager.exported_program().graph.nodes)
        place = {node: index for index, node in enumerate(nodes)}
        return [
            (
                node.op,
                node.target if node.op == "call_function" else None,
                [place[argument] for argument in node.all_input_nodes],
                [tuple(v.shape) for v in [node.meta.get("val")] if isinstance(v, torch.Tensor)],
            )
            for node in nodes
        ]

    assert written(given) == written(expected)
    torch.testing.assert_close(given.exported_program().module()(x), module(x))


def test_a_pass_is_skipped_only_where_it_would_change_nothing() -> None:
    from executorch.exir.pass_base import ExportPass

    from converters import edge

    class Rename(ExportPass):
        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            op = torch.ops.aten.cos.default if op is torch.ops.aten.sin.default else op
            return super().call_operator(op, args, kwargs, meta)

    class Scale(ExportPass):
        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            args = (args[0], 3.0) if op is torch.ops.aten.mul.Tensor else args
            return super().call_operator(op, args, kwargs, meta)

    class Watch(Rename):
        def placeholder(self, name: str, arg: Any, meta: Any) -> Any:
            return super().placeholder(name, arg, meta)

    class Function(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x)

    def skipped(kind: Any, function: Any) -> bool:
        graph_module = torch.export.export(Function(function), (torch.ones(2),)).graph_module
        return edge.changes_nothing(kind(), graph_module)

    assert skipped(Rename, torch.cos)
    assert not skipped(Rename, torch.sin)
    assert skipped(Scale, torch.cos)
    assert not skipped(Scale, lambda x: x * 2.0)
    # These may look at anything, or execute the graph for its values.
    assert not skipped(Watch, torch.cos)
    assert not skipped(ExportPass, torch.cos)


def test_a_finished_signature_refuses_to_change() -> None:
    from converters import xnnpack

    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    signature = xnnpack.finished(program).graph_signature
    own = program.graph_signature
    for name in vars(xnnpack.FinishedSignature):
        if name.startswith(("inputs_to", "parameters", "buffers")):
            assert getattr(signature, name) == getattr(own, name)
            assert getattr(signature, name) is getattr(signature, name)
    with pytest.raises(RuntimeError, match="cannot change"):
        signature.replace_all_uses("x", "y")
    with pytest.raises(AttributeError):
        signature.input_specs.append(None)
    own.replace_all_uses("x", "y")


def test_without_executorch_the_refusal_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pocket-diffusion\[executorch\]"):
        executorch.prepare(None, None)  # type: ignore[arg-type]
