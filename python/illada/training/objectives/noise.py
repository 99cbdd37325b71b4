"""Noise levels, masks, and the weight of a masked token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Whatever torch's default device and dtype are, a batch is the same.
CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def stratified(count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Returns (count,) float32 in [low, high), one in each of `count` equal slices, in random order.

    u_i = (u + i / count) mod 1 (Kingma et al., arXiv 2107.00630, appendix I.1; MDLM and BD3-LM call the levels
    antithetic). Each level is uniform and their mean hardly varies, so most of the level's noise leaves the loss.
    """
    slices = torch.arange(count, **CPU) / max(count, 1)
    u = (torch.rand((), generator=generator, **CPU) + slices) % 1
    return low + (high - low) * u[torch.randperm(count, generator=generator, device="cpu")]


def mask_independently(shape: tuple[int, int], p: Tensor, generator: torch.Generator) -> Tensor:
    """Returns (B, S) bool, each True with probability p (B, 1) or (B, S)."""
    return torch.rand(shape, generator=generator, **CPU) < p


def mask_count(counts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Returns (N, length) bool with exactly counts[i] True in row i, all such subsets equally likely."""
    rank = torch.rand(len(counts), length, generator=generator, **CPU).argsort(1).argsort(1)
    return rank < counts[:, None]


def cart_weight(masked: Tensor, p: float = 0.3) -> Tensor:
    """Returns Dream's weight (B, S): w_i = 1/2 * sum over unmasked j != i of p * (1 - p)**(|i - j| - 1).

    A masked token counts by the clean text near it instead of by 1/t (Dream 7B, arXiv 2508.15487, section 3). Each side
    is a linear recurrence, so time and memory are O(S).
    """
    clean = (~masked).float()
    return 0.5 * p * (_decayed_sum(clean, 1 - p) + _decayed_sum(clean.flip(1), 1 - p).flip(1))


def _decayed_sum(x: Tensor, decay: float, chunk: int = 64) -> Tensor:
    """Returns y (B, S) with y_i = sum over j < i of decay**(i - j - 1) * x_j: a matmul a chunk, a scan over chunks."""
    batch, length = x.shape
    x = torch.nn.functional.pad(x, (0, -length % chunk)).unflatten(1, (-1, chunk))  # (B, N, chunk)
    at = torch.arange(chunk, device=x.device)
    distance = at - at[:, None]  # (j, i)
    inside = x @ torch.where(distance > 0, decay ** (distance - 1).clamp(min=0).float(), 0.0)
    last = x @ decay ** (chunk - 1 - at).float()  # (B, N), what a chunk hands on
    carries = [torch.zeros_like(last[:, 0])] if length else []
    for n in range(x.shape[1] - 1):
        carries.append(carries[-1] * decay**chunk + last[:, n])
    if not carries:
        return x.new_zeros(batch, length)
    return (inside + torch.stack(carries, 1)[..., None] * decay ** at.float()).flatten(1)[:, :length]
