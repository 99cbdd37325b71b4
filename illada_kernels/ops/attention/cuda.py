"""Runs attention on Hopper: csrc/cuda/attention_fwd_sm90a.cuh and attention_bwd_*_sm90a.cu. Plans their grids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._extension import DTYPES, extension_reason
from ..._gpu import hopper_reason, launch
from .problem import MAX_GPU_SCALE, Problem, element_strides, upstream

_FORWARD = {torch.bfloat16: "attention_fwd_bf16_sm90a", torch.float16: "attention_fwd_fp16_sm90a"}
_DIMS = (64, 96, 128, 256)
_MOST_FUSED_DIM = 128
_MAX_KEYS = 2**31 - 1024


def available() -> str | None:
    return hopper_reason() or extension_reason(*_FORWARD.values(), "attention_bwd_keys_sm90a")


def supports(problem: Problem) -> str | None:
    q, k, v = problem.q, problem.k, problem.v
    if abs(problem.scale) > MAX_GPU_SCALE:
        return f"takes a scale of at most {MAX_GPU_SCALE:g} in magnitude, not {problem.scale:g}"
    if q.dtype not in _FORWARD:
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] not in _DIMS or v.shape[3] != q.shape[3]:
        return f"takes a head_dim of {', '.join(map(str, _DIMS))}, alike for q and v, not {q.shape[3]} and {v.shape[3]}"
    if max(q.shape[1], k.shape[1]) > _MAX_KEYS:
        return f"takes at most {_MAX_KEYS} queries and keys"
    return next(filter(None, (_unfit_for_tma(name, x) for name, x in (("q", q), ("k", k), ("v", v)))), None)


def _unfit_for_tma(name: str, x: Tensor) -> str | None:
    """Returns None, or why TMA cannot load x: addresses and strides must be multiples of 16 bytes."""
    if x.data_ptr() % 16:
        return f"{name} starts at an address that is not a multiple of 16 bytes; .clone() it"
    for size, stride in zip(x.shape[:3], x.stride()[:3]):
        if size > 1 and (stride <= 0 or stride * x.element_size() % 16):
            return f"{name} has strides {x.stride()} that are not positive multiples of 16 bytes; use .contiguous()"
    return None


class Schedule(NamedTuple):
    """The grid of the forward. It depends on shapes alone, so that a captured graph serves any lengths."""

    pack: int  # query heads of one key head that share a tile's rows
    items: int  # (batch entry, heads, tile of rows): what one block takes up at a time
    splits: int  # of the keys of an item, among blocks


@functools.lru_cache(1024)
def schedule(batch: int, rows: int, keys: int, heads: int, kv_heads: int, dim: int, processors: int) -> Schedule:
    """Returns the grid. A tile is 3 warpgroups (2 for head_dim 256) of 64 rows.

    Heads that share keys share a tile if that fills at least nine tenths of its rows, or if all rows fit one tile.
    With fewer items than processors the keys are split: the number of splits minimises the steps of the busiest block,
    where starting an item costs about two steps, and combining the parts about two more.
    """
    warpgroups, step = (2, 80) if dim == 256 else (3, 128)
    group = heads // kv_heads
    packs = group <= 64 and (10 * (64 // group * group) >= 9 * 64 or group * rows <= 64 * warpgroups)
    pack = group if packs else 1
    items = batch * (heads // pack) * -(-rows // (warpgroups * (64 // pack)))
    steps = -(-keys // step)

    def cost(splits: int) -> int:
        return -(-items * splits // processors) * (-(-steps // splits) + 2) + 2 * (splits > 1)

    most = min(32, steps) if 0 < items < processors else 1
    return Schedule(pack, items, min(range(1, most + 1), key=cost, default=1))


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns out (B, Sq, Hq, D) in q's dtype and lse (B, Hq, Sq) float32.

    Accumulates in float32; the probabilities are rounded to q's dtype for the second product. One launch, two where the
    keys are split. Memory: then 4 (D + 1) bytes per row, head and split.
    """
    q, k, v = problem.q, problem.k, problem.v
    batch, queries, keys, heads, kv_heads, dim, _ = problem.sizes()
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0 or keys == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    count = processors(q.device)
    cut = schedule(batch, queries, keys, heads, kv_heads, dim, count)
    blocks = min(count, cut.items * cut.splits)
    parts = lse.new_empty(cut.splits * lse.numel() * (dim + 1)) if cut.splits > 1 else None
    # Blocks draw items of unlike lengths from a counter; like ones they take in turns.
    counter = None
    if problem.bounds is not None and cut.items * cut.splits > blocks:
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    q, scale = _with_positive_scale(q, problem.scale)
    bounds = _aligned(problem.bounds)
    strides = element_strides(q, k, v, bounds)
    sizes = (batch, queries, keys, heads, kv_heads, dim)
    how = (strides.buffer_info()[0], scale, cut.pack, cut.splits, parts, counter, blocks)
    launch(_FORWARD[q.dtype], q.device, q, k, v, bounds, out, lse, *sizes, *how)
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

    First the rows' delta and lse and the tiles' key ranges, then dk and dv, one block per key tile and key head, and
    dq, one block per query tile and head. Seven products, not five, and in return nothing is added across blocks:
    bitwise the same run after run. dk and dv are summed over a group's query heads in registers. Memory: that of
    `workspace`.

    Not deterministic, head_dim up to 128: the blocks of dk and dv add to a float32 dq too, five products; then 4 D
    bytes per row (of tiles of 64) and head more, and the last bits of dq vary. Those of dk and dv do not.
    """
    q, k, v = problem.q, problem.k, problem.v
    batch, queries, keys, heads, kv_heads, dim, _ = problem.sizes()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, out, bounds = _fit_for_tma(upstream(dout, out)), _fit_for_tma(out), _aligned(problem.bounds)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
    strides = element_strides(q, k, v, bounds, out, dout)
    sizes = (batch, queries, keys, heads, kv_heads, dim, 1 if bounds is None else bounds.shape[0])
    code, at, blocks = DTYPES[q.dtype], strides.buffer_info()[0], processors(q.device)
    space = workspace(batch, queries, heads, sizes[-1], q.device)
    launch("attention_bwd_preprocess_sm90a", q.device, code, out, lse, dout, dlse, bounds, *space, *sizes, at)
    inputs, how = (code, q, k, v, dout, *space), (*sizes, at, problem.scale, blocks)
    if not problem.deterministic and dim <= _MOST_FUSED_DIM:
        sums = torch.zeros(space[0].numel() // 2 * dim, dtype=torch.float32, device=q.device)
        launch("attention_bwd_fused_sm90a", q.device, *inputs, sums, dq, dk, dv, *how)
        return dq, dk, dv
    launch("attention_bwd_keys_sm90a", q.device, *inputs, dk, dv, *how)
    launch("attention_bwd_queries_sm90a", q.device, *inputs, dq, *how)
    return dq, dk, dv


def workspace(
    batch: int, rows: int, heads: int, bounds_batches: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the backward's workspace, in tiles of 64 rows: 8 bytes per row and head (lse, delta), 16 per row of the
    bounds (its ranges in normal form), 36 per tile of them (hulls), and 8. No part grows with the number of keys."""
    tiles = -(-rows // 64)
    return (
        torch.empty(batch, heads, tiles, 2, 64, dtype=torch.float32, device=device),
        torch.empty(bounds_batches, tiles * 64, 4, dtype=torch.int32, device=device),
        torch.empty(bounds_batches, tiles, 9, dtype=torch.int32, device=device),
        torch.empty(2, dtype=torch.int32, device=device),
    )


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Returns (q, scale) with a positive scale, so that a maximum stays one and a masked score stays -inf.

    Negation is exact. A scale near float32's smallest is multiplied into q; what that rounds away is far below one
    rounding of the log-sum-exp.
    """
    if abs(scale) < 1e-30:
        return (q.float() * scale).to(q.dtype), 1.0
    return (q, scale) if scale > 0 else (-q, -scale)


def _aligned(bounds: Tensor | None) -> Tensor | None:
    """Returns bounds whose rows of four integers one aligned 16-byte load reads."""
    if bounds is None or (
        bounds.stride(2) == 1
        and bounds.data_ptr() % 16 == 0
        and bounds.stride(0) % 4 == 0
        and bounds.stride(1) % 4 == 0
    ):
        return bounds
    return bounds.clone(memory_format=torch.contiguous_format)


def _fit_for_tma(x: Tensor) -> Tensor:
    """Returns x, or a copy if TMA cannot load it: an upstream gradient may be expanded, or a view at an odd offset."""
    return x if _unfit_for_tma("", x) is None else x.clone(memory_format=torch.contiguous_format)
