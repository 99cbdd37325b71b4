"""Runs attention in Triton: says which calls the kernels of fwd.py and bwd.py take, and imports them at the first."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...._gpu import triton_reason
from ..problem import MAX_GPU_SCALE, Problem
from .measure import tune as tune

_HEAD_DIMS = (64, 96, 128, 256)
_MAX_ROWS = 2**31 - 1024
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def available() -> str | None:
    if (reason := triton_reason()) is not None:
        return reason
    if torch.version.hip:
        return "has tile sizes for NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"


def supports(problem: Problem) -> str | None:
    q, v = problem.q, problem.v
    if abs(problem.scale) > MAX_GPU_SCALE:
        return f"takes a scale of at most {MAX_GPU_SCALE:g} in magnitude, not {problem.scale:g}"
    if q.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if q.shape[3] not in _HEAD_DIMS or v.shape[3] != q.shape[3]:
        return f"takes q and v of a head_dim of 64, 96, 128 or 256, not {q.shape[3]} and {v.shape[3]}"
    if max(q.shape[1] * q.shape[2] // v.shape[2], v.shape[1]) > _MAX_ROWS:
        return f"takes at most {_MAX_ROWS} keys, and queries times query heads per key head"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns out (B, Sq, Hq, D) in q's dtype and lse (B, Hq, Sq) float32. Allocates the results only."""
    from . import fwd

    return fwd.forward(problem)


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, shaped and typed like q, k and v, of the sum of out * dout and lse * dlse.

    Gives the same bits run after run. Allocates the results and 8 bytes per row of out.
    """
    from . import bwd

    return bwd.backward(problem, dout, dlse, out, lse)
