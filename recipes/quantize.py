"""INT8 weights, made once in PyTorch: every target lowers these same integers.

A chosen `Conv2d`, `Linear` or `Embedding` is replaced by a module that holds int8 weights with one
float scale an output channel (for an embedding: one a row), symmetric in -127..127, and computes
through the `quantized_decomposed` operators, which Core ML, ONNX and ExecuTorch all know how to
lower. Scales are max-abs: on the 328 layers of the embedded model, a search for the clipping with
the least squared error gained 0.01 dB (median) to 0.08 dB (most), not worth its time.
"""

import copy
import difflib
import fnmatch
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

# Registers the torch.ops.quantized_decomposed operators.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes.schema import QuantizeSettings

QUANT_MIN, QUANT_MAX = -127, 127

Activations = Literal["none", "int8_dynamic", "int8_static"]

ops = torch.ops.quantized_decomposed

_DROPPED_BITS = (1 << (23 - 10)) - 1
"""Of a float32's 23 stored bits, those that a float16 has no room for."""


def max_abs_scale(weight: Tensor) -> Tensor:
    """The symmetric scale of each channel (axis 0): max|w| / 127, and 1 for a channel of zeros.

    Rounded up to 11 significant bits, which is what float16 has: a target that keeps its scales
    in float16 then holds the same number as one that keeps them in float32.

    weight: (channels, ...) float32, finite. Returns (channels,) float32, finite and positive.
    """
    low, high = weight.flatten(1).aminmax(dim=1)
    peak = torch.maximum(-low, high)
    # Below the smallest normal number 1 / scale would overflow.
    scale = (peak / QUANT_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (scale.view(torch.int32) + _DROPPED_BITS) & ~_DROPPED_BITS
    scale = torch.where(scale.isfinite(), rounded.view(torch.float32), scale)
    # Asked this way, NaN and Inf stay in the scale, where `run` sees them.
    return torch.where(peak == 0, torch.ones_like(scale), scale)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to int8, symmetric per channel (axis 0).

    weight: (channels, ...) float. Returns the integers (same shape, int8) and the scales
    ((channels,) float32); `integers * scale` is within half a scale of the weight.
    """
    weight = weight.detach().float()
    scale = max_abs_scale(weight)
    zero_point = torch.zeros(len(scale), dtype=torch.int8)
    integers = ops.quantize_per_channel(
        weight, scale, zero_point, 0, QUANT_MIN, QUANT_MAX, torch.int8
    )
    return integers, scale


class QuantizedModule(nn.Module):
    """A layer whose weight is stored as int8 with a scale for each channel of axis 0.

    weight_int8: (channels, ...) int8; weight_scale: (channels,) float32; weight_zero_point:
    (channels,) int8, all zero, there because XNNPACK and Core ML want the operand.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self, weight_int8: Tensor, weight_scale: Tensor, activations: Activations = "none"
    ) -> None:
        super().__init__()
        self.activations = activations
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero_point", torch.zeros(len(weight_scale), dtype=torch.int8))

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        return ops.dequantize_per_channel(
            self.weight_int8,
            self.weight_scale,
            self.weight_zero_point,
            0,
            QUANT_MIN,
            QUANT_MAX,
            torch.int8,
        )

    def to_float(self) -> nn.Module:
        """The ordinary PyTorch layer that holds the dequantized weight."""
        raise NotImplementedError


class QuantizedConv2d(QuantizedModule):
    """`nn.Conv2d` with int8 weights. Dynamic activations: a scale a sample, or a pixel if 1x1."""

    def __init__(
        self, layer: nn.Conv2d, integers: Tensor, scale: Tensor, activations: Activations
    ) -> None:
        super().__init__(integers, scale, activations)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation, self.groups = layer.padding, layer.dilation, layer.groups
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) float32."""
        if self.activations == "int8_dynamic":
            # As XNNPACK does: a 1x1 convolution is a linear of the pixels.
            pointwise = self.kernel_size == self.stride == (1, 1)
            x = fake_quantize_per_pixel(x) if pointwise else fake_quantize_per_sample(x)
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def to_float(self) -> nn.Conv2d:
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        return _with_weights(layer, self.weight, self.bias)


class QuantizedLinear(QuantizedModule):
    """`nn.Linear` with int8 weights. Dynamic activations: one scale for each token."""

    def __init__(
        self, layer: nn.Linear, integers: Tensor, scale: Tensor, activations: Activations
    ) -> None:
        super().__init__(integers, scale, activations)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) float32."""
        if self.activations == "int8_dynamic":
            x = fake_quantize_per_token(x)
        return F.linear(x, self.weight, self.bias)

    def to_float(self) -> nn.Linear:
        layer = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        return _with_weights(layer, self.weight, self.bias)


class QuantizedEmbedding(QuantizedModule):
    """`nn.Embedding` with int8 rows."""

    def __init__(
        self, layer: nn.Embedding, integers: Tensor, scale: Tensor, activations: Activations
    ) -> None:
        super().__init__(integers, scale, activations)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape of integers below num_embeddings."""
        return F.embedding(ids, self.weight, self.padding_idx)

    def to_float(self) -> nn.Embedding:
        layer = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        return _with_weights(layer, self.weight, None)


def _with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


def fake_quantize_per_sample(x: Tensor) -> Tensor:
    """Round an activation to int8 with an asymmetric scale for each sample of the batch."""
    return fake_quantize_per_token(x.flatten(1)).view(x.shape)


def fake_quantize_per_pixel(x: Tensor) -> Tensor:
    """Round an activation (B, C, H, W) to int8 with an asymmetric scale for each pixel."""
    return fake_quantize_per_token(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """Round an activation to int8 with an asymmetric scale for each row of its last axis."""
    scale, zero_point = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    integers = ops.quantize_per_token(x, scale, zero_point, -128, 127, torch.int8)
    return ops.dequantize_per_token(
        integers, scale, zero_point, -128, 127, torch.int8, torch.float32
    )


# By exact type: a subclass may compute something else.
REPLACEMENTS: dict[type[nn.Module], Any] = {
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
}


def component_modules(pipeline: Any, component: str) -> list[tuple[str, nn.Module]]:
    """The parts of a pipeline that make up a component, as (path in the plan, module)."""
    vae = pipeline.vae
    table: dict[str, list[tuple[str, nn.Module | None]]] = {
        "text_encoder": [("text_encoder", pipeline.text_encoder)],
        "unet": [("unet", pipeline.unet)],
        "vae_decoder": [
            ("vae_decoder.post_quant_conv", getattr(vae, "post_quant_conv", None)),
            ("vae_decoder.decoder", vae.decoder),
        ],
        "vae_encoder": [
            ("vae_encoder.encoder", vae.encoder),
            ("vae_encoder.quant_conv", getattr(vae, "quant_conv", None)),
        ],
    }
    return [(path, module) for path, module in table[component] if module is not None]


def quantizable_layers(pipeline: Any, components: Sequence[str]) -> dict[str, nn.Module]:
    """Every layer that could be quantized, by its path in the plan, in the pipeline's order."""
    return {
        ".".join(part for part in (path, name) if part): module
        for component in components
        for path, root in component_modules(pipeline, component)
        for name, module in root.named_modules()
        if type(module) in REPLACEMENTS
    }


def check(pipeline: Any, settings: QuantizeSettings) -> None:
    """Refuse, before any work, a rule whose pattern matches no layer (all such rules told)."""
    faults = []
    if "int8_static" in settings.every_activations:
        faults.append(
            "activations: int8_static needs scales from a calibration, which no stage makes yet; "
            "use none, or for ExecuTorch int8_dynamic"
        )
    layers = list(quantizable_layers(pipeline, settings.components))
    faults += [
        _no_match(rule.layers, layers, settings.components)
        for rule in settings.rules
        if not fnmatch.filter(layers, rule.layers)
    ]
    if faults:
        raise UserError("; ".join(faults))


def _no_match(pattern: str, layers: list[str], components: Sequence[str]) -> str:
    prefixes = {
        ".".join(name.split(".")[:depth]) + ".*"
        for name in layers
        for depth in range(1, name.count(".") + 1)
    }
    known = [*layers, *sorted(prefixes)]
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    hint = f"; close: {', '.join(close)}" if close else ""
    return (
        f"the rule for layers {pattern!r} matches no conv, linear or embedding of "
        f"{', '.join(components)}{hint}"
    )


def make_plan(pipeline: Any, settings: QuantizeSettings) -> list[LayerPlan]:
    """What happens to each layer, and why; of several rules that match, the last one wins."""
    check(pipeline, settings)
    sizes: dict[str, int] = {
        component: sum(
            parameter.numel()
            for _, module in component_modules(pipeline, component)
            for parameter in module.parameters()
        )
        for component in settings.components
    }
    plans = []
    for layer, module in quantizable_layers(pipeline, settings.components).items():
        weights: Literal["int8", "float32"] = "int8"
        activations: Activations = settings.activations
        reason = "default"
        if isinstance(module, nn.Embedding):
            activations = "none"
            # int8 takes a quarter of float32's bytes.
            saving = 0.75 * module.weight.numel() / sizes[layer.split(".")[0]]
            if saving < settings.embedding_min_saving:
                weights = "float32"
                reason = (
                    f"embedding: would save {saving:.2%} of its component, "
                    f"less than {settings.embedding_min_saving:.2%}"
                )
        elif isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            weights, reason = "float32", f"padding mode {module.padding_mode} is not supported"
        for rule in settings.rules:
            if fnmatch.fnmatchcase(layer, rule.layers):
                weights = rule.weights
                reason = f"rule {rule.layers}: {rule.reason}"
                if rule.activations is not None and not isinstance(module, nn.Embedding):
                    activations = rule.activations
        if weights == "float32":
            activations = "none"
        plans.append(
            LayerPlan(layer=layer, weights=weights, activations=activations, reason=reason)
        )
    return plans


def quantize(pipeline: Any, settings: QuantizeSettings) -> tuple[Any, list[LayerPlan]]:
    """Replace the layers that the settings name, in place; see `run` for the figures."""
    pipeline, plans, _ = run(pipeline, settings)
    return pipeline, plans


def run(pipeline: Any, settings: QuantizeSettings) -> tuple[Any, list[LayerPlan], dict[str, Any]]:
    """Replace the layers that the settings name, one by one, so that each float weight is freed.

    pipeline: a StableDiffusionPipeline, changed in place. Returns it, the plan, and a record of
    what was done (JSON). Raises UserError where a rule matches nothing or a weight is not finite.
    """
    plans = make_plan(pipeline, settings)
    layers = quantizable_layers(pipeline, settings.components)
    parents = dict(_parents(pipeline, settings.components))
    counts: dict[str, int] = {}
    snr_db: dict[str, float] = {}
    parameters = bytes_before = bytes_after = kept = 0
    for plan in plans:
        module: Any = layers.pop(plan.layer)
        bytes_before += module.weight.numel() * 4
        if plan.weights != "int8":
            kept += 1
            bytes_after += module.weight.numel() * 4
            continue
        integers, scale = quantize_weight(module.weight)
        if not bool(torch.isfinite(scale).all()):
            raise UserError(
                f"the weight of {plan.layer} holds NaN or Inf; the source's files are damaged"
            )
        figure = weight_snr_db(module.weight, integers, scale)
        if figure is not None:
            snr_db[plan.layer] = figure
        counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
        parameters += integers.numel()
        bytes_after += integers.numel() + 4 * scale.numel()
        replacement = REPLACEMENTS[type(module)](module, integers, scale, plan.activations)
        parent, name = parents[plan.layer]
        setattr(parent, name, replacement.eval())
        module.weight = None
    worst = min(snr_db, key=lambda layer: snr_db[layer]) if snr_db else None
    record = {
        "stage": "quantize",
        "layers": counts,
        "layers_kept_float": kept,
        "quantized_parameters": parameters,
        "weight_bytes_before": bytes_before,
        "weight_bytes_after": bytes_after,
        "weight_snr_db_min": round(snr_db[worst], 2) if worst else None,
        "weight_snr_db_min_layer": worst,
        "weight_snr_db_median": round(statistics.median(snr_db.values()), 2) if worst else None,
    }
    return pipeline, plans, record


def _parents(
    pipeline: Any, components: Sequence[str]
) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for component in components:
        for path, root in component_modules(pipeline, component):
            if type(root) in REPLACEMENTS:
                yield path, (pipeline.vae, path.split(".")[-1])
            for name, parent in root.named_modules():
                for child, _ in parent.named_children():
                    yield ".".join(p for p in (path, name, child) if p), (parent, child)


def weight_snr_db(weight: Tensor, integers: Tensor, scale: Tensor) -> float | None:
    """Signal to rounding noise of a quantized weight; None where nothing was lost (or all zero)."""
    signal = noise = 0.0
    # In blocks, so that a large layer needs no second float copy.
    for rows, whole, step in zip(
        weight.split(256), integers.split(256), scale.split(256), strict=True
    ):
        rows = rows.detach().float()
        error = rows - whole * step.view(-1, *[1] * (rows.dim() - 1))
        signal += float(torch.linalg.vector_norm(rows)) ** 2
        noise += float(torch.linalg.vector_norm(error)) ** 2
    if signal == 0 or noise == 0:
        return None
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def dequantized(module: nn.Module) -> nn.Module:
    """A copy of a module tree in which every quantized layer is an ordinary float one again."""
    memo: dict[int, Any] = {
        id(part): part.to_float() for part in module.modules() if isinstance(part, QuantizedModule)
    }
    # deepcopy takes what the memo already holds in place of the original.
    return copy.deepcopy(module, memo)
