"""The least logit that top_k, top_p and min_p keep in each row, and the search that finds it.

The search reads a row through READ(row, at), which returns the float32 logits at places `at` and -inf where there is
none: `row_logits` here, `run_tops` and `listed_logits` in draw.py."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .. import problem
from .noise import FLOAT32_MAX, INF, LEAST, of_sequence, row_state, shifted
from .partials import UNSPECIALIZED, added, changed

BY_TOP_K, BY_TOP_P, BY_MIN_P = (tl.constexpr(i) for i in (problem.BY_TOP_K, problem.BY_TOP_P, problem.BY_MIN_P))
WAYS = tl.constexpr(8)  # thresholds that a pass sums at once
NOTHING = tl.constexpr(-0x7F800001)  # the key of -inf


@triton.jit
def key_of(x):
    """Returns an integer that rises with x, which is no NaN. -0 comes before 0: added biases leave no -0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def row_logits(row, ids):
    """Reads a whole row: returns (P,) logits of ids as the rows kernel sees them, -inf where it finds the row bad."""
    source, head_bias, vocab, bias_ids, bias_values, biases, forbidden, forbids = row
    x = tl.load(source + ids, mask=ids < vocab, other=0.0).to(tl.float32)
    if head_bias is not None:
        x += tl.load(head_bias + ids, mask=ids < vocab, other=0.0).to(tl.float32)
    barred = ids >= vocab
    if forbidden is not None:  # few as a rule, and one by one they take the fewest registers
        for entry in range(forbids):
            barred = barred | (tl.load(forbidden + entry) == ids)
    change = added(ids, vocab, bias_ids, bias_values, biases, None, 0)
    x = changed(x, tl.where(barred, -INF, change))
    return tl.where(x < INF, x, -INF)


@triton.jit
def largest(row, size, READ: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the largest logit at places [0, size) of a row."""
    most = tl.full([BLOCK], -INF, tl.float32)
    for start in range(0, size, BLOCK):
        most = tl.maximum(most, READ(row, start + tl.arange(0, BLOCK)))
    return tl.max(most, 0)


@triton.jit
def reaching(
    thresholds,
    top,
    scale,
    row,
    size,
    READ: tl.constexpr,
    MASS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns (WAYS,) how many logits reach each threshold, or with MASS their exp((l - top) * scale), in integers of
    1 / ONE, which have no order."""
    integer: tl.constexpr = tl.int64 if MASS else tl.int32
    sums = tl.zeros([WAYS, BLOCK], integer)
    for start in range(0, size, BLOCK):
        x = READ(row, start + tl.arange(0, BLOCK))
        if MASS:
            z = shifted(x, top, scale)
            weight = tl.ceil(tl.where(z < LEAST, 0.0, tl.exp(z)) * ONE).to(integer)
        else:
            weight = (x > -INF).to(integer)
        sums += tl.where(key_of(x)[None, :] >= thresholds.to(tl.int32)[:, None], weight[None, :], 0)
    return tl.sum(sums, 1)


@triton.jit
def largest_reached(
    least,
    wanted,
    top,
    temperature,
    scale,
    row,
    size,
    READ: tl.constexpr,
    MASS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns the key of the largest t >= least that enough reaches: `wanted` logits, or with MASS this share of what
    reaches `least`; NOTHING if too little does. A pass sums WAYS thresholds; the next ones lie between the two among
    which t was found."""
    way = tl.arange(0, WAYS)
    below = top - temperature * tl.exp2((6 - way).to(tl.float32))  # 32, 16 .. 0.5 temperatures
    thresholds = tl.where((way > 0) & (below > -INF), tl.maximum(key_of(below).to(tl.int64), least), least)
    sums = reaching(thresholds, top, scale, row, size, READ, MASS, ONE, BLOCK)
    total = tl.max(sums, 0)
    if MASS:
        enough = tl.ceil(wanted.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    else:
        enough = wanted
    low = tl.max(tl.where(sums >= enough, thresholds, NOTHING), 0)
    end = tl.min(tl.where(sums < enough, thresholds, key_of(top).to(tl.int64) + 1), 0)
    end = tl.where(total < enough, NOTHING, end)
    while end - low > 1:
        thresholds = tl.minimum(low + way * tl.cdiv(end - low, WAYS), end)
        sums = reaching(thresholds, top, scale, row, size, READ, MASS, ONE, BLOCK)
        low = tl.max(tl.where(sums >= enough, thresholds, low), 0)
        end = tl.min(tl.where(sums < enough, thresholds, end), 0)
    return low


@triton.jit
def min_p_bound(top, t, min_p, min_p_number, min_p_b, b, inside):
    """Returns top + T log(min_p), -inf where min_p drops nothing: at 0 and below, and at NaN."""
    share = tl.sum(of_sequence(min_p, min_p_number, min_p_b, b, inside, tl.float32), 0)
    below = tl.minimum(tl.log(tl.where(share > 0, share, 1.0).to(tl.float64)).to(tl.float32), 0.0)
    return tl.where(share > 0, top + t * below, -INF)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "first_row", "top_k_number"))
def bounds_kernel(
    logits,
    logits_b,
    logits_k,
    first_row,
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
    top_k,
    top_k_number,
    top_k_b,
    top_p,
    top_p_number,
    top_p_b,
    min_p,
    min_p_number,
    min_p_b,
    bounds,
    TRUNCATE: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    NEEDS: tl.constexpr,
    REVISES: tl.constexpr,
    DENSE: tl.constexpr,
):
    """bounds (B * K): the largest t that top_k logits reach; the largest t such that those that reach it, of what top_k
    keeps, have top_p of its sum of exp((l - max) / T); max + T log(min_p); of these the largest. logits: as the rows
    kernel takes them, of all ids.
    One program owns a row, and reads it once for the maximum and once for each pass of a search, 10 or so. Sums are
    integers. A row without noise has the bound -inf, and is not read."""
    local = tl.program_id(0)
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
        NEEDS,
    )
    _held, _key0, _key1, _position, _step, row_temperature, _scale = state
    t = tl.max(tl.where(active, row_temperature, 0.0), 0)
    bound = tl.full([], -INF, tl.float32)
    if t > 0:
        if DENSE:
            source = logits + local.to(tl.int64) * logits_k
        else:
            source = logits + tl.sum(b * logits_b + k * logits_k, 0)
        whole = (source, head_bias, vocab, bias_ids, bias_values, biases, forbidden, forbids)
        top = largest(whole, vocab, row_logits, BLOCK)
        inside = row < rows
        scale = tl.minimum(tl.div_rn(tl.full([], 1.0, tl.float32), t), FLOAT32_MAX)
        if top > -INF:
            least = tl.full([], NOTHING + 1, tl.int64)
            if BY_TOP_K & TRUNCATE:
                wanted = tl.sum(of_sequence(top_k, top_k_number, top_k_b, b, inside, tl.int64), 0)
                if (wanted > 0) & (wanted < vocab):
                    found = largest_reached(least, wanted, top, t, scale, whole, vocab, row_logits, False, ONE, BLOCK)
                    least = tl.maximum(least, found)
                    bound = tl.where(found > NOTHING, logit_of(found), bound)
            if BY_TOP_P & TRUNCATE:
                share = tl.sum(of_sequence(top_p, top_p_number, top_p_b, b, inside, tl.float32), 0)
                if share <= 0:
                    bound = top
                elif share < 1:  # a NaN counts as 1
                    found = largest_reached(least, share, top, t, scale, whole, vocab, row_logits, True, ONE, BLOCK)
                    bound = logit_of(found)
            if BY_MIN_P & TRUNCATE:
                bound = tl.maximum(bound, min_p_bound(top, t, min_p, min_p_number, min_p_b, b, inside))
    tl.store(bounds + row, bound, mask=active)
