"""Layers of 4-bit integers in blocks, with a small float branch beside them for what they miss.

The weight W of a `Linear` or `Conv2d` becomes Q + up * down: a product of low rank first takes out
the large directions, so that the integers Q of the rest need smaller steps (SVDQuant,
arXiv:2411.05007, without its quantized activations). What rounding left over moves into the branch
again, a few times (LoftQ, arXiv:2310.08659). The two stay apart, since their sum would be a float
weight; the layer adds what they give.

A block is some input channels of one output channel, of one tap of a convolution's kernel. Its
integers are -8..7 and its step is the one with the least squared error of a few below max|w| / 7:
on the embedded model's layers that gains 1 dB over max|w| / 7 itself. Steps and branch are numbers
that float16 holds exactly, so that every target has the same, at two bytes each.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobile_runtime.manifest import LayerPlan
from recipes.settings import Int4Settings

INT4_MIN, INT4_MAX = -8, 7
SMALLEST_BLOCK = 16
"""ONNX Runtime's 4-bit kernel knows no smaller ones, and steps would take a bit a weight more."""
LARGEST = float(torch.finfo(torch.float16).max)
"""Of a weight: float16 holds its block's step, and its part of the branch."""

_SMALLEST_STEP = 2.0**-24
_SMALL = 128
"""Rows or columns of a weight up to which a whole SVD is the quicker one."""
_AT_ONCE = 2**17
"""Weights that are rounded at a time: they stay in the processor's cache."""
_STEPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""That are tried, of max|w| / 7."""


@torch.library.custom_op("pocket_diffusion::dequantize_blockwise", mutates_args=())
def dequantize_blockwise(integers: Tensor, scale: Tensor) -> Tensor:
    """The floats of a blockwise weight.

    integers: (out, in, ...) int8. scale: (out, blocks, ...) float32; a block is `in / blocks`
    neighbours on axis 1. Returns (out, in, ...) float32.
    """
    return integers * scale.repeat_interleave(integers.shape[1] // scale.shape[1], 1)


@dequantize_blockwise.register_fake
def _(integers: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(integers, dtype=scale.dtype)


OPERATOR = torch.ops.pocket_diffusion.dequantize_blockwise.default
"""As an exported program names it; each target translates it."""


def is_int4(program: torch.export.ExportedProgram) -> bool:
    """Whether an exported program holds weights of 4 bits."""
    return any(node.target is OPERATOR for node in program.graph.nodes)


@dataclass(frozen=True)
class Form:
    """How a layer is written: its block, and the rank of its branch (0: none)."""

    block: int
    rank: int


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be int4, or None."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return "int4 is for linears and convolutions"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "int4 is for convolutions of one group"
    inputs = layer.weight.shape[1]
    if inputs % SMALLEST_BLOCK:
        return f"its {inputs} inputs are not blocks of {SMALLEST_BLOCK} or more"
    return None


def form(layer: Any, settings: Int4Settings) -> Form:
    """The form of a layer that has no `obstacle`: as the settings say, or what fits it.

    The block is the largest power of two that divides the inputs, up to the settings'. The branch
    takes up to `branch_share` of the integers' bytes.
    """
    rows, inputs = layer.weight.shape[:2]
    block: int = settings.block
    while inputs % block:
        block //= 2
    columns = layer.weight[0].numel()
    affordable = settings.branch_share * (rows * columns / 2) / (2 * (rows + columns))
    rank = min(settings.rank, int(affordable), rows, columns)
    return Form(block, rank)


def form_of(plan: LayerPlan) -> Form:
    """The form that a plan with weights int4 tells."""
    assert plan.block is not None
    assert plan.rank is not None
    return Form(plan.block, plan.rank)


def weight_bytes(shape: tuple[int, ...], form: Form) -> int:
    """The bytes of a weight (out, in, ...): packed integers, steps and branch."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return (
        (rows * columns + 1) // 2
        + 2 * rows * columns // form.block
        + 2 * form.rank * (rows + columns)
    )


def quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round a weight to integers in blocks along axis 1.

    weight: (out, in, ...) float, finite, up to LARGEST; `block` divides in. Returns the integers
    (same shape, int8, -8..7) and the steps ((out, in / block, ...) float32, positive, exact in
    float16).
    """
    weight = weight.detach().float()
    rows = max(1, _AT_ONCE // weight[0].numel())
    parts = [_quantize_rows(part, block) for part in weight.split(rows)]
    integers, steps = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return integers, steps


def _quantize_rows(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = weight.unflatten(1, (-1, block)).movedim(2, -1).contiguous()
    peak = blocks.abs().amax(-1, keepdim=True)
    least = torch.full_like(peak, torch.inf)
    steps = torch.ones_like(peak)
    for part in _STEPS:
        tried = _float16_above(peak * (part / INT4_MAX))
        error = _rounded(blocks, tried).mul_(tried).sub_(blocks).square_().sum(-1, keepdim=True)
        better = error < least
        least, steps = torch.where(better, error, least), torch.where(better, tried, steps)
    integers = _rounded(blocks, steps).to(torch.int8)
    return integers.movedim(-1, 2).flatten(1, 2).contiguous(), steps.squeeze(-1)


def _rounded(blocks: Tensor, step: Tensor) -> Tensor:
    return (blocks / step).round_().clamp_(INT4_MIN, INT4_MAX)


def _float16_above(values: Tensor) -> Tensor:
    """The smallest positive float16 numbers that are not below the values, as float32."""
    half = values.clamp(min=_SMALLEST_STEP).half()
    upward = torch.nextafter(half, torch.tensor(torch.inf, dtype=torch.float16))
    return torch.where(half.float() < values, upward, half).float()


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of a rank: (down, up) with up @ down near the weight; exact in float16.

    weight: (out, in) float32. Returns (rank, in) and (out, rank). A wide weight's is found by
    random projections (arXiv:0909.4061), with a fixed seed.
    """
    if min(weight.shape) <= _SMALL:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=4)
        vt = v.T
    root = s[:rank].sqrt()
    down, up = root[:, None] * vt[:rank], u[:, :rank] * root
    return down.half().float(), up.half().float()


class Int4Module(nn.Module):
    """A layer of 4-bit integers in blocks, and of two small float layers, one after the other.

    weight_int4: (out, in, ...) int8, -8..7; a target packs two to the byte. weight_scale:
    (out, blocks, ...) float32. down, up: of the branch; None at rank 0.
    """

    weight_int4: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    down: nn.Module | None
    up: nn.Module | None

    def __init__(self, layer: Any, form: Form, iterations: int) -> None:
        super().__init__()
        self.form = form
        weight = layer.weight.detach().float()
        integers, scale, branch = _decomposed(weight, form, iterations)
        self.register_buffer("weight_int4", integers)
        self.register_buffer("weight_scale", scale)
        self.bias = layer.bias
        self.down = self.up = None
        if branch is not None:
            self.down, self.up = _branch_layers(layer, *branch)

    @property
    def dequantized(self) -> Tensor:
        """What the integers alone stand for."""
        return dequantize_blockwise(self.weight_int4, self.weight_scale)

    @property
    def weight(self) -> Tensor:
        """What integers and branch stand for together, float32."""
        if self.down is None or self.up is None:
            return self.dequantized
        up, down = (layer.get_parameter("weight").flatten(1) for layer in (self.up, self.down))
        product = up @ down
        return self.dequantized + product.view(self.weight_int4.shape)

    @property
    def bytes(self) -> int:
        """Of the weight, in a file."""
        return weight_bytes(tuple(self.weight_int4.shape), self.form)

    def to_float(self) -> nn.Module:
        """The ordinary PyTorch layer that holds the summed weight."""
        raise NotImplementedError

    def _branch(self, x: Tensor, y: Tensor) -> Tensor:
        if self.down is None or self.up is None:
            return y
        return y + self.up(self.down(x))


class Int4Linear(Int4Module):
    """`nn.Linear` in 4 bits."""

    def __init__(self, layer: nn.Linear, form: Form, iterations: int = 4) -> None:
        super().__init__(layer, form, iterations)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) float32."""
        return self._branch(x, F.linear(x, self.dequantized, self.bias))

    def to_float(self) -> nn.Linear:
        return _filled(
            nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"),
            self.weight,
            self.bias,
        )


class Int4Conv2d(Int4Module):
    """`nn.Conv2d` in 4 bits. Its branch is a kernel of the same size, then one of a pixel."""

    def __init__(self, layer: nn.Conv2d, form: Form, iterations: int = 4) -> None:
        super().__init__(layer, form, iterations)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation, self.groups = layer.padding, layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) float32."""
        y = F.conv2d(x, self.dequantized, self.bias, self.stride, self.padding, self.dilation)
        return self._branch(x, y)

    def to_float(self) -> nn.Conv2d:
        layer = _conv(self, self.in_channels, self.out_channels, self.bias is not None)
        return _filled(layer, self.weight, self.bias)


def _branch_layers(layer: Any, down: Tensor, up: Tensor) -> tuple[nn.Module, nn.Module]:
    """down (rank, in * kernel) as a layer like the given one, and up (out, rank) after it."""
    rows, rank = up.shape
    if isinstance(layer, nn.Linear):
        first: nn.Module = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        second: nn.Module = nn.Linear(rank, rows, bias=False, device="meta")
        return _filled(first, down, None), _filled(second, up, None)
    first = _conv(layer, layer.in_channels, rank, bias=False)
    second = nn.Conv2d(rank, rows, 1, bias=False, device="meta")
    down = down.view(-1, *layer.weight.shape[1:])
    return _filled(first, down, None), _filled(second, up[:, :, None, None], None)


def _conv(like: Any, columns: int, rows: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        columns,
        rows,
        like.kernel_size,
        like.stride,
        like.padding,
        like.dilation,
        bias=bias,
        device="meta",
    )


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


def _decomposed(
    weight: Tensor, form: Form, iterations: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Integers, steps, and the branch, of the best of the iterations."""
    if form.rank == 0:
        return *quantize_blocks(weight, form.block), None
    flat = weight.flatten(1)
    standing = torch.zeros_like(weight)
    least = torch.inf
    found: Any = None
    for _ in range(iterations):
        down, up = low_rank(flat - standing.flatten(1), form.rank)
        rest = weight - (up @ down).view(weight.shape)
        integers, scale = quantize_blocks(rest, form.block)
        standing = dequantize_blockwise(integers, scale)
        error = float(torch.linalg.vector_norm(rest - standing))
        if error < least:
            least, found = error, (integers, scale, (down, up))
    return found


REPLACEMENTS: dict[type[nn.Module], Any] = {nn.Conv2d: Int4Conv2d, nn.Linear: Int4Linear}


def quantized(layer: Any, form: Form, iterations: int = 4) -> Int4Module:
    """The 4-bit form of a float layer that has no `obstacle`."""
    return REPLACEMENTS[type(layer)](layer, form, iterations).eval()


def weight_snr_db(weight: Tensor, layer: Int4Module) -> float | None:
    """Signal to error of a weight in 4 bits; None where nothing was lost (or all is zero)."""
    weight = weight.detach().double()
    signal = float(torch.linalg.vector_norm(weight))
    error = float(torch.linalg.vector_norm(weight - layer.weight.double()))
    if signal == 0 or error == 0:
        return None
    return float(20 * torch.log10(torch.tensor(signal / error, dtype=torch.float64)))
