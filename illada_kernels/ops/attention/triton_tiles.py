"""What the Triton kernels of attention share: key ranges seen from a tile of rows, and tiles of memory.

The query heads that read one key head are packed into rows: row r of a (batch entry, key head) is query r // group under
head r % group of them. So a tile of 128 rows holds 32 queries where four heads share a key head: as many products,
narrower hulls, and a block of a few new queries fills a tile. head_dim is one power of two, HEAD, or the sum of two, HEAD
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
def key_tiles(begin, end, all_begin, all_end, first, KEYS: tl.constexpr):
    """Of a hull, from key tile `first` on: its tiles, and those among them that every row attends to whole."""
    tile = tl.maximum(begin // KEYS, first)
    tiles_end = tl.maximum(tl.cdiv(end, KEYS), tile)
    full = tl.minimum(tl.maximum(tl.cdiv(all_begin, KEYS), tile), tiles_end)
    full_end = tl.maximum(tl.minimum(all_end // KEYS, tiles_end), full)
    return tile, full, full_end, tiles_end


@triton.jit
def key_plan(bounds, queries, inside, row_stride, num_keys, KEYS: tl.constexpr):
    """The ranges of a tile of rows, and the tiles of its two hulls: those of the second start after the first's."""
    if bounds is None:
        zero = tl.zeros_like(queries)
        lo0, hi0, lo1, hi1 = zero, zero + num_keys, zero + num_keys, zero + num_keys
        t0, f0, g0, e0 = 0, 0, num_keys // KEYS, tl.cdiv(num_keys, KEYS)
        t1, f1, g1, e1 = 0, 0, 0, 0
    else:
        lo0, hi0, lo1, hi1 = row_ranges(bounds, queries, inside, row_stride, num_keys)
        begin, end, all_begin, all_end = hull(lo0, hi0, inside, num_keys)
        t0, f0, g0, e0 = key_tiles(begin, end, all_begin, all_end, 0, KEYS)
        begin, end, all_begin, all_end = hull(lo1, hi1, inside, num_keys)
        t1, f1, g1, e1 = key_tiles(begin, end, all_begin, all_end, e0, KEYS)
    return lo0, hi0, lo1, hi1, t0, f0, g0, e0, t1, f1, g1, e1


@triton.jit
def partial_tile(i, t0, f0, g0, e0, t1, f1, g1, e1):
    """The i-th of the tiles t0..f0, g0..e0, t1..f1, g1..e1."""
    tile = t0 + i
    i -= f0 - t0
    tile = tl.where(i >= 0, g0 + i, tile)
    i -= e0 - g0
    tile = tl.where(i >= 0, t1 + i, tile)
    i -= f1 - t1
    return tl.where(i >= 0, g1 + i, tile)


@triton.jit
def allowed_pairs(keys, lo0, hi0, lo1, hi1):
    """(rows, keys) or (keys, rows), whichever way the arguments are spread. Unsigned: one comparison a range."""
    first = (keys - lo0).to(tl.uint32) < (hi0 - lo0).to(tl.uint32)
    return first | ((keys - lo1).to(tl.uint32) < (hi1 - lo1).to(tl.uint32))


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
