"""Filling a hole with a block-diffusion model: the text on both sides comes first, the hole last, each token at its
own place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from illada_kernels import KeyRanges, TopK, unmask

from .errors import PromptError
from .model import Model


@torch.no_grad()
def fill_hole(
    model: Model,
    before: Sequence[int],
    hole_length: int,
    after: Sequence[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    callback: Callable[[list[int]], object] | None = None,
) -> list[int]:
    """The `hole_length` tokens between `before` and `after`, for a model trained with `diffusion.hole_order`
    (causal_block > 0).

    Generated block by block in the order before, after, hole, the surest token of a block first, one a pass; so every
    token of the hole sees both sides. `callback` gets the whole text after each pass. Raises PromptError if the text
    does not fit the model, or the model sees everything anyway (then `generate.fill` does it)."""
    c, block = model.config, model.config.causal_block
    total = len(before) + hole_length + len(after)
    if not block:
        raise PromptError("fill_hole: expected a block-causal model; use generate.fill for one that sees both sides")
    if hole_length < 1 or total > c.max_seq_len:
        raise PromptError(
            f"fill_hole: expected a hole and at most {c.max_seq_len} tokens, got {hole_length} and {total}"
        )
    start = len(before) + len(after)  # of the hole, in the order in which tokens are seen
    tokens = torch.tensor([[*before, *after, *[c.mask_id] * hole_length]]).to(model.device)
    place = [
        *range(len(before)),
        *range(len(before) + hole_length, total),
        *range(len(before), len(before) + hole_length),
    ]
    places = torch.tensor(place).to(model.device)
    for first in range(start // block * block, total, block):
        end = min(first + block, total)
        candidates = torch.arange(first, end, device=model.device)[None]
        ranges = KeyRanges.block_causal(end, block, device=model.device)
        for step in range(end - max(first, start)):
            hidden = model(tokens[:, :end], ranges, places[:end])
            unmask(
                hidden[:, first:end],
                model.head_weight,
                tokens,
                candidates,
                TopK(1),
                mask_id=c.mask_id,
                temperature=temperature,
                seed=seed,
                step=step,
            )
            if callback is not None:
                seen = tokens[0].tolist()
                callback([*seen[: len(before)], *seen[start:], *seen[len(before) : start]])
    return tokens[0, start:].tolist()
