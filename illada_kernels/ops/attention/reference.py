"""Attention in plain PyTorch: the specification that every other backend is tested against.

    s = scale * q k^T, -inf where a row may not attend;  lse = log sum exp s;  p = exp(s - lse);  out = p v
    dv = p^T dout;  dp = dout v^T;  ds = p * (dp - sum_k p dp + dlse);  dq = scale * ds k;  dk = scale * ds^T q

Computes in float32, in float64 for float64 inputs, and stores the whole (B, Hq, Sq, Sk) score matrix. A row that may
attend to no key gives out = 0, lse = -inf and no gradient. What such a row holds, and what keys hold that no row of
their batch entry may attend to, is replaced by zero before any product, so that not even NaN or inf reaches a result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...key_ranges import KeyRanges
from .problem import Problem, upstream


def available() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq) in float32, float64 for float64 inputs."""
    q, k, v = problem.q, problem.k, problem.v
    with torch.autocast(q.device.type, enabled=False):
        allowed, rows, keys = masks(problem)
        group = q.shape[2] // k.shape[2]
        q_, k_, v_ = grouped(q, rows, 1), grouped(k, keys, group), grouped(v, keys, group)
        s = scores(q_, k_, allowed, problem.scale)
        lse = s.logsumexp(-1)  # (B, Hq, Sq)
        out = probabilities(s, lse) @ v_  # (B, Hq, Sq, Dv)
        return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool] = (True, True, True),
    some_keys: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of the sum of out * dout and lse * dlse: dq, dk, dv, each with the shape and dtype of its
    tensor. Does not read `out`, unless out and lse are of more keys than k holds (`some_keys`): the other backends
    read it always."""
    q, k, v = problem.q, problem.k, problem.v
    with torch.autocast(q.device.type, enabled=False):
        allowed, rows, keys = masks(problem)
        group = q.shape[2] // k.shape[2]
        q_, k_, v_ = grouped(q, rows, 1), grouped(k, keys, group), grouped(v, keys, group)
        dout_ = grouped(upstream(dout, out), rows, 1)
        p = probabilities(scores(q_, k_, allowed, problem.scale), lse)  # (B, Hq, Sq, Sk)
        dp = dout_ @ v_.mT
        delta = grouped(out, rows, 1) * dout_ if some_keys else p * dp
        ds = p * (dp - delta.sum(-1, keepdim=True))
        if dlse is not None:
            ds = ds + p * torch.where(lse == -torch.inf, 0, dlse)[..., None]
        dq, dk, dv = problem.scale * (ds @ k_), problem.scale * (ds.mT @ q_), p.mT @ dout_  # per query head
        return _grad(dq, q), _grad(dk, k), _grad(dv, v)


def masks(problem: Problem) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns which pairs (B or 1, 1, Sq or 1, Sk) attend, and which rows (B or 1, Sq or 1) and keys (B or 1, Sk) do so
    at all. None: all."""
    if problem.bounds is None:
        return None, None, None
    allowed = KeyRanges(problem.bounds, problem.k.shape[1]).dense()
    return allowed[:, None], allowed.any(2), allowed.any(1)


def grouped(x: Tensor, used: Tensor | None, group: int) -> Tensor:
    """Returns x (B, S, H, D) as (B, H * group, S, D) in the working precision, zero where not used."""
    if used is not None:
        x = torch.where(used[:, :, None, None], x, 0)
    return x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).repeat_interleave(group, dim=1)


def scores(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Returns scale * q k^T (B, Hq, Sq, Sk), -inf where a row may not attend."""
    s = scale * (q @ k.mT)
    return s if allowed is None else torch.where(allowed, s, -torch.inf)


def probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """Returns exp(s - lse), 0 in a row without keys, whose s and lse are all -inf."""
    return (s - torch.where(lse == -torch.inf, 0, lse)[..., None]).exp()


def _grad(per_query_head: Tensor, x: Tensor) -> Tensor:
    """Returns (B, Hq, S, D) as the gradient of x (B, S, H, D): summed over the query heads that share a head of x."""
    batch, s, heads, dim = x.shape
    summed = per_query_head.reshape(batch, heads, per_query_head.shape[1] // heads, s, dim).sum(2)
    return summed.transpose(1, 2).to(x.dtype).contiguous()
