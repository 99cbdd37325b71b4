"""Objectives whose noise is not a mask: edits, replaced tokens, a canvas of random tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .blocks import assemble, both, packing_of
from .example import Example
from .noise import CPU, mask_independently, stratified
from .sequence import full_sequence


def random_ids(shape: tuple[int, ...], mask_id: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Returns int64 ids, uniform on 0 .. vocab_size - 1 without the mask (mask_id -1: there is none)."""
    ids = torch.randint(0, vocab_size - (mask_id >= 0), shape, generator=generator, device="cpu")
    return ids + (ids >= mask_id).long() if mask_id >= 0 else ids


def edit(
    tokens: Tensor,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    *,
    most: float = 0.1,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns Seed Diffusion's edited batch: k random edits of each sequence, which the model takes back.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
    vocab_size : int
    generator : torch.Generator
    most : float
        Largest share of tokens that are edited: k = floor(S * a), a uniform on [0, most].
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`).

    Returns
    -------
    Example
        Every token is scored against x, weight 1 / (B * S).

    Notes
    -----
    loss = -E log p(x | x_t), unweighted, on all positions (Seed Diffusion, arXiv 2508.02193). An edit inserts, deletes
    or substitutes a token, each with probability 1/3, at a uniform place, with a uniform id. How the paper maps
    insertions and deletions to targets of equal length is not public. Here column i has target x_i, what hangs over the
    end is cut, and what is missing at the end is shown as masks.
    """
    if not 0 <= most <= 1:
        raise ValueError(f"most: expected a number from 0 to 1, got {most}")
    batch, length = tokens.shape
    edits = (stratified(batch, generator, 0, most) * length).long().tolist()
    shown = torch.full_like(tokens, mask_id)
    for row, (text, count) in enumerate(zip(tokens.tolist(), edits)):
        kinds = torch.randint(0, 3, (count,), generator=generator, device="cpu").tolist()
        places = torch.rand(count, generator=generator, device="cpu", dtype=torch.float64).tolist()
        ids = random_ids((count,), mask_id, vocab_size, generator).tolist()
        for kind, place, new in zip(kinds, places, ids):
            _edit_once(text, kind, place, new)
        kept = text[:length]
        shown[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64, device="cpu")
    every = torch.ones(batch, length, dtype=torch.bool, device="cpu")
    weight = torch.full((batch, length), 1 / tokens.numel(), **CPU)
    return Example(shown, tokens, every, weight, forbid_mask=forbid_mask)


def _edit_once(text: list[int], kind: int, place: float, new: int) -> None:
    """Inserts (kind 0), deletes (1) or substitutes (2) a token of `text` in place, at share `place` of its places."""
    if kind == 0:
        text.insert(int(place * (len(text) + 1)), new)
    elif text:
        at = int(place * len(text))
        text[at : at + 1] = [new] if kind == 2 else []


def seed_diffusion(
    tokens: Tensor,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    *,
    done: float,
    most: float = 0.1,
    edits_from: float = 0.8,
    eps: float = 1e-3,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns Seed Diffusion's batch: masks, and from `edits_from` of the run on edits too, as a second half.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id, vocab_size : int
    generator : torch.Generator
    done : float
        Share of the run that is over, 0 .. 1.
    most, eps
        As in `edit` and `full_sequence`.
    edits_from : float
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`).

    Returns
    -------
    Example
        The loss is the sum of both terms (arXiv 2508.02193).
    """
    masks = full_sequence(tokens, mask_id, generator, eps=eps, forbid_mask=forbid_mask)
    return masks if done < edits_from else both(masks, edit(tokens, mask_id, vocab_size, generator, most=most))


def token_to_token(
    example: Example,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    *,
    rate: float = 0.1,
    weight: float = 1.0,
    learn: Tensor | None = None,
) -> Example:
    """Adds LLaDA2.1's editing to a masked batch: visible tokens become random ones, and the model takes them back.

    Parameters
    ----------
    example : Example
        Of `full_sequence`, `packed`, `sft` or `block_diffusion`, whose `forbid_mask` stays.
    mask_id, vocab_size : int
    generator : torch.Generator
    rate : float
        Probability that a visible token is replaced by a uniform id, which may be its own.
    weight : float
        Factor of the replaced tokens' cross-entropy.
    learn : bool (B, S), optional
        Tokens that may be replaced: with prompts or padding what the example was made with. None: all.

    Returns
    -------
    Example
        The example's loss plus weight * CE(x_i) / tokens to learn, over replaced tokens i.

    Raises
    ------
    ValueError
        For an example whose scored rows are not its first ones, or a rate outside 0 .. 1.

    Notes
    -----
    Source: LLaDA2.1's report (mask-to-token and token-to-token in one pass). `illada_kernels.Edit` decodes with it.
    """
    if example.rows is not None:
        raise ValueError("example: expected one whose first rows are scored, such as block_diffusion's")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a number from 0 to 1, got {rate}")
    shape = tuple(example.targets.shape)
    learn = torch.ones(shape, dtype=torch.bool, device="cpu") if learn is None else learn
    chosen = mask_independently(shape, torch.full((1, 1), rate, **CPU), generator)  # type: ignore[arg-type]
    replaced = chosen & learn & ~example.masked
    new = random_ids(shape, mask_id, vocab_size, generator)
    noisy = torch.where(replaced, new, example.tokens[:, : shape[1]])
    return dataclasses.replace(
        example,
        tokens=torch.cat([noisy, example.tokens[:, shape[1] :]], 1),
        masked=example.masked | replaced,
        weight=example.weight.where(~replaced, weight / learn.sum().float()),
    )


def uniform_canvas(
    tokens: Tensor,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    *,
    block: int,
    causal: str | None = "clean",
    documents: Tensor | None = None,
    learn: Tensor | None = None,
    per: str = "tokens",
    forbid_mask: bool | None = None,
) -> Example:
    """Returns DiffusionGemma's batch, [canvas ; clean]: each canvas block is partly random, and all of it is learned.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
        Never drawn; -1 where the model has none.
    vocab_size : int
    generator : torch.Generator
    block : int
        Tokens of a canvas.
    causal : "clean" or None
        "clean": clean rows are causal, as the encoder is. A canvas sees itself and the clean tokens before it.
    documents, learn, per
        As in `block_diffusion`.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`).

    Returns
    -------
    Example

    Notes
    -----
    loss = mean of CE(row i, x_i) over all canvas positions. A block's tokens are replaced by uniform ids with its
    probability t, uniform on (0, 1) and stratified over the batch; t = 1 is the canvas that generation begins with.
    Source: transformers' models/diffusion_gemma, which has the loss and the mask; its distribution of t is not public.
    """
    packing = packing_of(tokens, block, None, documents, learn)
    number = packing.blocks(block)
    t = stratified(int(number[-1, -1]) + 1, generator)[number]
    shape = tuple(tokens.shape)
    replaced = mask_independently(shape, t, generator) & packing.learn  # type: ignore[arg-type]
    noisy = torch.where(replaced, random_ids(shape, mask_id, vocab_size, generator), tokens)
    weight = 1 / packing.denominator(per)
    return assemble(tokens, noisy, packing.learn, weight, packing, block, None, causal, forbid_mask)
