"""Objectives with several kinds of rows in one pass: noisy and autoregressive ones, or a context and draft blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from illada_kernels import KeyRanges

from .blocks import block_diffusion
from .documents import Packing
from .example import Example
from .noise import CPU


def joint(
    tokens: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    block: int,
    causal: str = "clean",
    diffusion: float = 0.3,
    autoregressive: float = 1.0,
    noise: str = "block",
    clip: tuple[float, float] = (1e-3, 1.0),
    documents: Tensor | None = None,
    learn: Tensor | None = None,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns [noisy ; clean] whose noisy rows learn the masked tokens and whose clean rows learn the next token.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
    generator : torch.Generator
    block : int
    causal : str
        "clean": clean rows are causal, noisy blocks see themselves whole (Nemotron-Labs-Diffusion). "both": noisy rows
        are causal within their block too (I-DLM).
    diffusion, autoregressive : float
        Factors of the two means: Nemotron-Labs-Diffusion 0.3 and 1, I-DLM 1 and 0.2.
    noise, clip, documents, learn
        As in `block_diffusion`.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`).

    Returns
    -------
    Example

    Raises
    ------
    ValueError
        As `block_diffusion`, and for another `causal`.

    Notes
    -----
    loss = diffusion * mean of 1/t CE(noisy row, x_i) + autoregressive * mean of CE(clean row i, x_i+1), the first mean
    over tokens to learn, the second over those that have a token before them in their document. Sources:
    Nemotron-Labs-Diffusion (arXiv 2607.05722), I-DLM (arXiv 2604.11035).
    """
    if causal not in ("clean", "both"):
        raise ValueError(f'causal: expected "clean" or "both", got {causal!r}')
    made = block_diffusion(
        tokens, mask_id, generator, block=block, noise=noise, clip=clip, documents=documents, learn=learn, causal=causal
    )
    packing = Packing.of(tokens, documents, learn)
    length = tokens.shape[1]
    column = torch.arange(length, device="cpu")
    follows = packing.learn.roll(-1, 1) & (column + 1 < packing.end)  # (B, S)
    next_weight = (autoregressive / follows.sum().clamp(min=1).float()).expand_as(made.weight)
    assert made.previous is not None
    clean = (length + column).expand_as(made.previous)
    return Example(
        made.tokens,
        torch.cat([tokens, tokens.roll(-1, 1)], 1),
        torch.cat([made.masked, follows], 1),
        torch.cat([made.weight * diffusion, next_weight], 1),
        made.key_ranges,
        made.positions,
        torch.cat([made.previous, clean], -1),
        torch.arange(2 * length, device="cpu"),
        forbid_mask,
    )


def anchor_blocks(
    tokens: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    block: int,
    count: int,
    gamma: float = 7.0,
    documents: Tensor | None = None,
    learn: Tensor | None = None,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns a block drafter's batch, [context ; blocks]: after each anchor token a block of masks.

    Parameters
    ----------
    tokens : int64 (B, S)
        The context, whose rows are causal.
    mask_id : int
    generator : torch.Generator
    block : int
        Length of a block: the anchor and block - 1 masks behind it, all in the anchor's document.
    count : int
        Blocks of a sequence. Their anchors are drawn without repetition; a sequence with fewer places has fewer.
    gamma : float
        The k-th token behind an anchor weighs exp(-(k - 1) / gamma), because a draft is of no use behind its first
        wrong token.
    documents, learn
        As in `packed`; a block's masked tokens are all to be learned.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`).

    Returns
    -------
    Example
        Weights sum to 1 over the batch.

    Raises
    ------
    ValueError
        For a block below 2, a count below 1, a gamma that is not positive, or a batch without a place for a block.

    Notes
    -----
    Source: DFlash (arXiv 2602.06036). Its drafter reads a larger model's hidden rows as context; here the context is
    the model's own. A block sees the context before its anchor and itself.
    """
    for name, value, least in (("block", block, 2), ("count", count, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not gamma > 0:
        raise ValueError(f"gamma: expected a positive number, got {gamma}")
    batch, length = tokens.shape
    packing = Packing.of(tokens, documents, learn)
    anchors = _anchors(packing, block, count, generator)  # (B, N), -1 for none
    if not bool((anchors >= 0).any()):
        raise ValueError(f"block: expected a document with {block - 1} tokens to learn behind a token, found none")
    step = torch.arange(block, device="cpu")
    at = (anchors.clamp(min=0)[..., None] + step).flatten(1)  # (B, N * block), columns of the context
    targets = tokens.gather(1, at)
    step = step.repeat(anchors.shape[1])  # (N * block,)
    masked = (step > 0) & (anchors >= 0).repeat_interleave(block, 1)
    weight = ((1 - step).float() / gamma).exp().expand_as(targets)
    rows = length + torch.arange(len(step), device="cpu")
    positions = packing.positions.expand(batch, length)
    return Example(
        torch.cat([tokens, targets.masked_fill(step > 0, mask_id)], 1),
        targets,
        masked,
        weight / weight[masked].sum(),
        _drafter_ranges(packing, anchors, block),
        torch.cat([positions, positions.gather(1, at)], 1),
        rows - (step > 0).long(),
        rows,
        forbid_mask,
    )


def _anchors(packing: Packing, block: int, count: int, generator: torch.Generator) -> Tensor:
    """Returns (B, min(count, S)) columns, each followed by block - 1 tokens to learn; -1 where there are no more."""
    length = packing.learn.shape[1]
    column = torch.arange(length, device="cpu")
    before = torch.nn.functional.pad(packing.learn.long().cumsum(1), (1, 0))  # (B, S + 1)
    last = (column + block).clamp(max=length).expand(len(before), -1)
    learned = before.gather(1, last) - before[:, 1:]
    fits = (column + block <= packing.end) & (learned == block - 1)
    drawn = torch.rand(fits.shape, generator=generator, **CPU).masked_fill(~fits, -1).topk(min(count, length), 1)
    return drawn.indices.where(drawn.values >= 0, -1)


def _drafter_ranges(packing: Packing, anchors: Tensor, block: int) -> KeyRanges:
    """Returns the ranges of [context, causal ; blocks]."""
    batch, length = packing.start.shape
    num_keys = length + anchors.shape[1] * block
    until = (torch.arange(length, device="cpu") + 1).expand(batch, length)
    context = torch.stack([packing.start, until, until, until], -1).to(torch.int32)
    blocks = KeyRanges.anchor_blocks(anchors, length, block).bounds.clone()  # (B, N * block, 4)
    start = packing.start.gather(1, anchors.clamp(min=0)).repeat_interleave(block, 1)
    blocks[..., 0] = torch.minimum(start.to(torch.int32), blocks[..., 1])
    return KeyRanges(torch.cat([context, blocks], 1), num_keys)
