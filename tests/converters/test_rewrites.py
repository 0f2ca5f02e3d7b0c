"""Rewrites leave the function alone: on random modules, and on whole pipelines, float and INT8."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from converters import attention, layers, rewrites
from converters.components import Component
from mobile_runtime.errors import UserError
from recipes import quantize, quantized_layers
from recipes.settings import QuantizeSettings
from tests.converters.small import NAMES, build, make_small_pipeline, make_small_tiny_pipeline

FLOAT32_DB = 100.0


def snr_db(expected: torch.Tensor, given: torch.Tensor) -> float:
    assert given.shape == expected.shape
    noise = (given.double() - expected.double()).square().sum().item()
    power = expected.double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(power / noise)


@pytest.fixture(scope="module")
def float_components() -> dict[str, Component]:
    pipeline = make_small_pipeline()
    return {name: build(pipeline, name) for name in NAMES}


@pytest.fixture(scope="module")
def int8_components() -> dict[str, Component]:
    pipeline, _ = quantize.quantize(
        make_small_pipeline(),
        QuantizeSettings(components=NAMES, embedding_min_saving=0.0),
    )
    return {name: build(pipeline, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["float_components", "int8_components"])
def test_every_rewrite_alone_and_all_together_keep_the_function(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    component: Component = request.getfixturevalue(kind)[name]
    inputs = tuple(component.example_inputs().values())
    expected = component.module(*inputs)
    for names in [*([one] for one in rewrites.REWRITES), list(rewrites.REWRITES)]:
        rewritten = rewrites.apply(component.module, names)
        assert snr_db(expected, rewritten(*inputs)) > FLOAT32_DB, names


def test_a_tiny_decoder_keeps_its_function() -> None:
    component = build(make_small_tiny_pipeline(), "vae_decoder")
    (latents,) = component.example_inputs().values()
    rewritten = rewrites.apply(component.module, list(rewrites.REWRITES))
    assert snr_db(component.module(latents), rewritten(latents)) > FLOAT32_DB
    assert not any(isinstance(module, nn.Upsample) for module in rewritten.modules())


def test_the_original_stays_as_it_was(float_components: dict[str, Component]) -> None:
    component = float_components["unet"]
    before = [(path, type(module)) for path, module in component.module.named_modules()]
    rewritten = rewrites.apply(component.module, list(rewrites.REWRITES))
    assert [(path, type(module)) for path, module in component.module.named_modules()] == before
    kinds = {type(module) for module in rewritten.modules()}
    assert not kinds & {nn.GroupNorm, nn.LayerNorm}


def test_an_unknown_rewrite_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"explicit_attention.*upsample_by_concat"):
        rewrites.apply(nn.Linear(1, 1), ["winograd"])


def int8_linear(columns: int, rows: int) -> quantized_layers.QuantizedLinear:
    linear = nn.Linear(columns, rows)
    integers, scale = quantized_layers.quantize_weight(linear.weight)
    return quantized_layers.QuantizedLinear(linear, integers, scale, "none")


def test_scaling_and_slicing_an_int8_linear_keep_its_integers() -> None:
    linear, x = int8_linear(6, 10), torch.randn(3, 6)
    scaled = layers.scaled_linear(linear, 0.3)
    assert scaled.weight_int8 is linear.weight_int8
    torch.testing.assert_close(scaled(x), 0.3 * linear(x))
    part = layers.sliced_linear(linear, slice(4, None))
    assert torch.equal(part.get_buffer("weight_int8"), linear.weight_int8[4:])
    torch.testing.assert_close(part(x), linear(x)[:, 4:])


@settings(max_examples=20, deadline=None)
@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 5),
    batch=st.integers(1, 2),
    height=st.integers(1, 9),
    affine=st.booleans(),
    offset=st.floats(-3, 3),
)
def test_the_group_norm_equals_torchs(
    groups: int, size: int, batch: int, height: int, affine: bool, offset: float
) -> None:
    norm = nn.GroupNorm(groups, groups * size, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    decomposed = rewrites.DecomposedGroupNorm(norm)
    x = torch.randn(batch, groups * size, height, 7) + offset
    torch.testing.assert_close(decomposed(x), norm(x), rtol=1e-4, atol=1e-4)
    tokens = x.flatten(2)
    torch.testing.assert_close(decomposed(tokens), norm(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_the_layer_norm_equals_torchs(affine: bool) -> None:
    norm = nn.LayerNorm(24, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 24) * 3 + 1
    torch.testing.assert_close(rewrites.DecomposedLayerNorm(norm)(x), norm(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 6)] * 4))
def test_doubling_is_nearest_neighbour_interpolation(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(rewrites.double(x), F.interpolate(x, scale_factor=2.0, mode="nearest"))


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3),
    head=st.integers(1, 8),
    tokens=st.integers(1, 6),
    context=st.integers(1, 6),
)
def test_explicit_attention_equals_torchs(heads: int, head: int, tokens: int, context: int) -> None:
    query, key, value = (
        torch.randn(2, length, heads * head) for length in (tokens, context, context)
    )
    mask = torch.zeros(1, tokens, context)
    mask[..., context // 2 + 1 :] = -10000.0
    split = [x.unflatten(-1, (heads, head)).transpose(1, 2) for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*split, attn_mask=mask)
    given = attention.attend(query * head**-0.5, key, value, heads, mask)
    torch.testing.assert_close(given, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cosine_first", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_timestep_embedding_equals_diffusers(cosine_first: bool, shift: int) -> None:
    original = Timesteps(32, cosine_first, shift)
    steps = torch.tensor([0.0, 1.0, 499.0, 999.0])
    assert torch.equal(rewrites.ConstantTimesteps(original)(steps), original(steps))


def test_an_attention_with_norms_of_its_own_is_refused_by_name() -> None:
    from diffusers.models.attention_processor import Attention

    with pytest.raises(UserError, match="norm_q"):
        rewrites.explicit_attention(
            nn.Sequential(Attention(8, heads=2, dim_head=4, qk_norm="layer_norm"))
        )


def test_an_upsampler_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="nearest-neighbour"):
        rewrites.upsample_by_concat(nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear")))


def test_a_module_named_twice_is_replaced_once() -> None:
    norm = nn.LayerNorm(4)
    module = nn.ModuleDict({"first": norm, "second": norm})
    rewritten = rewrites.decomposed_layer_norm(module)
    assert rewritten["first"] is rewritten["second"]  # type: ignore[index]
