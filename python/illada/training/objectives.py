"""Objectives: each corrupts clean tokens x (B, S) and returns an `Example`, with a weight for every masked token.

The loss is the same for all, loss = sum over masked i of weight_i * CE(hidden_i @ head.T, x_i). The denominator is in
the weights and counts the whole batch, otherwise gradients would depend on how masks fall. Random numbers come from the
given CPU generator, so a batch is the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illada_kernels import KeyRanges, masked_loss

from ..model import Model

WEIGHTINGS = ("llada", "mdlm", "cart")
# Whatever torch's default device and dtype are, a batch is the same.
_CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


@dataclass(frozen=True)
class Example:
    """A corrupted batch. The first S of the model's T rows are scored against the targets where masked."""

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, S) int64
    masked: Tensor  # (B, S) bool
    weight: Tensor  # (B, S) float32
    key_ranges: KeyRanges | None = None
    positions: Tensor | None = None  # (1 or B, T) int64
    previous: Tensor | None = None  # (S,) int64, the rows that predict the targets of a model with shifted logits

    def to(self, device: torch.device | str) -> Example:
        """Returns the batch on a device."""
        moved = (None if x is None else x.to(device) for x in (self.key_ranges, self.positions, self.previous))
        return Example(*(x.to(device) for x in (self.tokens, self.targets, self.masked, self.weight)), *moved)  # type: ignore[arg-type]

    def loss(self, model: Model, reduction: str = "sum", forbid_mask: bool | None = None) -> Tensor:
        """Returns the weighted sum, a float32 scalar; with reduction "none" the weighted losses (B, S).

        forbid_mask: whether the mask's logit is -inf; None is what the model's configuration says.
        """
        c = model.config
        if c.shifted_logits and self.previous is not None:
            hidden = model.unshifted(self.tokens, self.key_ranges, self.positions)[:, self.previous]
        else:
            hidden = model(self.tokens, self.key_ranges, self.positions)[:, : self.targets.shape[1]]
        forbid = (c.mask_id,) if (c.forbid_mask if forbid_mask is None else forbid_mask) and c.mask_id >= 0 else ()
        return masked_loss(
            hidden, model.head_weight, self.targets, self.masked, self.weight, reduction=reduction, forbid=forbid
        )


# ---- noise levels and masks ---------------------------------------------------------------------------------------


def stratified(count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Returns (count,) float32 in [low, high), one in each of `count` equal slices, in random order.

    u_i = (u + i / count) mod 1 (Kingma et al., arXiv 2107.00630, appendix I.1). Each level is uniform and their mean
    hardly varies, so most of the level's noise leaves the loss.
    """
    slices = torch.arange(count, **_CPU) / max(count, 1)
    u = (torch.rand((), generator=generator, **_CPU) + slices) % 1
    return low + (high - low) * u[torch.randperm(count, generator=generator, device="cpu")]


def mask_independently(shape: tuple[int, int], p: Tensor, generator: torch.Generator) -> Tensor:
    """Returns (B, S) bool, each True with probability p (B, 1)."""
    return torch.rand(shape, generator=generator, **_CPU) < p


def mask_count(counts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Returns (N, length) bool with exactly counts[i] True in row i, all such subsets equally likely."""
    rank = torch.rand(len(counts), length, generator=generator, **_CPU).argsort(1).argsort(1)
    return rank < counts[:, None]


def cart_weight(masked: Tensor, p: float = 0.3) -> Tensor:
    """Returns Dream's weight (B, S): w_i = 1/2 * sum over unmasked j != i of p * (1 - p)**(|i - j| - 1).

    A masked token counts by the clean text near it instead of by 1/t (Dream 7B, arXiv 2508.15487, section 3).
    """
    at = torch.arange(masked.shape[1], device=masked.device)
    distance = (at[:, None] - at).abs()  # (S, S)
    kernel = 0.5 * p * (1 - p) ** (distance - 1).clamp(min=0).float() * (distance > 0)
    return (~masked).float() @ kernel


# ---- objectives ---------------------------------------------------------------------------------------------------


def full_sequence(
    tokens: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    eps: float = 1e-3,
    weighting: str = "llada",
    complementary: bool = False,
) -> Example:
    """Returns LLaDA's pre-training batch: every token masked with a probability p of its sequence.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
    generator : torch.Generator
    eps : float
        Smallest p: p = (1 - eps) u + eps with u uniform.
    weighting : str
        "llada": 1 / (p * B * S) (arXiv 2502.09992, equation 3). "mdlm": the same with p = max(u, 1 / S) (MDLM, arXiv
        2406.07524, whose -alpha'/(1 - alpha) is 1/t for the linear schedule). "cart": Dream's `cart_weight` / (B * S).
    complementary : bool
        Doubles the batch; the second half is masked where the first is not, with 1 - p for p (LLaDA2.0, Fast-dLLM v2).
        Each half weighs one half, so every token is learned in every step.

    Returns
    -------
    Example

    Raises
    ------
    ValueError
        For an unknown weighting.

    Notes
    -----
    With "llada" and "mdlm" the loss's expectation is an upper bound of -log p(x) / S; with "cart" it is not a bound.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    batch, length = tokens.shape
    u = stratified(batch, generator)[:, None]  # (B, 1)
    p = u.clamp(min=1 / length) if weighting == "mdlm" else (1 - eps) * u + eps
    masked = mask_independently((batch, length), p, generator)
    if complementary:
        rest = (1 - p).clamp(min=eps)
        tokens, masked, p = torch.cat([tokens, tokens]), torch.cat([masked, ~masked]), torch.cat([p, rest])
    weight = cart_weight(masked) if weighting == "cart" else (1 / p).expand_as(tokens)
    return Example(tokens.masked_fill(masked, mask_id), tokens, masked, weight / tokens.numel())


def sft(
    tokens: Tensor, prompt_lengths: Tensor, mask_id: int, generator: torch.Generator, *, eps: float = 1e-3
) -> Example:
    """Returns LLaDA's fine-tuning batch: prompts are kept, answers masked with probability p.

    Parameters
    ----------
    tokens : int64 (B, S)
        Prompt, answer, then end-of-text ids, which count as answer and are learned too.
    prompt_lengths : int64 (B,)
        At most S - 1; the answer's length is S - prompt_lengths.
    mask_id : int
    generator : torch.Generator
    eps : float
        Smallest p.

    Returns
    -------
    Example
        Weight 1 / (p * answer length * B) (arXiv 2502.09992, section 2.3; SDAR normalises the same way).

    Raises
    ------
    ValueError
        If a prompt leaves no answer.
    """
    batch, length = tokens.shape
    answer = length - prompt_lengths[:, None]  # (B, 1)
    if bool((answer < 1).any()):
        raise ValueError(f"prompt_lengths: expected at most {length - 1}, so that something is left to learn from")
    p = (1 - eps) * stratified(batch, generator)[:, None] + eps
    masked = mask_independently((batch, length), p, generator) & (
        torch.arange(length, device="cpu") >= prompt_lengths[:, None]
    )
    weight = (1 / (p * answer * batch)).expand_as(tokens)
    return Example(tokens.masked_fill(masked, mask_id), tokens, masked, weight)


def block_diffusion(
    tokens: Tensor, mask_id: int, generator: torch.Generator, *, block: int, order: Tensor | None = None
) -> Example:
    """Returns block diffusion's batch (BD3-LM, arXiv 2503.09573): [noisy ; clean] in one pass, noise per block.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
    generator : torch.Generator
    block : int
        A divisor of S.
    order : int64 (B, S), optional
        The order in which tokens are produced, a permutation of positions (default: left to right). Each token keeps
        its position; with a middle piece moved to the end the model learns to fill a hole from both sides.

    Returns
    -------
    Example

    Raises
    ------
    ValueError
        If block does not divide S.

    Notes
    -----
    n of a block's b tokens are masked, n uniform on 1 .. b and stratified over the batch, every subset equally likely,
    weight b / (n * B * S). The expectation is BD3-LM's integral over t with weight 1/t, with less variance (as LLaDA's,
    arXiv 2502.09992, equation 6). It bounds -log p(x) / S from above; for b = 1 it equals it.
    """
    batch, length = tokens.shape
    if block < 1 or length % block:
        raise ValueError(f"block: expected a divisor of the sequence length {length}, got {block}")
    positions = torch.arange(length, device="cpu")[None] if order is None else order
    if order is not None:
        tokens = tokens.gather(1, order)
    level = stratified(batch * (length // block), generator)
    count = (level * block).long().clamp(max=block - 1) + 1  # (B * S / b,)
    masked = mask_count(count, block, generator).view(batch, length)
    weight = (block / count.float()).repeat_interleave(block).view(batch, length) / tokens.numel()
    return Example(
        torch.cat([tokens.masked_fill(masked, mask_id), tokens], dim=1),
        tokens,
        masked,
        weight,
        KeyRanges.block_diffusion(length, block, device="cpu"),
        positions.repeat(1, 2),
        previous_rows(length, block, clean=length),
    )


def previous_rows(scored: int, block: int, clean: int) -> Tensor:
    """Returns the row that predicts each of `scored` noisy tokens in a model with shifted logits, int64 (scored,).

    As in decoding, a block's first token is predicted by the clean token before it, the others by the noisy one before
    them. The clean copy of the first noisy token stands in column `clean`; if no token precedes it, its own row counts.
    """
    i = torch.arange(scored, device="cpu")
    return torch.where(i % block == 0, clean + i - 1, i - 1).where((i > 0) | (clean > scored), 0)


def hole_order(batch: int, length: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Returns (batch, length) orders: in about `fraction` of the rows a random middle piece comes last.

    Fill-in-the-middle (arXiv 2207.14255) without sentinel tokens, because positions say where the piece belongs.
    """
    order = torch.arange(length, device="cpu").repeat(batch, 1)
    for row in torch.nonzero(torch.rand(batch, generator=generator, **_CPU) < fraction).flatten().tolist():
        start, stop = torch.randint(1, length, (2,), generator=generator, device="cpu").sort().values.tolist()
        order[row] = torch.cat([order[row, :start], order[row, stop:], order[row, start:stop]])
    return order
