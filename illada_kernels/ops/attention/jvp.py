"""The forward-mode derivative of attention, in plain PyTorch on every device.

    dp = p * (ds - sum_k p ds), ds = scale * (dq k^T + q dk^T);   dout = dp v + p dv;   dlse = sum_k p ds

with p = exp(s - lse) rebuilt from the forward's lse. Works on slices of queries, so that at most 64 MiB of scores are
held at once.
"""

import torch
from torch import Tensor

from .problem import Problem
from .reference import grouped, masks, probabilities, scores

SLICE_BYTES = 64 << 20


def jvp(problem: Problem, saved: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Returns the tangents of out and lse, in their dtypes."""
    q, k, v, lse = problem.q, problem.k, problem.v, saved[1]
    dq, dk, dv = tangents
    with torch.autocast(q.device.type, enabled=False):
        allowed, rows, keys = masks(problem)
        group = q.shape[2] // k.shape[2]
        k_, v_ = grouped(k, keys, group), grouped(v, keys, group)
        dk_ = None if dk is None else grouped(dk, keys, group)
        dv_ = None if dv is None else grouped(dv, keys, group)
        q_, dq_ = grouped(q, rows, 1), None if dq is None else grouped(dq, rows, 1)
        size = max(1, SLICE_BYTES // max(1, q.shape[0] * q.shape[2] * k.shape[1] * lse.element_size()))
        outs, lses = [], []
        for start in range(0, q.shape[1], size):
            at = slice(start, start + size)
            inside = allowed if allowed is None or allowed.shape[2] == 1 else allowed[:, :, at]
            p = probabilities(scores(q_[:, :, at], k_, inside, problem.scale), lse[:, :, at])  # (B, Hq, queries, Sk)
            ds = torch.zeros_like(p)
            if dq_ is not None:
                ds = ds + dq_[:, :, at] @ k_.mT
            if dk_ is not None:
                ds = ds + q_[:, :, at] @ dk_.mT
            weighted = problem.scale * p * ds
            dlse = weighted.sum(-1)
            dout = (weighted - p * dlse[..., None]) @ v_
            outs.append(dout if dv_ is None else dout + p @ dv_)
            lses.append(dlse)
        if not outs:
            return torch.zeros_like(saved[0]), torch.zeros_like(lse)
        return torch.cat(outs, 2).transpose(1, 2).to(q.dtype), torch.cat(lses, 2)
