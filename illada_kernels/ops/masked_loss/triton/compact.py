"""Triton kernels around the matmuls of masked_loss: compact, gather and scatter rows, compute factors and the loss.

compact: one program a tile of the R rows. Counts first, then places, so that a row's place is the number of masked rows
before it in whatever order programs run. Sums of weights and of losses are float64, in a fixed order.
gather, scatter: one program a piece of a row, 16 bytes a thread if rows are aligned. Bound by memory and launches.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .rows import row_of

NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["total", "vocab"])
def count_kernel(masked, targets, weight, total, vocab, counts, bads, weights, BLOCK: tl.constexpr):
    """Computes of each tile the number of masked rows, the first whose target is not an id, the sum of weights."""
    tile = tl.program_id(0)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    is_masked = tl.load(masked + row, mask=inside, other=0) != 0
    target = tl.load(targets + row, mask=is_masked, other=0)
    bad = is_masked & ((target < 0) | (target >= vocab))
    tl.store(counts + tile, tl.sum(is_masked.to(tl.int32), 0))
    tl.store(bads + tile, tl.min(tl.where(bad, row, NONE), 0))
    w = is_masked.to(tl.float64)
    if weight is not None:
        w = tl.load(weight + row, mask=is_masked, other=0.0).to(tl.float64)
    tl.store(weights + tile, tl.sum(w, 0))


@triton.jit(do_not_specialize=["total", "tiles", "capacity"])
def place_kernel(
    masked,
    targets,
    weight,
    total,
    counts,
    bads,
    weights,
    tiles,
    capacity,
    index,
    kept_targets,
    scale,
    slot,
    info,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    bad = tl.full([BLOCK], NONE, tl.int32)
    denominator = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, tiles, BLOCK):
        other = begin + lane
        c = tl.load(counts + other, mask=other < tiles, other=0)
        count += c
        before += tl.where(other < tile, c, 0)
        bad = tl.minimum(bad, tl.load(bads + other, mask=other < tiles, other=NONE))
        denominator += tl.load(weights + other, mask=other < tiles, other=0.0)
    masked_rows = tl.sum(count, 0)
    if tile == 0:
        first_bad = tl.min(bad, 0)
        tl.store(info, masked_rows)
        tl.store(info + 1, tl.where(first_bad == NONE, -1, first_bad))

    row = tile * BLOCK + lane
    inside = row < total
    is_masked = tl.load(masked + row, mask=inside, other=0) != 0
    place = tl.sum(before, 0) + tl.cumsum(is_masked.to(tl.int32), 0) - 1
    tl.store(slot + row, tl.where(is_masked, place, -1), mask=inside)
    keep = is_masked & (place < capacity)
    w = is_masked.to(tl.float64)
    if weight is not None:
        w = tl.load(weight + row, mask=keep, other=0.0).to(tl.float64)
    if MEAN:
        w = w / tl.sum(denominator, 0)
    overflow = masked_rows > capacity
    tl.store(index + place, row, mask=keep)
    tl.store(kept_targets + place, tl.load(targets + row, mask=keep, other=0), mask=keep)
    tl.store(scale + place, tl.where(overflow, float("nan"), w.to(tl.float32)), mask=keep)
    filler = (row < capacity) & (row >= masked_rows)  # places without a row
    tl.store(index + row, tl.zeros([BLOCK], tl.int32), mask=filler)
    tl.store(kept_targets + row, tl.zeros([BLOCK], tl.int64), mask=filler)
    tl.store(scale + row, tl.zeros([BLOCK], tl.float32), mask=filler)


@triton.jit(do_not_specialize=["start", "inner"])
def gather_kernel(x, inner, outer_stride, stride, index, info, start, width, factors, out, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    live = start + i < tl.load(info)
    row = row_of(x, tl.load(index + i), inner, outer_stride, stride)
    picked = tl.load(row + column, mask=inside & live, other=0.0).to(tl.float32)
    if factors is not None:
        picked *= tl.load(factors + i, mask=live, other=0.0)
    tl.store(out + i.to(tl.int64) * width + column, picked.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["held", "capacity"])
def scatter_kernel(dx, slot, info, capacity, held, width, factors, out, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = tl.load(slot + r)
    here = (place >= 0) & (place < held)
    x = tl.load(dx + place.to(tl.int64) * width + column, mask=inside & here, other=0.0)
    if factors is not None:
        x *= tl.load(factors + place, mask=here, other=0.0)
    x = tl.where(tl.load(info) > capacity, float("nan"), x)
    tl.store(out + r.to(tl.int64) * width + column, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def power_of_two(x):
    """Returns min(1, 2^floor(log2 |x|)), x with only its exponent's bits; 1 for zero, subnormals, inf and NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    power = bits.to(tl.float32, bitcast=True)
    return tl.where((bits == 0) | (power > 1.0), 1.0, power)


@triton.jit(do_not_specialize=["start", "held"])
def factors_kernel(
    scale,
    index,
    info,
    start,
    held,
    grad_loss,
    out,
    OVER: tl.constexpr,
    POWER: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (i < held) & (start + i < tl.load(info))
    x = tl.load(scale + i, mask=live, other=0.0)
    power = power_of_two(x)
    if OVER:
        x = x / power
    if POWER:
        x = power
    if grad_loss is not None:
        if PER_ROW:
            x *= tl.load(grad_loss + tl.load(index + i, mask=live, other=0), mask=live, other=0.0)
        else:
            x *= tl.load(grad_loss)
    tl.store(out + i, tl.where(live, x, 0.0), mask=i < held)


@triton.jit
def loss_of(
    state,
    place,
    live,
    targets,
    scale,
    vocab,
    n_allowed,
    smoothing,
    z_loss,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    """Returns scale * loss of the rows at `place`, 0 where not live."""
    at = state + 4 * place.to(tl.int64)
    high = tl.load(at, mask=live, other=0.0)
    log_sum = tl.log(tl.load(at + 1, mask=live, other=1.0))
    loss = log_sum + (1.0 - smoothing) * (high - tl.load(at + 2, mask=live, other=0.0))
    if SMOOTHED:
        loss += smoothing * (high - tl.load(at + 3, mask=live, other=0.0) / n_allowed)
    if Z_LOSS:
        loss += z_loss * (high + log_sum) * (high + log_sum)
    target = tl.load(targets + place, mask=live, other=0)
    loss = tl.where((target < 0) | (target >= vocab), float("nan"), loss)
    return tl.where(live, loss * tl.load(scale + place, mask=live, other=0.0), 0.0)


@triton.jit(do_not_specialize=["held", "capacity", "vocab", "n_allowed"])
def loss_sum_kernel(
    state,
    targets,
    scale,
    info,
    capacity,
    held,
    vocab,
    n_allowed,
    smoothing,
    z_loss,
    out,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the losses in one program, because there are at most as many rows as tokens in a batch."""
    count = tl.load(info)
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, held, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        live = (i < held) & (i < count)
        loss = loss_of(state, i, live, targets, scale, vocab, n_allowed, smoothing, z_loss, SMOOTHED, Z_LOSS)
        sums += loss.to(tl.float64)
    tl.store(out, tl.where(count > capacity, float("nan"), tl.sum(sums, 0).to(tl.float32)))


@triton.jit(do_not_specialize=["total", "held", "capacity", "vocab", "n_allowed"])
def loss_rows_kernel(
    state,
    targets,
    scale,
    slot,
    info,
    capacity,
    total,
    held,
    vocab,
    n_allowed,
    smoothing,
    z_loss,
    out,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(info)
    place = tl.load(slot + r, mask=r < total, other=-1)
    live = (place >= 0) & (place < held)
    loss = loss_of(state, place, live, targets, scale, vocab, n_allowed, smoothing, z_loss, SMOOTHED, Z_LOSS)
    tl.store(out + r, tl.where(count > capacity, float("nan"), loss), mask=r < total)
