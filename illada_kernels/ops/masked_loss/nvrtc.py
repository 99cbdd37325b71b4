"""Returns, for _nvrtc.py, what each entry point of csrc/cuda/masked_loss_*.cu launches, by functions of those names."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._nvrtc import Launch

ROWS, COMPACT = "masked_loss_rows.cu", "masked_loss_compact.cu"
TYPES = ("float", "illada::bf16", "illada::fp16")  # by illada_dtype
GATHERS = [f"{t}, {t}" for t in TYPES] + [f"{t}, float" for t in TYPES[1:]]
KERNELS = {
    ROWS: [
        f"illada::loss::rows_{kernel}<{t}, {plain}>"
        for kernel in ("stats", "dlogits", "gradients")
        for t in TYPES
        for plain in ("false", "true")
    ],
    COMPACT: [f"illada::loss::{name}" for name in ("compact", "factors", "sum_losses", "row_losses")]
    + [f"illada::loss::gather<{types}>" for types in GATHERS]
    + [f"illada::loss::scatter<{t}>" for t in TYPES],
}

# as in the sources
ROW_THREADS, WIDE_THREADS, ROW_SCRATCH = 256, 512, 128
ONE_BLOCK, COPY_THREADS, FLAT_THREADS, SCRATCH = 1024, 128, 256, 256
OPTIONS = np.dtype(
    {
        "names": ["vocab", "bias", "softcap", "smoothing", "z_loss", "forbid", "n_forbid"],
        "formats": ["i8", "u8", "f4", "f4", "f4", "u8", "i8"],
    },
    align=True,
)
TERMS = np.dtype([("vocab", "i8"), ("allowed", "i8"), ("smoothing", "f4"), ("z_loss", "f4")], align=True)


def _launch(source: str, kernel: str, blocks: int, threads: int, smem: int, *arguments: Any) -> Launch:
    return Launch(source, f"illada::loss::{kernel}", (blocks,), threads, smem, arguments)


def _options(values: list[Any]) -> Any:
    """Returns struct Options, made of its members."""
    return np.array(tuple(values), OPTIONS)


def _row_kernel(kernel: str, dtype: int, options: list[Any]) -> str:
    """Returns the kernel for this dtype and formula, as `with_kernel` in the source chooses it."""
    _, bias, softcap, smoothing, _, _, n_forbid = options
    plain = not bias and softcap <= 0 and smoothing <= 0 and n_forbid == 0
    return f"rows_{kernel}<{TYPES[dtype]}, {str(plain).lower()}>"


def _blocks_for(rows: int) -> int:
    return -(-rows // FLAT_THREADS)


def masked_loss_compact_cuda(*a: Any) -> Launch:
    *before, mean, index, targets, scale, slot, info = a
    arguments = (*before, np.int32(mean), index, targets, scale, slot, info)
    return _launch(COMPACT, "compact", 1, ONE_BLOCK, SCRATCH, *arguments)


def masked_loss_gather_cuda(*a: Any) -> Launch:
    x, dtype, inner, outer_stride, stride, index, info, start, rows, width, factors, out, out_dtype = a
    kernel = f"gather<{TYPES[dtype]}, {TYPES[out_dtype]}>"
    arguments = (x, inner, outer_stride, stride, index, info, start, width, factors, out)
    return _launch(COMPACT, kernel, rows, COPY_THREADS, 0, *arguments)


def masked_loss_scatter_cuda(*a: Any) -> Launch:
    dx, slot, info, capacity, rows, held, width, factors, out, dtype = a
    arguments = (dx, slot, info, capacity, held, width, factors, out)
    return _launch(COMPACT, f"scatter<{TYPES[dtype]}>", rows, COPY_THREADS, 0, *arguments)


def masked_loss_factors_cuda(*a: Any) -> Launch:
    *before, rows, what, grad, per_row, out = a
    arguments = (*before, rows, np.int32(what), grad, np.int32(per_row), out)
    return _launch(COMPACT, "factors", _blocks_for(rows), FLAT_THREADS, 0, *arguments)


def masked_loss_losses_cuda(*a: Any) -> Launch:
    state, targets, scale, slot, info, capacity, rows, held, vocab, allowed, smoothing, z_loss, per_row, out = a
    rest = (held, np.array((vocab, allowed, smoothing, z_loss), TERMS), out)
    if not per_row:
        return _launch(COMPACT, "sum_losses", 1, ONE_BLOCK, SCRATCH, state, targets, scale, info, capacity, *rest)
    arguments = (state, targets, scale, slot, info, capacity, rows, *rest)
    return _launch(COMPACT, "row_losses", _blocks_for(rows), FLAT_THREADS, 0, *arguments)


def masked_loss_rows_stats_cuda(*a: Any) -> Launch:
    x, dtype, inner, outer_stride, stride, slot, info, start, rows, held, first, width, targets, *options, state = a
    where = (x, inner, outer_stride, stride, slot, info, start, held, np.int32(first), np.int32(width), targets)
    arguments = (*where, _options(options), state)
    return _launch(ROWS, _row_kernel("stats", dtype, options), rows, ROW_THREADS, ROW_SCRATCH, *arguments)


def masked_loss_rows_dlogits_cuda(*a: Any) -> Launch:
    x, dtype, inner, outer_stride, stride, out, out_stride, slot, info, start, rows, held, *rest = a
    capacity, first, width, targets, state, scales, *options = rest
    where = (x, inner, outer_stride, stride, out, out_stride, slot, info, start, held, capacity)
    arguments = (*where, np.int32(first), np.int32(width), targets, state, scales, _options(options))
    return _launch(ROWS, _row_kernel("dlogits", dtype, options), rows, ROW_THREADS, 0, *arguments)


def masked_loss_rows_gradients_cuda(*a: Any) -> Launch:
    x, dtype, stride, info, start, rows, targets, scales, *options, state, shared_memory = a
    vectors = options[0] // (4 if dtype == 0 else 8)  # of 16 bytes in a row
    kept = min(vectors, (shared_memory - ROW_SCRATCH) // 16)
    arguments = (x, stride, info, start, targets, scales, _options(options), state, np.int32(kept))
    smem = ROW_SCRATCH + 16 * kept
    return _launch(ROWS, _row_kernel("gradients", dtype, options), rows, WIDE_THREADS, smem, *arguments)
