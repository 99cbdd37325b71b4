"""Objectives on recorded trajectories: noisy states are those of a sampler, not random masks."""

from __future__ import annotations

import torch
from torch import Tensor

from illada_kernels import KeyRanges

from .blocks import assemble, packing_of
from .example import Example
from .noise import stratified

SCORED = ("all", "next")
NEVER = -1  # the order of a mask that no pass fills


def trajectory(
    tokens: Tensor,
    order: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    lengths: Tensor | None = None,
    appear: Tensor | None = None,
    first: Tensor | None = None,
    scored: str = "all",
    passes: tuple[float, float] = (0.0, 1.0),
    forbid_mask: bool | None = None,
) -> Example:
    """Returns a batch of states in which a sampler was: before pass i, what the passes from i on committed is masked.

    Parameters
    ----------
    tokens : int64 (B, S)
        Prompts, and what the passes committed.
    order : int64 (B, S)
        The pass 1, 2, ... that committed the token; 0: it was given; -1: a mask that no pass filled.
    mask_id : int
    generator : torch.Generator
    lengths : int64 (B,), optional
        Tokens of each row; what lies behind is padding, which no token sees. None: S.
    appear : int64 (B, S), optional
        The pass from which on a token, or its mask, is there, rising along a row (variable length: a block's masks
        appear with the block's first pass). None: all are there from the start.
    first : int64 (B,), optional
        The first pass whose state is shown (where a teacher took over, the states before are not its own). None: 1.
    scored : "all" or "next"
        "all": every mask that a later pass fills, weight T / (m * total), m of the row's T tokens masked. "next":
        those that pass i commits, weight n / total, n the row's passes.
    passes : (float, float)
        The part of each trajectory that i is drawn from: (0, 1) all of it, (0, 0) its first state alone.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`).

    Returns
    -------
    Example

    Raises
    ------
    ValueError
        For shapes that differ, a row without a token to learn, a pass behind a row's length, or another `scored` or
        `passes`.

    Notes
    -----
    loss = E_i sum over scored j of weight_j * -log p(x_j | state i), i uniform on the row's passes and stratified over
    the batch, total: tokens to learn in the batch. With "next" the expectation is -log p of the trajectory, a token:
    each token given what was there when it was committed. With "all" and orders of one token a pass that are uniformly
    random it is the masks' bound (LLaDA, arXiv 2502.09992, equation 6).
    Sources: the constrained-order loss of Seed Diffusion (arXiv 2508.02193), on trajectories that the model made and
    its bound filtered; its weight lambda(x_i) is not public. d3LLM's pseudo-trajectories (hao-ai-lab.github.io/blogs/
    text-diffusion) and T3D's self-distillation show a teacher's states likewise, against the teacher's final tokens.
    """
    check_orders(tokens, order, scored, passes)
    least = torch.ones_like(order[:, 0]) if first is None else first
    learn = order >= least[:, None]
    if not bool(learn.any(1).all()):
        row = int((~learn.any(1)).nonzero()[0])
        raise ValueError(f"order: expected a pass from {int(least[row])} on in every row, found none in row {row}")
    u = stratified(len(tokens), generator, *passes)
    now = _drawn(u, least, order.amax(1))[:, None]  # (B, 1)
    count = order.amax(1, keepdim=True) - least[:, None] + 1
    masked, weight = _scored(order, now, count, learn.sum(1, keepdim=True), scored)
    shown = tokens.masked_fill((order >= now) | (order == NEVER), mask_id)
    column = torch.arange(tokens.shape[1], device="cpu")
    there = column < (torch.full_like(least, tokens.shape[1]) if lengths is None else lengths)[:, None]
    if bool((learn & ~there).any()):
        row = int((learn & ~there).any(1).nonzero()[0])
        raise ValueError(f"order: expected no pass behind the length of a row, got one in row {row}")
    if appear is not None:
        there &= appear <= now
    ranges = None
    if not bool(there.all()):
        end = there.sum(1)
        bounds = torch.stack([torch.zeros_like(end), end, end, end], -1)[:, None].to(torch.int32)
        ranges = KeyRanges(bounds, tokens.shape[1])
    return Example(shown, tokens, masked, weight / learn.sum().float(), ranges, forbid_mask=forbid_mask)


def block_trajectory(
    tokens: Tensor,
    order: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    block: int,
    scored: str = "all",
    passes: tuple[float, float] = (0.0, 1.0),
    forbid_mask: bool | None = None,
) -> Example:
    """Returns `trajectory`'s batch for a block-causal model: [noisy ; clean], each block in a state of its own.

    Parameters
    ----------
    tokens, order, mask_id, generator, scored, passes, forbid_mask
        As in `trajectory`; n, m and T are the block's, whose passes follow each other. What lies behind a row has order
        -1 where its block has begun.
    block : int
        The model's blocks, a divisor of S.

    Returns
    -------
    Example

    Raises
    ------
    ValueError
        As `trajectory`, and for a block that does not divide S.

    Notes
    -----
    As `trajectory`. A block sees the final tokens of the blocks before it, as the sampler did.
    """
    check_orders(tokens, order, scored, passes)
    learn = order > 0
    packing = packing_of(tokens, block, None, None, learn)
    blocks = order.unflatten(1, (-1, block))  # (B, N, block)
    last = blocks.amax(-1)
    least = torch.where(blocks > 0, blocks, torch.iinfo(torch.int64).max).amin(-1).clamp(max=last.clamp(min=1))
    u = stratified(last.numel(), generator, *passes).view_as(last)
    now = _drawn(u, least, last).clamp(min=1)  # a block without a pass shows what was given
    per_token = [
        x.repeat_interleave(block, 1)
        for x in (now, last - least + 1, (blocks > 0).sum(-1), (blocks >= now[..., None]).sum(-1))
    ]
    now, count, size, left = per_token
    masked, weight = _scored(order, now, count, size, scored, left)
    noisy = tokens.masked_fill((order >= now) | (order == NEVER), mask_id)
    return assemble(
        tokens, noisy, masked & learn, weight / learn.sum().float(), packing, block, None, None, forbid_mask
    )


def check_orders(tokens: Tensor, order: Tensor, scored: str, passes: tuple[float, float]) -> None:
    if order.shape != tokens.shape:
        raise ValueError(f"order: expected {tuple(tokens.shape)} like tokens, got {tuple(order.shape)}")
    if scored not in SCORED:
        raise ValueError(f"scored: expected one of {', '.join(SCORED)}, got {scored!r}")
    low, high = passes
    if not 0 <= low <= high <= 1:
        raise ValueError(f"passes: expected 0 <= low <= high <= 1, got {passes}")


def _drawn(u: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Returns the pass at share u of first .. last."""
    return torch.minimum(first + (u * (last - first + 1)).long(), last)


def _scored(
    order: Tensor, now: Tensor, count: Tensor, size: Tensor, scored: str, left: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (masked, weight) of the states before the passes `now`, before any denominator."""
    if scored == "next":
        return order == now, count.float().expand(order.shape)
    masked = order >= now
    left = masked.sum(1, keepdim=True) if left is None else left
    return masked, (size / left.clamp(min=1)).float().expand(order.shape)
