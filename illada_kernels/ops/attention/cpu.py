"""Attention through the compiled extension: csrc/cpu/attention_fwd.cpp and attention_bwd.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._extension import DTYPES, check, extension_reason, native, pointer
from .problem import Problem, contiguous_bounds, element_strides, upstream

_MAX_DIM = 4096


def available() -> str | None:
    return extension_reason()


def supports(problem: Problem) -> str | None:
    q, v = problem.q, problem.v
    if q.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > _MAX_DIM:
        return f"takes a head_dim of at most {_MAX_DIM}, not {max(q.shape[3], v.shape[3])}"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq) float32. Accumulates in float32. Memory: a few
    hundred KB per thread."""
    q, k, v = _rows(problem.q), _rows(problem.k), _rows(problem.v)
    bounds = contiguous_bounds(problem.bounds)
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[3])
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    strides = element_strides(q, k, v, bounds)
    code = native().attention_fwd_cpu(
        DTYPES[q.dtype],
        *map(pointer, (q, k, v, bounds, out, lse)),
        *problem.sizes(),
        strides.buffer_info()[0],
        problem.scale,
        torch.get_num_threads(),
    )
    check("attention", code)
    return out, lse


def backward(
    problem: Problem,
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv, shaped and typed like q, k and v, of the sum of out * dout and lse * dlse.

    Bitwise the same for any number of threads. Memory: dq in float32, delta (B, Hq, Sq), and about a MB per thread.
    """
    q, k, v = _rows(problem.q), _rows(problem.k), _rows(problem.v)
    bounds = contiguous_bounds(problem.bounds)
    dq = torch.zeros(q.shape, dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.to(q.dtype), dk.zero_(), dv.zero_()
    out, dout = _rows(out), upstream(dout, out)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    strides = element_strides(q, k, v, bounds, out, dout)
    code = native().attention_bwd_cpu(
        DTYPES[q.dtype],
        *map(pointer, (q, k, v, bounds, out, lse, dout, dlse, dq, dk, dv)),
        *problem.sizes(),
        strides.buffer_info()[0],
        problem.scale,
        torch.get_num_threads(),
    )
    check("attention_bwd", code)
    return dq.to(q.dtype), dk, dv


def _rows(x: Tensor) -> Tensor:
    """Returns x with a contiguous last dimension: the operator also takes tensors that api.py has not seen."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
