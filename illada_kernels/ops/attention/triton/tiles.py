# mypy: allow-untyped-defs
"""What the Triton kernels of attention share: key ranges seen from a tile of rows, and tiles of memory.

The query heads that read a key head are packed into rows: row r of a (batch entry, key head) is query r // GROUP under
head r % GROUP of those. So a tile of 128 rows holds 32 queries where four heads share a key head: as many products, but
narrower hulls, and a block of a few new queries fills a tile. head_dim is a power of two, HEAD, or the sum of two, HEAD
and TAIL (96 = 64 + 32), whose parts are separate tensors: nothing is padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_ranges(bounds, queries, inside, row_stride, num_keys):
    """lo0, hi0, lo1, hi1 (rows,) in normal form; ranges that touch are one, and a row's only range is its first."""
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
    """begin, end: the ranges of all rows lie within; all_begin, all_end: within the range of every row, or empty."""
    some = lo < hi
    begin = tl.min(tl.where(some, lo, num_keys), 0)
    end = tl.max(tl.where(some, hi, 0), 0)
    all_begin = tl.max(tl.where(some, lo, tl.where(inside, num_keys, 0)), 0)
    all_end = tl.min(tl.where(some, hi, tl.where(inside, 0, num_keys)), 0)
    return begin, end, all_begin, all_end


@triton.jit
def key_span(begin, end, all_begin, all_end, first, KEYS: tl.constexpr, PART: tl.constexpr):
    """What a hull visits from key `first` on, begin <= full <= full_end <= end: whole tiles of KEYS keys in between,
    which every row attends to, and before and after them parts of PART keys, which some row may attend to."""
    begin = tl.maximum(begin // PART * PART, first)
    end = tl.maximum(tl.cdiv(end, PART) * PART, begin)
    full = tl.cdiv(tl.maximum(all_begin, first), KEYS) * KEYS
    full_end = all_end // KEYS * KEYS
    none = full >= full_end
    return begin, tl.where(none, end, full), tl.where(none, end, full_end), end


@triton.jit
def key_plan(bounds, queries, inside, row_stride, num_keys, KEYS: tl.constexpr, PART: tl.constexpr):
    """The ranges of a tile of rows, and what its two hulls visit; the second starts where the first ends."""
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
    return lo0, hi0, lo1, hi1, begin0, full0, full_end0, end0, begin1, full1, full_end1, end1


@triton.jit
def part_at(key, begin0, full0, full_end0, end0, begin1, full1, full_end1):
    """The key that is `key` keys after begin0, where only begin0..full0, full_end0..end0, begin1..full1 and
    full_end1.. count."""
    at = begin0 + key
    key -= full0 - begin0
    at = tl.where(key >= 0, full_end0 + key, at)
    key -= end0 - full_end0
    at = tl.where(key >= 0, begin1 + key, at)
    key -= full1 - begin1
    return tl.where(key >= 0, full_end1 + key, at)


@triton.jit
def allowed_pairs(keys, lo0, hi0, lo1, hi1):
    """(rows, keys) or (keys, rows), whichever way the arguments are spread. Unsigned: one comparison a range."""
    first = (keys - lo0).to(tl.uint32) < (hi0 - lo0).to(tl.uint32)
    return first | ((keys - lo1).to(tl.uint32) < (hi1 - lo1).to(tl.uint32))


@triton.jit
def attended_keys(keys, lo0, hi0, lo1, hi1):
    """(keys,): some row attends. Computed once more and the other way round: to reduce (rows, keys), which lies as a
    product does, over its rows takes twice the registers."""
    pairs = allowed_pairs(keys[:, None], lo0[None, :], hi0[None, :], lo1[None, :], hi1[None, :])
    return tl.max(pairs.to(tl.int32), 1) > 0


@triton.jit
def load_tile(base, row_offsets, rows_wanted, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Channels FIRST .. FIRST + SIZE of rows (rows, SIZE), zero where not wanted (None: all are)."""
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
