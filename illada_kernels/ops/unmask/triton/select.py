"""The last kernel of a step: partials to proposals and confidences, the rule, what is written into tokens."""

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
from .rows import BAD, HELD, LOGIT, NEEDS_ENTROPY, NEEDS_HELD, NEEDS_SECOND, SCORE, SECOND, SURPRISE, TOP, TOTAL

TOP_K, THRESHOLD, FACTOR = (tl.constexpr(i) for i in (rules.TOP_K, rules.THRESHOLD, rules.FACTOR))
ENTROPY_BOUND, INCLUSIVE = tl.constexpr(rules.ENTROPY_BOUND), tl.constexpr(rules.ENTROPY_BOUND_INCLUSIVE)
EDIT, REMASK, BY_SCORES = (tl.constexpr(i) for i in (rules.EDIT, rules.REMASK, rules.REMASK_BY_SCORES))
PROBABILITY, MARGIN, NEG_ENTROPY = (tl.constexpr(i) for i in (rules.PROBABILITY, rules.MARGIN, rules.NEG_ENTROPY))
SAMPLED, FROM_LEFT = tl.constexpr(rules.SAMPLED), tl.constexpr(rules.FROM_LEFT)
ENTROPY_ONE = tl.constexpr(2.0**40)  # the sum of 2**14 entropies below 2**5 fits 63 bits
LAST = tl.constexpr(2**63 - 1)  # the place of a candidate that is not ranked
LOWEST = tl.constexpr(-(2**63))
CHUNK = tl.constexpr(16)  # candidates that all others are compared with at once
UNSPECIALIZED = (
    "seed_number",
    "step_number",
    "mask_id",
    "length",
    "rows",
    "count",
    "groups",
    "rule_number",
    "revise_number",
    "least_number",
    "defers",
)


# ---- rank: a place is (key, position) as one integer -----------------------------------------------------------------
@triton.jit
def place(eligible, key, position):
    """Rises with the float key, then with the position, which is below 2**31. 0 and -0 are one key."""
    bits = tl.where(key == 0, 0.0, key).to(tl.int32, bitcast=True)
    low = bits.to(tl.uint32, bitcast=True).to(tl.int64)
    rising = tl.where(bits < 0, 0xFFFFFFFF - low, low + 0x80000000)
    return tl.where(eligible, (rising << 31) | position, LAST)


@triton.jit
def key_of(places):
    rising = places >> 31
    low = tl.where(rising >= 0x80000000, rising - 0x80000000, 0xFFFFFFFF - rising)
    return low.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def below(places, bound, RULE: tl.constexpr):
    """How many places lie below the bound, and the sum of their keys, which are entropies, in integers: it has no order
    either. With INCLUSIVE the sum counts those at the bound too."""
    count = tl.sum((places < bound).to(tl.int32), 0)
    total = count.to(tl.int64)
    if RULE == ENTROPY_BOUND or RULE == INCLUSIVE:
        among = places < LAST
        among = among & (places <= bound if RULE == INCLUSIVE else places < bound)
        entropies = tl.where(among, key_of(places), 0.0).to(tl.float64)
        total = tl.sum(tl.ceil(entropies * ENTROPY_ONE).to(tl.int64), 0)
    return count, total


@triton.jit
def last_chosen(places, stored, count, least, number, RULE: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """The last place that the rule commits, were there one at every integer. The rank of a place is the number of those
    below it, and with rising rank confidences fall, bars and sums rise: what passes comes before what fails, so each
    rule is a bisection. 63 steps of one reduction cost less than a sort, and no candidate need stay in a register."""
    end = tl.zeros([], tl.int64)
    for i in range(63):
        bound = end | (tl.full([], 1, tl.int64) << (62 - i))
        if ONE_BLOCK:
            rank, total = below(places, bound, RULE)
        else:
            rank, total = tl.zeros([], tl.int32), tl.zeros([], tl.int64)
            for start in range(0, count, BLOCK):
                k = start + tl.arange(0, BLOCK)
                some_rank, some_total = below(tl.load(stored + k, mask=k < count, other=LAST), bound, RULE)
                rank += some_rank
                total += some_total
        end = tl.where((rank < least) | passing(rank, -key_of(bound), total, number, RULE), bound, end)
    return end


@triton.jit
def passing(rank, confidence, total, number, RULE: tl.constexpr):
    """Whether the rule commits ranks, from 0, beyond those that it always commits. total: of entropies, in units of
    1 / ENTROPY_ONE."""
    if RULE == TOP_K:
        return rank < 0
    elif RULE == THRESHOLD:
        return confidence >= number
    elif RULE == FACTOR:  # ranks count from 1: f / (r + 1)
        return confidence >= 1.0 - tl.div_rn(number + tl.zeros(rank.shape, tl.float32), (rank + 2).to(tl.float32))
    else:
        return total.to(tl.float64) * (1 / ENTROPY_ONE) <= number.to(tl.float64)


@triton.jit
def first_failing(places, confidence, stored, stored_entropies, count, least, number, RULE: tl.constexpr):
    """The lowest of these places that the rule does not commit, for ranks in any order. Compares each with all others:
    the order need not follow the confidence, so that no bisection finds it."""
    rank, total = tl.zeros(places.shape, tl.int32), tl.zeros(places.shape, tl.int64)
    for start in range(0, count, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(stored + j, mask=j < count, other=LAST)
        before = other[None, :] < places[:, None]
        rank += tl.sum(before.to(tl.int32), 1)
        if RULE == ENTROPY_BOUND or RULE == INCLUSIVE:
            counted = other[None, :] <= places[:, None] if RULE == INCLUSIVE else before
            own = tl.load(stored_entropies + j, mask=j < count, other=0)
            total += tl.sum(tl.where(counted & (other[None, :] < LAST), own[None, :], 0), 1)
    fails = (rank >= least) & ~passing(rank, confidence, total, number, RULE)
    return tl.min(tl.where(fails, places, LAST), 0)


# ---- one row's partials ----------------------------------------------------------------------------------------------
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
    """(best id or -1, probability, margin, entropy, held probability, largest probability, best logit less the
    largest) of the wanted rows. Sums over groups are of
    integers of 1 / ONE, so BLOCK and BLOCK_G change nothing."""
    field = groups.to(tl.int64) * rows
    top, second = tl.full([BLOCK], -INF, tl.float32), tl.full([BLOCK], -INF, tl.float32)
    score, logit, held_logit = top, top, top
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
        top = tl.maximum(top, block_top)
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
    return tl.where(good, best, -1), probability, margin, entropy, held_probability, largest, logit - top


# ---- a sequence ------------------------------------------------------------------------------------------------------
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
    scale = confidence_scale(confidence_temperature, confidence_number, confidence_b, sequence, inside)
    wanted = candidate if REVISE == EDIT or REVISE == REMASK else masked
    best, probability, margin, entropy, held_probability, largest, gap = merged(
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
    tl.store(proposals + row, proposal, mask=inside)
    tl.store(confidences + row, confidence, mask=inside)
    tl.store(commits + row, (edited if REVISE == EDIT else edited & False).to(tl.uint8), mask=inside)
    return places, lowest, entropy


@triton.jit
def written(
    b,
    k,
    places,
    lowest,
    end,
    lowest_end,
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
    proposals,
    commits,
    BLOCK: tl.constexpr,
):
    """Writes tokens; how many of these candidates are masked then."""
    inside = k < count
    row = b * count + k
    candidate, held, at = candidates(
        tl.zeros([BLOCK], tl.int64) + b,
        k,
        inside,
        tokens,
        token_b,
        length,
        positions,
        position_b,
        position_k,
        frozen,
        frozen_b,
        frozen_l,
    )
    edited = tl.load(commits + row, mask=inside, other=0) != 0
    committed = edited | ((places <= end) & (places < LAST))
    token = tl.where(committed, tl.load(proposals + row, mask=inside, other=-1), held)
    token = tl.where((lowest <= lowest_end) & (lowest < LAST), mask_id, token)
    tl.debug_barrier()  # all threads have read what is written now
    tl.store(tokens + b * token_b + at, token, mask=candidate & (token != held))
    tl.store(commits + row, committed.to(tl.uint8), mask=inside)
    return tl.sum((candidate & (token == mask_id)).to(tl.int32), 0)


@triton.jit
def parameter(tensor, number, stride, b, dtype: tl.constexpr):
    """Of sequence b, a scalar."""
    if tensor is None:
        return tl.full([], number, dtype)
    else:
        return tl.load(tensor + b * stride).to(dtype)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_kernel(
    partials,
    best_ids,
    groups,
    rows,
    count,
    scratch,
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
    confidence_temperature,
    confidence_number,
    confidence_b,
    seed,
    seed_number: tl.int64,
    seed_b,
    step,
    step_number: tl.int64,
    step_b,
    rule,
    rule_number,
    rule_b,
    revision,
    revise_number,
    revise_b,
    least,
    least_number,
    least_b,
    temperature,
    temperature_number,
    temperature_b,
    rank_temperature,
    rank_number,
    rank_b,
    defer,
    defers,
    scores,
    scores_b,
    scores_k,
    proposals,
    confidences,
    commits,
    remaining,
    RULE: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    REVISE: tl.constexpr,
    ORDER: tl.constexpr,
    RERANKED: tl.constexpr,
    NEEDS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """One program owns one sequence, BLOCK candidates at a time; if there are more, or they are RERANKED, their places
    wait in scratch (B, 3, K). Reads up to 32 bytes per candidate and group of ids; merges them in integers, ranks by
    (key rising, position rising), applies the rule and the revision, writes tokens in place and (proposal, confidence,
    committed) for each candidate. Confidences are float64 until rounded once. A row with a NaN or +inf logit, or none
    above -inf, proposes -1, has confidence -inf and is not ranked."""
    b = tl.program_id(0).to(tl.int64)
    number = parameter(rule, rule_number, rule_b, b, tl.float32)
    always = parameter(least, least_number, least_b, b, tl.int64)
    revised = parameter(revision, revise_number, revise_b, b, tl.float32 if REVISE == EDIT else tl.int64)
    tau = revised if REVISE == EDIT else 2.0
    stored = scratch + 3 * b * count
    stored_lowest, stored_entropies = stored + count, stored + 2 * count
    places = tl.full([BLOCK], LAST, tl.int64)
    lowest = places
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        places, lowest, entropy = proposed(
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
            tau,
            scores,
            scores_b,
            scores_k,
            proposals,
            confidences,
            commits,
            RULE,
            CONFIDENCE,
            REVISE,
            ORDER,
            RERANKED,
            NEEDS,
            ONE,
            BLOCK,
            BLOCK_G,
        )
        if RERANKED or not ONE_BLOCK:
            tl.store(stored + k, places, mask=k < count)
        if not ONE_BLOCK:
            tl.store(stored_lowest + k, lowest, mask=k < count)
        if RERANKED and (RULE == ENTROPY_BOUND or RULE == INCLUSIVE):
            tl.store(stored_entropies + k, tl.ceil(entropy.to(tl.float64) * ENTROPY_ONE).to(tl.int64), mask=k < count)
    tl.debug_barrier()
    if RERANKED:
        failing = tl.full([], LAST, tl.int64)
        for start in range(0, count, BLOCK):
            k = start + tl.arange(0, BLOCK).to(tl.int64)
            some = tl.load(stored + k, mask=k < count, other=LAST)
            confidence = tl.load(confidences + b * count + k, mask=k < count, other=0.0)
            lowest_failing = first_failing(some, confidence, stored, stored_entropies, count, always, number, RULE)
            failing = tl.minimum(failing, lowest_failing)
        end = failing - 1
    else:
        end = last_chosen(places, stored, count, always, number, RULE, BLOCK, ONE_BLOCK)
    lowest_end = tl.zeros([], tl.int64)
    if REVISE == REMASK or REVISE == BY_SCORES:
        lowest_end = last_chosen(lowest, stored_lowest, count, revised, number, TOP_K, BLOCK, ONE_BLOCK)
    left = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        if not ONE_BLOCK:
            places = tl.load(stored + k, mask=k < count, other=LAST)
            lowest = tl.load(stored_lowest + k, mask=k < count, other=LAST)
        left += written(
            b,
            k,
            places,
            lowest,
            end,
            lowest_end,
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
            proposals,
            commits,
            BLOCK,
        )
    tl.store(remaining + b, left)
