"""Block diffusion: [noisy ; clean] in one pass, so that each noisy block sees the clean blocks before it."""

from __future__ import annotations

import torch
from torch import Tensor

from illada_kernels import KeyRanges

from .documents import Packing
from .example import Example
from .noise import CPU, mask_independently, stratified

NOISE = ("count", "block", "document", "all")


def block_diffusion(
    tokens: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    block: int,
    order: Tensor | None = None,
    noise: str = "count",
    clip: tuple[float, float] = (1e-3, 1.0),
    complementary: bool = False,
    documents: Tensor | None = None,
    learn: Tensor | None = None,
    per: str = "tokens",
    causal: str | None = None,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns block diffusion's batch (BD3-LM, arXiv 2503.09573): [noisy ; clean] in one pass.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
    generator : torch.Generator
    block : int
        A divisor of S, unless `documents` are given: blocks restart at each, and its last may be shorter.
    order : int64 (B, S), optional
        The order in which tokens are produced, a permutation of positions (default: left to right). Each token keeps
        its position; with a middle piece moved to the end the model learns to fill a hole from both sides.
    noise : str
        "count": n of a block's m tokens to learn are masked, n uniform on 1 .. m, every subset equally likely, weight
        m / n. "block": a block's tokens are masked with its probability t, weight 1/t (BD3-LM). "document": t is the
        document's (SDAR). "all": every token is masked, weight 1.
    clip : (float, float)
        Of "block" and "document": t is uniform between these (BD3-LM's clipped schedules; LLaDA2.0's mask ratios).
    complementary : bool
        Of "block" and "document": doubles the batch; the second half is masked where the first is not, weight
        1 / (1 - t), and each half weighs one half (Fast-dLLM v2, LLaDA2.0).
    documents, learn, per
        As in `packed`; a prompt is what is not to be learned, and its block shows it clean.
    causal : "clean" or "both", optional
        As in `KeyRanges.block_diffusion`.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`);
        BD3-LM forbids it, SDAR does not.

    Returns
    -------
    Example
        A model with shifted logits is scored as it generates: a block's first token on the clean row before the block.

    Raises
    ------
    ValueError
        For a block, a noise, a clip or a combination that is not among these.

    Notes
    -----
    Levels are stratified over the batch. "count" is BD3-LM's integral over t with weight 1/t, with less variance (as
    LLaDA's, arXiv 2502.09992, equation 6). With it, or with clip (0, 1), the expectation bounds -log p(x) from above,
    a token; for blocks of 1 it equals it. Other clips weigh some t only and bound nothing.
    """
    _check_noise(noise, clip, complementary)
    packing = packing_of(tokens, block, order, documents, learn)
    if order is not None:
        tokens = tokens.gather(1, order)
    masked, weight, inverse = _masks(packing, block, noise, clip, generator)
    weight = weight / packing.denominator(per)
    made = assemble(
        tokens, tokens.masked_fill(masked, mask_id), masked, weight, packing, block, order, causal, forbid_mask
    )
    if not complementary:
        return made
    rest = packing.learn & ~masked
    inverse = inverse / packing.denominator(per)
    other = assemble(
        tokens, tokens.masked_fill(rest, mask_id), rest, inverse, packing, block, order, causal, forbid_mask
    )
    return both(made, other, 0.5)


def packing_of(
    tokens: Tensor, block: int, order: Tensor | None, documents: Tensor | None, learn: Tensor | None
) -> Packing:
    """Returns the packing; raises ValueError for a block that does not fit, or an order of packed documents."""
    length = tokens.shape[1]
    if block < 1 or (documents is None and length % block):
        raise ValueError(f"block: expected a divisor of the sequence length {length}, got {block}")
    if order is not None and (documents is not None or learn is not None):
        raise ValueError("order: expected None with documents or learn, which are given by column")
    return Packing.of(tokens, documents, learn)


def assemble(
    tokens: Tensor,
    noisy: Tensor,
    scored: Tensor,
    weight: Tensor,
    packing: Packing,
    block: int,
    order: Tensor | None,
    causal: str | None,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns the example [noisy ; tokens], scored on its noisy rows."""
    length = tokens.shape[1]
    positions = (packing.positions if order is None else order).repeat(1, 2)
    previous = previous_rows(length, block, clean=length, start=None if packing.whole else packing.start)
    shown = torch.cat([noisy, tokens], dim=1)
    ranges = packing.block_ranges(block, causal)
    return Example(shown, tokens, scored, weight, ranges, positions, previous, forbid_mask=forbid_mask)


def both(first: Example, second: Example, share: float = 1.0) -> Example:
    """Returns the sequences of two examples of one shape as one batch, with weights times `share`."""

    def stack(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return a if a is None or b is None or len(a) == 1 or a.dim() == 1 else torch.cat([a, b])

    ranges = first.key_ranges
    if ranges is not None and second.key_ranges is not None and ranges.bounds.shape[0] > 1:
        ranges = KeyRanges(torch.cat([ranges.bounds, second.key_ranges.bounds]), ranges.num_keys)
    return Example(
        torch.cat([first.tokens, second.tokens]),
        torch.cat([first.targets, second.targets]),
        torch.cat([first.masked, second.masked]),
        torch.cat([first.weight, second.weight]) * share,
        ranges,
        stack(first.positions, second.positions),
        stack(first.previous, second.previous),
        stack(first.rows, second.rows),
        first.forbid_mask,
    )


def _check_noise(noise: str, clip: tuple[float, float], complementary: bool) -> None:
    if noise not in NOISE:
        raise ValueError(f"noise: expected one of {', '.join(NOISE)}, got {noise!r}")
    low, high = clip
    if not 0 <= low <= high <= 1 or high == 0:
        raise ValueError(f"clip: expected 0 <= low <= high <= 1 with high above 0, got {clip}")
    if complementary and noise not in ("block", "document"):
        raise ValueError(f'complementary: expected noise "block" or "document", got {noise!r}')


def _masks(
    packing: Packing, block: int, noise: str, clip: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns masks (B, S), their weights before any denominator, and those of the inverse masks."""
    shape = tuple(packing.learn.shape)
    if noise == "all":
        ones = torch.ones(shape, **CPU)
        return packing.learn, ones, ones
    number = packing.number if noise == "document" else packing.blocks(block)
    count = int(number[-1, -1]) + 1
    if noise == "count":
        size = torch.bincount(number[packing.learn], minlength=count)  # (blocks,) tokens to learn
        drawn = (stratified(count, generator) * size).long().clamp(max=size - 1) + 1
        rank = _rank_in_block(number, packing.learn, generator)
        weight = size.clamp(min=1) / drawn.clamp(min=1).float()
        return (rank < drawn[number]) & packing.learn, weight[number], weight[number]
    t = stratified(count, generator, *clip).clamp(min=1e-6)[number]
    masked = mask_independently(shape, t, generator) & packing.learn  # type: ignore[arg-type]
    return masked, 1 / t, 1 / (1 - t).clamp(min=max(clip[0], 1e-6))


def _rank_in_block(number: Tensor, learn: Tensor, generator: torch.Generator) -> Tensor:
    """Returns each token's place (B, S) in a random order of its block, tokens to learn first."""
    key = torch.rand(number.shape, generator=generator, **CPU).double() + (~learn).double()  # below 2
    order = (number.double() + key / 2).flatten().argsort()
    size = torch.bincount(number.flatten())
    first = size.cumsum(0) - size
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device="cpu") - first[number.flatten()[order]]
    return rank.view_as(number)


def previous_rows(scored: int, block: int, clean: int, start: Tensor | None = None) -> Tensor:
    """Returns the row that predicts each of `scored` noisy tokens in a model with shifted logits, int64 (scored,).

    As in decoding, a block's first token is predicted by the clean token before it, the others by the noisy one before
    them. The clean copy of the first noisy token stands in column `clean`; if no token precedes it, its own row counts.
    With `start` (B, scored), the column at which each token's document begins, the answer is (B, scored).
    """
    i = torch.arange(scored, device="cpu")
    if start is not None:
        inside = i - start
        return torch.where(inside % block == 0, clean + i - 1, i - 1).where(inside > 0, i)
    return torch.where(i % block == 0, clean + i - 1, i - 1).where((i > 0) | (clean > scored), 0)


def hole_order(batch: int, length: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Returns (batch, length) orders: in about `fraction` of the rows a random middle piece comes last.

    Fill-in-the-middle (arXiv 2207.14255) without sentinel tokens, because positions say where the piece belongs.
    """
    order = torch.arange(length, device="cpu").repeat(batch, 1)
    for row in torch.nonzero(torch.rand(batch, generator=generator, **CPU) < fraction).flatten().tolist():
        start, stop = torch.randint(1, length, (2,), generator=generator, device="cpu").sort().values.tolist()
        order[row] = torch.cat([order[row, :start], order[row, stop:], order[row, start:stop]])
    return order
