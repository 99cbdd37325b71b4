"""The partial of a row and a group of ids: its fields, how a tile of logits joins it, how it is stored."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .. import problem
from .noise import INF, LEAST, NEEDS_TOP_ID, NO_ID, fixed_sum, noised, philox, rescaled, shifted

# Fields of a partial: float32 (FIELDS, groups, rows), and int32 (groups, rows) the id of the best score, NO_BEST if no
# logit is above -inf, BAD if one is NaN or +inf.
# HELD: under NEEDS_TOP_ID the bits of the lowest id with the largest logit.
TOP, SECOND, TOTAL, SURPRISE, SCORE, LOGIT, HELD = (tl.constexpr(i) for i in range(7))
FIELDS = 7
NO_BEST, BAD = tl.constexpr(-1), tl.constexpr(-2)
NEEDS_ENTROPY, NEEDS_SECOND = tl.constexpr(problem.NEEDS_ENTROPY), tl.constexpr(problem.NEEDS_SECOND)
NEEDS_HELD = tl.constexpr(problem.NEEDS_HELD)
ONE = tl.constexpr(2.0**50)  # of sums within a tile, of at most 2048 exponentials not above 1
FORBIDDEN_AT_ONCE = tl.constexpr(16)
UNSPECIALIZED = ("seed_number", "step_number", "mask_id", "length", "biases", "forbids", "rows", "count", "groups")


@triton.jit
def added(ids, vocab, bias_ids, bias_values, biases, forbidden, forbids):
    """Returns (P,) what is added to the logits of ids: their biases, one after another in the order given; -inf where
    forbidden or beyond the vocab."""
    total = tl.zeros(ids.shape, tl.float32)
    if bias_ids is not None:
        for entry in range(biases):
            total += tl.where(tl.load(bias_ids + entry) == ids, tl.load(bias_values + entry), 0.0)
    barred = ids >= vocab
    if forbidden is not None:
        for start in range(0, forbids, FORBIDDEN_AT_ONCE):
            i = start + tl.arange(0, FORBIDDEN_AT_ONCE)
            some = tl.load(forbidden + i, mask=i < forbids, other=-1)
            barred = barred | (tl.max((ids[:, None] == some[None, :]).to(tl.int32), 1) > 0)
    return tl.where(barred, -INF, total)


@triton.jit
def changed(logits, change):
    return tl.where(change == -INF, -INF, logits + change)


@triton.jit
def empty_partial(N: tl.constexpr):
    none = tl.full([N], -INF, tl.float32)
    zero = tl.zeros([N], tl.float32)
    return none, none, zero, zero, none, none, none, tl.full([N], NO_BEST, tl.int32)


@triton.jit
def fold(
    even,
    odd,
    pair,
    row,
    top,
    second,
    total,
    surprise,
    score,
    logit,
    held_logit,
    best,
    bound,
    NOISE: tl.constexpr,
    NEEDS: tl.constexpr,
):
    """Adds a tile to the partials of N rows: logits (P, N) of ids 2 * pair and 2 * pair + 1, which share a Philox
    block. Maxima, ids and integer sums do not depend on how the tile is laid out; the rest is elementwise over rows."""
    held, key0, key1, position, step, temperature, scale = row
    even_id, odd_id = 2 * pair[:, None], 2 * pair[:, None] + 1
    poisoned = tl.max((~((even < INF) & (odd < INF))).to(tl.int32), 0) > 0
    even, odd = tl.where(even < INF, even, -INF), tl.where(odd < INF, odd, -INF)
    tile_top = tl.maximum(tl.max(even, 0), tl.max(odd, 0))

    z0, z1 = shifted(even, tile_top[None, :], scale[None, :]), shifted(odd, tile_top[None, :], scale[None, :])
    e0, e1 = tl.exp(z0), tl.exp(z1)
    tile_total = (fixed_sum(e0, ONE) + fixed_sum(e1, ONE)).to(tl.float32) * (1 / ONE)
    tile_surprise = tl.zeros(top.shape, tl.float32)
    if NEEDS_ENTROPY & NEEDS:
        s0, s1 = tl.where(z0 < LEAST, 0.0, -z0 * e0), tl.where(z1 < LEAST, 0.0, -z1 * e1)
        tile_surprise = (fixed_sum(s0, ONE) + fixed_sum(s1, ONE)).to(tl.float32) * (1 / ONE)
    new_top = tl.maximum(top, tile_top)
    total, surprise = rescaled(total, surprise, top, new_top, scale)
    tile_total, tile_surprise = rescaled(tile_total, tile_surprise, tile_top, new_top, scale)
    total, surprise = total + tile_total, surprise + tile_surprise
    if NEEDS_SECOND & NEEDS:
        first = lowest_id(even, odd, even_id, odd_id, tile_top)[None, :]
        rest = tl.maximum(
            tl.max(tl.where(even_id == first, -INF, even), 0), tl.max(tl.where(odd_id == first, -INF, odd), 0)
        )
        second = tl.maximum(tl.maximum(second, rest), tl.minimum(top, tile_top))
    if NEEDS_HELD & NEEDS:
        held_logit = tl.maximum(held_logit, of_id(even, odd, even_id, odd_id, held))
    if NEEDS_TOP_ID & NEEDS:
        top_id = lowest_id(even, odd, even_id, odd_id, tile_top).to(tl.float32, bitcast=True)
        held_logit = tl.where(tile_top > top, top_id, held_logit)

    if NOISE:
        zero = tl.zeros([1, 1], tl.uint32)
        w0, w1, w2, w3 = philox(
            key0[None, :], key1[None, :], pair[:, None].to(tl.uint32), position[None, :], step[None, :], zero
        )
        score0, score1 = noised(even, temperature[None, :], w0, w1), noised(odd, temperature[None, :], w2, w3)
        if bound is not None:
            score0 = tl.where(even >= bound[None, :], score0, -INF)
            score1 = tl.where(odd >= bound[None, :], score1, -INF)
        tile_score = tl.maximum(tl.max(score0, 0), tl.max(score1, 0))
        tile_best = lowest_id(score0, score1, even_id, odd_id, tile_score)
        tile_logit = of_id(even, odd, even_id, odd_id, tile_best)
    else:
        tile_score, tile_logit = tile_top, tile_top
        tile_best = lowest_id(even, odd, even_id, odd_id, tile_top)
    better = tile_score > score  # ids rise, so a tie stays with the earlier tile
    score, logit = tl.where(better, tile_score, score), tl.where(better, tile_logit, logit)
    best = tl.where(best == BAD, BAD, tl.where(better, tile_best, best))
    best = tl.where(poisoned, BAD, best)
    return new_top, second, total, surprise, score, logit, held_logit, best


@triton.jit
def lowest_id(x0, x1, even_id, odd_id, value):
    """Returns (N,) the lowest id at which x is value."""
    value = value[None, :]
    return tl.minimum(tl.min(tl.where(x0 == value, even_id, NO_ID), 0), tl.min(tl.where(x1 == value, odd_id, NO_ID), 0))


@triton.jit
def of_id(x0, x1, even_id, odd_id, wanted):
    """Returns (N,) x at the wanted id, -inf where it is not in the tile."""
    wanted = wanted[None, :]
    return tl.maximum(tl.max(tl.where(even_id == wanted, x0, -INF), 0), tl.max(tl.where(odd_id == wanted, x1, -INF), 0))


@triton.jit
def load_partial(partials, best_ids, groups, rows, group, row, mask):
    """Loads the partial, an empty one where the mask is false."""
    at = group.to(tl.int64) * rows + row
    field = groups.to(tl.int64) * rows
    top = tl.load(partials + TOP * field + at, mask=mask, other=-INF)
    second = tl.load(partials + SECOND * field + at, mask=mask, other=-INF)
    total = tl.load(partials + TOTAL * field + at, mask=mask, other=0.0)
    surprise = tl.load(partials + SURPRISE * field + at, mask=mask, other=0.0)
    score = tl.load(partials + SCORE * field + at, mask=mask, other=-INF)
    logit = tl.load(partials + LOGIT * field + at, mask=mask, other=-INF)
    held_logit = tl.load(partials + HELD * field + at, mask=mask, other=-INF)
    best = tl.load(best_ids + at, mask=mask, other=NO_BEST)
    return top, second, total, surprise, score, logit, held_logit, best


@triton.jit
def store_partial(
    partials, best_ids, groups, rows, group, row, mask, top, second, total, surprise, score, logit, held_logit, best
):
    at = group.to(tl.int64) * rows + row
    field = groups.to(tl.int64) * rows
    tl.store(partials + TOP * field + at, top, mask=mask)
    tl.store(partials + SECOND * field + at, second, mask=mask)
    tl.store(partials + TOTAL * field + at, total, mask=mask)
    tl.store(partials + SURPRISE * field + at, surprise, mask=mask)
    tl.store(partials + SCORE * field + at, score, mask=mask)
    tl.store(partials + LOGIT * field + at, logit, mask=mask)
    tl.store(partials + HELD * field + at, held_logit, mask=mask)
    tl.store(best_ids + at, best, mask=mask)
