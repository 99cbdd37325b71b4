"""What the entry points of csrc/cuda/masked_loss_*.cu launch, for _nvrtc.py: functions of their names and arguments."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._nvrtc import Launch

TYPES = ("float", "__nv_bfloat16", "__half")  # by illada_dtype
KERNELS = {"masked_loss_rows.cu": [f"{kernel}<{t}>" for kernel in ("rows_fwd", "rows_bwd") for t in TYPES]}

THREADS = 256
SCRATCH = THREADS // 32 * 4
OPTIONS = np.dtype(
    {
        "names": ["vocab", "bias", "softcap", "smoothing", "z_loss", "forbid", "n_forbid"],
        "formats": ["i8", "u8", "f4", "f4", "f4", "u8", "i8"],
    },
    align=True,
)


def _options(vocab: int, rest: list[Any]) -> Any:
    """struct Options."""
    return np.array((vocab, *rest), OPTIONS)


def masked_loss_rows_fwd(*a: Any) -> Launch:
    logits, dtype, rows, vocab, stride, masked, targets, *options, losses, stats = a
    arguments = (logits, stride, masked, targets, _options(vocab, options), losses, stats)
    return Launch("masked_loss_rows.cu", f"rows_fwd<{TYPES[dtype]}>", (rows,), THREADS, SCRATCH, arguments)


def masked_loss_rows_bwd(*a: Any) -> Launch:
    logits, stride, out, out_stride, dtype, rows, vocab, masked, targets, stats, scales, *options = a
    arguments = (logits, stride, out, out_stride, masked, targets, stats, scales, _options(vocab, options))
    return Launch("masked_loss_rows.cu", f"rows_bwd<{TYPES[dtype]}>", (rows,), THREADS, 0, arguments)
