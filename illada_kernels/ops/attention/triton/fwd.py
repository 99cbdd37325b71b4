# mypy: allow-untyped-defs
"""Attention forward in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem, contiguous_bounds
from . import tuning
from .tiles import (
    LN_2,
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
from .tuning import FORWARD, FULL, Tile, aot, every_tile, head_parts, strides

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32


@triton.jit
def _attend(
    state,
    q,
    q_tail,
    common,
    ranges,
    start,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds one key tile to the running maximum (of scores / log 2), sum and output of a row tile."""
    maximum, total, acc, acc_tail = state
    k, v, k_row, v_row, num_keys, scale = common
    lanes = tl.arange(0, KEYS)
    keys = start + lanes
    k += start.to(tl.int64) * k_row
    v += start.to(tl.int64) * v_row
    k_at, v_at = lanes.to(tl.int64) * k_row, lanes.to(tl.int64) * v_row
    if MASKED:
        lo0, hi0, lo1, hi1 = ranges
        allowed = allowed_pairs(keys[None, :], lo0[:, None], hi0[:, None], lo1[:, None], hi1[:, None])
        exists = keys < num_keys
        attended = attended_keys(keys, lo0, hi0, lo1, hi1)  # loads no other v: p is 0 there, but 0 * NaN is NaN
    else:
        exists, attended = None, None
    s = tl.dot(q, tl.trans(load_tile(k, k_at, exists, 0, HEAD)), input_precision=PRECISION)  # (rows, keys)
    if TAIL:
        s = tl.dot(q_tail, tl.trans(load_tile(k, k_at, exists, HEAD, TAIL)), s, input_precision=PRECISION)
    if MASKED:
        s = tl.where(allowed, s * scale, float("-inf"))
        new = tl.maximum(maximum, tl.max(s, 1))
        p = tl.math.exp2(s - new[:, None])
    else:
        largest = tl.min(s, 1) if NEGATIVE else tl.max(s, 1)
        new = tl.maximum(maximum, largest * scale)
        p = tl.math.exp2(s * scale - new[:, None])
    rescale = tl.math.exp2(maximum - new)
    total = total * rescale + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    acc = tl.dot(p, load_tile(v, v_at, attended, 0, HEAD), acc * rescale[:, None], input_precision=PRECISION)
    if TAIL:
        tail = load_tile(v, v_at, attended, HEAD, TAIL)
        acc_tail = tl.dot(p, tail, acc_tail * rescale[:, None], input_precision=PRECISION)
    return new, total, acc, acc_tail


@triton.jit(do_not_specialize=["num_queries", "num_keys", "kv_heads"])
def attention_fwd(
    q,
    k,
    v,
    bounds,
    out,
    lse,
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
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(scale q k^T) v, lse = log sum exp(scale q k^T), over the keys that `bounds` allows each row.

    One program owns ROWS packed rows of one key head and streams the key tiles of its two hulls: first, masked, the
    tiles to which some row attends in part, then, without mask code, those to which all rows attend. 4 D flops per pair
    of a visited tile; q, out and lse move once, k and v once per row tile, mostly from L2. Scores, softmax (exp2, scale
    folded in) and sums are float32; p is rounded to v's dtype for the second matmul. Ties need no rule. NaN reaches the
    rows that attend to it. A row without keys: out 0, lse -inf.
    """
    tiles = tl.cdiv(num_queries * GROUP, ROWS)
    program = tl.program_id(0)
    tile_of_rows = tiles - 1 - program % tiles  # last rows first: under causal-like masks they have the most keys
    batch = (program // tiles // kv_heads).to(tl.int64)
    kv_head = program // tiles % kv_heads

    rows = tile_of_rows * ROWS + tl.arange(0, ROWS)
    inside = rows < num_queries * GROUP
    queries, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    if bounds is not None:
        bounds += batch * bounds_batch
    ranges, plan = key_plan(bounds, queries, inside, bounds_row, num_keys, KEYS, PART)

    q += batch * q_batch
    q_at = queries.to(tl.int64) * q_row + heads.to(tl.int64) * q_head
    q_head_part = load_tile(q, q_at, inside, 0, HEAD)
    q_tail = q_head_part
    if TAIL:
        q_tail = load_tile(q, q_at, inside, HEAD, TAIL)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    scale *= LOG2_E

    # Finite, so that p of a row that has met no key, or only -inf, is 0 and not NaN.
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    acc_tail = tl.zeros([ROWS, TAIL if TAIL else 16], tl.float32)
    state, common = (maximum, total, acc, acc_tail), (k, v, k_row, v_row, num_keys, scale)
    for i in tl.range(0, keys_in_parts(plan), PART, num_stages=MASKED_STAGES):
        start = key_in_parts(i, plan)
        state = _attend(state, q_head_part, q_tail, common, ranges, start, HEAD, TAIL, PART, True, NEGATIVE, PRECISION)
    for i in tl.range(0, keys_in_whole_tiles(plan), KEYS, num_stages=STAGES):
        start = key_in_whole_tiles(i, plan)
        state = _attend(state, q_head_part, q_tail, common, ranges, start, HEAD, TAIL, KEYS, False, NEGATIVE, PRECISION)

    maximum, total, acc, acc_tail = state
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    out_at = ((batch * num_queries + queries) * kv_heads * GROUP + heads) * (HEAD + TAIL)
    store_tile(out, out_at, inside, acc / total[:, None], 0, HEAD)
    if TAIL:
        store_tile(out, out_at, inside, acc_tail / total[:, None], HEAD, TAIL)
    log = tl.where(none, float("-inf"), (maximum + tl.math.log2(total)) * LN_2)
    tl.store(lse + (batch * kv_heads * GROUP + heads) * num_queries + queries, log, mask=inside)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, bounds, scale = problem.q, problem.k, problem.v, contiguous_bounds(problem.bounds), problem.scale
    batch, queries, keys, heads, kv_heads, dim, _ = problem.sizes()
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile, group = tuning.choose(FORWARD, q), heads // kv_heads
    fixed = constants(group, dim, q.dtype, tile) | {"NEGATIVE": scale < 0, "num_warps": tile.warps}
    moves = strides(q, k, v, bounds)
    grid = (triton.cdiv(queries * group, tile.rows) * batch * kv_heads,)
    with torch.cuda.device_of(q):
        attention_fwd[grid](q, k, v, bounds, out, lse, scale, queries, keys, kv_heads, *moves, **fixed)
    return out, lse


def constants(group: int, dim: int, dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    head, tail = head_parts(dim)
    return {
        "GROUP": group,
        "HEAD": head,
        "TAIL": tail,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "PART": tile.part,
        "STAGES": tile.stages,
        "MASKED_STAGES": tile.masked_stages,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def aot_configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yields every tile of the table, with bounds, for tests/gpu_code/triton_code.py."""
    for name, dim, dtype, tile, archs in every_tile(FORWARD):
        fixed = constants(4, dim, dtype, tile) | {"NEGATIVE": name == FULL}
        yield f"fwd {name}", *aot(attention_fwd, name, dtype, fixed, tile.warps, archs)
