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
from .tiles import (
    LOG2_E,
    allowed_pairs,
    attended_keys,
    hull,
    key_plan,
    load_tile,
    part_at,
    row_ranges,
    store_tile,
)
from .tuning import KEYS_BACKWARD, QUERIES_BACKWARD, Tile, aot, every_tile, head_parts, strides

SCAN = tl.constexpr(32)  # row tiles that a key tile tests together, one bit each in an int64


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


@triton.jit
def _add_rows(
    dk,
    dk_tail,
    dv,
    dv_tail,
    k,
    k_tail,
    v,
    v_tail,
    q,
    dout,
    log_sums,
    deltas,
    bounds,
    tile,
    first_key,
    scale,
    num_queries,
    num_keys,
    kv_head,
    q_row,
    q_head,
    dout_row,
    dout_head,
    bounds_row,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one row tile's share to dk / scale and dv of a key tile. Scores are (keys, rows)."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    log_sum, delta = tl.load(log_sums + rows), tl.load(deltas + rows)
    wanted = rows < num_queries * GROUP
    if MASKED:
        lo0, hi0, lo1, hi1 = row_ranges(bounds, queries, wanted, bounds_row, num_keys)
        keys = first_key + tl.arange(0, KEYS)
        allowed = allowed_pairs(keys[:, None], lo0[None, :], hi0[None, :], lo1[None, :], hi1[None, :])
        wanted = lo0 < hi0  # never loads a row without keys: p and ds are 0 there, but 0 * NaN is NaN
    q_at = queries.to(tl.int64) * q_row + heads.to(tl.int64) * q_head
    dout_at = queries.to(tl.int64) * dout_row + heads.to(tl.int64) * dout_head
    x, g = load_tile(q, q_at, wanted, 0, HEAD), load_tile(dout, dout_at, wanted, 0, HEAD)
    s = tl.dot(k, tl.trans(x), input_precision=PRECISION)  # (keys, rows)
    if TAIL:
        x_tail, g_tail = load_tile(q, q_at, wanted, HEAD, TAIL), load_tile(dout, dout_at, wanted, HEAD, TAIL)
        s = tl.dot(k_tail, tl.trans(x_tail), s, input_precision=PRECISION)
    p = tl.math.exp2(s * scale - log_sum[None, :])
    if MASKED:
        p = tl.where(allowed, p, 0.0)
    p_narrow = p.to(q.dtype.element_ty)
    dv = tl.dot(p_narrow, g, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)  # (keys, rows)
    if TAIL:
        dv_tail = tl.dot(p_narrow, g_tail, dv_tail, input_precision=PRECISION)
        dp = tl.dot(v_tail, tl.trans(g_tail), dp, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    if MASKED:
        ds = tl.where(allowed, ds, 0.0)  # v and therefore dp may be NaN where no row attends
    ds_narrow = ds.to(q.dtype.element_ty)
    dk = tl.dot(ds_narrow, x, dk, input_precision=PRECISION)
    if TAIL:
        dk_tail = tl.dot(ds_narrow, x_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv, dv_tail


@triton.jit
def _lowest_bit(bits):
    """Returns the position of the lowest set bit, from the exponent of a float; bits > 0."""
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit(do_not_specialize=["num_queries", "num_keys", "kv_heads"])
def attention_bwd_keys(
    q,
    k,
    v,
    bounds,
    dout,
    log_sums,
    deltas,
    hulls,
    dk,
    dv,
    scale,
    num_queries,
    num_keys,
    kv_heads,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    bounds_batch,
    bounds_row,
    dout_batch,
    dout_row,
    dout_head,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv = p^T dout, dk = scale ds^T q, where p = exp(scale q k^T - lse), ds = p (dout v^T - delta).

    One program owns a key tile of one key head, keeps k, v and the sums, and visits the tiles of packed rows (all query
    heads of the group) that attend to it. It compares the hulls of 32 row tiles at a time with its keys, and sets one
    bit for each tile that attends in part and one for each whose rows attend to all keys; the loop over the latter has
    no mask code. Of tiles without a bit it loads the hulls only. 8 D flops per pair of a visited tile; q and dout are
    read once per key tile, mostly from L2. p and ds are rounded to the inputs' dtype; sums are float32, in fixed order.
    """
    key_tiles = tl.cdiv(num_keys, KEYS)
    program = tl.program_id(0)
    first_key = program % key_tiles * KEYS
    batch, kv_head = (program // key_tiles // kv_heads).to(tl.int64), program // key_tiles % kv_heads
    keys = first_key + tl.arange(0, KEYS)
    exists = keys < num_keys

    tiles = tl.cdiv(num_queries * GROUP, ROWS)
    q += batch * q_batch
    dout += batch * dout_batch
    log_sums += (program // key_tiles).to(tl.int64) * tiles * ROWS
    deltas += (program // key_tiles).to(tl.int64) * tiles * ROWS
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    k_at, v_at = keys.to(tl.int64) * k_row, keys.to(tl.int64) * v_row
    k_part, v_part = load_tile(k, k_at, exists, 0, HEAD), load_tile(v, v_at, exists, 0, HEAD)
    k_tail, v_tail = k_part, v_part
    if TAIL:
        k_tail, v_tail = load_tile(k, k_at, exists, HEAD, TAIL), load_tile(v, v_at, exists, HEAD, TAIL)
    dk_part, dv_part = tl.zeros([KEYS, HEAD], tl.float32), tl.zeros([KEYS, HEAD], tl.float32)
    dk_tail, dv_tail = dk_part, dv_part
    if TAIL:
        dk_tail, dv_tail = tl.zeros([KEYS, TAIL], tl.float32), tl.zeros([KEYS, TAIL], tl.float32)

    if bounds is None:
        for tile in tl.range(0, tiles, num_stages=STAGES):
            dk_part, dk_tail, dv_part, dv_tail = _add_rows(
                dk_part,
                dk_tail,
                dv_part,
                dv_tail,
                k_part,
                k_tail,
                v_part,
                v_tail,
                q,
                dout,
                log_sums,
                deltas,
                bounds,
                tile,
                first_key,
                scale * LOG2_E,
                num_queries,
                num_keys,
                kv_head,
                q_row,
                q_head,
                dout_row,
                dout_head,
                bounds_row,
                GROUP,
                HEAD,
                TAIL,
                ROWS,
                KEYS,
                False,
                PRECISION,
            )
    else:
        bounds += batch * bounds_batch
        hulls += batch * tiles * 8
        end = tl.minimum(first_key + KEYS, num_keys)
        bit = tl.arange(0, SCAN).to(tl.int64)
        for first_tile in tl.range(0, tiles, SCAN, num_stages=1):
            index = first_tile + tl.arange(0, SCAN)
            at, there = hulls + index * 8, index < tiles
            touched = (tl.load(at, mask=there, other=num_keys) < end) & (
                tl.load(at + 1, mask=there, other=0) > first_key
            )
            touched |= (tl.load(at + 4, mask=there, other=num_keys) < end) & (
                tl.load(at + 5, mask=there, other=0) > first_key
            )
            full = (tl.load(at + 2, mask=there, other=num_keys) <= first_key) & (
                tl.load(at + 3, mask=there, other=0) >= end
            )
            full |= (tl.load(at + 6, mask=there, other=num_keys) <= first_key) & (
                tl.load(at + 7, mask=there, other=0) >= end
            )
            one = tl.full([SCAN], 1, tl.int64) << bit
            bits = tl.sum(tl.where(touched & (full == 0), one, 0), 0)
            for _ in tl.range(0, tl.sum((touched & (full == 0)).to(tl.int32), 0), num_stages=MASKED_STAGES):
                tile = first_tile + _lowest_bit(bits)
                bits &= bits - 1
                dk_part, dk_tail, dv_part, dv_tail = _add_rows(
                    dk_part,
                    dk_tail,
                    dv_part,
                    dv_tail,
                    k_part,
                    k_tail,
                    v_part,
                    v_tail,
                    q,
                    dout,
                    log_sums,
                    deltas,
                    bounds,
                    tile,
                    first_key,
                    scale * LOG2_E,
                    num_queries,
                    num_keys,
                    kv_head,
                    q_row,
                    q_head,
                    dout_row,
                    dout_head,
                    bounds_row,
                    GROUP,
                    HEAD,
                    TAIL,
                    ROWS,
                    KEYS,
                    True,
                    PRECISION,
                )
            bits = tl.sum(tl.where(full, one, 0), 0)
            for _ in tl.range(0, tl.sum(full.to(tl.int32), 0), num_stages=STAGES):
                tile = first_tile + _lowest_bit(bits)
                bits &= bits - 1
                dk_part, dk_tail, dv_part, dv_tail = _add_rows(
                    dk_part,
                    dk_tail,
                    dv_part,
                    dv_tail,
                    k_part,
                    k_tail,
                    v_part,
                    v_tail,
                    q,
                    dout,
                    log_sums,
                    deltas,
                    bounds,
                    tile,
                    first_key,
                    scale * LOG2_E,
                    num_queries,
                    num_keys,
                    kv_head,
                    q_row,
                    q_head,
                    dout_row,
                    dout_head,
                    bounds_row,
                    GROUP,
                    HEAD,
                    TAIL,
                    ROWS,
                    KEYS,
                    False,
                    PRECISION,
                )

    at = ((batch * num_keys + keys) * kv_heads + kv_head) * (HEAD + TAIL)
    store_tile(dk, at, exists, dk_part * scale, 0, HEAD)
    store_tile(dv, at, exists, dv_part, 0, HEAD)
    if TAIL:
        store_tile(dk, at, exists, dk_tail * scale, HEAD, TAIL)
        store_tile(dv, at, exists, dv_tail, HEAD, TAIL)


@triton.jit
def _add_keys(
    dq,
    dq_tail,
    q,
    q_tail,
    g,
    g_tail,
    log_sum,
    delta,
    k,
    v,
    start,
    scale,
    num_keys,
    k_row,
    v_row,
    lo0,
    hi0,
    lo1,
    hi1,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one key tile's share to dq / scale of a row tile. Scores are (rows, keys)."""
    lanes = tl.arange(0, KEYS)
    keys = start + lanes
    k += start.to(tl.int64) * k_row
    v += start.to(tl.int64) * v_row
    k_at, v_at = lanes.to(tl.int64) * k_row, lanes.to(tl.int64) * v_row
    if MASKED:
        allowed = allowed_pairs(keys[None, :], lo0[:, None], hi0[:, None], lo1[:, None], hi1[:, None])
        wanted = attended_keys(keys, lo0, hi0, lo1, hi1)  # loads no other k: ds is 0 there, but 0 * NaN is NaN
    else:
        wanted = None
    x, y = load_tile(k, k_at, wanted, 0, HEAD), load_tile(v, v_at, wanted, 0, HEAD)
    s = tl.dot(q, tl.trans(x), input_precision=PRECISION)  # (rows, keys)
    dp = tl.dot(g, tl.trans(y), input_precision=PRECISION)
    if TAIL:
        x_tail, y_tail = load_tile(k, k_at, wanted, HEAD, TAIL), load_tile(v, v_at, wanted, HEAD, TAIL)
        s = tl.dot(q_tail, tl.trans(x_tail), s, input_precision=PRECISION)
        dp = tl.dot(g_tail, tl.trans(y_tail), dp, input_precision=PRECISION)
    ds = tl.math.exp2(s * scale - log_sum[:, None]) * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(allowed, ds, 0.0)
    ds = ds.to(k.dtype.element_ty)
    dq = tl.dot(ds, x, dq, input_precision=PRECISION)
    if TAIL:
        dq_tail = tl.dot(ds, x_tail, dq_tail, input_precision=PRECISION)
    return dq, dq_tail


@triton.jit(do_not_specialize=["num_queries", "num_keys", "kv_heads", "packed_rows"])
def attention_bwd_queries(
    q,
    k,
    v,
    bounds,
    dout,
    log_sums,
    deltas,
    dq,
    scale,
    num_queries,
    num_keys,
    kv_heads,
    packed_rows,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    bounds_batch,
    bounds_row,
    dout_batch,
    dout_row,
    dout_head,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq = scale ds k, where ds = p (dout v^T - delta), p = exp(scale q k^T - lse).

    One program owns ROWS packed rows of one key head and streams key tiles as attention_fwd does: masked parts first,
    then whole tiles. 6 D flops per pair of a visited tile. ds is rounded to the inputs' dtype; sums are float32.
    """
    tiles = tl.cdiv(num_queries * GROUP, ROWS)
    program = tl.program_id(0)
    tile_of_rows = tiles - 1 - program % tiles
    batch, kv_head = (program // tiles // kv_heads).to(tl.int64), program // tiles % kv_heads
    rows = tile_of_rows * ROWS + tl.arange(0, ROWS)
    inside = rows < num_queries * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    if bounds is not None:
        bounds += batch * bounds_batch
    lo0, hi0, lo1, hi1, begin0, full0, full_end0, end0, begin1, full1, full_end1, end1 = key_plan(
        bounds, queries, inside, bounds_row, num_keys, KEYS, PART
    )

    q += batch * q_batch
    dout += batch * dout_batch
    q_at = queries.to(tl.int64) * q_row + heads.to(tl.int64) * q_head
    dout_at = queries.to(tl.int64) * dout_row + heads.to(tl.int64) * dout_head
    q_part, g_part = load_tile(q, q_at, inside, 0, HEAD), load_tile(dout, dout_at, inside, 0, HEAD)
    q_tail, g_tail = q_part, g_part
    if TAIL:
        q_tail, g_tail = load_tile(q, q_at, inside, HEAD, TAIL), load_tile(dout, dout_at, inside, HEAD, TAIL)
    packed = (program // tiles).to(tl.int64) * packed_rows + rows
    log_sum = tl.load(log_sums + packed, mask=inside, other=float("inf"))
    delta = tl.load(deltas + packed, mask=inside, other=0.0)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head

    dq_part = tl.zeros([ROWS, HEAD], tl.float32)
    dq_tail = tl.zeros([ROWS, TAIL if TAIL else 16], tl.float32)
    keys_in_part = full0 - begin0 + end0 - full_end0 + full1 - begin1 + end1 - full_end1
    for i in tl.range(0, keys_in_part, PART, num_stages=MASKED_STAGES):
        start = part_at(i, begin0, full0, full_end0, end0, begin1, full1, full_end1)
        dq_part, dq_tail = _add_keys(
            dq_part,
            dq_tail,
            q_part,
            q_tail,
            g_part,
            g_tail,
            log_sum,
            delta,
            k,
            v,
            start,
            scale * LOG2_E,
            num_keys,
            k_row,
            v_row,
            lo0,
            hi0,
            lo1,
            hi1,
            HEAD,
            TAIL,
            PART,
            True,
            PRECISION,
        )
    whole = full_end0 - full0
    for i in tl.range(0, whole + full_end1 - full1, KEYS, num_stages=STAGES):
        start = tl.where(i < whole, full0 + i, full1 + i - whole)
        dq_part, dq_tail = _add_keys(
            dq_part,
            dq_tail,
            q_part,
            q_tail,
            g_part,
            g_tail,
            log_sum,
            delta,
            k,
            v,
            start,
            scale * LOG2_E,
            num_keys,
            k_row,
            v_row,
            lo0,
            hi0,
            lo1,
            hi1,
            HEAD,
            TAIL,
            KEYS,
            False,
            PRECISION,
        )

    at = ((batch * num_queries + queries) * kv_heads * GROUP + heads) * (HEAD + TAIL)
    store_tile(dq, at, inside, dq_part * scale, 0, HEAD)
    if TAIL:
        store_tile(dq, at, inside, dq_tail * scale, HEAD, TAIL)


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
