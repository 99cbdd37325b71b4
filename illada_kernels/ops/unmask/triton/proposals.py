"""Partials to proposals, confidences and places."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .... import rules
from .noise import (
    FLOAT32_MAX,
    HIGHEST_TEMPERATURE,
    INF,
    LEAST,
    NEEDS_TOP_ID,
    NO_ID,
    candidates,
    confidence_scale,
    fixed_sum,
    gumbel,
    noise_counters,
    of_sequence,
    philox,
    shifted,
    unit,
)
from .partials import BAD, HELD, LOGIT, NEEDS_ENTROPY, NEEDS_HELD, NEEDS_SECOND, SCORE, SECOND, SURPRISE, TOP, TOTAL
from .ranks import ENTROPY_BOUND, INCLUSIVE, LAST, LOWEST, place

EDIT, REMASK, BY_SCORES = (tl.constexpr(i) for i in (rules.EDIT, rules.REMASK, rules.REMASK_BY_SCORES))
PROBABILITY, MARGIN, NEG_ENTROPY = (tl.constexpr(i) for i in (rules.PROBABILITY, rules.MARGIN, rules.NEG_ENTROPY))
SAMPLED, FROM_LEFT = tl.constexpr(rules.SAMPLED), tl.constexpr(rules.FROM_LEFT)


@triton.jit
def merged(
    partials,
    best_ids,
    groups,
    rows,
    row,
    wanted,
    scale,
    NEEDS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Returns (best id or -1, probability, margin, entropy, held probability, largest probability, best logit less the
    largest) of the wanted rows. Sums over groups are of
    integers of 1 / ONE, so BLOCK and BLOCK_G change nothing."""
    field = groups.to(tl.int64) * rows
    top, second = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], -INF, tl.float32)
    score, logit, held_logit = top, top, top
    top_id = tl.full([BLOCK], NO_ID, tl.int32)
    best, bad = tl.full([BLOCK], -1, tl.int32), tl.full([BLOCK], 0, tl.int32)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        here = (group < groups)[:, None] & wanted[None, :]
        at = group.to(tl.int64)[:, None] * rows + row[None, :]
        tops = tl.load(partials + TOP * field + at, mask=here, other=-INF)
        scores = tl.load(partials + SCORE * field + at, mask=here, other=-INF)
        ids = tl.load(best_ids + at, mask=here, other=-1)
        block_score = tl.max(scores, 0)
        block_best = tl.min(tl.where(scores == block_score[None, :], ids, NO_ID), 0)
        better = block_score > score
        logits = tl.load(partials + LOGIT * field + at, mask=here, other=-INF)
        block_logit = tl.max(tl.where(ids == block_best[None, :], logits, -INF), 0)
        score, best = tl.where(better, block_score, score), tl.where(better, block_best, best)
        logit = tl.where(better, block_logit, logit)
        bad = tl.maximum(bad, tl.max((ids == BAD).to(tl.int32), 0))
        block_top = tl.max(tops, 0)
        if NEEDS_SECOND & NEEDS:
            first = tl.min(tl.where(tops == block_top[None, :], group[:, None], NO_ID), 0)
            rest = tl.max(tl.where(group[:, None] == first[None, :], -INF, tops), 0)
            seconds = tl.max(tl.load(partials + SECOND * field + at, mask=here, other=-INF), 0)
            second = tl.maximum(tl.maximum(second, tl.maximum(rest, seconds)), tl.minimum(top, block_top))
        if NEEDS_HELD & NEEDS:
            held = tl.load(partials + HELD * field + at, mask=here, other=-INF)
            held_logit = tl.maximum(held_logit, tl.max(held, 0))
        if NEEDS_TOP_ID & NEEDS:
            top_ids = tl.load(partials + HELD * field + at, mask=here, other=0.0).to(tl.int32, bitcast=True)
            block_id = tl.min(tl.where(here & (tops == block_top[None, :]), top_ids, NO_ID), 0)
            top_id = tl.where(block_top > top, block_id, top_id)
        top = tl.maximum(top, block_top)
    if NEEDS_TOP_ID & NEEDS:
        logit = top
    good = wanted & (bad == 0) & (top > -INF)

    totals, surprises = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        here = (group < groups)[:, None] & good[None, :]
        at = group.to(tl.int64)[:, None] * rows + row[None, :]
        z = shifted(tl.load(partials + TOP * field + at, mask=here, other=-INF), top[None, :], scale[None, :])
        weight = tl.where(z < LEAST, 0.0, tl.exp(z)).to(tl.float64)
        group_total = tl.load(partials + TOTAL * field + at, mask=here, other=0.0).to(tl.float64)
        totals += fixed_sum(weight * group_total, ONE)
        if NEEDS_ENTROPY & NEEDS:
            surprise = tl.load(partials + SURPRISE * field + at, mask=here, other=0.0).to(tl.float64)
            z = tl.where(z < LEAST, 0.0, z).to(tl.float64)
            surprises += fixed_sum(weight * (surprise - z * group_total), ONE)
    total = tl.where(good, totals.to(tl.float64) * (1 / ONE), 1.0)
    mean = surprises.to(tl.float64) * (1 / ONE) / total
    entropy = tl.maximum(tl.log(total) + mean, 0.0).to(tl.float32)
    probability = (tl.exp(shifted(logit, top, scale)).to(tl.float64) / total).to(tl.float32)
    margin = ((1.0 - tl.exp(shifted(second, top, scale)).to(tl.float64)) / total).to(tl.float32)
    held_probability = (tl.exp(shifted(held_logit, top, scale)).to(tl.float64) / total).to(tl.float32)
    largest = (1.0 / total).to(tl.float32)
    return tl.where(good, best, -1), probability, margin, entropy, held_probability, largest, logit - top, top_id


@triton.jit
def proposed(
    b,
    k,
    partials,
    best_ids,
    groups,
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
    mask_id,
    noise_positions,
    noise_b,
    noise_k,
    confidence_temperature,
    confidence_number,
    confidence_b,
    seed,
    seed_number,
    seed_b,
    step,
    step_number,
    step_b,
    temperature,
    temperature_number,
    temperature_b,
    rank_temperature,
    rank_number,
    rank_b,
    defer,
    defers,
    vocab,
    tau,
    scores,
    scores_b,
    scores_k,
    proposals,
    confidences,
    commits,
    RULE: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    REVISE: tl.constexpr,
    ORDER: tl.constexpr,
    RERANKED: tl.constexpr,
    NEEDS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Candidates k of sequence b: stores proposal, confidence and whether it is an edit; (their places under the rule,
    and among those that may go back to the mask, LAST where there is none; their entropies)."""
    inside = k < count
    row = b * count + k
    sequence = tl.zeros([BLOCK], tl.int64) + b
    candidate, held, at = candidates(
        sequence, k, inside, tokens, token_b, length, positions, position_b, position_k, frozen, frozen_b, frozen_l
    )
    masked, fixed = candidate & (held == mask_id), candidate & (held != mask_id)
    if NEEDS_TOP_ID & NEEDS:
        masked, fixed = candidate, candidate & False
    scale = confidence_scale(confidence_temperature, confidence_number, confidence_b, sequence, inside)
    wanted = candidate if REVISE == EDIT or REVISE == REMASK else masked
    best, probability, margin, entropy, held_probability, largest, gap, top_id = merged(
        partials, best_ids, groups, rows, row, wanted, scale, NEEDS, ONE, BLOCK, BLOCK_G
    )
    key0, key1, position, at_step = noise_counters(
        sequence, k, inside, at, noise_positions, noise_b, noise_k, seed, seed_number, seed_b, step, step_number, step_b
    )
    zero = tl.zeros([BLOCK], tl.uint32)
    if CONFIDENCE == PROBABILITY:
        confidence = probability
    elif CONFIDENCE == MARGIN:
        confidence = margin
    elif CONFIDENCE == NEG_ENTROPY:
        confidence = 0.0 - entropy
    elif CONFIDENCE == SAMPLED:
        t = of_sequence(temperature, temperature_number, temperature_b, sequence, inside, tl.float32)
        noisy = masked & (t > 0)
        t = tl.where(noisy, tl.minimum(t, HIGHEST_TEMPERATURE), 1.0)
        confidence = tl.where(noisy, tl.minimum(largest, tl.exp(tl.div_rn(gap, t))), largest)
    else:
        w0, w1, _w2, _w3 = philox(key0, key1, zero, position, at_step, zero + 1)
        confidence = unit(w0, w1)

    good = wanted & (best >= 0)
    takes_part = good if REVISE == EDIT else masked & good
    proposal = tl.where(takes_part, best.to(tl.int64), -1)
    confidence = tl.where(takes_part, confidence, -INF)
    by_entropy: tl.constexpr = RULE == ENTROPY_BOUND or RULE == INCLUSIVE
    key = entropy if by_entropy else -confidence
    deferred = tl.zeros([BLOCK], tl.int32) > 0
    if RERANKED:
        t = of_sequence(rank_temperature, rank_number, rank_b, sequence, inside, tl.float32)
        v0, v1, _v2, _v3 = philox(key0, key1, zero, position, at_step, zero + 2)
        noise = tl.minimum(t, HIGHEST_TEMPERATURE) * gumbel(v0, v1)
        key = tl.where(t > 0, -tl.minimum(tl.maximum(noise - key, -FLOAT32_MAX), FLOAT32_MAX), key)
        if ORDER == FROM_LEFT:
            key = tl.zeros([BLOCK], tl.float32)
        if defer is not None:
            for i in range(defers):
                deferred = deferred | (tl.load(defer + i) == proposal)
    places = place(masked & takes_part, key, at)
    if RERANKED:
        places = tl.where(deferred | (places == LAST), places, places + LOWEST)
    lowest = tl.full([BLOCK], LAST, tl.int64)
    edited = fixed & takes_part & (proposal != held) & (probability >= tau)
    if REVISE == REMASK or REVISE == BY_SCORES:
        if REVISE == REMASK:
            score, eligible = held_probability, fixed & good
        else:
            score = tl.load(scores + b * scores_b + k * scores_k, mask=inside, other=0.0)
            eligible = fixed & (score == score)
        lowest = place(eligible, score, at)
        proposal, confidence = tl.where(eligible, held, proposal), tl.where(eligible, score, confidence)
    if NEEDS_TOP_ID & NEEDS:  # writes what was drawn, reports the best, and gives on what may be written instead
        tl.store(tokens + b * token_b + at, proposal, mask=takes_part)
        u0, u1, _u2, _u3 = philox(key0, key1, zero, position, at_step, zero + 3)
        lowest = u0.to(tl.int64) * vocab + ((u1.to(tl.int64) * vocab) >> 32) >> 32  # uniform in [0, vocab)
        proposal = tl.where(takes_part, top_id.to(tl.int64), -1)
    tl.store(proposals + row, proposal, mask=inside)
    tl.store(confidences + row, confidence, mask=inside)
    tl.store(commits + row, (edited if REVISE == EDIT else edited & False).to(tl.uint8), mask=inside)
    return places, lowest, entropy
