"""Triton kernels over the logits of masked_loss: statistics of each row, and the gradient of its loss.

    z = softcap tanh((logit + bias) / softcap), -inf at forbidden ids;  lse = log sum exp z
    dlogit = scale ((1 + 2 z_loss lse) exp(z - lse) - e / allowed - [target] (1 - e)) dz/dlogit

stats: one program a row, one read. dlogits: one program a tile of a row, one read and one write. gradients: one program
a row, stats then dlogits; the second pass reads L2 while the rows in flight fit. About 10 flops and one exponential an
element and pass: memory-bound. All float32; a row has as many partial sums as a tile has elements, reduced by a fixed
tree, so that equal inputs give equal bits. A NaN or +inf logit makes its row NaN.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # below every finite number; -inf - -inf would be NaN
NO_ID = tl.constexpr(1 << 62)


@triton.jit
def row_of(x, r, inner, outer_stride, stride):
    """Returns the address of row r of the flattened leading dimensions (_gpu.row_strides)."""
    return x + ((r // inner).to(tl.int64) * outer_stride + (r % inner).to(tl.int64) * stride)


@triton.jit
def tanh(x):
    """Computes tanh within 3 ulp. For |x| <= 0.625, where 1 - 2 / (1 + exp(2x)) cancels, x + x^3 P(x^2) with a minimax
    polynomial P, which is within 4.4e-9 of tanh before rounding."""
    square = x * x
    p = -0.005705018062144518
    p = p * square + 0.020639119669795036
    p = p * square - 0.053739726543426514
    p = p * square + 0.13331443071365356
    p = p * square - 0.3333328068256378
    size = tl.abs(x)
    large = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2E)))
    return tl.where(size < 0.625, x + x * square * p, tl.where(x < 0.0, -large, large))


@triton.jit
def capped(x, id, keep, bias, softcap, CAPPED: tl.constexpr):
    """Returns (z, dz/dlogit) of the logits x."""
    if bias is not None:
        x += tl.load(bias + id, mask=keep, other=0.0)
    slope = 1.0
    if CAPPED:
        t = tanh(x / softcap)
        x = softcap * t
        slope = (1.0 - t) * (1.0 + t)
    return x, slope


@triton.jit
def forbidden_from(forbid, n_forbid, id):
    """Returns the position in `forbid` of the first id >= `id`."""
    low = id * 0
    high = low + n_forbid
    while low < high:
        middle = (low + high) // 2
        below = tl.load(forbid + middle) < id
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def allowed(keep, id, stop, forbid, n_forbid, f):
    """Returns (keep without the forbidden ids below `stop`, next f); forbid[f] is the first that may be among `id`."""
    forbidden = tl.load(forbid + f, mask=f < n_forbid, other=NO_ID)
    while forbidden < stop:
        keep = keep & (id != forbidden)
        f += 1
        forbidden = tl.load(forbid + f, mask=f < n_forbid, other=NO_ID)
    return keep, f


@triton.jit
def scan(row, width, first, terms, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns (max of z or LOWEST, sum of exp(z - max), sum of allowed z) of the ids from `first` on."""
    bias, softcap, forbid, n_forbid = terms
    high = tl.full([BLOCK], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if forbid is not None:
        f = forbidden_from(forbid, n_forbid, first)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        keep = column < width
        x = tl.load(row + column, mask=keep, other=0.0).to(tl.float32)
        z, _ = capped(x, first + column, keep, bias, softcap, CAPPED)
        if forbid is not None:
            keep, f = allowed(keep, first + column, first + begin + BLOCK, forbid, n_forbid, f)
        if SMOOTHED:
            total += tl.where(keep, z, 0.0)
        z = tl.where(keep, z, float("-inf"))
        e = tl.exp2(-tl.abs(z - high) * LOG2E)  # one exponential rescales whichever of the two is smaller
        above = z > high
        sums = tl.where(above, sums * e + 1.0, sums + e)
        high = tl.where(above, z, high)
    most = tl.max(high, 0)
    return most, tl.sum(sums * tl.exp2((high - most) * LOG2E), 0), tl.sum(total, 0)


@triton.jit
def update(row, width, first, target, terms, state, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the ids first .. first + width to the row's state; returns its max and its sum."""
    bias, softcap, forbid, n_forbid = terms
    later = first > 0
    high, sums, total = scan(row, width, first, terms, CAPPED, SMOOTHED, BLOCK)
    before = tl.load(state, mask=later, other=float("-inf"))
    most = tl.maximum(high, before)
    sums = sums * tl.exp2((high - most) * LOG2E)
    sums += tl.load(state + 1, mask=later, other=0.0) * tl.exp2((tl.maximum(before, LOWEST) - most) * LOG2E)
    sums = tl.where(most == float("inf"), float("nan"), sums)
    most = tl.where(sums == 0.0, float("-inf"), most)

    here = (target >= first) & (target < first + width)
    x = tl.load(row + (target - first), mask=here, other=0.0).to(tl.float32)
    at_target, _ = capped(x, target, here, bias, softcap, CAPPED)
    if forbid is not None:
        f = forbidden_from(forbid, n_forbid, target)
        is_forbidden = tl.load(forbid + f, mask=f < n_forbid, other=NO_ID) == target
        at_target = tl.where(is_forbidden, float("-inf"), at_target)
    old = tl.load(state + 2, mask=later, other=float("-inf"))
    total += tl.load(state + 3, mask=later, other=0.0)
    tl.store(state, most)
    tl.store(state + 1, sums)
    tl.store(state + 2, tl.where(here, at_target, old))
    tl.store(state + 3, total)
    return most, sums


@triton.jit
def differentiate(
    row,
    out,
    begin,
    width,
    first,
    target,
    high,
    sums,
    scale,
    loss_terms,
    terms,
    f,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the gradients of the tile that starts at column `begin`; returns the next f."""
    n_allowed, smoothing, z_loss = loss_terms
    bias, softcap, forbid, n_forbid = terms
    column = begin + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = capped(x, first + column, inside, bias, softcap, CAPPED)
    keep = inside
    if forbid is not None:
        keep, f = allowed(inside, first + column, first + begin + BLOCK, forbid, n_forbid, f)
    factor = scale * (1.0 + 2.0 * z_loss * (high + tl.log(sums))) / sums
    at_target = tl.where(first + column == target, scale * (1.0 - smoothing), 0.0)
    d = factor * tl.exp2((z - high) * LOG2E) - scale * (smoothing / n_allowed) - at_target
    tl.store(out + column, tl.where(keep, d * slope, 0.0).to(out.dtype.element_ty), mask=inside)
    return f


@triton.jit
def fill(out, begin, width, value, BLOCK: tl.constexpr):
    column = begin + tl.arange(0, BLOCK)
    x = tl.full([BLOCK], 0.0, tl.float32) + value
    tl.store(out + column, x.to(out.dtype.element_ty), mask=column < width)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "held", "first", "n_forbid", "inner"])
def stats_kernel(
    logits,
    inner,
    outer_stride,
    stride,
    slot,
    info,
    start,
    held,
    first,
    width,
    targets,
    bias,
    softcap,
    forbid,
    n_forbid,
    state,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    i = r
    if slot is not None:
        i = tl.load(slot + r)
    if (i >= 0) & (i < held) & (start + i < tl.load(info)):
        row = row_of(logits, r, inner, outer_stride, stride)
        terms = bias, softcap, forbid, n_forbid
        target, at = tl.load(targets + i), state + 4 * i.to(tl.int64)
        update(row, width, first, target, terms, at, CAPPED, SMOOTHED, BLOCK)


@triton.jit(do_not_specialize=["start", "held", "first", "n_forbid", "inner", "capacity", "vocab", "n_allowed"])
def dlogits_kernel(
    logits,
    inner,
    outer_stride,
    stride,
    out,
    out_stride,
    slot,
    info,
    start,
    held,
    capacity,
    first,
    width,
    targets,
    state,
    scale,
    vocab,
    n_allowed,
    smoothing,
    z_loss,
    bias,
    softcap,
    forbid,
    n_forbid,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    begin = tl.program_id(1) * BLOCK
    count = tl.load(info)
    i = r
    value = 0.0
    if slot is not None:
        i = tl.load(slot + r)
        value = tl.where(count > capacity, float("nan"), 0.0)
    live = (i >= 0) & (i < held) & (start + i < count)
    by = tl.load(scale + i, mask=live, other=0.0)
    target = tl.load(targets + i, mask=live, other=0)
    bad = live & ((by != by) | (target < 0) | (target >= vocab))
    value = tl.where(bad, float("nan"), value)
    out += r.to(tl.int64) * out_stride
    if live & (value == 0.0):
        row = row_of(logits, r, inner, outer_stride, stride)
        at = state + 4 * i.to(tl.int64)
        f = 0
        if forbid is not None:
            f = forbidden_from(forbid, n_forbid, first + begin)
        terms, loss_terms = (bias, softcap, forbid, n_forbid), (n_allowed, smoothing, z_loss)
        high, sums = tl.load(at), tl.load(at + 1)
        differentiate(row, out, begin, width, first, target, high, sums, by, loss_terms, terms, f, CAPPED, BLOCK)
    else:
        fill(out, begin, width, value, BLOCK)


@triton.jit(do_not_specialize=["start", "n_forbid", "n_allowed"])
def gradients_kernel(
    logits,
    stride,
    info,
    start,
    width,
    targets,
    state,
    scale,
    n_allowed,
    smoothing,
    z_loss,
    bias,
    softcap,
    forbid,
    n_forbid,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = logits + i.to(tl.int64) * stride
    live = start + i < tl.load(info)
    by = tl.load(scale + i, mask=live, other=0.0)
    target = tl.load(targets + i, mask=live, other=0)
    value = tl.where(live & ((by != by) | (target < 0) | (target >= width)), float("nan"), 0.0)
    terms, loss_terms = (bias, softcap, forbid, n_forbid), (n_allowed, smoothing, z_loss)
    high = 0.0
    sums = 0.0
    if live:
        high, sums = update(row, width, 0, target, terms, state + 4 * i.to(tl.int64), CAPPED, SMOOTHED, BLOCK)
    tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
    if live & (value == 0.0):
        f = 0
        for begin in range(0, width, BLOCK):
            f = differentiate(row, row, begin, width, 0, target, high, sums, by, loss_terms, terms, f, CAPPED, BLOCK)
    else:
        for begin in range(0, width, BLOCK):
            fill(row, begin, width, value, BLOCK)
