"""Runs the row functions by csrc/cpu/layer.cpp."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._extension import DTYPES, check, extension_reason, native, pointer
from . import problem

DEVICE = "cpu"  # the type of device whose memory the kernels read


@functools.cache
def available() -> str | None:
    return extension_reason("layer_rope_cpu")


def supports(tensors: Sequence[Tensor]) -> str | None:
    return next((f"has no kernels for {x.dtype}" for x in tensors if x.dtype not in DTYPES), None)


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Returns x + delta (x without a delta) and its norm."""
    x, weight, delta = x.contiguous(), weight.contiguous(), None if delta is None else delta.contiguous()
    out, total = torch.empty_like(x), x if delta is None else torch.empty_like(x)
    dim = x.shape[-1]
    code = native().layer_rms_norm_cpu(
        DTYPES[x.dtype],
        *map(pointer, (x, delta, weight)),
        *(x.numel() // dim, dim, eps, in_fp32),
        *(total.data_ptr(), out.data_ptr()),
        torch.get_num_threads(),
    )
    check("rms_norm", code)
    return total, out


def swiglu(gate_up: Tensor) -> Tensor:
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if rows := out.numel() and out.numel() // width:
        where = (gate_up.data_ptr(), rows, width, out.data_ptr())
        check("swiglu", native().layer_swiglu_cpu(DTYPES[out.dtype], *where, torch.get_num_threads()))
    return out


def rope(
    call: problem.Rope,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor | None,
    start: int | Tensor,
    keep: Tensor | None,
) -> Tensor:
    """Returns the rotated q; writes keys, and values if there are any."""
    batch, length, heads, kv_heads, dim, slots, strides = call
    out = torch.empty((batch, length, heads, dim), dtype=q.dtype, device=q.device)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    first, starts = (0, start.contiguous()) if isinstance(start, Tensor) else (start, None)
    keep = None if keep is None else keep.contiguous()
    code = native().layer_rope_cpu(
        DTYPES[q.dtype],
        *(q.data_ptr(), k.data_ptr(), pointer(v), cos.data_ptr(), sin.data_ptr()),
        *(batch, length, heads, kv_heads, dim, strides.buffer_info()[0]),
        *(out.data_ptr(), keys.data_ptr(), pointer(values)),
        *(slots, first, pointer(starts), pointer(keep)),
        torch.get_num_threads(),
    )
    check("apply_rope", code)
    return out
