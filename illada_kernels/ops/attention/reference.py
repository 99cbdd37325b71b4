"""Attention in plain PyTorch: the specification that every other backend is tested against.

    s = scale * q k^T, -inf where a row may not attend;  lse = log sum exp s;  p = exp(s - lse);  out = p v
    dv = p^T dout;  dp = dout v^T;  ds = p * (dp - sum_k p dp + dlse);  dq = scale * ds k;  dk = scale * ds^T q

Computes in float32, in float64 for float64 inputs, and stores the whole (B, Hq, Sq, Sk) score matrix. A row that may
attend to no key gives out = 0, lse = -inf and no gradient. What such a row holds, and what keys hold that no row of
their batch entry may attend to, is replaced by zero before any product, so that not even NaN or inf reaches a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...key_ranges import KeyRanges


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), bounds int32 (B or 1, Sq or 1, 4) or None for full: out,
    lse.

    out (B, Sq, Hq, Dv) has q's dtype; lse (B, Hq, Sq) is float32, float64 for float64 inputs.
    """
    with torch.autocast(q.device.type, enabled=False):
        allowed, rows, keys = _masks(k, bounds)
        q_, k_, v_ = _heads(q, rows, 1), _heads(k, keys, _group(q, k)), _heads(v, keys, _group(q, k))
        scores = _scores(q_, k_, allowed, scale)
        lse = scores.logsumexp(-1)  # (B, Hq, Sq)
        out = _probabilities(scores, lse) @ v_  # (B, Hq, Sq, Dv)
        return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum of out * dout and lse * dlse: dq, dk, dv, each with the shape and dtype of its tensor. `out`
    is not read."""
    with torch.autocast(q.device.type, enabled=False):
        allowed, rows, keys = _masks(k, bounds)
        group = _group(q, k)
        q_, k_, v_, dout_ = _heads(q, rows, 1), _heads(k, keys, group), _heads(v, keys, group), _heads(dout, rows, 1)
        p = _probabilities(_scores(q_, k_, allowed, scale), lse)  # (B, Hq, Sq, Sk)
        dp = dout_ @ v_.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        if dlse is not None:
            ds = ds + p * torch.where(lse == -torch.inf, 0, dlse)[..., None]
        dq, dk, dv = scale * (ds @ k_), scale * (ds.mT @ q_), p.mT @ dout_  # per query head
        return _grad(dq, q), _grad(dk, k), _grad(dv, v)


def _masks(k: Tensor, bounds: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Which pairs (B or 1, 1, Sq or 1, Sk) attend, which rows (B or 1, Sq or 1) and which keys (B or 1, Sk) do so at
    all. None: all."""
    if bounds is None:
        return None, None, None
    allowed = KeyRanges(bounds, k.shape[1]).dense()
    return allowed[:, None], allowed.any(2), allowed.any(1)


def _group(q: Tensor, k: Tensor) -> int:
    """Query heads per key head."""
    return q.shape[2] // k.shape[2]


def _heads(x: Tensor, used: Tensor | None, group: int) -> Tensor:
    """(B, S, H, D) -> (B, H * group, S, D) in the working precision, zero where not used."""
    if used is not None:
        x = torch.where(used[:, :, None, None], x, 0)
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).repeat_interleave(group, dim=1)


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    scores = scale * (q @ k.mT)  # (B, Hq, Sq, Sk)
    return scores if allowed is None else torch.where(allowed, scores, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), 0 in a row without keys, whose s and lse are all -inf."""
    return (scores - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()


def _grad(per_query_head: Tensor, x: Tensor) -> Tensor:
    """(B, Hq, S, D) -> the gradient of x (B, S, H, D): summed over the query heads that share a head of x."""
    batch, s, heads, dim = x.shape
    summed = per_query_head.reshape(batch, heads, per_query_head.shape[1] // heads, s, dim).sum(2)
    return summed.transpose(1, 2).to(x.dtype).contiguous()
