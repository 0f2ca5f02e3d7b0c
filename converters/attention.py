"""Attention in its explicit form: linears, two 3-D matrix products, and a softmax between them."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention

from converters.layers import scaled_linear
from mobile_runtime.errors import UserError


class ExplicitAttention(nn.Module):
    """diffusers' Attention as linears, two 3-D matrix products and a softmax.

    The scale of the scores is folded into the query's weights. A picture-shaped input
    (B, C, H, W) is flattened to tokens and back, as the Attention of an autoencoder does.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        unknown = [
            name
            for name in ("spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")
            if getattr(attention, name, None) is not None
        ]
        if unknown:
            raise UserError(
                f"an attention layer of this pipeline has {unknown[0]}, which the explicit form "
                "does not know; only plain Stable Diffusion attention can be lowered here"
            )
        self.heads = attention.heads
        self.residual_connection = attention.residual_connection
        self.rescale_output_factor = attention.rescale_output_factor
        self.group_norm = attention.group_norm
        self.to_q = scaled_linear(attention.to_q, attention.scale)
        self.to_k = attention.to_k
        self.to_v = attention.to_v
        self.to_out = nn.ModuleList([attention.to_out[0]])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Tokens (B, L, D) or a picture (B, C, H, W) -> the same shape."""
        if attention_mask is not None:
            raise ValueError("explicit attention takes no mask")
        residual, x = hidden_states, hidden_states
        if self.group_norm is not None:
            x = self.group_norm(x) if x.ndim == 4 else self.group_norm(x.mT).mT
        if hidden_states.ndim == 4:
            batch, channels, height, width = x.shape
            x = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        x = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        x = self.to_out[0](x)
        if hidden_states.ndim == 4:
            x = x.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        if self.residual_connection:
            x = x + residual
        return x if self.rescale_output_factor == 1 else x / self.rescale_output_factor


class ExplicitClipAttention(nn.Module):
    """CLIP's self-attention in the same form, with the causal mask added to the scores."""

    def __init__(self, attention: CLIPAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.q_proj = scaled_linear(attention.q_proj, attention.scale)
        self.k_proj = attention.k_proj
        self.v_proj = attention.v_proj
        self.out_proj = attention.out_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        causal_attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[torch.Tensor, None]:
        """(B, L, D) -> (B, L, D); the mask is (1, 1, L, L), added to every head's scores."""
        if attention_mask is not None:
            raise ValueError("explicit attention takes the causal mask only")
        query, key, value = (
            project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = causal_attention_mask
        if mask is not None:
            mask = mask.reshape(1, *mask.shape[-2:])
        return self.out_proj(attend(query, key, value, self.heads, mask)), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(Q Kᵀ + mask) V by head. Q (B, L, D), scaled; K, V (B, S, D); mask (1, L, S)."""
    batch, tokens, width = query.shape
    head = width // heads
    context = key.shape[1]
    q = query.view(batch, tokens, heads, head).permute(0, 2, 1, 3)
    k = key.view(batch, context, heads, head).permute(0, 2, 3, 1)
    v = value.view(batch, context, heads, head).permute(0, 2, 1, 3)
    scores = torch.bmm(
        q.reshape(batch * heads, tokens, head), k.reshape(batch * heads, head, context)
    )
    if mask is not None:
        scores = scores + mask
    out = torch.bmm(scores.softmax(-1), v.reshape(batch * heads, context, head))
    out = out.view(batch, heads, tokens, head).permute(0, 2, 1, 3)
    return out.reshape(batch, tokens, width)
