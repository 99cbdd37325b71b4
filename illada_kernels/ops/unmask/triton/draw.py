"""The draw of calls that top_k or min_p truncates, from the logits that the head kernel left in its scratch."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .bounds import (
    BY_MIN_P,
    BY_TOP_K,
    NOTHING,
    key_of,
    largest,
    largest_reached,
    logit_of,
    min_p_bound,
)
from .head import RUN
from .noise import INF, of_sequence, row_state
from .partials import BAD, LOGIT, SCORE, UNSPECIALIZED, empty_partial, fold


@triton.jit
def run_tops(row, at):
    """Reads the largest logits of runs."""
    tops, runs = row
    return tl.load(tops + at, mask=at < runs, other=-INF)


@triton.jit
def listed_logits(row, at):
    """Reads the logits of the runs listed: of a run first its RUN even ids, then the odd ones."""
    logits, stride, listed, count, pairs = row
    there = at < count * (2 * RUN)
    pair = tl.load(listed + at // (2 * RUN), mask=there, other=0) * RUN + at % RUN
    plane = 2 * (pair // pairs) + at // RUN % 2  # of a tile the even ids, then the odd ones
    return tl.load(logits + (plane * pairs + pair % pairs).to(tl.int64) * stride, mask=there, other=-INF)


@triton.jit
def list_runs(listed, tops, runs, floor, BLOCK: tl.constexpr):
    """Lists the runs whose largest logit has a key >= floor, in order of id; returns how many."""
    count = tl.zeros([], tl.int32)
    for start in range(0, runs, BLOCK):
        run = start + tl.arange(0, BLOCK)
        top = run_tops((tops, runs), run)
        reached = (key_of(top) >= floor).to(tl.int32)
        tl.store(listed + count + tl.cumsum(reached, 0) - 1, run, mask=reached > 0)
        count += tl.sum(reached, 0)
    tl.debug_barrier()  # the list is written
    return count


@triton.jit
def best_listed(kept, state, bound, BLOCK: tl.constexpr):
    """Returns (score, logit, id), (1,) each: the best of the logits of the runs listed that reach bound. Runs lie in
    order of id, so ties go to the lowest one."""
    _logits, _stride, listed, count, _pairs = kept
    top, second, total, surprise, score, logit, held_logit, best = empty_partial(1)
    for start in range(0, count * RUN, BLOCK // 2):
        place = start + tl.arange(0, BLOCK // 2)
        run, within = place // RUN, place % RUN
        pair = tl.load(listed + run, mask=run < count, other=0) * RUN + within
        even = listed_logits(kept, run * (2 * RUN) + within)
        odd = listed_logits(kept, run * (2 * RUN) + RUN + within)
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
            tl.zeros([1], tl.float32) + bound,
            True,
            0,
        )
    return score, logit, best


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "vocab", "runs", "top_k_number"))
def draw_kernel(
    logits,
    stride,
    tops,
    listed,
    runs,
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
    partials,
    best_ids,
    groups,
    top_k,
    top_k_number,
    top_k_b,
    min_p,
    min_p_number,
    min_p_b,
    TRUNCATE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEEDS: tl.constexpr,
    REVISES: tl.constexpr,
):
    """argmax of l + T * Gumbel over the ids with l >= the row's bound, which is the number that bounds_kernel finds.
    logits, tops: what the head kernel wrote, (tiles, 2, PAIRS, stride) and (rows, runs). listed (rows, runs): written.
    One program owns a row. It reads only runs that may hold a kept logit: if k runs have a largest logit >= t, then k
    logits are >= t, so the k-th largest of tops is not above the k-th largest logit; min_p's bound needs the largest
    logit alone. The best score goes to the partial of the row's first group. A row without noise has its best already,
    and is not read. Ties to the lowest id."""
    row = tl.program_id(0) + tl.arange(0, 1)
    active, b, _k, state = row_state(
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
        NEEDS,
    )
    _held, _key0, _key1, _position, _step, row_temperature, _scale = state
    t = tl.max(tl.where(active, row_temperature, 0.0), 0)
    first_run = tl.program_id(0).to(tl.int64) * runs
    tops += first_run
    listed += first_run
    top = tl.full([], -INF, tl.float32)
    if t > 0:
        top = largest((tops, runs), runs, run_tops, BLOCK)
    if top > -INF:
        inside = row < rows
        bound = tl.full([], -INF, tl.float32)
        if BY_MIN_P & TRUNCATE:
            bound = min_p_bound(top, t, min_p, min_p_number, min_p_b, b, inside)
        floor = tl.maximum(key_of(bound).to(tl.int64), NOTHING + 1)
        wanted = tl.zeros([], tl.int64)
        if BY_TOP_K & TRUNCATE:
            wanted = tl.sum(of_sequence(top_k, top_k_number, top_k_b, b, inside, tl.int64), 0)
            wanted = tl.where(wanted < vocab, wanted, 0)
            if wanted > 0:
                found = largest_reached(floor, wanted, top, t, t, (tops, runs), runs, run_tops, False, 1.0, BLOCK)
                floor = tl.maximum(floor, found)
        met = list_runs(listed, tops, runs, floor, BLOCK)
        kept = (logits + tl.program_id(0), stride, listed, met, PAIRS)
        if BY_TOP_K & TRUNCATE:
            if wanted > 0:
                size = met * (2 * RUN)
                found = largest_reached(floor, wanted, top, t, t, kept, size, listed_logits, False, 1.0, BLOCK)
                bound = tl.where(found > NOTHING, logit_of(found), bound)
        score, logit, best = best_listed(kept, state, bound, BLOCK)
        field = groups.to(tl.int64) * rows
        tl.store(partials + SCORE * field + row, score)
        tl.store(partials + LOGIT * field + row, logit)
        tl.store(best_ids + row, tl.where(tl.load(best_ids + row) == BAD, BAD, best))
