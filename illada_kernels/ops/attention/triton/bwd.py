# mypy: allow-untyped-defs
"""Attention backward in Triton: one kernel prepares the rows, one computes dk and dv, one dq. No atomics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem, contiguous_bounds, upstream
from . import tuning
from .bwd_keys import attention_bwd_keys
from .bwd_queries import attention_bwd_queries
from .tiles import LOG2_E, hull, load_tile, row_ranges
from .tuning import KEYS_BACKWARD, QUERIES_BACKWARD, Tile, aot, every_tile, head_parts, strides


@triton.jit(do_not_specialize=["num_queries", "num_keys", "kv_heads"])
def attention_bwd_preprocess(
    out,
    dout,
    lse,
    dlse,
    bounds,
    log_sums,
    deltas,
    hulls,
    num_queries,
    num_keys,
    kv_heads,
    out_batch,
    out_row,
    out_head,
    dout_batch,
    dout_row,
    dout_head,
    bounds_batch,
    bounds_row,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes for each packed row lse / log 2 and delta = sum out * dout - dlse, for each row tile its two hulls.

    One program owns ROWS packed rows of one key head and reads out and dout once. Rows without keys, and rows beyond
    the last, get lse +inf and delta 0, so that p = exp2(s - lse) is 0 there even if they hold NaN.
    """
    tiles = tl.cdiv(num_queries * GROUP, ROWS)
    program = tl.program_id(0)
    batch, kv_head, tile = (program // tiles // kv_heads).to(tl.int64), program // tiles % kv_heads, program % tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < num_queries * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP

    at = (batch * kv_heads * GROUP + heads) * num_queries + queries
    log_sum = tl.load(lse + at, mask=inside, other=float("-inf"))
    some = log_sum != float("-inf")
    out += batch * out_batch
    dout += batch * dout_batch
    out_at = queries.to(tl.int64) * out_row + heads.to(tl.int64) * out_head
    dout_at = queries.to(tl.int64) * dout_row + heads.to(tl.int64) * dout_head
    o, g = load_tile(out, out_at, some, 0, HEAD), load_tile(dout, dout_at, some, 0, HEAD)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if TAIL:
        o, g = load_tile(out, out_at, some, HEAD, TAIL), load_tile(dout, dout_at, some, HEAD, TAIL)
        delta += tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=some, other=0.0)
    packed = (program // tiles).to(tl.int64) * tiles * ROWS + rows
    tl.store(log_sums + packed, tl.where(some, log_sum * LOG2_E, float("inf")))
    tl.store(deltas + packed, delta)

    if bounds is not None:
        if kv_head == 0:
            lo0, hi0, lo1, hi1 = row_ranges(bounds + batch * bounds_batch, queries, inside, bounds_row, num_keys)
            begin0, end0, all_begin0, all_end0 = hull(lo0, hi0, inside, num_keys)
            begin1, end1, all_begin1, all_end1 = hull(lo1, hi1, inside, num_keys)
            hulls += (batch * tiles + tile) * 8
            tl.store(hulls, begin0)
            tl.store(hulls + 1, end0)
            tl.store(hulls + 2, all_begin0)
            tl.store(hulls + 3, all_end0)
            tl.store(hulls + 4, begin1)
            tl.store(hulls + 5, end1)
            tl.store(hulls + 6, all_begin1)
            tl.store(hulls + 7, all_end1)


def backward(
    problem: Problem, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, bounds, scale = problem.q, problem.k, problem.v, contiguous_bounds(problem.bounds), problem.scale
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    batch, queries, keys, heads, kv_heads, dim, _ = problem.sizes()
    group, sizes = heads // kv_heads, (queries, keys, kv_heads)
    dout, lse, dlse = upstream(dout, out), lse.contiguous(), None if dlse is None else dlse.contiguous()
    keys_tile, queries_tile = tuning.choose(KEYS_BACKWARD, q), tuning.choose(QUERIES_BACKWARD, q)
    tiles = triton.cdiv(queries * group, keys_tile.rows)
    packed_rows = tiles * keys_tile.rows
    log_sums, deltas = q.new_empty(2, batch * kv_heads, packed_rows, dtype=torch.float32).unbind(0)
    hulls = None if bounds is None else q.new_empty(batch, tiles, 8, dtype=torch.int32)
    moves = *strides(q, k, v, bounds), *dout.stride()[:3]
    of_rows = *out.stride()[:3], *moves[11:], *moves[9:11]
    inputs, sums = (q, k, v, bounds, dout), (log_sums, deltas)
    for_rows = _preprocess_constants(group, dim, keys_tile) | {"num_warps": 4}
    for_keys = _keys_constants(group, dim, q.dtype, keys_tile) | {"num_warps": keys_tile.warps}
    for_queries = _keys_constants(group, dim, q.dtype, queries_tile) | {"num_warps": queries_tile.warps}
    with torch.cuda.device_of(q):
        attention_bwd_preprocess[(tiles * batch * kv_heads,)](
            out, dout, lse, dlse, bounds, *sums, hulls, *sizes, *of_rows, **for_rows
        )
        attention_bwd_keys[(triton.cdiv(keys, keys_tile.keys) * batch * kv_heads,)](
            *inputs, *sums, hulls, dk, dv, scale, *sizes, *moves, **for_keys
        )
        attention_bwd_queries[(triton.cdiv(queries * group, queries_tile.rows) * batch * kv_heads,)](
            *inputs, *sums, dq, scale, *sizes, packed_rows, *moves, **for_queries, PART=queries_tile.part
        )
    return dq, dk, dv


def _preprocess_constants(group: int, dim: int, tile: Tile) -> dict[str, Any]:
    head, tail = head_parts(dim)
    return {"GROUP": group, "HEAD": head, "TAIL": tail, "ROWS": tile.rows}


def _keys_constants(group: int, dim: int, dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    return _preprocess_constants(group, dim, tile) | {
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "MASKED_STAGES": tile.masked_stages,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def aot_configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yields every tile of the tables, with bounds, for tests/gpu_code/triton_code.py."""
    for name, dim, dtype, tile, archs in every_tile(KEYS_BACKWARD):
        yield (
            f"bwd_preprocess {name}",
            *aot(attention_bwd_preprocess, name, dtype, _preprocess_constants(4, dim, tile), 4, archs[:1]),
        )
        fixed = _keys_constants(4, dim, dtype, tile)
        yield f"bwd_keys {name}", *aot(attention_bwd_keys, name, dtype, fixed, tile.warps, archs)
    for name, dim, dtype, tile, archs in every_tile(QUERIES_BACKWARD):
        fixed = _keys_constants(4, dim, dtype, tile) | {"PART": tile.part}
        yield f"bwd_queries {name}", *aot(attention_bwd_queries, name, dtype, fixed, tile.warps, archs)
