"""Returns, for _nvrtc.py, what the entry points of csrc/cuda/unmask_{bounds,rows,select}.cu launch: one function each,
of its name and arguments. Only the extension has the fused head for Hopper."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ... import rules
from ..._nvrtc import Launch
from .cuda import SORT_IN_SHARED, Call

TYPES = ("float", "illada::bf16", "illada::fp16")  # by illada_dtype
FLAGS = ("false", "true")
KERNELS = {
    "unmask_bounds.cu": [f"bounds_kernel<{t}>" for t in TYPES],
    "unmask_rows.cu": [f"rows_kernel<{t}, {e}>" for t in TYPES for e in FLAGS],
    "unmask_select.cu": [f"select_kernel<{e}>" for e in FLAGS],
}

# as in the sources
SPAN, ROWS_THREADS, ROWS_SMEM, SELECT_THREADS = 4096, 256, 8 * 32, 512
BOUNDS_THREADS, BOUNDS_SMEM = 512, 8 * (16 * 8 + 8) + 4 * (16 + 1 + 8192) + 4  # the last 4 bytes are padding
OUTPUTS = np.dtype([(name, "u8") for name in ("proposal", "confidence", "committed", "remaining")])


def _by_value(record: int) -> Any:
    """Returns the bytes of the illada_unmask_call at this address."""
    return np.frombuffer(ctypes.string_at(record, ctypes.sizeof(Call)), np.dtype(("V", ctypes.sizeof(Call))))


def unmask_bounds_cuda(*a: Any) -> Launch:
    record, dtype, logits, stride_b, stride_k, first_row, rows = a
    arguments = (_by_value(record), logits, stride_b, stride_k, first_row)
    kernel = f"bounds_kernel<{TYPES[dtype]}>"
    return Launch("unmask_bounds.cu", kernel, (rows,), BOUNDS_THREADS, BOUNDS_SMEM, arguments)


def unmask_rows_cuda(*a: Any) -> Launch:
    record, dtype, logits, stride_b, stride_k, first_row, rows, first, ids = a
    arguments = (_by_value(record), logits, stride_b, stride_k, first_row, first, ids)
    grid, call = (rows, -(-ids // SPAN)), Call.from_address(record)
    extended = FLAGS[bool(call.truncate) or call.rule == rules.RENOISE]
    return Launch(
        "unmask_rows.cu", f"rows_kernel<{TYPES[dtype]}, {extended}>", grid, ROWS_THREADS, ROWS_SMEM, arguments
    )


def unmask_select_cuda(*a: Any) -> Launch:
    record, workspace, *outputs = a
    call = Call.from_address(record)
    padded = 1 << max(call.count - 1, 0).bit_length()
    in_shared = padded <= SORT_IN_SHARED
    smem = SELECT_THREADS // 32 * 8 + (16 * padded if in_shared else 0)
    arguments = (_by_value(record), 0 if in_shared else workspace, np.uint32(padded), np.array(tuple(outputs), OUTPUTS))
    kernel = f"select_kernel<{FLAGS[call.rule == rules.RENOISE]}>"
    return Launch("unmask_select.cu", kernel, (call.batch,), SELECT_THREADS, smem, arguments)
