"""From hidden states or logits to one partial per row and group of ids: the kernels before the selection."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .. import problem
from .noise import (
    HIGHEST_TEMPERATURE,
    INF,
    LEAST,
    NO_ID,
    candidates,
    confidence_scale,
    fixed_sum,
    noise_counters,
    noised,
    of_sequence,
    philox,
    rescaled,
    shifted,
)

# Fields of a partial: float32 (FIELDS, groups, rows), and int32 (groups, rows) the id of the best score, NO_BEST if no
# logit is above -inf, BAD if one is NaN or +inf.
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
    """(P,) what is added to the logits of ids: their biases, one after another in the order given; -inf where forbidden
    or beyond the vocab."""
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
    NOISE: tl.constexpr,
    NEEDS: tl.constexpr,
):
    """The partials of N rows with one more tile: logits (P, N) of ids 2 * pair and 2 * pair + 1, which share a Philox
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

    if NOISE:
        zero = tl.zeros([1, 1], tl.uint32)
        w0, w1, w2, w3 = philox(
            key0[None, :], key1[None, :], pair[:, None].to(tl.uint32), position[None, :], step[None, :], zero
        )
        score0, score1 = noised(even, temperature[None, :], w0, w1), noised(odd, temperature[None, :], w2, w3)
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
    """(N,) the lowest id at which x is value."""
    value = value[None, :]
    return tl.minimum(tl.min(tl.where(x0 == value, even_id, NO_ID), 0), tl.min(tl.where(x1 == value, odd_id, NO_ID), 0))


@triton.jit
def of_id(x0, x1, even_id, odd_id, wanted):
    """(N,) x at the wanted id, -inf where it is not in the tile."""
    wanted = wanted[None, :]
    return tl.maximum(tl.max(tl.where(even_id == wanted, x0, -INF), 0), tl.max(tl.where(odd_id == wanted, x1, -INF), 0))


@triton.jit
def load_partial(partials, best_ids, groups, rows, group, row, mask):
    """The partial, or where the mask is false an empty one."""
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


@triton.jit
def row_state(
    row,
    inside,
    count,
    tokens,
    token_b,
    length,
    positions,
    position_b,
    position_k,
    frozen,
    frozen_b,
    frozen_l,
    mask_id,
    noise_positions,
    noise_b,
    noise_k,
    temperature,
    temperature_number,
    temperature_b,
    confidence_temperature,
    confidence_number,
    confidence_b,
    seed,
    seed_number,
    seed_b,
    step,
    step_number,
    step_b,
    REVISES: tl.constexpr,
):
    """(takes part, b, k, (held id, key0, key1, position, step, temperature, scale)) of rows b * K + k."""
    b, k = (row // count).to(tl.int64), (row % count).to(tl.int64)
    candidate, held, at = candidates(
        b, k, inside, tokens, token_b, length, positions, position_b, position_k, frozen, frozen_b, frozen_l
    )
    masked = held == mask_id
    active = candidate if REVISES else candidate & masked
    key0, key1, position, at_step = noise_counters(
        b, k, inside, at, noise_positions, noise_b, noise_k, seed, seed_number, seed_b, step, step_number, step_b
    )
    t = of_sequence(temperature, temperature_number, temperature_b, b, inside, tl.float32)
    t = tl.where(masked & (t > 0), tl.minimum(t, HIGHEST_TEMPERATURE), 0.0)
    scale = confidence_scale(confidence_temperature, confidence_number, confidence_b, b, inside)
    held = tl.where((held >= 0) & (held < NO_ID), held, NO_ID).to(tl.int32)
    return active, b, k, (held, key0, key1, position, at_step, t, scale)


@triton.jit
def tile_logits(
    pair,
    x_rows,
    active,
    head,
    head_v,
    head_bias,
    dim,
    vocab,
    bias_ids,
    bias_values,
    biases,
    forbidden,
    forbids,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """(P, N) logits of ids 2 * pair, and of 2 * pair + 1: two products of one layout."""
    d = tl.arange(0, BLOCK_D)
    even_rows = head + (2 * pair).to(tl.int64)[:, None] * head_v + d[None, :]  # (P, D)
    even_there, odd_there = 2 * pair < vocab, 2 * pair + 1 < vocab
    even = tl.zeros([PAIRS, BLOCK_N], tl.float32)
    odd = tl.zeros([PAIRS, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_rows + start, mask=active[None, :], other=0.0)
            w0 = tl.load(even_rows + start, mask=even_there[:, None], other=0.0)
            w1 = tl.load(even_rows + head_v + start, mask=odd_there[:, None], other=0.0)
        else:
            within = start + d < dim
            x = tl.load(x_rows + start, mask=active[None, :] & within[:, None], other=0.0)
            w0 = tl.load(even_rows + start, mask=even_there[:, None] & within[None, :], other=0.0)
            w1 = tl.load(even_rows + head_v + start, mask=odd_there[:, None] & within[None, :], other=0.0)
        x = x.to(w0.dtype)
        even = tl.dot(w0, x, even, input_precision="ieee")
        odd = tl.dot(w1, x, odd, input_precision="ieee")
    if head_bias is not None:
        even += tl.load(head_bias + 2 * pair, mask=even_there, other=0.0).to(tl.float32)[:, None]
        odd += tl.load(head_bias + 2 * pair + 1, mask=odd_there, other=0.0).to(tl.float32)[:, None]
    even = changed(even, added(2 * pair, vocab, bias_ids, bias_values, biases, forbidden, forbids)[:, None])
    odd = changed(odd, added(2 * pair + 1, vocab, bias_ids, bias_values, biases, forbidden, forbids)[:, None])
    return even, odd


@triton.jit(do_not_specialize=UNSPECIALIZED)
def head_kernel(
    hidden,
    hidden_b,
    hidden_k,
    head,
    head_v,
    head_bias,
    dim,
    scratch,
    vocab,
    rows,
    count,
    tokens,
    token_b,
    length,
    positions,
    position_b,
    position_k,
    frozen,
    frozen_b,
    frozen_l,
    mask_id: tl.int64,
    noise_positions,
    noise_b,
    noise_k,
    temperature,
    temperature_number,
    temperature_b,
    confidence_temperature,
    confidence_number,
    confidence_b,
    seed,
    seed_number: tl.int64,
    seed_b,
    step,
    step_number: tl.int64,
    step_b,
    bias_ids,
    bias_values,
    biases,
    forbidden,
    forbids,
    partials,
    best_ids,
    groups,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    NOISE: tl.constexpr,
    NEEDS: tl.constexpr,
    REVISES: tl.constexpr,
):
    """l = hidden . head_v + head_bias_v for up to BLOCK_N rows, reduced to a partial per row.
    One program owns the tiles of 2 * PAIRS ids of its group; tiles and groups depend on V alone. It reads their rows of
    the head once (2 * PAIRS * D elements a tile), and every hidden row, out of the second level cache, once a tile.
    Products accumulate in float32 over D in steps of BLOCK_D, for each row alike: BLOCK_N only says how many columns
    one instruction has. A tile's logits then pass, CHUNK rows at a time, through a scratch of the program's own that
    stays in the cache, so that registers do not grow with the rows. Even and odd ids are two products, so that an id
    pair's noise is drawn once. Rows that take no part are not read; NaN in one row stays there. Ties to the lowest id.
    """
    group = tl.program_id(0)
    row = tl.arange(0, BLOCK_N)
    active, b, k, _unused = row_state(
        row,
        row < rows,
        count,
        tokens,
        token_b,
        length,
        positions,
        position_b,
        position_k,
        frozen,
        frozen_b,
        frozen_l,
        mask_id,
        noise_positions,
        noise_b,
        noise_k,
        temperature,
        temperature_number,
        temperature_b,
        confidence_temperature,
        confidence_number,
        confidence_b,
        seed,
        seed_number,
        seed_b,
        step,
        step_number,
        step_b,
        REVISES,
    )
    x_rows = hidden + (b * hidden_b + k * hidden_k)[None, :] + tl.arange(0, BLOCK_D)[:, None]  # (D, N)
    own = scratch + group.to(tl.int64) * (2 * PAIRS * BLOCK_N) + tl.arange(0, PAIRS)[:, None] * BLOCK_N  # (P, 1)
    tiles = tl.cdiv(vocab, 2 * PAIRS)
    first_tile = group * tiles // groups
    for tile in range(first_tile, (group + 1) * tiles // groups):
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        even, odd = tile_logits(
            pair,
            x_rows,
            active,
            head,
            head_v,
            head_bias,
            dim,
            vocab,
            bias_ids,
            bias_values,
            biases,
            forbidden,
            forbids,
            PAIRS,
            BLOCK_N,
            BLOCK_D,
            EVEN_D,
        )
        tl.store(own + row[None, :], even)
        tl.store(own + PAIRS * BLOCK_N + row[None, :], odd)
        tl.debug_barrier()
        for first in range(0, rows, CHUNK):
            some = first + tl.arange(0, CHUNK)
            there, _some_b, _some_k, state = row_state(
                some,
                some < rows,
                count,
                tokens,
                token_b,
                length,
                positions,
                position_b,
                position_k,
                frozen,
                frozen_b,
                frozen_l,
                mask_id,
                noise_positions,
                noise_b,
                noise_k,
                temperature,
                temperature_number,
                temperature_b,
                confidence_temperature,
                confidence_number,
                confidence_b,
                seed,
                seed_number,
                seed_b,
                step,
                step_number,
                step_b,
                REVISES,
            )
            some_even, some_odd = tl.load(own + some[None, :]), tl.load(own + PAIRS * BLOCK_N + some[None, :])
            top, second, total, surprise, score, logit, held_logit, best = load_partial(
                partials, best_ids, groups, rows, group, some, there & (tile > first_tile)
            )
            top, second, total, surprise, score, logit, held_logit, best = fold(
                some_even,
                some_odd,
                pair,
                state,
                top,
                second,
                total,
                surprise,
                score,
                logit,
                held_logit,
                best,
                NOISE,
                NEEDS,
            )
            tl.debug_barrier()  # all threads have read the partial
            store_partial(
                partials,
                best_ids,
                groups,
                rows,
                group,
                some,
                there,
                top,
                second,
                total,
                surprise,
                score,
                logit,
                held_logit,
                best,
            )
        tl.debug_barrier()  # all threads have read the scratch


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "first_id", "first_row"))
def rows_kernel(
    logits,
    logits_b,
    logits_k,
    first_row,
    first_id,
    ids,
    head_bias,
    vocab,
    rows,
    count,
    tokens,
    token_b,
    length,
    positions,
    position_b,
    position_k,
    frozen,
    frozen_b,
    frozen_l,
    mask_id: tl.int64,
    noise_positions,
    noise_b,
    noise_k,
    temperature,
    temperature_number,
    temperature_b,
    confidence_temperature,
    confidence_number,
    confidence_b,
    seed,
    seed_number: tl.int64,
    seed_b,
    step,
    step_number: tl.int64,
    step_b,
    bias_ids,
    bias_values,
    biases,
    forbidden,
    forbids,
    partials,
    best_ids,
    groups,
    SPAN: tl.constexpr,
    PAIRS: tl.constexpr,
    NOISE: tl.constexpr,
    NEEDS: tl.constexpr,
    REVISES: tl.constexpr,
    DENSE: tl.constexpr,
):
    """The same partials from logits: of ids [first_id, first_id + ids) of rows from first_row on. logits: (B, K, V) as
    given, or DENSE: (rows from first_row on, ids) of a product, head_bias still to be added.
    One program owns SPAN ids of one row and reads them once, in blocks of 2 * PAIRS; it ends at once where the row
    takes no part. Ties to the lowest id."""
    spans = tl.cdiv(ids, SPAN)
    local, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    row = first_row + local + tl.arange(0, 1)
    active, b, k, state = row_state(
        row,
        row < rows,
        count,
        tokens,
        token_b,
        length,
        positions,
        position_b,
        position_k,
        frozen,
        frozen_b,
        frozen_l,
        mask_id,
        noise_positions,
        noise_b,
        noise_k,
        temperature,
        temperature_number,
        temperature_b,
        confidence_temperature,
        confidence_number,
        confidence_b,
        seed,
        seed_number,
        seed_b,
        step,
        step_number,
        step_b,
        REVISES,
    )
    if tl.max(active.to(tl.int32), 0) > 0:
        if DENSE:
            source = logits + local.to(tl.int64) * logits_k
        else:
            source = logits + tl.sum(b * logits_b + k * logits_k, 0)
        top, second, total, surprise, score, logit, held_logit, best = empty_partial(1)
        side = tl.arange(0, 2)[None, :]
        for start in range(span * SPAN, tl.minimum(ids, (span + 1) * SPAN), 2 * PAIRS):
            at = start + 2 * tl.arange(0, PAIRS)
            both = at[:, None] + side  # (P, 2): ids within the slice
            x = tl.load(source + both, mask=both < ids, other=0.0).to(tl.float32)
            if head_bias is not None:
                x += tl.load(head_bias + first_id + both, mask=both < ids, other=0.0).to(tl.float32)
            even, odd = tl.split(x)
            pair = (first_id + at) // 2
            even = changed(even, added(2 * pair, vocab, bias_ids, bias_values, biases, forbidden, forbids))
            odd = changed(odd, added(2 * pair + 1, vocab, bias_ids, bias_values, biases, forbidden, forbids))
            top, second, total, surprise, score, logit, held_logit, best = fold(
                even[:, None],
                odd[:, None],
                pair,
                state,
                top,
                second,
                total,
                surprise,
                score,
                logit,
                held_logit,
                best,
                NOISE,
                NEEDS,
            )
        store_partial(
            partials,
            best_ids,
            groups,
            rows,
            first_id // SPAN + span,
            row,
            active,
            top,
            second,
            total,
            surprise,
            score,
            logit,
            held_logit,
            best,
        )
