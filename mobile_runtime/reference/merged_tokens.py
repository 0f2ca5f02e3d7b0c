"""Token merging for Stable Diffusion (Bolya and Hoffman, arXiv:2303.17604).

Before a self-attention at the highest resolution, the tokens that are most like another one are
averaged into it; after it, each takes its partner's result. One token of every 2x2 square is kept
as a partner, the first one here, so that nothing is random.
"""

from collections.abc import Callable
from typing import Any

STRIDE = 2


def places(size: tuple[int, int], device: Any) -> tuple[Any, Any]:
    """Which tokens of (h, w) are partners, and which are not: their numbers, on the device."""
    import torch

    rows, columns = range(0, size[0], STRIDE), range(0, size[1], STRIDE)
    kept = [row * size[1] + column for row in rows for column in columns]
    left = sorted(set(range(size[0] * size[1])) - set(kept))
    return torch.tensor(kept, device=device), torch.tensor(left, device=device)


def merging(x: Any, partners: Any, others: Any, share: float) -> tuple[Callable[..., Any], ...]:
    """Two functions of tokens (B, h * w, C): to fewer of them, and back to all.

    x: the tokens whose likeness decides. partners, others: of `places`. share: of the tokens to
    leave out, at most the 3/4 that are no partners.
    """
    import torch

    batch, count, _ = x.shape
    leave = min(int(share * count), len(others))
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    alike, partner = (unit[:, others] @ unit[:, partners].transpose(1, 2)).max(dim=-1)
    order = alike.argsort(dim=-1, descending=True, stable=True)
    merged, stay = order[:, :leave], order[:, leave:]
    goal = partner.gather(1, merged)  # (B, leave): which partner each goes into

    def rows(tokens: Any, places: Any) -> Any:
        return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))

    def fewer(tokens: Any) -> Any:
        source, kept = tokens[:, others], tokens[:, partners]
        moved = rows(source, merged)
        index = goal[..., None].expand_as(moved)
        kept = kept.scatter_reduce(1, index, moved, reduce="mean", include_self=True)
        return torch.cat([rows(source, stay), kept], dim=1)

    def back(tokens: Any) -> Any:
        staying, kept = tokens.split([stay.shape[1], len(partners)], dim=1)
        source = tokens.new_empty(batch, len(others), tokens.shape[-1])
        wide = (-1, -1, tokens.shape[-1])
        source = source.scatter(1, stay[..., None].expand(*wide), staying)
        source = source.scatter(1, merged[..., None].expand(*wide), rows(kept, goal))
        out = tokens.new_empty(batch, count, tokens.shape[-1])
        out[:, others], out[:, partners] = source, kept
        return out

    return fewer, back


class MergedAttention:
    """An attention processor of diffusers: the module's own, between merging and its undoing."""

    def __init__(self, own: Any, partners: Any, others: Any, share: float) -> None:
        self.own, self.partners, self.others, self.share = own, partners, others, share

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **rest: Any
    ) -> Any:
        """Self-attention of (B, h * w, C) on fewer tokens."""
        fewer, back = merging(hidden_states, self.partners, self.others, self.share)
        return back(self.own(attn, fewer(hidden_states), encoder_hidden_states, **rest))


def merge_tokens(unet: Any, size: tuple[int, int], share: float) -> int:
    """Put merging around the self-attentions at the latents' own size; how many there were.

    unet: on its device. size: (h, w) of the latents.
    """
    # Once: made at each call, they would be copied to the device at each.
    partners, others = places(size, unet.device)
    changed = 0
    for block in (unet.down_blocks[0], unet.up_blocks[-1]):
        for transformer in getattr(block, "attentions", None) or ():
            for inner in transformer.transformer_blocks:
                inner.attn1.set_processor(
                    MergedAttention(inner.attn1.processor, partners, others, share)
                )
                changed += 1
    return changed
