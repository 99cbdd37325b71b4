# mypy: allow-untyped-defs
"""dk and dv of attention in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2_E, allowed_pairs, load_tile, row_ranges, store_tile

SCAN = tl.constexpr(32)  # row tiles that a key tile tests together, one bit each in an int64


@triton.jit
def _add_rows(
    sums,
    key_tile,
    inputs,
    numbers,
    tile,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one row tile's share to dk / scale and dv of a key tile. Scores are (keys, rows)."""
    dk, dk_tail, dv, dv_tail = sums
    k, k_tail, v, v_tail = key_tile
    q, dout, log_sums, deltas, bounds, q_row, q_head, dout_row, dout_head, bounds_row = inputs
    num_queries, num_keys, kv_head, first_key, scale = numbers
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
def _attending(hulls, first_tile, tiles, first_key, end, num_keys):
    """Returns for each of SCAN row tiles whether a row attends to some key of first_key .. end, and whether all rows
    attend to all of them."""
    index = first_tile + tl.arange(0, SCAN)
    at, there = hulls + index * 8, index < tiles
    touched = (tl.load(at, mask=there, other=num_keys) < end) & (tl.load(at + 1, mask=there, other=0) > first_key)
    touched |= (tl.load(at + 4, mask=there, other=num_keys) < end) & (tl.load(at + 5, mask=there, other=0) > first_key)
    full = (tl.load(at + 2, mask=there, other=num_keys) <= first_key) & (tl.load(at + 3, mask=there, other=0) >= end)
    full |= (tl.load(at + 6, mask=there, other=num_keys) <= first_key) & (tl.load(at + 7, mask=there, other=0) >= end)
    return touched, full


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

    sums, key_tile = (dk_part, dk_tail, dv_part, dv_tail), (k_part, k_tail, v_part, v_tail)
    if bounds is not None:
        bounds += batch * bounds_batch
    inputs = q, dout, log_sums, deltas, bounds, q_row, q_head, dout_row, dout_head, bounds_row
    numbers = num_queries, num_keys, kv_head, first_key, scale * LOG2_E
    if bounds is None:
        for tile in tl.range(0, tiles, num_stages=STAGES):
            sums = _add_rows(sums, key_tile, inputs, numbers, tile, GROUP, HEAD, TAIL, ROWS, KEYS, False, PRECISION)
    else:
        hulls += batch * tiles * 8
        end = tl.minimum(first_key + KEYS, num_keys)
        one = tl.full([SCAN], 1, tl.int64) << tl.arange(0, SCAN).to(tl.int64)
        for first_tile in tl.range(0, tiles, SCAN, num_stages=1):
            touched, full = _attending(hulls, first_tile, tiles, first_key, end, num_keys)
            some = touched & (full == 0)
            bits = tl.sum(tl.where(some, one, 0), 0)
            for _ in tl.range(0, tl.sum(some.to(tl.int32), 0), num_stages=MASKED_STAGES):
                tile = first_tile + _lowest_bit(bits)
                bits &= bits - 1
                sums = _add_rows(sums, key_tile, inputs, numbers, tile, GROUP, HEAD, TAIL, ROWS, KEYS, True, PRECISION)
            bits = tl.sum(tl.where(full, one, 0), 0)
            for _ in tl.range(0, tl.sum(full.to(tl.int32), 0), num_stages=STAGES):
                tile = first_tile + _lowest_bit(bits)
                bits &= bits - 1
                sums = _add_rows(sums, key_tile, inputs, numbers, tile, GROUP, HEAD, TAIL, ROWS, KEYS, False, PRECISION)

    dk_part, dk_tail, dv_part, dv_tail = sums
    at = ((batch * num_keys + keys) * kv_heads + kv_head) * (HEAD + TAIL)
    store_tile(dk, at, exists, dk_part * scale, 0, HEAD)
    store_tile(dv, at, exists, dv_part, 0, HEAD)
    if TAIL:
        store_tile(dk, at, exists, dk_tail * scale, HEAD, TAIL)
        store_tile(dv, at, exists, dv_tail, HEAD, TAIL)
