"""The last kernel of a step: partials to proposals and confidences, the rule, what is written into tokens."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .noise import NEEDS_TOP_ID, candidates
from .proposals import BY_SCORES, EDIT, REMASK, proposed
from .ranks import ENTROPY_BOUND, ENTROPY_ONE, INCLUSIVE, LAST, TOP_K, first_failing, last_chosen

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
    "vocab",
)


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
    NEEDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes tokens. Returns how many of these candidates are masked then."""
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
    proposal = tl.load(proposals + row, mask=inside, other=-1)
    if NEEDS_TOP_ID & NEEDS:  # what was drawn is written already
        token = tl.where(committed | (proposal < 0), held, lowest)
    else:
        token = tl.where(committed, proposal, held)
        token = tl.where((lowest <= lowest_end) & (lowest < LAST), mask_id, token)
    tl.debug_barrier()  # all threads have read what is written now
    tl.store(tokens + b * token_b + at, token, mask=candidate & (token != held))
    tl.store(commits + row, committed.to(tl.uint8), mask=inside)
    left = candidate & (~committed if NEEDS_TOP_ID & NEEDS else token == mask_id)
    return tl.sum(left.to(tl.int32), 0)


@triton.jit
def parameter(tensor, number, stride, b, dtype: tl.constexpr):
    """Returns the parameter of sequence b, a scalar."""
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
    vocab,
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
            vocab,
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
            NEEDS,
            BLOCK,
        )
    tl.store(remaining + b, left)
