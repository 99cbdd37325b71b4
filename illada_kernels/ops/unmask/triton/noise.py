"""Device functions of unmask's Triton kernels: the noise, bit for bit that of csrc/include/illada/philox.h up to its
logarithms; what they read about a row; sums that have no order.

Every function takes arrays that broadcast. Kernels that call them are compiled with enable_fp_fusion=False, so that
l + T * g rounds twice."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .. import problem

INF = tl.constexpr(float("inf"))
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
LEAST = tl.constexpr(problem.LEAST_SHIFTED)
HIGHEST_TEMPERATURE = tl.constexpr(problem.HIGHEST_TEMPERATURE)
HIGHEST_CONFIDENCE_TEMPERATURE = tl.constexpr(problem.HIGHEST_CONFIDENCE_TEMPERATURE)
NO_ID = tl.constexpr(2**31 - 1)
NEEDS_TOP_ID = tl.constexpr(problem.NEEDS_TOP_ID)  # Renoise: every candidate is drawn, whatever token it holds


# ---- noise -----------------------------------------------------------------------------------------------------------
@triton.jit
def philox(key0, key1, c0, c1, c2, c3):
    """Computes Philox-4x32-10, uint32 throughout. What does not vary along an axis is computed once for it, as long as
    it does not: with c0 of shape (P, 1) and the rest (1, N), most of the first two rounds."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def unit(high, low):
    """Returns (high << 32 | low) * 2**-64 in float32, rounded once, to nearest."""
    return ((high.to(tl.uint64) << 32) | low.to(tl.uint64)).to(tl.float32) * 2.0**-64


@triton.jit
def gumbel(high, low):
    """Returns -log(-log1p(-u)). With w = 1 - u rounded, log1p(-u) = -u * log(w) / (w - 1), or -u where w = 1. 1 - w is
    exact, and log(w) / (w - 1) at w instead of 1 - u is off by less than 2**-25 relatively, so that the inner logarithm
    has the rounding of one float32 log, product and division, and half of one more: below 8 * 2**-24 relatively."""
    u = tl.maximum(unit(high, low), 2.0**-64)
    w = 1.0 - u
    d = 1.0 - w
    e = tl.where(d > 0, u * (0.0 - tl.log(w)) / tl.where(d > 0, d, 1.0), u)
    return 0.0 - tl.log(e)


@triton.jit
def noised(logits, temperature, high, low):
    """Returns l + T * g, finite where l is; l where T is 0."""
    scores = tl.minimum(tl.maximum(logits + temperature * gumbel(high, low), -FLOAT32_MAX), FLOAT32_MAX)
    return tl.where((temperature > 0) & (logits > -INF), scores, logits)


# ---- sums without an order -------------------------------------------------------------------------------------------
@triton.jit
def fixed_sum(x, ONE: tl.constexpr):
    """Sums x >= 0 over axis 0, in integers of 1 / ONE: no layout, number of warps or block shape changes a bit. Rounded
    up, so that what is not 0 stays so."""
    return tl.sum(tl.ceil(x * ONE).to(tl.int64), 0)


@triton.jit
def shifted(logit, top, scale):
    """Returns z = (l - top) * scale; -inf where l is, also if all are."""
    return (logit - tl.where(top > -INF, top, 0.0)) * scale


@triton.jit
def rescaled(total, surprise, old_top, top, scale):
    """Rescales total = sum e^z and surprise = sum -z e^z from z below old_top to z below top."""
    z = shifted(old_top, top, scale)
    weight = tl.exp(z)
    return tl.where(z < LEAST, 0.0, weight * total), tl.where(z < LEAST, 0.0, weight * (surprise - z * total))


# ---- what is known of a row ------------------------------------------------------------------------------------------
@triton.jit
def of_sequence(tensor, number, stride, b, inside, dtype: tl.constexpr):
    """Returns a parameter of sequences b: what lies in its tensor, or its number."""
    if tensor is None:
        return tl.full(b.shape, number, dtype)
    else:
        return tl.load(tensor + b * stride, mask=inside, other=0).to(dtype)


@triton.jit
def candidates(b, k, inside, tokens, token_b, length, positions, position_b, position_k, frozen, frozen_b, frozen_l):
    """Returns (takes a place among the candidates, token held there, its position) of candidates k of sequences b,
    int64."""
    at = tl.load(positions + b * position_b + k * position_k, mask=inside, other=-1)
    candidate = inside & (at >= 0) & (at < length)
    at = tl.where(candidate, at, 0)
    if frozen is not None:
        candidate = candidate & (tl.load(frozen + b * frozen_b + at * frozen_l, mask=candidate, other=1) == 0)
    held = tl.load(tokens + b * token_b + at, mask=candidate, other=0)
    return candidate, held, at


@triton.jit
def noise_counters(
    b, k, inside, at, noise_positions, noise_b, noise_k, seed, seed_number, seed_b, step, step_number, step_b
):
    """Returns (key0, key1, position, step) of a row, uint32. One seed s for all means s + b for sequence b."""
    position = at
    if noise_positions is not None:
        position = tl.load(noise_positions + b * noise_b + k * noise_k, mask=inside, other=0)
    key = of_sequence(seed, seed_number, seed_b, b, inside, tl.int64) + b * (1 - seed_b)
    at_step = of_sequence(step, step_number, step_b, b, inside, tl.int64)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32), position.to(tl.uint32), at_step.to(tl.uint32)


@triton.jit
def confidence_scale(tensor, number, stride, b, inside):
    """Returns 1 / confidence temperature, rounded once; 1 where that is not above 0."""
    tc = of_sequence(tensor, number, stride, b, inside, tl.float32)
    tc = tl.minimum(tl.where(tc > 0, tc, 1.0), HIGHEST_CONFIDENCE_TEMPERATURE)
    return tl.minimum(tl.div_rn(tl.full(b.shape, 1.0, tl.float32), tc), FLOAT32_MAX)


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
    NEEDS: tl.constexpr,
):
    """Returns (takes part, b, k, (held id, key0, key1, position, step, temperature, scale)) of rows b * K + k."""
    b, k = (row // count).to(tl.int64), (row % count).to(tl.int64)
    candidate, held, at = candidates(
        b, k, inside, tokens, token_b, length, positions, position_b, position_k, frozen, frozen_b, frozen_l
    )
    masked = candidate if NEEDS_TOP_ID & NEEDS else held == mask_id
    active = candidate if REVISES else candidate & masked
    key0, key1, position, at_step = noise_counters(
        b, k, inside, at, noise_positions, noise_b, noise_k, seed, seed_number, seed_b, step, step_number, step_b
    )
    t = of_sequence(temperature, temperature_number, temperature_b, b, inside, tl.float32)
    t = tl.where(masked & (t > 0), tl.minimum(t, HIGHEST_TEMPERATURE), 0.0)
    scale = confidence_scale(confidence_temperature, confidence_number, confidence_b, b, inside)
    held = tl.where((held >= 0) & (held < NO_ID), held, NO_ID).to(tl.int32)
    return active, b, k, (held, key0, key1, position, at_step, t, scale)
