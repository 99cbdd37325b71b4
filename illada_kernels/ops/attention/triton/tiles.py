# mypy: allow-untyped-defs
"""Plans the key tiles of a row tile, and loads and stores tiles, for the Triton kernels of attention.

The query heads that share a key head are packed into rows: row r of a (batch entry, key head) is query r // GROUP of
head r % GROUP. With GROUP = 4 a tile of 128 rows holds 32 queries: the matmuls are as large, the hulls narrower, and a
few new queries fill a tile. head_dim is a power of two, HEAD, or a sum of two, HEAD + TAIL (96 = 64 + 32), in separate
tensors, so that nothing is padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_ranges(bounds, queries, inside, row_stride, num_keys):
    """Returns lo0, hi0, lo1, hi1 (rows,) in normal form: adjacent ranges are merged; a single range comes first."""
    at = bounds + queries.to(tl.int64) * row_stride
    lo0 = tl.minimum(tl.maximum(tl.load(at, mask=inside, other=0), 0), num_keys)
    hi0 = tl.minimum(tl.maximum(tl.load(at + 1, mask=inside, other=0), lo0), num_keys)
    lo1 = tl.minimum(tl.maximum(tl.load(at + 2, mask=inside, other=0), hi0), num_keys)
    hi1 = tl.minimum(tl.maximum(tl.load(at + 3, mask=inside, other=0), lo1), num_keys)
    lo0 = tl.where(lo0 == hi0, lo1, lo0)
    one = (lo0 == lo1) | (hi0 == lo1)
    hi0 = tl.where(one, hi1, hi0)
    lo1 = tl.where(one, hi1, lo1)
    return lo0, hi0, lo1, hi1


@triton.jit
def hull(lo, hi, inside, num_keys):
    """Returns begin, end, the union's hull, and all_begin, all_end, the intersection of the rows' ranges, or empty."""
    some = lo < hi
    begin = tl.min(tl.where(some, lo, num_keys), 0)
    end = tl.max(tl.where(some, hi, 0), 0)
    all_begin = tl.max(tl.where(some, lo, tl.where(inside, num_keys, 0)), 0)
    all_end = tl.min(tl.where(some, hi, tl.where(inside, 0, num_keys)), 0)
    return begin, end, all_begin, all_end


@triton.jit
def key_span(begin, end, all_begin, all_end, first, KEYS: tl.constexpr, PART: tl.constexpr):
    """Returns what a hull visits from key `first` on, begin <= full <= full_end <= end.

    full .. full_end are whole tiles of KEYS keys to which every row attends; before and after them come parts of PART
    keys to which some row may attend.
    """
    begin = tl.maximum(begin // PART * PART, first)
    end = tl.maximum(tl.cdiv(end, PART) * PART, begin)
    full = tl.cdiv(tl.maximum(all_begin, first), KEYS) * KEYS
    full_end = all_end // KEYS * KEYS
    none = full >= full_end
    return begin, tl.where(none, end, full), tl.where(none, end, full_end), end


@triton.jit
def key_plan(bounds, queries, inside, row_stride, num_keys, KEYS: tl.constexpr, PART: tl.constexpr):
    """Returns the ranges of a row tile, lo0, hi0, lo1, hi1, and what its two hulls visit, begin, full, full_end and end
    of either; the second starts where the first ends."""
    if bounds is None:
        zero = tl.zeros_like(queries)
        lo0, hi0, lo1, hi1 = zero, zero + num_keys, zero + num_keys, zero + num_keys
        begin0, full0, full_end0, end0 = key_span(0, num_keys, 0, num_keys, 0, KEYS, PART)
        begin1, full1, full_end1, end1 = end0, end0, end0, end0
    else:
        lo0, hi0, lo1, hi1 = row_ranges(bounds, queries, inside, row_stride, num_keys)
        begin, end, all_begin, all_end = hull(lo0, hi0, inside, num_keys)
        begin0, full0, full_end0, end0 = key_span(begin, end, all_begin, all_end, 0, KEYS, PART)
        begin, end, all_begin, all_end = hull(lo1, hi1, inside, num_keys)
        begin1, full1, full_end1, end1 = key_span(begin, end, all_begin, all_end, end0, KEYS, PART)
    return (lo0, hi0, lo1, hi1), (begin0, full0, full_end0, end0, begin1, full1, full_end1, end1)


@triton.jit
def keys_in_parts(plan):
    """Returns how many keys the plan visits in parts."""
    begin0, full0, full_end0, end0, begin1, full1, full_end1, end1 = plan
    return full0 - begin0 + end0 - full_end0 + full1 - begin1 + end1 - full_end1


@triton.jit
def key_in_parts(i, plan):
    """Returns the i-th of the keys that the plan visits in parts."""
    begin0, full0, full_end0, end0, begin1, full1, full_end1, _ = plan
    at = begin0 + i
    i -= full0 - begin0
    at = tl.where(i >= 0, full_end0 + i, at)
    i -= end0 - full_end0
    at = tl.where(i >= 0, begin1 + i, at)
    i -= full1 - begin1
    return tl.where(i >= 0, full_end1 + i, at)


@triton.jit
def keys_in_whole_tiles(plan):
    """Returns how many keys the plan visits in whole tiles."""
    return plan[2] - plan[1] + plan[6] - plan[5]


@triton.jit
def key_in_whole_tiles(i, plan):
    """Returns the i-th of the keys that the plan visits in whole tiles."""
    full0, full1, of_first = plan[1], plan[5], plan[2] - plan[1]
    return tl.where(i < of_first, full0 + i, full1 + i - of_first)


@triton.jit
def allowed_pairs(keys, lo0, hi0, lo1, hi1):
    """Returns the mask, (rows, keys) or (keys, rows) as the arguments broadcast. Unsigned, one comparison a range."""
    first = (keys - lo0).to(tl.uint32) < (hi0 - lo0).to(tl.uint32)
    return first | ((keys - lo1).to(tl.uint32) < (hi1 - lo1).to(tl.uint32))


@triton.jit
def attended_keys(keys, lo0, hi0, lo1, hi1):
    """Returns (keys,): whether some row attends. Rebuilds the mask as (keys, rows), because (rows, keys) has the
    MMA layout, and reducing that over its rows needs twice the registers."""
    pairs = allowed_pairs(keys[:, None], lo0[None, :], hi0[None, :], lo1[None, :], hi1[None, :])
    return tl.max(pairs.to(tl.int32), 1) > 0


@triton.jit
def load_tile(base, row_offsets, rows_wanted, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Returns channels FIRST .. FIRST + SIZE of the rows, (rows, SIZE), zero where not wanted (None: all are)."""
    at = base + row_offsets[:, None] + (FIRST + tl.arange(0, SIZE))[None, :]
    if rows_wanted is None:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=rows_wanted[:, None], other=0.0)
    return tile


@triton.jit
def store_tile(base, row_offsets, rows_wanted, tile, FIRST: tl.constexpr, SIZE: tl.constexpr):
    at = base + row_offsets[:, None] + (FIRST + tl.arange(0, SIZE))[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=rows_wanted[:, None])
