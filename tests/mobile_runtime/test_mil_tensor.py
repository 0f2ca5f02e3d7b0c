"""The interpreter's operations that move, make, find and reduce elements, against PyTorch."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.mobile_runtime.mil_programs import (
    Case,
    check_expected,
    compare,
    integers,
    normal,
    official_values,
    run_cases,
)

X = normal(2, 3, 4, 5)
V = normal(7)
MATRIX = normal(4, 6)
INTS = integers(-9, 9, 2, 3, 4)


def one(name: str, x: np.ndarray, expected: Any, official: bool = True, **arguments: Any) -> Case:
    return Case(lambda mb, x: getattr(mb, name)(x=x, **arguments), (x,), expected, official)


def random_slices(count: int) -> dict[str, Case]:
    """slice_by_index over random bounds, steps of both signs and masks; the truth is numpy's."""
    rng = np.random.default_rng(3)
    cases = {}
    while len(cases) < count:
        shape = rng.integers(1, 6, rng.integers(1, 5))
        x = normal(*shape, seed=len(cases))
        stride = rng.choice([1, 1, 2, 3, -1, -2], len(shape))
        begin = np.array([rng.integers(-n, n) for n in shape])
        end = np.array([rng.integers(-n, n + 1) for n in shape])
        begin_mask, end_mask, squeeze = rng.random((3, len(shape))) < [[0.3], [0.3], [0.2]]
        begin_mask &= ~squeeze
        stride = np.where(squeeze, 1, stride)
        index = tuple(
            int(begin[a])
            if squeeze[a]
            else slice(
                None if begin_mask[a] else begin[a], None if end_mask[a] else end[a], stride[a]
            )
            for a in range(len(shape))
        )
        want = x[index]
        if want.size == 0 or want.ndim == 0:
            continue
        arguments = {
            "begin": begin.astype(np.int32),
            "end": end.astype(np.int32),
            "stride": stride.astype(np.int32),
            "begin_mask": begin_mask,
            "end_mask": end_mask,
            "squeeze_mask": squeeze,
        }
        cases[f"slice_{len(cases)}"] = one(
            "slice_by_index", x, lambda x, want=want: want, official=False, **arguments
        )
    return cases


def scattered(data: np.ndarray, places: Any, updates: np.ndarray, update: Any) -> Any:
    result = data.copy()
    update(result, places, updates)
    return lambda *_: result


IDS = integers(0, 4, 3, 2)
ALONG = integers(0, 3, 2, 5, 4, 5)
UPDATES = normal(2, 3, 2, 5, seed=5)
REDUCTIONS = {
    "reduce_mean": torch.mean,
    "reduce_sum": torch.sum,
    "reduce_max": torch.amax,
    "reduce_min": torch.amin,
    "reduce_log_sum_exp": torch.logsumexp,
    "reduce_l1_norm": lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim),
    "reduce_l2_norm": lambda x, axes, keepdim: torch.linalg.vector_norm(x, 2, axes, keepdim),
    "reduce_sum_square": lambda x, axes, keepdim: (x * x).sum(axes, keepdim=keepdim),
}
CASES = {
    **random_slices(40),
    "reshape": one("reshape", X, lambda x: x.reshape(6, 20), shape=[6, 20]),
    "reshape_infers": one("reshape", X, lambda x: x.reshape(4, 30), shape=[4, -1]),
    "reshape_keeps": one("reshape", X, lambda x: x.reshape(2, 3, 20, 1), shape=[0, 0, -1, 1]),
    "reshape_keeps_from_the_end": one(
        "reshape", MATRIX, lambda x: x.reshape(1, 1, 4, 6), False, shape=[1, 0, -1, 0]
    ),
    "reshape_computed": Case(
        lambda mb, x: mb.reshape(x=x, shape=mb.concat(values=[mb.shape(x=x), [1]], axis=0)),
        (X,),
        lambda x: x.unsqueeze(-1),
        False,
    ),
    "reshape_like": Case(
        lambda mb, x, y: mb.reshape_like(
            x=x, ref_tensors=[y, x], begins=[0, 2], ends=[2, 0], end_masks=[False, True]
        ),
        (X, normal(2, 3)),
        lambda x, y: x.reshape(2, 3, 4, 5),
        False,
    ),
    "transpose": one("transpose", X, lambda x: x.permute(0, 3, 1, 2), perm=[0, -1, 1, 2]),
    "expand_dims": one("expand_dims", MATRIX, lambda x: x[None, :, :, None], axes=[0, -1]),
    "squeeze": one("squeeze", normal(1, 3, 1), lambda x: x.squeeze(0), axes=[0]),
    "squeeze_all": one("squeeze", normal(1, 3, 1), torch.squeeze),
    "flatten2d": one("flatten2d", X, lambda x: x.reshape(6, 20), axis=2),
    "flatten2d_negative": one("flatten2d", X, lambda x: x.reshape(24, 5), axis=-1),
    "flatten2d_zero": one("flatten2d", X, lambda x: x.reshape(1, 120), False, axis=0),
    "split_even": one("split", MATRIX, lambda x: x.split(2, 1), num_splits=3, axis=1),
    "split_sizes": one("split", MATRIX, lambda x: x.split([1, 5], 1), split_sizes=[1, 5], axis=-1),
    "concat": Case(
        lambda mb, x, y: mb.concat(values=[x, y, x], axis=1),
        (MATRIX, normal(4, 2)),
        lambda x, y: torch.cat([x, y, x], 1),
    ),
    "concat_interleaved": Case(
        lambda mb, x, y: mb.concat(values=[x, y], axis=0, interleave=True),
        (MATRIX, normal(4, 6, seed=2)),
        lambda x, y: torch.stack([x, y], 1).reshape(8, 6),
        False,
    ),
    "concat_one": Case(lambda mb, x: mb.concat(values=[x], axis=0), (V,), lambda x: x),
    "stack": Case(
        lambda mb, x, y: mb.stack(values=[x, y], axis=1),
        (MATRIX, normal(4, 6, seed=2)),
        lambda x, y: torch.stack([x, y], 1),
    ),
    "slice_by_size": one(
        "slice_by_size", X, lambda x: x[1:2, 1:3, :, 2:4], False, begin=[1, 1, 0, -3],
        size=[1, 2, -1, 2],
    ),
    "tile": one("tile", MATRIX, lambda x: x.repeat(2, 3), reps=[2, 3]),
    "fill": Case(
        lambda mb, x: mb.fill(shape=mb.shape(x=x), value=1.5),
        (MATRIX,),
        lambda x: torch.full((4, 6), 1.5),
        False,
    ),
    "fill_like": Case(
        lambda mb, x: mb.fill_like(ref_tensor=x, value=np.int32(3)),
        (MATRIX,),
        lambda x: torch.full((4, 6), 3, dtype=torch.int32),
    ),
    "shape": one("shape", X, lambda x: torch.tensor(x.shape, dtype=torch.int32)),
    "identity": one("identity", X, lambda x: x),
    "range_1d": Case(
        lambda mb, x: mb.range_1d(start=mb.squeeze(x=x), end=np.float32(3.1), step=np.float32(0.5)),
        (np.ones(1, np.float32),),
        lambda x: torch.arange(1, 3.1, 0.5),
        False,
    ),
    "band_lower": one("band_part", MATRIX, torch.tril, lower=-1, upper=0),
    "band_upper": one("band_part", MATRIX, torch.triu, lower=0, upper=-1),
    "band_both": one("band_part", MATRIX, lambda x: x.tril(2).triu(-1), lower=1, upper=2),
    "pad_constant": one(
        "pad", MATRIX, lambda x: torch.nn.functional.pad(x, (0, 2, 1, 0), value=7.0),
        pad=[1, 0, 0, 2], mode="constant", constant_val=7.0,
    ),
    "pad_last_axis": one(
        "pad", X, lambda x: torch.nn.functional.pad(x, (1, 2)), pad=[1, 2]
    ),
    "pad_reflect": one(
        "pad", X, lambda x: torch.nn.functional.pad(x, (1, 2, 3, 0), mode="reflect"),
        pad=[3, 0, 1, 2], mode="reflect",
    ),
    "pad_replicate": one(
        "pad", X, lambda x: torch.nn.functional.pad(x, (1, 2, 3, 0), mode="replicate"),
        pad=[3, 0, 1, 2], mode="replicate",
    ),
    "reverse": one("reverse", X, lambda x: x.flip(1, 3), axes=[1, -1]),
    "reverse_all": one("reverse", MATRIX, lambda x: x.flip(0, 1), False),
    "pixel_shuffle": one(
        "pixel_shuffle", normal(2, 8, 3, 2), lambda x: torch.pixel_shuffle(x, 2), False,
        upscale_factor=2,
    ),
    "pixel_unshuffle": one(
        "pixel_unshuffle", normal(2, 3, 4, 6), lambda x: torch.pixel_unshuffle(x, 2), False,
        downscale_factor=np.uint32(2),
    ),
    "space_to_depth": one(
        "space_to_depth", normal(1, 2, 4, 6),
        # TensorFlow's: the place in the block is the slower part of the new channel.
        lambda x: torch.pixel_unshuffle(x, 2).reshape(1, 2, 4, 2, 3).transpose(1, 2)
        .reshape(1, 8, 2, 3), False, block_size=2,
    ),
    "depth_to_space": one(
        "depth_to_space", normal(1, 8, 2, 3),
        lambda x: torch.pixel_shuffle(
            x.reshape(1, 4, 2, 2, 3).transpose(1, 2).reshape(1, 8, 2, 3), 2
        ), False, block_size=2,
    ),
    "gather": Case(
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=2, validate_indices=False),
        (X, IDS),
        lambda x, i: x[:, :, i.long()],
    ),
    "gather_scalar": Case(
        lambda mb, x, i: mb.gather(x=x, indices=mb.squeeze(x=i), axis=-1),
        (X, np.array([3], np.int32)),
        lambda x, i: x[..., 3],
    ),
    "gather_batched": Case(
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        (X, integers(0, 4, 2, 3)),
        lambda x, i: torch.stack([x[b][:, i[b].long()] for b in range(2)]),
    ),
    "gather_along_axis": Case(
        lambda mb, x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
        (X, ALONG),
        lambda x, i: torch.take_along_dim(x, i.long(), 1),
    ),
    "gather_nd": Case(
        lambda mb, x, i: mb.gather_nd(x=x, indices=i),
        (X, np.array([[1, 2], [0, 1], [1, 0]], np.int32)),
        lambda x, i: x[i[:, 0].long(), i[:, 1].long()],
        False,
    ),
    "gather_nd_batched": Case(
        lambda mb, x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
        (X, np.array([[[2], [1]], [[0], [1]]], np.int32)),
        lambda x, i: torch.stack([x[0][[2, 1]], x[1][[0, 1]]]),
        False,
    ),
    **{
        f"scatter_{mode}": Case(
            lambda mb, x, u, mode=mode: mb.scatter(
                data=x, indices=[2, 0], updates=u, axis=2, mode=mode, validate_indices=False
            ),
            (X, UPDATES),
            scattered(X, (slice(None), slice(None), np.array([2, 0])), UPDATES, update),
            False,
        )
        for mode, update in {
            "update": np.ndarray.__setitem__, "add": np.add.at, "sub": np.subtract.at,
            "mul": np.multiply.at, "div": np.divide.at, "max": np.maximum.at,
            "min": np.minimum.at,
        }.items()
    },
    "scatter_adds_twice": Case(
        lambda mb, x, u: mb.scatter(data=x, indices=[1, 1], updates=u, axis=0, mode="add"),
        (MATRIX, normal(2, 6)),
        lambda x, u: x.index_add(0, torch.tensor([1, 1]), u),
        False,
    ),
    "scatter_along_axis": Case(
        lambda mb, x, i, u: mb.scatter_along_axis(data=x, indices=i, updates=u, axis=1, mode="add"),
        (MATRIX, integers(0, 6, 4, 3), normal(4, 3)),
        lambda x, i, u: x.scatter_add(1, i.long(), u),
        False,
    ),
    "scatter_nd": Case(
        lambda mb, x, u: mb.scatter_nd(
            data=x, indices=[[1, 2], [0, 5]], updates=u, mode="update"
        ),
        (MATRIX, normal(2)),
        lambda x, u: x.index_put((torch.tensor([1, 0]), torch.tensor([2, 5])), u),
        False,
    ),
    "topk": one("topk", X, lambda x: list(x.topk(2, 2)), k=2, axis=2),
    "topk_smallest": one(
        "topk", X, lambda x: list(x.topk(2, 2, largest=False)), False, k=2, axis=2, ascending=True
    ),
    "topk_values": one("topk", V, lambda x: x.topk(3)[0], k=3, return_indices=False),
    "argsort": one("argsort", V, lambda x: x.argsort(descending=True), False),
    "argsort_ascending": one("argsort", V, torch.argsort, ascending=True),
    "one_hot": Case(
        lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=4, on_value=2.0, off_value=-1.0),
        (IDS,),
        lambda i: torch.nn.functional.one_hot(i.long(), 4).float() * 3 - 1,
        False,
    ),
    "one_hot_axis": Case(
        lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=0),
        (IDS,),
        lambda i: torch.nn.functional.one_hot(i.long(), 4).permute(2, 0, 1),
        False,
    ),
    "cumsum": one("cumsum", X, lambda x: x.cumsum(2), axis=2),
    "cumsum_exclusive": one(
        "cumsum", MATRIX, lambda x: x.cumsum(1) - x, False, axis=1, exclusive=True
    ),
    "cumsum_reverse": one(
        "cumsum", MATRIX, lambda x: x.flip(0).cumsum(0).flip(0), axis=0, reverse=True
    ),
    "argmax": one("reduce_argmax", X, lambda x: x.argmax(1), axis=1),
    "argmin": one("reduce_argmin", X, lambda x: x.argmin(-1, keepdim=True), keep_dims=True),
    "reduce_prod": one(
        "reduce_prod", X, lambda x: x.prod(1).prod(2), axes=[1, -1], keep_dims=False
    ),
    "reduce_log_sum": one(
        "reduce_log_sum", np.abs(X), lambda x: x.sum((0, 1)).log(), axes=[0, 1]
    ),
    "reduce_sum_int": one("reduce_sum", INTS, lambda x: x.sum(1), axes=[1]),
    "reduce_mean_int": one("reduce_mean", INTS, lambda x: x.double().mean(1).trunc(), axes=[1]),
    "reduce_everything": one("reduce_sum", X, lambda x: x.sum((0, 1, 2, 3), keepdim=True),
                             keep_dims=True),
    **{
        f"{name}{axes}{keep}": one(
            name, X, lambda x, f=function, a=axes, k=keep: f(x, a, keepdim=k),
            axes=axes, keep_dims=keep,
        )
        for name, function in REDUCTIONS.items()
        for axes in ([1], [2, -1])
        for keep in (False, True)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    return run_cases(CASES, tmp_path_factory.mktemp("mil") / "ops.mlpackage")


@pytest.mark.parametrize("name", CASES)
def test_an_operation_computes_what_torch_computes(
    name: str, results: dict[str, list[np.ndarray]]
) -> None:
    check_expected(CASES[name], results[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.official])
def test_an_operation_agrees_with_its_numpy_definition(
    name: str, results: dict[str, list[np.ndarray]]
) -> None:
    official = official_values(CASES[name])
    assert official is not None
    compare(CASES[name], results[name], official)
