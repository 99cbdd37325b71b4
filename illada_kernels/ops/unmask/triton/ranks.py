"""The order of candidates and how far a rule commits it."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .... import rules

TOP_K, THRESHOLD, FACTOR = (tl.constexpr(i) for i in (rules.TOP_K, rules.THRESHOLD, rules.FACTOR))
ENTROPY_BOUND, INCLUSIVE = tl.constexpr(rules.ENTROPY_BOUND), tl.constexpr(rules.ENTROPY_BOUND_INCLUSIVE)
ENTROPY_ONE = tl.constexpr(2.0**40)  # the sum of 2**14 entropies below 2**5 fits 63 bits
LAST = tl.constexpr(2**63 - 1)  # the place of a candidate that is not ranked
LOWEST = tl.constexpr(-(2**63))
CHUNK = tl.constexpr(16)  # candidates that all others are compared with at once


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
    """Returns how many places lie below the bound, and the sum of their keys, which are entropies, in integers, because
    their sum has no order either. With INCLUSIVE the sum counts those at the bound too."""
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
    """Returns the last place that the rule commits, were there one at every integer. The rank of a place is the number
    of those below it. With rising rank confidences fall, bars and sums rise: what passes comes before what fails, so
    each rule is a bisection. 63 steps of one reduction cost less than a sort, and no candidate need stay in a
    register."""
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
    """Returns whether the rule commits ranks, from 0, beyond those that it always commits. total: of entropies, in
    units of 1 / ENTROPY_ONE."""
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
    """Returns the lowest of these places that the rule does not commit, for ranks in any order. Compares each with all
    others, because the order need not follow the confidence: no bisection finds it."""
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
