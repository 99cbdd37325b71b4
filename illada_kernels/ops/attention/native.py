"""Attention through the compiled extension: csrc/cpu/attention_fwd.cpp and attention_bwd.cpp."""

from __future__ import annotations

import array
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import check, extension_reason, native

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_DIM = 4096


def available() -> str | None:
    """None, or why the compiled extension cannot be used."""
    return extension_reason()


def supports(request: Any) -> str | None:
    """None, or why this call (its q, k and v) cannot run here."""
    q, v = request.q, request.v
    if q.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > _MAX_DIM:
        return f"takes a head_dim of at most {_MAX_DIM}, not {max(q.shape[3], v.shape[3])}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), bounds int32 (B or 1, Sq or 1, 4) or None for full: out,
    lse.

    out (B, Sq, Hq, Dv) in q's dtype, lse (B, Hq, Sq) float32. Accumulates in float32. Memory: a few hundred KB per
    thread.
    """
    batch, rows, heads, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[3])
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v, bounds = _rows(q), _rows(k), _rows(v), _bounds(bounds)
    strides = element_strides(q, k, v, bounds)
    code = native().attention_fwd_cpu(
        _DTYPES[q.dtype],
        *_pointers(q, k, v, bounds, out, lse),
        *_sizes(q, k, v),
        strides.buffer_info()[0],
        scale,
        torch.get_num_threads(),
    )
    check("attention", code)
    return out, lse


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
    """dq, dk and dv, shaped and typed like q, k and v, of the sum of out * dout and lse * dlse (dlse may be None).

    Bitwise the same for any number of threads. Memory: dq in float32, delta (B, Hq, Sq), and about a MB per thread.
    """
    dq = torch.zeros(q.shape, dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.to(q.dtype), dk.zero_(), dv.zero_()
    q, k, v, out, dout, bounds = _rows(q), _rows(k), _rows(v), _rows(out), _rows(dout), _bounds(bounds)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    strides = element_strides(q, k, v, bounds, out, dout)
    code = native().attention_bwd_cpu(
        _DTYPES[q.dtype],
        *_pointers(q, k, v, bounds, out, lse, dout, dlse, dq, dk, dv),
        *_sizes(q, k, v),
        strides.buffer_info()[0],
        scale,
        torch.get_num_threads(),
    )
    check("attention_bwd", code)
    return dq.to(q.dtype), dk, dv


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; an expanded gradient is the usual one without."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _bounds(bounds: Tensor | None) -> Tensor | None:
    return bounds if bounds is None or bounds.stride(2) == 1 else bounds.contiguous()


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def element_strides(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, *rest: Tensor) -> array.array[int]:
    """Element strides of batch, row and head of each; of bounds those of batch and row, 0 where it is broadcast."""
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    strides += [0, 0] if bounds is None else [bounds.stride(i) if bounds.shape[i] > 1 else 0 for i in (0, 1)]
    return array.array("q", strides + [s for x in rest for s in x.stride()[:3]])
