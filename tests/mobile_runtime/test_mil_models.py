"""Whole components of a Stable Diffusion pipeline, converted by coremltools, against PyTorch."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobile_runtime.backends.mil import ARITHMETICS, Program
from tests.mobile_runtime.mil_programs import coremltools, quiet, snr_db


class Component(torch.nn.Module):
    """A tensor-in, tensor-out face of a part of the pipeline; it owns only that part."""

    def __init__(self, part: torch.nn.Module, call: Any) -> None:
        super().__init__()
        self.part = part
        self.call = call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.call(self.part, *inputs)


def components(pipeline: Any) -> dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    randn = functools.partial(torch.randn, generator=generator)
    return {
        "unet": (
            Component(pipeline.unet, lambda unet, *inputs: unet(*inputs).sample),
            {
                "sample": randn(2, 4, 8, 8),
                "timestep": torch.tensor([749.0]),
                "encoder_hidden_states": randn(2, 16, 32),
            },
        ),
        "text_encoder": (
            Component(pipeline.text_encoder, lambda text, ids: text(ids).last_hidden_state),
            {"input_ids": torch.randint(0, 600, (1, 16), generator=generator, dtype=torch.int32)},
        ),
        "vae_decoder": (
            Component(pipeline.vae, lambda vae, z: vae.decoder(vae.post_quant_conv(z))),
            {"latent_sample": randn(1, 4, 8, 8)},
        ),
    }


@pytest.fixture(scope="module", params=["text_encoder", "unet", "vae_decoder"])
def exported(request: pytest.FixtureRequest, tiny_pipeline: Any) -> Any:
    """An exported component, its inputs, and what PyTorch computes of them."""
    module, inputs = components(tiny_pipeline)[request.param]
    with torch.no_grad(), quiet():
        program = torch.export.export(module.eval(), tuple(inputs.values())).run_decompositions({})
        reference = module(*inputs.values()).numpy()
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # unknown to coremltools
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program, inputs, reference


@pytest.mark.parametrize(("precision", "least_db"), [("FLOAT32", 100), ("FLOAT16", 45)])
def test_a_converted_component_computes_what_pytorch_computes(
    precision: str, least_db: float, exported: Any, tmp_path: Path
) -> None:
    program, inputs, reference = exported
    ct = coremltools()
    with quiet():
        model = ct.convert(
            program,
            inputs=[
                ct.TensorType(name, tuple(value.shape), value.numpy().dtype)
                for name, value in inputs.items()
            ],
            outputs=[ct.TensorType("out", dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=getattr(ct.precision, precision),
            skip_model_load=True,
        )
        model.save(str(tmp_path / "component.mlpackage"))
    opened = Program.open(tmp_path / "component.mlpackage")
    feeds = {key: value.numpy() for key, value in inputs.items()}
    for arithmetic in ARITHMETICS:
        out = opened.run(feeds, arithmetic=arithmetic)["out"]
        assert out.dtype == np.float32
        assert out.shape == reference.shape
        assert snr_db(reference, out) >= least_db
