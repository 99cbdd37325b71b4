"""The noise of unmask in plain PyTorch: a function of (seed, step, position, token id) alone.

Philox counters are (c0, position, step, use): use 0 and c0 = id // 2 for Gumbel noise, c0 = 0 and use 1 for the random
confidence, 2 for ranks, 3 for what Renoise draws again. csrc/include/illada/philox.h is the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes Philox-4x32-10 of the counter (c0, c1, c2, c3) under the key (low, high) of seed: four words below 2**32
    in int64. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Integer products wrap, which leaves
    their bits right."""
    k0, k1 = seed, seed >> 32  # bits above the lowest 32 go with each round's
    c0, c1, c2 = c0 & MASK32, c1 & MASK32, c2 & MASK32
    w3: Tensor | int = c3
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, w3 = (p1 >> 32 ^ c1 ^ k0) & MASK32, p1 & MASK32, (p0 >> 32 ^ w3 ^ k1) & MASK32, p0 & MASK32
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    assert isinstance(w3, Tensor)
    return c0, c1, c2, w3


def philox_unit(words: tuple[Tensor, ...]) -> Tensor:
    """Returns (high << 32 | low) * 2**-64 in float32, rounded once, to nearest: halving keeps a signed integer
    positive, and the bit shifted out stays behind as a sticky bit."""
    u = words[0] << 32 | words[1]
    positive = torch.where(u >= 0, u, u >> 1 & 0x7FFFFFFFFFFFFFFF | u & 1).float()
    return torch.where(u >= 0, positive, positive * 2) * 2.0**-64


def gumbel(seed: Tensor, position: Tensor, step: Tensor, vocab: int) -> Tensor:
    """Returns (N, V) Gumbel noise, float32. seed, position, step: (N, 1) int64. The winning tail lies at u near 0,
    where float32 is dense."""
    pairs = torch.arange((vocab + 1) // 2, device=seed.device)
    w0, w1, w2, w3 = philox(seed, pairs, position, step, 0)
    both = torch.stack([philox_unit((w0, w1)), philox_unit((w2, w3))], dim=-1)
    return gumbel_of_unit(both.flatten(1)[:, :vocab])


def gumbel_of(words: tuple[Tensor, ...]) -> Tensor:
    return gumbel_of_unit(philox_unit(words))


def gumbel_of_unit(u: Tensor) -> Tensor:
    return -torch.log(-torch.log1p(-u.clamp(min=2.0**-64)))


def scaled(words: tuple[Tensor, ...], vocab: int) -> Tensor:
    """Returns floor((w0 << 32 | w1) * vocab / 2**64), uniform in [0, vocab); exact, because vocab < 2**31."""
    return words[0] * vocab + (words[1] * vocab >> 32) >> 32
