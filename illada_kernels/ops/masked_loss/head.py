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
CHUNK_COST = 75  # rows: what one more pass over the head costs; measured with D = 1024, V = 32768
ROW_BYTES = 256  # of indices, states and coefficients
SLICE_BYTES = 8 << 20  # of logits, or of a half-precision head in float32, where the budget allows more

Needs = tuple[bool, bool, bool]  # gradients of hidden, head_weight, head_bias
Kept = tuple[Tensor, Tensor, Tensor]


# ----- which mode --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    mode: str  # "loss", "one_chunk", "row_chunks" or "slices"
    rows: int  # capacity: masked rows there can be
    room: int  # row_chunks: bytes for a chunk of rows, their logits and their gradient
    slice: int  # ids whose logits are computed at a time


def plan(
    hidden: Tensor,
    head_weight: Tensor,
    masked: Tensor,
    reduction: str,
    max_masked: int | None,
    budget: int | None,
    needs: Needs,
) -> Plan:
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
            return Plan("one_chunk", rows, left, converted)
        if reduction != "none" and left // per_row >= LEAST_CHUNK:
            return Plan("row_chunks", rows, left, converted)
    per_id = 4 * rows + (4 * width if half else 0)
    ids = (budget - 8 * rows * width) // max(per_id, 1)
    ids = max(LEAST_SLICE, min(ids, max(SLICE_BYTES // max(per_id, 1), 1024)))
    return Plan("slices" if any(needs) else "loss", rows, left, min(vocab, ids))


def row_chunks(count: int, room: int, vocab: int, width: int) -> tuple[int, int]:
    """(rows of a chunk, ids whose logits it holds) of least cost: where not all V fit, the rest, at most half, is
    computed twice, and each chunk costs another pass over the head."""
    best: tuple[float, int, int] | None = None
    for chunks in range(1, count + 1):
        rows = min(-(-count // (8 * chunks)) * 8, count)
        held = min(vocab, (room - 8 * width * rows) // (4 * rows))
        held -= held % 16 if held < vocab and vocab >= 64 else 0
        if 2 * held < vocab:
            continue
        cost = count * (1 - held / vocab) + CHUNK_COST * chunks
        if best is None or cost < best[0]:
            best = (cost, rows, held)
        if held == vocab:
            break
    return best[1:] if best else (1, vocab)


def kept_shapes(
    hidden: Tensor,
    head_weight: Tensor,
    masked: Tensor,
    reduction: str,
    max_masked: int | None,
    budget: int | None,
    needs: Needs,
) -> list[tuple[int, ...]]:
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


def head_slices(head_weight: Tensor, ids: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first id, (ids, D) float32) of the ids from start to stop: views, or one buffer filled in turn."""
    vocab, width = head_weight.shape
    stop = vocab if stop is None else stop
    buffer = None if head_weight.dtype == torch.float32 else floats(min(ids, stop - start), width)
    for first in range(start, stop, ids):
        part = head_weight[first : min(first + ids, stop)]
        yield first, part if buffer is None else buffer[: len(part)].copy_(part)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b."""
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


# ---- forward and backward ----------------------------------------------------------------------------------------


def forward(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    head_bias: Tensor | None,
    options: Options,
    budget: int | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _logits(
    x: Tensor,
    head_weight: Tensor,
    ids: int,
    out: Tensor,
    first: int = 0,
    rows: Rows | None = None,
    math: RowMath | None = None,
    state: Tensor | None = None,
) -> None:
    """Fills out (N, n) with the logits of n ids from `first` on, and brings the state up to date if there is one."""
    for at, w in head_slices(head_weight, ids, first, first + out.shape[1]):
        part = out[:, at - first : at - first + len(w)]
        product(x, w.T, part)
        if rows is not None and math is not None and state is not None:
            math.stats(part, at, rows.targets, state)


def _forward_one_chunk(hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, p: Plan, kept: Tensor) -> Tensor:
    """kept[:N] becomes d(loss) / d(logits)."""
    d = kept[: len(rows.flat)]
    state = math.state(len(d))
    _logits(gather(hidden, rows), head_weight, p.slice, d, 0, rows, math, state)
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
    step, held = row_chunks(count, p.room, *head_weight.shape)
    buffer = floats(min(step, count) * held)
    for start in range(0, count, step):
        part = rows.chunk(start, start + step)
        x = gather(hidden, part)
        losses[start : start + step], coefficients = _chunk_forward(
            x, head_weight, part, scales[start : start + step], math, p.slice, buffer, held
        )
        dx = torch.empty_like(x) if needs[0] else x
        _chunk_gradients(x, head_weight, part, coefficients, math, p.slice, buffer, held, dx, kept, needs, start > 0)
        if needs[0]:
            d_hidden.view(d_hidden.shape[:-1].numel(), x.shape[1]).index_copy_(0, part.flat, dx)
        del x, dx  # before the next chunk's are made
    return losses


def _chunk_forward(
    x: Tensor, head_weight: Tensor, rows: Rows, scales: Tensor, math: RowMath, ids: int, buffer: Tensor, held: int
) -> tuple[Tensor, Tensor]:
    """(losses, coefficients of the gradients); the logits of the first `held` ids stay in the buffer."""
    vocab, state = head_weight.shape[0], math.state(len(x))
    for first in (held, 0) if held < vocab else (0,):
        width = vocab - held if first else held
        _logits(x, head_weight, ids, buffer[: len(x) * width].view(len(x), width), first, rows, math, state)
    return math.losses(state), math.coefficients(state[:, 0], state[:, 1], scales)


def _chunk_gradients(
    x: Tensor,
    head_weight: Tensor,
    rows: Rows,
    coefficients: Tensor,
    math: RowMath,
    ids: int,
    buffer: Tensor,
    held: int,
    dx: Tensor,
    kept: Kept,
    needs: Needs,
    accumulate: bool,
) -> None:
    """dx, and the gradients of the head: of the ids whose logits are in the buffer, then of the rest, done again."""
    vocab = head_weight.shape[0]
    for first, stop in ((0, held), (held, vocab)) if held < vocab else ((0, vocab),):
        d = buffer[: len(x) * (stop - first)].view(len(x), stop - first)
        if first:
            _logits(x, head_weight, ids, d, first)
        math.dlogits(d, d, first, rows.targets, coefficients)
        if needs[1]:
            product(d.T, x, kept[1][first:stop], accumulate)
        if needs[2]:
            part = kept[2][first:stop]
            part.add_(d.sum(0)) if accumulate else torch.sum(d, 0, out=part)
        if needs[0]:
            for at, w in head_slices(head_weight, ids, first, stop):
                product(d[:, at - first : at - first + len(w)], w, dx, accumulate=at > 0)


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
    grad_loss: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    head_bias: Tensor | None,
    kept: Kept,
    options: Options,
    p: Plan,
    needs: Needs,
) -> Kept:
    """Gradients of hidden, head_weight and head_bias in their dtypes; empty where not needed."""
    of = (hidden, head_weight, head_bias)
    grads = [
        torch.empty(x.shape if need and x is not None else (0,), dtype=(hidden if x is None else x).dtype)
        for x, need in zip(of, needs)
    ]
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
    grad_loss: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    rows: Rows,
    math: RowMath,
    kept: Tensor,
    p: Plan,
    grads: list[Tensor],
    needs: Needs,
) -> Tensor:
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
