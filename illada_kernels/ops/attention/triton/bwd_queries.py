# mypy: allow-untyped-defs
"""dq of attention in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LOG2_E,
    allowed_pairs,
    attended_keys,
    key_in_parts,
    key_in_whole_tiles,
    key_plan,
    keys_in_parts,
    keys_in_whole_tiles,
    load_tile,
    store_tile,
)


@triton.jit
def _add_keys(
    sums,
    row_tile,
    common,
    ranges,
    start,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one key tile's share to dq / scale of a row tile. Scores are (rows, keys)."""
    dq, dq_tail = sums
    q, q_tail, g, g_tail, log_sum, delta = row_tile
    k, v, k_row, v_row, scale = common
    lanes = tl.arange(0, KEYS)
    keys = start + lanes
    k += start.to(tl.int64) * k_row
    v += start.to(tl.int64) * v_row
    k_at, v_at = lanes.to(tl.int64) * k_row, lanes.to(tl.int64) * v_row
    if MASKED:
        lo0, hi0, lo1, hi1 = ranges
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
    ranges, plan = key_plan(bounds, queries, inside, bounds_row, num_keys, KEYS, PART)

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
    sums, row_tile = (dq_part, dq_tail), (q_part, q_tail, g_part, g_tail, log_sum, delta)
    common = k, v, k_row, v_row, scale * LOG2_E
    for i in tl.range(0, keys_in_parts(plan), PART, num_stages=MASKED_STAGES):
        start = key_in_parts(i, plan)
        sums = _add_keys(sums, row_tile, common, ranges, start, HEAD, TAIL, PART, True, PRECISION)
    for i in tl.range(0, keys_in_whole_tiles(plan), KEYS, num_stages=STAGES):
        start = key_in_whole_tiles(i, plan)
        sums = _add_keys(sums, row_tile, common, ranges, start, HEAD, TAIL, KEYS, False, PRECISION)

    dq_part, dq_tail = sums
    at = ((batch * num_queries + queries) * kv_heads * GROUP + heads) * (HEAD + TAIL)
    store_tile(dq, at, inside, dq_part * scale, 0, HEAD)
    if TAIL:
        store_tile(dq, at, inside, dq_tail * scale, HEAD, TAIL)
