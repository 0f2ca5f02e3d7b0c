"""Token merging for Stable Diffusion (Bolya and Hoffman, arXiv:2303.17604).

Before a self-attention at the highest resolution, the tokens that are most like another one are
averaged into it; after it, each takes its partner's result. One token of every 2x2 square is kept
as a partner, the first one here, so that nothing is random.
"""

from collections.abc import Callable
from typing import Any

STRIDE = 2


def merging(x: Any, size: tuple[int, int], share: float) -> tuple[Callable[..., Any], ...]:
    """Two functions of tokens (B, h * w, C): to fewer of them, and back to all.

    x: the tokens whose likeness decides. size: (h, w). share: of the tokens to leave out, at most
    the 3/4 that are no partners.
    """
    import torch

    batch, count, _ = x.shape
    # By Python: places of a size that a compiler knows.
    rows_, columns = range(0, size[0], STRIDE), range(0, size[1], STRIDE)
    kept_places = [row * size[1] + column for row in rows_ for column in columns]
    left_places = sorted(set(range(count)) - set(kept_places))
    partners = torch.tensor(kept_places, device=x.device)
    others = torch.tensor(left_places, device=x.device)
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

    def __init__(self, own: Any, size: tuple[int, int], share: float) -> None:
        self.own, self.size, self.share = own, size, share

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **rest: Any
    ) -> Any:
        """Self-attention of (B, h * w, C) on fewer tokens."""
        fewer, back = merging(hidden_states, self.size, self.share)
        return back(self.own(attn, fewer(hidden_states), encoder_hidden_states, **rest))


def merge_tokens(unet: Any, size: tuple[int, int], share: float) -> int:
    """Put merging around the self-attentions at the latents' own size; how many there were.

    size: (h, w) of the latents.
    """
    changed = 0
    for block in (unet.down_blocks[0], unet.up_blocks[-1]):
        for transformer in getattr(block, "attentions", None) or ():
            for inner in transformer.transformer_blocks:
                inner.attn1.set_processor(MergedAttention(inner.attn1.processor, size, share))
                changed += 1
    return changed
