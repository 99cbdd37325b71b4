"""Triton kernels of a layer's rows: RMSNorm with the residual, RoPE with the cache's write, SwiGLU.

    norm     sum = x + delta;  out = sum / sqrt(mean(sum^2) + eps) * weight
    rope     (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (x[i], x[i + dim / 2]); k and v go to their slots
    swiglu   gate / (1 + exp(-gate)) * up

norm: a program has whole rows, read once (twice if one is longer than BLOCK). rope: a program has HEADS heads of one
token, of q, of k or of v. swiglu: a program has a piece of a row. All are bound by memory, and by launches where rows
are few. Float32 between load and store. Equal rows get equal bits: the order of a sum depends on the row's length, and
where 16 does not divide that on how far apart rows lie. Of tokens whose slots are clamped to one the last is written,
by one program.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_of(x, r, inner, outer_stride, stride):
    """Returns the address of row r of the flattened leading dimensions (_gpu.row_strides)."""
    return x + ((r // inner).to(tl.int64) * outer_stride + (r % inner).to(tl.int64) * stride)


# ---- norm ------------------------------------------------------------------------------------------------------------


@triton.jit
def summed(x, delta, column, keep):
    """Returns x + delta in float32, rounded as the sum is stored."""
    v = tl.load(x + column, mask=keep, other=0.0)
    if delta is not None:
        by = tl.load(delta + column, mask=keep, other=0.0)
        v = (v.to(tl.float32) + by.to(tl.float32)).to(v.dtype)
    return v.to(tl.float32)


@triton.jit
def store_norm(v, scale, by, total, out, column, keep, IN_FP32: tl.constexpr):
    """Writes the sum v, where it is wanted, and v * scale * by, the weight."""
    kind = out.dtype.element_ty
    if total is not None:
        tl.store(total + column, v.to(kind), mask=keep)
    v *= scale
    if not IN_FP32:
        v = v.to(kind).to(tl.float32)
    tl.store(out + column, (v * by.to(tl.float32)).to(kind), mask=keep)


@triton.jit(do_not_specialize=["rows", "x_inner", "delta_inner"])
def norm_kernel(
    x,
    x_inner,
    x_outer_stride,
    x_stride,
    delta,
    delta_inner,
    delta_outer_stride,
    delta_stride,
    weight,
    rows,
    width,
    eps,
    total,
    out,
    IN_FP32: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(rows.dtype) * ROWS + tl.arange(0, ROWS))[:, None]  # (ROWS, 1)
    column = tl.arange(0, BLOCK)[None, :]
    exists = row < rows
    x = row_of(x, row, x_inner, x_outer_stride, x_stride)
    out += row.to(tl.int64) * width
    if delta is not None:
        delta = row_of(delta, row, delta_inner, delta_outer_stride, delta_stride)
        total += row.to(tl.int64) * width

    if WHOLE:
        keep = exists & (column < width)
        v = summed(x, delta, column, keep)  # (ROWS, BLOCK)
        by = tl.load(weight + column, mask=column < width, other=0.0)  # in flight with x, not behind its sum
        mean = tl.sum(v * v, 1)[:, None] / width
        store_norm(v, 1.0 / tl.sqrt_rn(mean + eps), by, total, out, column, keep, IN_FP32)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, width, BLOCK):
            v = summed(x, delta, begin + column, exists & (begin + column < width))
            squares += v * v
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / width + eps)
        for begin in range(0, width, BLOCK):
            keep = exists & (begin + column < width)
            v = summed(x, delta, begin + column, keep)
            by = tl.load(weight + begin + column, mask=begin + column < width, other=0.0)
            store_norm(v, scale, by, total, out, begin + column, keep, IN_FP32)


# ---- rope ------------------------------------------------------------------------------------------------------------


@triton.jit
def load_heads(x, x_head, head, heads, pair, half):
    """Returns the halves of heads of one token, (HEADS, PAIRS) each."""
    keep = (head < heads) & (pair < half)
    x += head.to(tl.int64) * x_head + pair
    return tl.load(x, mask=keep, other=0.0), tl.load(x + half, mask=keep, other=0.0)


@triton.jit
def rotated(first, second, cos, sin):
    a, b = first.to(tl.float32), second.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def store_heads(first, second, out, out_head, head, heads, pair, half, written):
    keep = (head < heads) & (pair < half) & written
    out += head.to(tl.int64) * out_head + pair
    tl.store(out, first.to(out.dtype.element_ty), mask=keep)
    tl.store(out + half, second.to(out.dtype.element_ty), mask=keep)


@triton.jit
def slot_of(b, token, length, start, starts, keep, slots):
    """Returns the slot of a token, or -1 if it is not written: of tokens that share a clamped slot the last one is."""
    raw = start + token
    if starts is not None:
        raw = tl.load(starts + b) + token
    overwritten = (token + 1 < length) & ((raw < 0) | (raw >= slots - 1))
    written = (slots > 0) & (overwritten == 0)
    if keep is not None:
        written = written & (tl.load(keep + b * length + token) != 0)
    return tl.where(written, tl.minimum(tl.maximum(raw, 0), slots - 1), -1)


@triton.jit(do_not_specialize=["start", "slots", "length", "heads", "kv_heads"])
def rope_kernel(
    q,
    k,
    v,
    cos,
    sin,
    starts,
    keep,
    start,
    slots,
    length,
    heads,
    kv_heads,
    half,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    keys_batch,
    keys_slot,
    keys_head,
    values_batch,
    values_slot,
    values_head,
    angle_batch,
    out,
    keys,
    values,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    b = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    part = tl.program_id(1)  # parts of q, then of k, then of v
    q_parts, k_parts = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    lane = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    angle = b * angle_batch + token * half + pair
    c = tl.load(cos + angle, mask=pair < half, other=0.0).to(tl.float32)  # (1, PAIRS)
    s = tl.load(sin + angle, mask=pair < half, other=0.0).to(tl.float32)

    # k and v are loaded before the slot is, even where they are not written: no load waits for another
    if part < q_parts:
        head = part * HEADS + lane
        x = q + (b * q_batch + token * q_token)
        q0, q1 = load_heads(x, q_head, head, heads, pair, half)
        q0, q1 = rotated(q0, q1, c, s)
        to = out + tl.program_id(0).to(tl.int64) * heads * (2 * half)
        store_heads(q0, q1, to, 2 * half, head, heads, pair, half, True)
    elif part < q_parts + k_parts:
        head = (part - q_parts) * HEADS + lane
        x = k + (b * k_batch + token * k_token)
        k0, k1 = load_heads(x, k_head, head, kv_heads, pair, half)
        slot = slot_of(b, token, length, start, starts, keep, slots)
        k0, k1 = rotated(k0, k1, c, s)
        to = keys + (b * keys_batch + slot * keys_slot)
        store_heads(k0, k1, to, keys_head, head, kv_heads, pair, half, slot >= 0)
    elif values is not None:
        head = (part - q_parts - k_parts) * HEADS + lane
        x = v + (b * v_batch + token * v_token)
        v0, v1 = load_heads(x, v_head, head, kv_heads, pair, half)
        slot = slot_of(b, token, length, start, starts, keep, slots)
        to = values + (b * values_batch + slot * values_slot)
        store_heads(v0, v1, to, values_head, head, kv_heads, pair, half, slot >= 0)


# ---- swiglu ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["inner"])
def swiglu_kernel(gate_up, inner, outer_stride, stride, width, out, BLOCK: tl.constexpr):
    pieces = tl.cdiv(width, BLOCK)  # of a row, all on the grid's first axis: the others end at 65535
    row = tl.program_id(0) // pieces
    column = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    keep = column < width
    x = row_of(gate_up, row, inner, outer_stride, stride)
    gate = tl.load(x + column, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(x + width + column, mask=keep, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp2(gate * -LOG2E)) * up
    tl.store(out + row.to(tl.int64) * width + column, product.to(out.dtype.element_ty), mask=keep)
