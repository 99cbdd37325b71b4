"""The CPU backend of masked_loss: products through torch.mm, rows through the extension, in float32, masked rows only.

A call runs in one of three modes (`plan`). What it keeps for the backward are the gradients of the logits, or the
gradients themselves, or two numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .native import Options, RowMath, Rows, gather, masked_rows, reduce, scale

DEFAULT_BUDGET = 256 << 20
LEAST_CHUNK = 32  # rows; products of fewer spend more on reading the head than on arithmetic
LEAST_SLICE = 256  # ids; each slice adds a rounding to the gradient of hidden
ROW_BYTES = 256  # of indices, states and coefficients
SLICE_BYTES = 8 << 20  # of logits, or of a half-precision head in float32, where the budget allows more

Needs = tuple[bool, bool, bool]  # gradients of hidden, head_weight, head_bias
Kept = tuple[Tensor, Tensor, Tensor]


# ----- which mode --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    mode: str  # "loss", "one_chunk", "row_chunks" or "slices"
    rows: int  # capacity: masked rows there can be
    chunk: int  # rows whose logits are held at a time
    slice: int  # ids whose logits are computed at a time


def plan(
    hidden: Tensor, head_weight: Tensor, masked: Tensor, reduction: str, max_masked: int | None, budget: int | None,
    needs: Needs,
) -> Plan:  # fmt: skip
    """The mode, from shapes and options alone."""
    vocab, width = head_weight.shape
    rows = masked.numel() if max_masked is None else min(max_masked, masked.numel())
    if budget is None:
        budget = max(DEFAULT_BUDGET, 4 * vocab * width)
    budget -= ROW_BYTES * rows
    half = head_weight.dtype != torch.float32
    converted = min(vocab, max(LEAST_SLICE, min(SLICE_BYTES, budget // 4) // (4 * max(width, 1)))) if half else vocab
    left = budget - (4 * converted * width if half else 0)
    if any(needs):
        per_row = 4 * vocab + 8 * width  # logits, the row in float32 and its gradient
        if rows * per_row <= left:
            return Plan("one_chunk", rows, rows, converted)
        if reduction != "none" and left // per_row >= LEAST_CHUNK:
            return Plan("row_chunks", rows, left // per_row, converted)
    per_id = 4 * rows + (4 * width if half else 0)
    ids = (budget - 8 * rows * width) // max(per_id, 1)
    ids = max(LEAST_SLICE, min(ids, max(SLICE_BYTES // max(per_id, 1), 1024)))
    return Plan("slices" if any(needs) else "loss", rows, rows, min(vocab, ids))


def kept_shapes(
    hidden: Tensor, head_weight: Tensor, masked: Tensor, reduction: str, max_masked: int | None, budget: int | None,
    needs: Needs,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Shapes of the three float32 tensors that `forward` keeps."""
    vocab = head_weight.shape[0]
    p = plan(hidden, head_weight, masked, reduction, max_masked, budget, needs)
    if p.mode == "one_chunk":
        return [(p.rows, vocab), (0,), (0,)]
    if p.mode == "row_chunks":
        shapes: list[tuple[int, ...]] = [tuple(hidden.shape), (vocab, head_weight.shape[1]), (vocab,)]
        return [shape if need else (0,) for shape, need in zip(shapes, needs)]
    return [(p.rows, 2) if p.mode == "slices" else (0,), (0,), (0,)]


def floats(*shape: int) -> Tensor:
    """Uninitialised float32, whatever torch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32)


def head_slices(head_weight: Tensor, ids: int) -> Iterator[tuple[int, Tensor]]:
    """(first id, (ids, D) float32): views, or one buffer filled in turn."""
    vocab, width = head_weight.shape
    buffer = None if head_weight.dtype == torch.float32 else floats(min(ids, vocab), width)
    for first in range(0, vocab, ids):
        part = head_weight[first : first + ids]
        yield first, part if buffer is None else buffer[: len(part)].copy_(part)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b."""
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


# ---- forward and backward ----------------------------------------------------------------------------------------


def forward(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None,
    head_bias: Tensor | None, options: Options, budget: int | None, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = plan(hidden, head_weight, masked, options.reduction, options.max_masked, budget, needs)
    shapes = kept_shapes(hidden, head_weight, masked, options.reduction, options.max_masked, budget, needs)
    kept = (floats(*shapes[0]), floats(*shapes[1]), floats(*shapes[2]))
    rows = masked_rows(targets, masked, weight, options.max_masked)
    count = len(rows.flat)
    math = RowMath(options, head_weight.shape[0], head_bias)
    if rows.overflow:
        for k in kept:
            k.fill_(torch.nan)
        losses = torch.empty(count, dtype=torch.float64)
    elif p.mode == "one_chunk":
        losses = _forward_one_chunk(hidden, head_weight, rows, math, p, kept[0])
    elif p.mode == "row_chunks":
        losses = _forward_row_chunks(hidden, head_weight, rows, math, p, kept, needs)
    else:
        losses = _forward_slices(hidden, head_weight, rows, math, p, kept[0])
    return (reduce(losses, rows, masked, options.reduction), *kept)


def _logits(x: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, ids: int, out: Tensor) -> Tensor:
    """Fills out (N, V) with logits; returns their state."""
    state = math.state(len(x))
    for first, w in head_slices(head_weight, ids):
        part = out[:, first : first + len(w)]
        product(x, w.T, part)
        math.stats(part, first, rows.targets, state)
    return state


def _forward_one_chunk(hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, p: Plan, kept: Tensor) -> Tensor:
    """kept[:N] becomes d(loss) / d(logits)."""
    d = kept[: len(rows.flat)]
    state = _logits(gather(hidden, rows), head_weight, rows, math, p.slice, d)
    coefficients = math.coefficients(state[:, 0], state[:, 1], scale(rows, math.options.reduction))
    math.dlogits(d, d, 0, rows.targets, coefficients)
    return math.losses(state)


def _forward_row_chunks(
    hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, p: Plan, kept: Kept, needs: Needs
) -> Tensor:
    """kept become d(loss) / d(hidden), d(head_weight), d(head_bias)."""
    count, scales = len(rows.flat), scale(rows, math.options.reduction)
    d_hidden, d_weight, d_bias = kept
    d_hidden.zero_()
    if count == 0:
        d_weight.zero_(), d_bias.zero_()
    losses = torch.empty(count, dtype=torch.float64)
    step = even_chunks(count, p.chunk)
    logits = floats(min(step, count), head_weight.shape[0])
    for start in range(0, count, step):
        part = rows.chunk(start, start + step)
        x = gather(hidden, part)
        d = logits[: len(x)]
        state = _logits(x, head_weight, part, math, p.slice, d)
        losses[start : start + step] = math.losses(state)
        coefficients = math.coefficients(state[:, 0], state[:, 1], scales[start : start + step])
        math.dlogits(d, d, 0, part.targets, coefficients)
        if needs[1]:
            product(d.T, x, d_weight, accumulate=start > 0)
        if needs[2]:
            d_bias.copy_(d.sum(0)) if start == 0 else d_bias.add_(d.sum(0))
        if needs[0]:
            dx = x  # the rows have been used
            for first, w in head_slices(head_weight, p.slice):
                product(d[:, first : first + len(w)], w, dx, accumulate=first > 0)
            d_hidden.view(d_hidden.shape[:-1].numel(), x.shape[1]).index_copy_(0, part.flat, dx)
    return losses


def even_chunks(count: int, most: int) -> int:
    """Rows per chunk for the fewest chunks of at most `most`, all about alike, in steps of 8 where that fits."""
    chunks = max(1, -(-count // most))
    even = -(-count // chunks)
    return max(1, min(most, -(-even // 8) * 8))


def _forward_slices(hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, p: Plan, kept: Tensor) -> Tensor:
    """kept[:N], where there are to be gradients, becomes the max and the sum of exponentials of each row."""
    x, state = gather(hidden, rows), math.state(len(rows.flat))
    buffer = floats(len(x) * p.slice)
    for first, w in head_slices(head_weight, p.slice):
        logits = buffer[: len(x) * len(w)].view(len(x), len(w))
        product(x, w.T, logits)
        math.stats(logits, first, rows.targets, state)
    if kept.numel():
        kept[: len(x)] = state[:, :2]
    return math.losses(state)


def ready_gradients(
    grad_loss: Tensor, hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, kept: Kept, p: Plan
) -> Kept | None:
    """The kept gradients themselves, where they need neither scaling nor rounding."""
    of = (hidden, head_weight, head_bias)
    if p.mode != "row_chunks" or any(k.numel() and x is not None and x.dtype != k.dtype for k, x in zip(kept, of)):
        return None
    return kept if grad_loss.item() == 1.0 else None


def backward(
    grad_loss: Tensor, hidden: Tensor, head_weight: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None,
    head_bias: Tensor | None, kept: Kept, options: Options, p: Plan, needs: Needs,
) -> Kept:  # fmt: skip
    """Gradients of hidden, head_weight and head_bias in their dtypes; empty where not needed."""
    of = (hidden, head_weight, head_bias)
    grads = [torch.empty(x.shape if need and x is not None else (0,), dtype=(hidden if x is None else x).dtype)
             for x, need in zip(of, needs)]  # fmt: skip
    rows = masked_rows(targets, masked, weight, options.max_masked)
    if rows.overflow:
        return tuple(g.fill_(torch.nan) for g in grads)  # type: ignore[return-value]
    if p.mode == "row_chunks":
        for g, k, need in zip(grads, kept, needs):
            if need:
                torch.mul(k, grad_loss, out=g)
        return grads[0], grads[1], grads[2]
    math = RowMath(options, head_weight.shape[0], head_bias)
    d_hidden = _backward_products(grad_loss, hidden, head_weight, rows, math, kept[0], p, grads, needs)
    if needs[0]:
        grads[0].zero_().view(masked.numel(), hidden.shape[-1]).index_copy_(0, rows.flat, d_hidden.to(hidden.dtype))
    return grads[0], grads[1], grads[2]


def _backward_products(
    grad_loss: Tensor, hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, kept: Tensor, p: Plan,
    grads: list[Tensor], needs: Needs,
) -> Tensor:  # fmt: skip
    """Fills the gradients of the head; returns that of the masked rows, (N, D) float32.

    One chunk: kept is d(loss) / d(logits) for an upstream gradient of 1, so that of a row multiplies that row of x
    and dx.
    """
    x = gather(hidden, rows)
    count, width = x.shape
    dx = floats(count if needs[0] else 0, width)
    one_chunk = p.mode == "one_chunk"
    upstream = grad_loss.reshape(-1)[rows.flat] if math.options.reduction == "none" else grad_loss.expand(count)
    if one_chunk:
        x *= upstream[:, None]
    else:
        high, total = kept[:count].double().unbind(1)
        coefficients = math.coefficients(high, total, scale(rows, math.options.reduction, grad_loss))
        buffer = floats(count * p.slice)
    d_weight = None if head_weight.dtype == torch.float32 else floats(p.slice if needs[1] else 0, width)
    for first, w in head_slices(head_weight, p.slice):
        ids = slice(first, first + len(w))
        if one_chunk:
            d = kept[:count, ids]
        else:
            d = buffer[: count * len(w)].view(count, len(w))
            product(x, w.T, d)
            math.dlogits(d, d, first, rows.targets, coefficients)
        if needs[0]:
            product(d, w, dx, accumulate=first > 0)
        if needs[1]:
            out = grads[1][ids] if d_weight is None else d_weight[: len(w)]
            product(d.T, x, out)
            if d_weight is not None:
                grads[1][ids] = out
        if needs[2]:
            grads[2][ids] = torch.mv(d.T, upstream) if one_chunk else d.sum(0)
    if one_chunk and needs[0]:
        dx *= upstream[:, None]
    return dx
