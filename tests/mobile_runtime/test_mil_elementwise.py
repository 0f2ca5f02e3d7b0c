"""The interpreter's elementwise operations compute what PyTorch and coremltools compute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
Y = normal(2, 3, 4, 5, seed=1)
UNIT = np.tanh(X) * 0.9  # for the functions of (-1, 1)
POSITIVE = np.abs(X) + 0.1
WIDE = np.linspace(-9, 9, 37, dtype=np.float32)
HALVES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.49], np.float32)
I = integers(-9, 9, 3, 4)  # noqa: E741
J = integers(1, 5, 3, 4, seed=1)
BOOLS = (integers(0, 2, 3, 4).astype(bool), integers(0, 2, 3, 4, seed=1).astype(bool))
Q = integers(-128, 128, 2, 3, 4).astype(np.int8)
U = integers(0, 256, 2, 3, 4).astype(np.uint8)


def unary(name: str, x: np.ndarray, expected: Any = None, **arguments: Any) -> Case:
    function = expected or getattr(torch, name)
    return Case(lambda mb, x: getattr(mb, name)(x=x, **arguments), (x,), function)


def binary(name: str, x: np.ndarray, y: np.ndarray, expected: Any) -> Case:
    return Case(lambda mb, x, y: getattr(mb, name)(x=x, y=y), (x, y), expected)


def channels(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).reshape(-1, 1, 1)


A, B = normal(3, seed=2), np.abs(normal(3, seed=3)) + 0.5
CASES = {
    **{
        name: unary(name, X)
        for name in ("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "sign")
    },
    **{name: unary(name, X) for name in ("sin", "sinh", "square", "tan", "tanh", "sigmoid")},
    **{name: unary(name, UNIT) for name in ("acos", "asin", "atanh")},
    "sqrt": unary("sqrt", POSITIVE),
    "round_half_to_even": unary("round", HALVES),
    "relu": unary("relu", X),
    "relu6": unary("relu6", WIDE, F.relu6),
    "silu": Case(lambda mb, x: mb.silu(x=x), (WIDE,), F.silu, False),
    "softplus": unary("softplus", WIDE, F.softplus),
    "softsign": unary("softsign", WIDE, F.softsign),
    "abs_int": unary("abs", I),
    "square_int": unary("square", I),
    "logical_not": unary("logical_not", BOOLS[0]),
    "inverse": unary("inverse", POSITIVE, lambda x: 1 / (x + 1e-4)),
    "inverse_epsilon": unary("inverse", POSITIVE, lambda x: 1 / (x + 0.5), epsilon=0.5),
    "log": unary("log", POSITIVE),
    "log_epsilon": unary("log", POSITIVE, lambda x: torch.log(x + 2), epsilon=2.0),
    "rsqrt": unary("rsqrt", POSITIVE),
    "rsqrt_epsilon": unary("rsqrt", POSITIVE, lambda x: torch.rsqrt(x + 3), epsilon=3.0),
    "clip": unary("clip", WIDE, lambda x: x.clamp(-1.5, 2), alpha=-1.5, beta=2.0),
    "threshold": unary("threshold", WIDE, lambda x: x.clamp(min=1.5), alpha=1.5),
    "gelu_exact": unary("gelu", WIDE, F.gelu, mode="EXACT"),
    "gelu_tanh": unary(
        "gelu", WIDE, lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"
    ),
    "gelu_sigmoid": unary(
        "gelu", WIDE, lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"
    ),
    "gelu_default": unary("gelu", WIDE, F.gelu),
    "elu": unary("elu", WIDE, lambda x: F.elu(x, 0.7), alpha=0.7),
    "leaky_relu": unary("leaky_relu", WIDE, lambda x: F.leaky_relu(x, 0.2), alpha=0.2),
    "clamped_relu": unary(
        "clamped_relu", WIDE, lambda x: F.leaky_relu(x, 0.2).clamp(max=3), alpha=0.2, beta=3.0
    ),
    "linear_activation": unary(
        "linear_activation", X, lambda x: 0.3 * x + 0.7, alpha=0.3, beta=0.7
    ),
    "scaled_tanh": unary(
        "scaled_tanh", X, lambda x: 1.7 * torch.tanh(0.6 * x), alpha=1.7, beta=0.6
    ),
    "sigmoid_hard": unary(
        "sigmoid_hard", WIDE, lambda x: (0.2 * x + 0.5).clamp(0, 1), alpha=0.2, beta=0.5
    ),
    "thresholded_relu": unary(
        "thresholded_relu", WIDE, lambda x: torch.where(x >= 1.0, x, 0.0), alpha=1.0
    ),
    "prelu": unary("prelu", X, lambda x: F.prelu(x, torch.from_numpy(A)), alpha=A),
    "softplus_parametric": unary(
        "softplus_parametric",
        X,
        lambda x: channels(A) * torch.log1p(torch.exp(channels(B) * x)),
        alpha=A,
        beta=B,
    ),
    "add": binary("add", X, Y, torch.add),
    "add_broadcast": binary("add", X, normal(4, 1), torch.add),
    "add_scalar": binary("add", X, normal(1)[0:1], torch.add),
    "sub": binary("sub", X, Y, torch.sub),
    "mul": binary("mul", X, Y, torch.mul),
    "real_div": binary("real_div", X, POSITIVE, torch.div),
    "floor_div": binary("floor_div", X, POSITIVE, torch.floor_divide),
    "floor_div_int": binary("floor_div", I, J, lambda x, y: torch.div(x, y, rounding_mode="floor")),
    "mod": binary("mod", X, POSITIVE, torch.remainder),
    "mod_int": binary("mod", I, J, torch.remainder),
    "pow": binary("pow", POSITIVE, Y, torch.pow),
    "pow_int": binary("pow", I, J, torch.pow),
    "maximum": binary("maximum", X, Y, torch.maximum),
    "minimum": binary("minimum", X, Y, torch.minimum),
    "add_int": binary("add", I, J, torch.add),
    "sub_int": binary("sub", I, J, torch.sub),
    "mul_int": binary("mul", I, J, torch.mul),
    **{
        name: binary(name, I, J, lambda x, y, f=function: f(x, y))
        for name, function in {
            "equal": torch.eq,
            "not_equal": torch.ne,
            "less": torch.lt,
            "less_equal": torch.le,
            "greater": torch.gt,
            "greater_equal": torch.ge,
        }.items()
    },
    **{name: binary(name, *BOOLS, getattr(torch, name)) for name in ("logical_and", "logical_or")},
    "logical_xor": binary("logical_xor", *BOOLS, torch.logical_xor),
    "select": Case(
        lambda mb, c, a, b: mb.select(cond=c, a=a, b=b),
        (BOOLS[0], I, J),
        torch.where,
    ),
    "cast_truncates": Case(
        lambda mb, x: mb.cast(x=x, dtype="int32"), (WIDE,), lambda x: x.trunc().int(), False
    ),
    "cast_bool": Case(lambda mb, x: mb.cast(x=x, dtype="bool"), (I,), lambda x: x != 0),
    "cast_int8": Case(lambda mb, x: mb.cast(x=x, dtype="int8"), (I,), lambda x: x),
    "cast_uint16": Case(lambda mb, x: mb.cast(x=x, dtype="uint16"), (J,), lambda x: x),
    "cast_from_bool": Case(
        lambda mb, x: mb.cast(x=x, dtype="fp32"), (BOOLS[0],), lambda x: x.float()
    ),
    "quantize_scalar": Case(
        lambda mb, x: mb.quantize(input=x, scale=np.float32(0.02), output_dtype="int8"),
        (X,),
        lambda x: torch.round(x / 0.02).clamp(-128, 127).to(torch.int8),
    ),
    "quantize_zero_point": Case(
        lambda mb, x: mb.quantize(
            input=x, scale=np.float32(0.02), zero_point=np.uint8(120), output_dtype="uint8"
        ),
        (X,),
        lambda x: (torch.round(x / 0.02) + 120).clamp(0, 255).to(torch.uint8),
    ),
    "quantize_axis": Case(
        lambda mb, x: mb.quantize(
            input=x, scale=B, zero_point=np.array([1, -2, 3], np.int8), axis=1, output_dtype="int8"
        ),
        (X * 30,),
        lambda x: (
            torch.round(x / channels(B)) + torch.tensor([1, -2, 3]).reshape(-1, 1, 1)
        ).clamp(-128, 127).to(torch.int8),
    ),
    "quantize_ties_to_even": Case(
        lambda mb, x: mb.quantize(input=x, scale=np.float32(1), output_dtype="int8"),
        (HALVES,),
        lambda x: torch.tensor([-2, -2, 0, 0, 2, 2, 3], dtype=torch.int8),
    ),
    "dequantize": Case(
        lambda mb, x: mb.dequantize(input=x, scale=np.float32(0.1)), (Q,), lambda x: x * 0.1, False
    ),
    "dequantize_axis": Case(
        lambda mb, x: mb.dequantize(
            input=x, scale=B, zero_point=np.array([1, 200, 3], np.uint8), axis=-2
        ),
        (U,),
        lambda x: (x - torch.tensor([[1.0], [200.0], [3.0]]))
        * torch.from_numpy(B).reshape(-1, 1), False,
    ),
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


def test_division_of_integers_is_refused_before_running(tmp_path: Path) -> None:
    from mobile_runtime.errors import UserError

    case = {"div": binary("real_div", I, J, None)}
    with pytest.raises(UserError, match=r"op real_div \(output 'div_out0'\): division of integers"):
        run_cases(case, tmp_path / "div.mlpackage")
