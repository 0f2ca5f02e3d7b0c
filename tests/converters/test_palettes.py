"""Palettes: tables by k-means, weights that are exactly their entries, and packages that hold them.

The packages run in the interpreter of ML programs, from their files; what they store is decoded by
coremltools' own reader, too.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from converters import components
from converters import coreml as converter
from converters.components import Component
from converters.coreml import CoreMLOptions
from converters.palettes import Palette, digest, kmeans, looked_up, palettized
from mobile_runtime.backends.mil import Program
from mobile_runtime.manifest import TensorSpec
from recipes.quantize import quantizable_layers
from tests.converters.small import build, make_small_pipeline
from tests.mobile_runtime.mil_programs import quiet

BITS = (1, 2, 3, 4, 6, 8)


def squared_error(values: np.ndarray, counts: np.ndarray, centers: np.ndarray) -> float:
    return float((np.square(values[:, None] - centers).min(1) * counts).sum())


@pytest.mark.parametrize("kind", ["normal", "laplace", "few", "zeros"])
def test_kmeans_comes_close_to_the_exact_optimum(kind: str) -> None:
    # coremltools' own solver is exact, and takes seconds for what these centers take milliseconds.
    with quiet():
        from coremltools._deps import kmeans1d
    rng = np.random.default_rng(0)
    weight = {
        "normal": rng.standard_normal(2500) * 0.05,
        "laplace": rng.laplace(size=1500),
        "few": rng.integers(-30, 30, 2000) / 64,
        "zeros": np.where(rng.random(9000) < 0.9, 0, rng.standard_normal(9000)),
    }[kind]
    values, counts = np.unique(weight.astype(np.float16).astype(float), return_counts=True)
    for k in (2, 4, 16, 40):
        best = np.array(kmeans1d.cluster(values, k, weights=counts).centroids)
        ours = kmeans(values, counts, k)
        assert len(ours) == min(k, len(values))
        assert squared_error(values, counts, ours) <= 1.15 * squared_error(values, counts, best)


WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.sampled_from([4, 8]), st.integers(1, 5)),
    elements=st.floats(-65504, 65504, width=16),
)


@given(weight=WEIGHTS, bits=st.sampled_from(BITS), groups=st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_each_value_becomes_the_nearest_entry_of_its_table(
    weight: np.ndarray, bits: int, groups: int
) -> None:
    made, palette = palettized(weight, bits, groups)
    assert (palette.bits, palette.groups) == (bits, groups)
    assert palette.tables.dtype == np.float16
    for rows, out, table in zip(
        np.split(weight, groups), np.split(made, groups), palette.tables, strict=True
    ):
        distances = np.abs(rows[..., None] - table.astype(np.float64))
        np.testing.assert_array_equal(np.abs(out - rows.astype(np.float64)), distances.min(-1))
        assert np.isin(out, table.astype(np.float32)).all()
        if len(np.unique(rows)) <= 2**bits:
            np.testing.assert_array_equal(out, rows)


@given(weight=WEIGHTS, bits=st.sampled_from(BITS), groups=st.sampled_from([1, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_a_palettized_weight_is_its_indices_looked_up_and_its_own_palette(
    weight: np.ndarray, bits: int, groups: int
) -> None:
    made, palette = palettized(weight, bits, groups)
    indices = palette.indices(made)
    assert indices.max() < 2**bits
    np.testing.assert_array_equal(looked_up(indices, palette.tables), made)
    again, same = palettized(made, bits, groups)
    np.testing.assert_array_equal(again, made)
    assert same.digest == palette.digest == digest(made.astype(np.float16)) == digest(made)


def test_another_weight_is_not_taken_for_one_of_the_palette() -> None:
    made, palette = palettized(np.float32([[1, 2], [3, 4]]), 2)
    with pytest.raises(ValueError, match="not in its palette"):
        palette.indices(made + np.float32(0.5))
    assert digest(made) != digest(made.reshape(1, 4)) != digest(-made.reshape(1, 4))
    assert digest(np.float32([0.0])) == digest(np.float32([-0.0]))


class Weighted(torch.nn.Module):
    """x @ W.T, with W of any shape; sizes that fill no whole bytes."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(columns, rows, bias=False)
        generator = torch.Generator().manual_seed(seed)
        self.linear.weight.data = torch.randn(rows, columns, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def linear_component(rows: int, columns: int) -> Component:
    def spec(name: str, width: int) -> TensorSpec:
        shape = (columns, width)
        return TensorSpec(name=name, shape=shape, dtype="float32", layout="NC", description="")

    module = Weighted(rows, columns, seed=rows).eval().requires_grad_(False)
    return Component("unet", module, (spec("x", columns),), (spec("y", rows),))


def palettize(layer: Any, bits: int, groups: int = 1) -> Palette:
    weight, palette = palettized(layer.weight.numpy(), bits, groups)
    layer.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    return palette


def lower(component: Component, folder: Path, palettes: dict[str, Palette], **options: Any) -> Any:
    program = components.export(component)
    chosen = CoreMLOptions(**options, palettes=palettes)
    return converter.lower(component, program, folder, chosen)


def stored_weights(path: Path) -> list[tuple[str, np.ndarray]]:
    """The type of the indices and the decoded weight of each palette, by coremltools' reader."""
    with quiet():
        import coremltools
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.converters.mil.mil import types

        model = coremltools.models.MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        program = load(spec, spec.specificationVersion, model.weights_dir)
    (function,) = program.functions.values()
    return [
        (types.builtin_to_string(op.indices.dtype), op.materialized_val_inference())
        for op in function.operations
        if op.op_type == "constexpr_lut_to_dense"
    ]


@pytest.mark.parametrize(
    ("target", "bits", "groups"),
    [("iOS16", bits, 1) for bits in (1, 2, 4, 6, 8)] + [("iOS18", bits, 7) for bits in BITS],
)
def test_a_package_holds_and_computes_exactly_the_palettized_weight(
    tmp_path: Path, target: str, bits: int, groups: int
) -> None:
    component = linear_component(rows=21, columns=13)
    layer = component.module.linear
    palettes = {"unet.linear": palettize(layer, bits, groups)}
    lowered = lower(component, tmp_path, palettes, deployment_target=target)
    assert lowered.details["palettized_weights"] == 1
    ((indices, stored),) = stored_weights(lowered.path)
    assert indices == ("uint8" if target == "iOS16" else f"uint{bits}")
    np.testing.assert_array_equal(stored, layer.weight.numpy().astype(np.float16))
    # x is the identity, so y is the weight, each entry a float16.
    eye = np.eye(13, dtype=np.float32)
    found = Program.open(lowered.path).run({"x": eye}, arithmetic="float16")["y"]
    np.testing.assert_array_equal(found, layer.weight.numpy().T)


def test_float32_packages_hold_the_same_entries(tmp_path: Path) -> None:
    component = linear_component(rows=21, columns=13)
    palettes = {"unet.linear": palettize(component.module.linear, 4)}
    lowered = lower(component, tmp_path, palettes, compute_precision="float32")
    x = component.example_inputs(seed=1)["x"]
    found = Program.open(lowered.path).run({"x": x.numpy()})["y"]
    torch.testing.assert_close(torch.from_numpy(found), component.module(x), rtol=1e-6, atol=1e-6)


def test_a_package_without_the_palettes_of_the_plan_is_found_when_it_is_read_back(
    tmp_path: Path,
) -> None:
    component = linear_component(rows=21, columns=13)
    _, of_another = palettized(np.ones((21, 13), np.float32), 4)
    with pytest.raises(RuntimeError, match="does not hold the palettes of the plan"):
        lower(component, tmp_path, {"unet.linear": of_another})


@pytest.mark.parametrize(
    ("name", "target", "bits", "group"),
    [("text_encoder", "iOS16", 4, None), ("vae_decoder", "iOS18", 6, 8)],
)
def test_a_whole_component_of_palettes_computes_what_its_module_computes(
    tmp_path: Path, name: str, target: str, bits: int, group: int | None
) -> None:
    pipeline = make_small_pipeline()
    palettes = {}
    for path, layer in quantizable_layers(pipeline, [name]).items():
        channels = len(layer.weight)
        groups = channels // group if group and channels % group == 0 else 1
        palettes[path] = palettize(layer, bits, groups)
    component = build(pipeline, name)
    others = {"unet.conv_in": palettized(np.ones((4, 4), np.float32), 1)[1]}
    lowered = lower(component, tmp_path, palettes | others, deployment_target=target)
    assert lowered.details["palettized_weights"] == len(palettes)
    inputs = component.example_inputs(seed=3)
    reference = component.module(*inputs.values()).double().numpy()
    feeds = {key: tensor.numpy() for key, tensor in inputs.items()}
    (found,) = Program.open(lowered.path).run(feeds, arithmetic="float16").values()
    noise = np.square(found - reference).sum() / np.square(reference).sum()
    assert -10 * np.log10(noise) >= 45
