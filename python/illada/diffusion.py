"""What a model is trained on: corruption of clean tokens, the layout it is shown in, and the weight of every masked
token.

Each objective turns clean tokens x (B, S) into an `Example`; the loss is the same for all,

    loss = sum over masked i of weight_i * CE(hidden_i @ head.T, x_i) = masked_loss(hidden, head, targets, masked,
    weight),

with the denominator in the weights and counted over the whole batch, so that gradients do not depend on how masks fall.
Randomness comes from the generator given, on the CPU: a batch is the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illada_kernels import KeyRanges, masked_loss

from .model import Model


@dataclass(frozen=True)
class Example:
    """One batch. tokens (B, T), positions (1 or B, T) and key_ranges go into the model; the first S of its T rows are
    scored against targets (B, S) where masked (B, S), times weight (B, S) float32."""

    tokens: Tensor
    targets: Tensor
    masked: Tensor
    weight: Tensor
    key_ranges: KeyRanges | None = None
    positions: Tensor | None = None

    def to(self, device: torch.device | str) -> Example:
        moved = (None if x is None else x.to(device) for x in (self.key_ranges, self.positions))
        return Example(*(x.to(device) for x in (self.tokens, self.targets, self.masked, self.weight)), *moved)  # type: ignore[arg-type]

    def loss(self, model: Model, reduction: str = "sum") -> Tensor:
        """float32; `reduction="none"` gives the weighted losses (B, S)."""
        scored = self.targets.shape[1]
        hidden = model(self.tokens, self.key_ranges, self.positions)[:, :scored]
        forbid = () if model.config.mask_id < 0 else (model.config.mask_id,)
        return masked_loss(
            hidden, model.head_weight, self.targets, self.masked, self.weight, reduction=reduction, forbid=forbid
        )


# ---- noise levels and masks ---------------------------------------------------------------------------------------


def stratified(count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """(count,) float32 in [low, high), one in each of `count` equal slices, in random order.

    Low-discrepancy noise levels (Kingma et al., arXiv 2107.00630, appendix I.1): u_i = (u + i / count) mod 1. Each is
    uniform, and their average over the batch hardly varies, which takes most of the noise of the level out of the
    loss."""
    u = (torch.rand((), generator=generator) + torch.arange(count) / max(count, 1)) % 1
    return low + (high - low) * u[torch.randperm(count, generator=generator)]


def mask_independently(shape: tuple[int, int], p: Tensor, generator: torch.Generator) -> Tensor:
    """(B, S) bool, True with probability p (B, 1), token by token."""
    return torch.rand(shape, generator=generator) < p


def mask_count(counts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """(N, length) bool with exactly counts[i] True in row i, all such subsets equally likely."""
    rank = torch.rand(len(counts), length, generator=generator).argsort(1).argsort(1)
    return rank < counts[:, None]


def cart_weight(masked: Tensor, p: float = 0.3) -> Tensor:
    """Dream's context-adaptive weight (B, S): w_i = 1/2 * sum over unmasked j != i of p * (1 - p)**(|i - j| - 1).

    A masked token counts by how much clean text is near it, instead of by 1/t (Dream 7B, arXiv 2508.15487, section 3).
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
    """LLaDA's pre-training (arXiv 2502.09992, equation 3): p = (1 - eps) u + eps for each sequence, every token
    masked with probability p, weight 1 / (p * B * S). Its expectation is an upper bound of -log p(x) / S.

    weighting: "llada" as above; "mdlm" the same with eps = 0 in p and the mask's own rate t >= 1/S as weight (MDLM,
    arXiv 2406.07524: -alpha'/(1 - alpha) = 1/t for the linear schedule); "cart" Dream's `cart_weight` / (B * S),
    which is no bound. complementary: the batch doubles, the second half being masked exactly where the first is not
    with weight 1 / (1 - p) (LLaDA2.0, Fast-dLLM v2: every token is learned from in every step); both halves weigh one
    half."""
    if weighting not in ("llada", "mdlm", "cart"):
        raise ValueError(f"weighting: expected 'llada', 'mdlm' or 'cart', got {weighting!r}")
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
    """LLaDA's fine-tuning (arXiv 2502.09992, section 2.3): the prompt is kept, the rest (answer, then end-of-text ids
    to the right, which are learned too) is masked with probability p; weight 1 / (p * answer length * B). tokens (B,
    S), prompt_lengths (B,); the answer's length is S - prompt_lengths, at least 1. SDAR normalises the same way."""
    batch, length = tokens.shape
    answer = length - prompt_lengths[:, None]  # (B, 1)
    if bool((answer < 1).any()):
        raise ValueError(f"prompt_lengths: expected at most {length - 1}, so that something is left to learn from")
    p = (1 - eps) * stratified(batch, generator)[:, None] + eps
    masked = mask_independently((batch, length), p, generator) & (torch.arange(length) >= prompt_lengths[:, None])
    weight = (1 / (p * answer * batch)).expand_as(tokens)
    return Example(tokens.masked_fill(masked, mask_id), tokens, masked, weight)


def block_diffusion(
    tokens: Tensor, mask_id: int, generator: torch.Generator, *, block: int, order: Tensor | None = None
) -> Example:
    """Block diffusion (BD3-LM, arXiv 2503.09573): [noisy ; clean] in one pass, each block noised on its own.

    A block of b tokens has n of them masked, n uniform on 1 .. b and stratified over the batch, every subset equally
    likely, weight b / n: in expectation exactly BD3-LM's integral over t with weight 1/t, as for LLaDA (arXiv
    2502.09992, equation 6), with less variance. Divided by B * S. The expectation bounds -log p(x) / S from above,
    and is -log p(x) / S itself for b = 1.

    order (B, S): the order in which tokens are produced, as positions in the text (a permutation; default left to
    right). Each token keeps its position, whenever its turn comes: with a middle piece moved to the end the model
    learns to fill a hole from both sides. S must be a multiple of block."""
    batch, length = tokens.shape
    if block < 1 or length % block:
        raise ValueError(f"block: expected a divisor of the sequence length {length}, got {block}")
    positions = torch.arange(length)[None] if order is None else order
    if order is not None:
        tokens = tokens.gather(1, order)
    level = stratified(batch * (length // block), generator)
    count = (level * block).long().clamp(max=block - 1) + 1  # (B * S / b,)
    masked = mask_count(count, block, generator).view(batch, length)
    weight = (block / count).repeat_interleave(block).view(batch, length) / tokens.numel()
    return Example(
        torch.cat([tokens.masked_fill(masked, mask_id), tokens], dim=1),
        tokens,
        masked,
        weight,
        KeyRanges.block_diffusion(length, block),
        positions.repeat(1, 2),
    )


def hole_order(batch: int, length: int, fraction: float, generator: torch.Generator) -> Tensor:
    """(batch, length): for about `fraction` of the rows a random middle piece comes last, the others run left to right.

    FIM (arXiv 2207.14255) without sentinel tokens: the positions say where the piece belongs.
    """
    order = torch.arange(length).repeat(batch, 1)
    for row in torch.nonzero(torch.rand(batch, generator=generator) < fraction).flatten().tolist():
        start, stop = torch.randint(1, length, (2,), generator=generator).sort().values.tolist()
        order[row] = torch.cat([order[row, :start], order[row, stop:], order[row, start:stop]])
    return order
