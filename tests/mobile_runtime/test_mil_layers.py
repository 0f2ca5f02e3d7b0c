"""The interpreter's products, windows, norms and resizing, against PyTorch's layers."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.mobile_runtime.mil_programs import Case, check_expected, normal, run_cases

IMAGE = normal(2, 4, 7, 9)
TOKENS = normal(2, 5, 8)


def conv_case(
    spatial: int, groups: int, stride: int, dilation: int, pad: tuple[int, ...], bias: bool
) -> Case:
    """A convolution with custom padding; the truth pads first, then convolves."""
    x = normal(2, 4, *(9, 8, 7)[:spatial])
    weight = normal(6, 4 // groups, *(3, 2, 3)[:spatial], seed=1)
    offset = normal(6, seed=2) if bias else None

    def build(mb: Any, x: Any) -> Any:
        given = {} if offset is None else {"bias": offset}
        return mb.conv(
            x=x, weight=weight, strides=[stride] * spatial, dilations=[dilation] * spatial,
            groups=groups, pad_type="custom", pad=list(pad), **given,
        )  # fmt: skip

    def expected(x: torch.Tensor) -> torch.Tensor:
        flat = [pad[2 * axis + side] for axis in reversed(range(spatial)) for side in (0, 1)]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        b = None if offset is None else torch.from_numpy(offset)
        padded = F.pad(x, flat)
        return convolve(padded, torch.from_numpy(weight), b, stride, 0, dilation, groups)

    return Case(build, (x,), expected, rtol=1e-4, atol=1e-5)


def same_case(pad_type: str, size: int, kernel: int, stride: int, dilation: int) -> Case:
    """Padding by TensorFlow's rule: ceil(size / stride) outputs; the odd element goes behind."""
    x, weight = normal(1, 2, size), normal(3, 2, kernel, seed=1)
    window = (kernel - 1) * dilation + 1
    total = max(0, (-(-size // stride) - 1) * stride + window - size)
    less, more = total // 2, total - total // 2
    pads = (less, more) if pad_type == "same" else (more, less)
    return Case(
        lambda mb, x: mb.conv(
            x=x, weight=weight, strides=[stride], dilations=[dilation], pad_type=pad_type
        ),
        (x,),
        lambda x: F.conv1d(F.pad(x, pads), torch.from_numpy(weight), None, stride, 0, dilation),
        rtol=1e-4,
        atol=1e-5,
    )


def transposed_case(
    groups: int, stride: int, dilation: int, pad: int, output_padding: int, bias: bool
) -> Case:
    x, weight = normal(2, 4, 5, 6), normal(4, 6 // groups, 3, 2, seed=1)
    offset = normal(6, seed=2) if bias else None
    truth = F.conv_transpose2d(
        torch.from_numpy(x), torch.from_numpy(weight),
        None if offset is None else torch.from_numpy(offset),
        stride, pad, output_padding, groups, dilation,
    )  # fmt: skip

    def build(mb: Any, x: Any) -> Any:
        given: dict[str, Any] = {} if offset is None else {"bias": offset}
        if output_padding:
            given["output_shape"] = list(truth.shape)
        return mb.conv_transpose(
            x=x, weight=weight, strides=[stride] * 2, dilations=[dilation] * 2, groups=groups,
            pad_type="custom", pad=[pad] * 4, **given,
        )  # fmt: skip

    return Case(build, (x,), lambda x: truth, rtol=1e-4, atol=1e-5)


def pool_case(kind: str, kernel: int, stride: int, pad: int, ceil: bool, exclude: bool) -> Case:
    def build(mb: Any, x: Any) -> Any:
        given = {"exclude_padding_from_average": exclude} if kind == "avg" else {}
        return getattr(mb, f"{kind}_pool")(
            x=x, kernel_sizes=[kernel] * 2, strides=[stride] * 2, pad_type="custom",
            pad=[pad] * 4, ceil_mode=ceil, **given,
        )  # fmt: skip

    def expected(x: torch.Tensor) -> torch.Tensor:
        if kind == "max":
            return F.max_pool2d(x, kernel, stride, pad, ceil_mode=ceil)
        return F.avg_pool2d(x, kernel, stride, pad, ceil, count_include_pad=not exclude)

    return Case(build, (IMAGE,), expected)


def matmul_case(x: np.ndarray, y: np.ndarray, transpose_x: bool, transpose_y: bool) -> Case:
    a = x.swapaxes(-1, -2).copy() if transpose_x else x
    b = y.swapaxes(-1, -2).copy() if transpose_y else y
    return Case(
        lambda mb, a, b: mb.matmul(x=a, y=b, transpose_x=transpose_x, transpose_y=transpose_y),
        (a, b),
        lambda *_: torch.matmul(torch.from_numpy(x), torch.from_numpy(y)),
        atol=1e-5,
    )


def resize_case(name: str, expected: Any, **arguments: Any) -> Case:
    return Case(
        lambda mb, x: getattr(mb, name)(x=x, **arguments), (IMAGE,), expected, atol=1e-5
    )  # fmt: skip


def bilinear(size: tuple[int, int], align: bool) -> Any:
    return lambda x: F.interpolate(x, size, mode="bilinear", align_corners=align)


def norm(name: str, x: np.ndarray, expected: Any, **arguments: Any) -> Case:
    return Case(lambda mb, x: getattr(mb, name)(x=x, **arguments), (x,), expected, atol=1e-5)


GAMMA, BETA = normal(8, seed=7), normal(8, seed=8)
CHANNEL_GAMMA, CHANNEL_BETA = normal(4, seed=7), normal(4, seed=8)
MEAN, VARIANCE = normal(4, seed=9), np.abs(normal(4, seed=10)) + 0.2
PLANE = normal(4, 7, seed=11)
t = torch.from_numpy


def attention_case(mask: np.ndarray | None, rank: int = 4) -> Case:
    shapes = [(2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4)]
    q, k, v = (normal(*shape[4 - rank :], seed=i) for i, shape in enumerate(shapes))

    def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor) -> Any:
        scores = q @ k.transpose(-1, -2) / 8**0.5
        if masks:
            m = masks[0]
            scores = scores.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else scores + m
        return scores.softmax(-1) @ v

    if mask is None:
        return Case(
            lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
            (q, k, v),
            explicit,
        )
    return Case(
        lambda mb, q, k, v, m: mb.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=m
        ),
        (q, k, v, mask),
        explicit,
    )


CASES = {
    **{
        f"conv{spatial}d_g{groups}_s{stride}_d{dilation}_{pad}": conv_case(
            spatial, groups, stride, dilation, (1, 1, 2, 0, 0, 1)[: 2 * spatial] if pad else
            (1,) * (2 * spatial), bias=groups == 1,
        )
        for spatial, groups, stride, dilation, pad in itertools.product(
            (1, 2, 3), (1, 2), (1, 2), (1, 2), (False, True)
        )
    },
    "conv_depthwise": Case(
        lambda mb, x: mb.conv(x=x, weight=normal(4, 1, 3, 3), groups=4, pad_type="valid"),
        (IMAGE,),
        lambda x: F.conv2d(x, t(normal(4, 1, 3, 3)), groups=4),
        atol=1e-5,
    ),
    **{
        f"conv_{pad_type}_{size}_{kernel}_{stride}_{dilation}": same_case(
            pad_type, size, kernel, stride, dilation
        )
        for pad_type, size, kernel, stride, dilation in itertools.product(
            ("same", "same_lower"), (7, 8), (2, 3), (1, 2, 3), (1, 2)
        )
    },
    **{
        f"transposed_g{groups}_s{stride}_d{dilation}_p{pad}_o{extra}": transposed_case(
            groups, stride, dilation, pad, extra, bias=extra == 0 or groups == 2
        )
        for groups, stride, dilation, pad, extra in itertools.product(
            (1, 2), (1, 2, 3), (1, 2), (0, 1), (0, 1)
        )
        if extra < max(stride, dilation)
    },
    "transposed_same": Case(
        lambda mb, x: mb.conv_transpose(
            x=x, weight=normal(4, 2, 4, seed=1), strides=[2], pad_type="same"
        ),
        (normal(1, 4, 5),),
        # TensorFlow's: stride times the size, the padding of the matching convolution cut off.
        lambda x: F.conv_transpose1d(x, t(normal(4, 2, 4, seed=1)), stride=2)[..., 1:11],
        atol=1e-5,
    ),
    **{
        f"{kind}_pool_{kernel}_{stride}_{pad}_{ceil}_{exclude}": pool_case(
            kind, kernel, stride, pad, ceil, exclude
        )
        for kind, kernel, stride, pad, ceil, exclude in itertools.product(
            ("max", "avg"), (2, 3), (1, 2, 3), (0, 1), (False, True), (False, True)
        )
        if not (kind == "max" and exclude) and stride <= kernel
    },
    "pool_same": Case(
        lambda mb, x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="same"),
        (IMAGE,),
        lambda x: F.max_pool2d(F.pad(x, (0, 1, 1, 1), value=-torch.inf), (3, 2), 2),
    ),
    "linear": Case(
        lambda mb, x: mb.linear(x=x, weight=normal(3, 8), bias=normal(3)),
        (TOKENS,),
        lambda x: F.linear(x, t(normal(3, 8)), t(normal(3))),
    ),
    "linear_vector": Case(
        lambda mb, x: mb.linear(x=x, weight=normal(3, 8)),
        (TOKENS[0, 0],),
        lambda x: F.linear(x, t(normal(3, 8))),
    ),
    **{
        f"matmul_{name}_{tx}_{ty}": matmul_case(normal(*xs), normal(*ys, seed=1), tx, ty)
        for name, xs, ys in (
            ("2d", (3, 4), (4, 5)),
            ("batched", (2, 3, 4, 5), (2, 3, 5, 6)),
            ("broadcast", (2, 1, 4, 5), (3, 5, 6)),
        )
        for tx in (False, True)
        for ty in (False, True)
    },
    "matmul_vector": matmul_case(normal(4), normal(4, 3, seed=1), False, True),
    "einsum": Case(
        lambda mb, x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"),
        (normal(2, 3, 4, 5), normal(2, 5, 4, 6, seed=1)),
        lambda x, y: torch.stack([x[:, :, h] @ y[:, :, h] for h in range(4)], 2),
    ),
    "softmax": norm("softmax", IMAGE, lambda x: x.softmax(1), axis=1),
    "layer_norm": norm(
        "layer_norm", TOKENS, lambda x: F.layer_norm(x, (8,), t(GAMMA), t(BETA), 1e-3),
        axes=[-1], gamma=GAMMA, beta=BETA, epsilon=1e-3,
    ),
    "layer_norm_two_axes": norm(
        "layer_norm", IMAGE, lambda x: F.layer_norm(x, (7, 9)), axes=[2, 3]
    ),
    "layer_norm_inner_axes": norm(
        "layer_norm", IMAGE,
        lambda x: F.layer_norm(x.permute(0, 3, 1, 2), (4, 7), t(PLANE)).permute(0, 2, 3, 1),
        axes=[1, 2], gamma=PLANE, beta=np.zeros_like(PLANE),
    ),
    "instance_norm": norm(
        "instance_norm", IMAGE,
        lambda x: F.instance_norm(x, weight=t(CHANNEL_GAMMA), bias=t(CHANNEL_BETA), eps=1e-3),
        gamma=CHANNEL_GAMMA, beta=CHANNEL_BETA, epsilon=1e-3,
    ),
    "batch_norm": norm(
        "batch_norm", IMAGE,
        lambda x: F.batch_norm(
            x, t(MEAN), t(VARIANCE), t(CHANNEL_GAMMA), t(CHANNEL_BETA), eps=1e-3
        ),
        mean=MEAN, variance=VARIANCE, gamma=CHANNEL_GAMMA, beta=CHANNEL_BETA, epsilon=1e-3,
    ),
    "l2_norm": norm(
        "l2_norm", IMAGE, lambda x: F.normalize(x.flatten(1)).reshape(x.shape), epsilon=1e-12
    ),
    "upsample_nearest": resize_case(
        "upsample_nearest_neighbor",
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
        scale_factor_height=np.float32(2), scale_factor_width=np.float32(3),
    ),
    "resize_nearest_up": resize_case(
        "resize_nearest_neighbor", lambda x: F.interpolate(x, (11, 18), mode="nearest"),
        target_size_height=11, target_size_width=18,
    ),
    "resize_nearest_down": resize_case(
        "resize_nearest_neighbor", lambda x: F.interpolate(x, (3, 5), mode="nearest"),
        target_size_height=3, target_size_width=5,
    ),
    **{
        f"upsample_bilinear_{align}": resize_case(
            "upsample_bilinear", bilinear((14, 27), align),
            scale_factor_height=2, scale_factor_width=3, align_corners=align,
        )
        for align in (False, True)
    },
    **{
        f"resize_bilinear_{mode}_{size}": resize_case(
            "resize_bilinear", bilinear(size, align),
            target_size_height=size[0], target_size_width=size[1], sampling_mode=mode,
        )
        for mode, align in (
            ("STRICT_ALIGN_CORNERS", True), ("ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)
        )
        for size in ((11, 18), (3, 5))
    },
    # By TensorFlow's old rule, an output reads i * n_in / n_out.
    "resize_bilinear_default": Case(
        lambda mb, x: mb.resize_bilinear(x=x, target_size_height=1, target_size_width=5),
        (np.array([[[0.0, 1.0]]], np.float32),),
        lambda x: torch.tensor([[[0.0, 0.4, 0.8, 1.0, 1.0]]]),
    ),
    "resize_bilinear_offset": Case(
        lambda mb, x: mb.resize_bilinear(
            x=x, target_size_height=1, target_size_width=5, sampling_mode="OFFSET_CORNERS"
        ),
        (np.array([[[0.0, 1.0]]], np.float32),),
        lambda x: torch.tensor([[[0.1, 0.3, 0.5, 0.7, 0.9]]]),
    ),
    "resize": resize_case(
        "resize", bilinear((11, 9), False),
        shape=[11, 0], resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS",
    ),
    "resize_to_nearest": resize_case(
        "resize", lambda x: F.interpolate(x, (7, 18), mode="nearest"),
        shape=[1, 0, 18], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR",
    ),
}  # fmt: skip
IOS18_CASES = {
    "attention": attention_case(None),
    "attention_3d": attention_case(None, rank=3),
    "attention_added_mask": attention_case(normal(2, 3, 5, 6, seed=9)),
    "attention_broadcast_mask": attention_case(normal(1, 1, 5, 6, seed=9)),
    "attention_bool_mask": attention_case(normal(2, 3, 5, 6, seed=9) > -0.8),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("mil")
    return run_cases(CASES, folder / "ops.mlpackage") | run_cases(
        IOS18_CASES, folder / "ios18.mlpackage", opset="iOS18"
    )


@pytest.mark.parametrize("name", CASES | IOS18_CASES)
def test_an_operation_computes_what_torch_computes(
    name: str, results: dict[str, list[np.ndarray]]
) -> None:
    check_expected((CASES | IOS18_CASES)[name], results[name])
