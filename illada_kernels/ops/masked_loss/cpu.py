"""masked_loss on the CPU, in float32, masked rows only: products by torch.mm, logits of few rows by head.cpp, what is
done with rows by cpu_rows.py.

A call runs in one of five modes (`plan`). Each keeps something else for the backward:

    one_chunk   d(loss) / d(logits) of the masked rows
    row_chunks  the gradients themselves, made in the forward, chunk by chunk
    slices      max and sum of exponentials of each row; the backward computes the logits again
    loss        nothing: there are no gradients
    logits      masked_loss_from_logits: max and sum of exponentials of each row
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._extension import DTYPES, check, extension_reason
from .cpu_rows import Rows
from .problem import Problem, Results, empty_grads, no_float64
from .ranks import add_gradients, merge

DEFAULT_BUDGET = 256 << 20
LEAST_CHUNK = 32  # rows; products of fewer spend more on reading the head than on arithmetic
LEAST_SLICE = 256  # ids; each slice adds a rounding to the gradient of hidden
CHUNK_COST = 75  # rows: what one more pass over the head costs; measured with D = 1024, V = 32768
FEW_ROWS = 128  # whose logits the extension computes; measured on Zen 4: 0.54 of MKL's time for 51 rows, 0.75 for 256
ROW_BYTES = 256  # of indices, states and coefficients
SLICE_BYTES = 8 << 20  # of logits, or of a half-precision head in float32, where the budget allows more


available, supports = functools.partial(extension_reason, "masked_loss_stats_cpu", "head_cpu"), no_float64


# ----- which mode --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    mode: str
    rows: int  # masked rows there can be
    vocab: int  # ids whose logits are computed here
    room: int = 0  # row_chunks: bytes for a chunk of rows, their logits and their gradient
    ids: int = 0  # ids whose logits are computed at a time


def plan(problem: Problem) -> Plan:
    """Returns the mode, from shapes and options alone."""
    rows, head_weight = problem.capacity, problem.head_weight
    if head_weight is None:
        return Plan("logits", rows, problem.hidden.shape[-1])
    vocab, width = head_weight.shape
    budget = problem.memory_budget
    if budget is None:
        budget = max(DEFAULT_BUDGET, 4 * vocab * width)
    budget -= ROW_BYTES * rows
    half = head_weight.dtype != torch.float32
    converted = min(vocab, max(LEAST_SLICE, min(SLICE_BYTES, budget // 4) // (4 * max(width, 1)))) if half else vocab
    left = budget - (4 * converted * width if half else 0)
    if any(problem.needs):
        per_row = 4 * vocab + 8 * width  # logits, the row in float32 and its gradient
        if rows * per_row <= left:
            return Plan("one_chunk", rows, vocab, left, converted)
        if problem.reduction != "none" and left // per_row >= LEAST_CHUNK and not problem.group:
            return Plan("row_chunks", rows, vocab, left, converted)
    per_id = 4 * rows + (4 * width if half else 0)
    ids = (budget - 8 * rows * width) // max(per_id, 1)
    ids = max(LEAST_SLICE, min(ids, max(SLICE_BYTES // max(per_id, 1), 1024)))
    return Plan("slices" if any(problem.needs) else "loss", rows, vocab, left, min(vocab, ids))


def row_chunks(count: int, room: int, vocab: int, width: int) -> tuple[int, int]:
    """Returns (rows of a chunk, ids whose logits it holds) of least cost: where not all V fit, the rest, at most half,
    is computed twice, and each chunk costs another pass over the head."""
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


def kept(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the three float32 tensors that `forward` keeps, uninitialised."""
    return _kept(problem, plan(problem))


def _kept(problem: Problem, p: Plan) -> tuple[Tensor, Tensor, Tensor]:
    shapes: list[tuple[int, ...]] = [(0,), (0,), (0,)]
    if p.mode == "one_chunk":
        shapes[0] = (p.rows, p.vocab)
    elif p.mode in ("slices", "logits"):
        shapes[0] = (p.rows, 2)
    elif p.mode == "row_chunks" and problem.head_weight is not None:
        of = (problem.hidden.shape, problem.head_weight.shape, (p.vocab,))
        shapes = [tuple(shape) if need else (0,) for shape, need in zip(of, problem.needs)]
    device = problem.hidden.device
    first, second, third = (torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    return first, second, third


# ---- forward and backward ----------------------------------------------------------------------------------------


def forward(problem: Problem) -> Results:
    p = plan(problem)
    return _forward(problem, p, Rows(problem, p.vocab))


def direct(problem: Problem) -> Results:
    """Runs as forward, but keeps only as much as the rows need that are masked."""
    p = plan(problem)
    rows = Rows(problem, p.vocab)
    return _forward(problem, p._replace(rows=rows.count), rows)


def _forward(problem: Problem, p: Plan, rows: Rows) -> Results:
    kept = _kept(problem, p)
    if rows.overflow:
        for k in kept:
            k.fill_(torch.nan)
    elif p.mode == "logits":
        logits, index = _flat(problem.hidden, rows)
        rows.stats(logits, 0, index)
    elif p.mode == "one_chunk":
        d = kept[0][: rows.count]
        _logits(rows, _gather(rows), p.ids, d, 0)
        if problem.group:
            merge(problem, rows.state)
        rows.dlogits(d, d, 0)
    elif p.mode == "row_chunks":
        _row_chunks(rows, p, kept)
    else:
        x = _gather(rows)
        buffer = _floats(len(x) * p.ids)
        for first, w in _head(problem, p.ids):
            logits = buffer[: len(x) * len(w)].view(len(x), len(w))
            _head_product(rows, x, w, logits)
            rows.stats(logits, first)
        if problem.group:
            merge(problem, rows.state)
    if p.mode in ("slices", "logits") and not rows.overflow:
        kept[0][: rows.count] = rows.state[:, :2]
    return rows.loss(), *kept


def _row_chunks(rows: Rows, p: Plan, kept: tuple[Tensor, Tensor, Tensor]) -> None:
    """Makes kept d(loss) / d(hidden), d(head_weight) and d(head_bias)."""
    kept[0].zero_()
    if rows.count == 0:
        kept[1].zero_(), kept[2].zero_()
        return
    step, held = row_chunks(rows.count, p.room, p.vocab, rows.problem.hidden.shape[-1])
    buffer = _floats(step * held)
    for start in range(0, rows.count, step):
        _row_chunk(rows.chunk(start, start + step), p, held, buffer, kept, accumulate=start > 0)


def _row_chunk(
    rows: Rows,
    p: Plan,
    held: int,
    buffer: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],
    accumulate: bool,
) -> None:
    """Adds the gradients of a chunk of rows to kept. The buffer holds the logits of the first `held` ids; those of the
    rest are computed twice."""
    problem, x = rows.problem, _gather(rows)
    d_hidden, d_weight, d_bias = kept
    spans = ((0, held), (held, p.vocab)) if held < p.vocab else ((0, p.vocab),)

    def logits(first: int, stop: int) -> Tensor:
        return buffer[: len(x) * (stop - first)].view(len(x), stop - first)

    for first, stop in reversed(spans):
        _logits(rows, x, p.ids, logits(first, stop), first)
    coefficients = rows.coefficients(rows.state)
    dx = torch.empty_like(x) if problem.needs[0] else None
    for first, stop in spans:
        d = logits(first, stop)
        if first:
            _logits(rows, x, p.ids, d, first, again=True)
        rows.dlogits(d, d, first, coefficients)
        if problem.needs[1]:
            _multiply(d.T, x, d_weight[first:stop], accumulate)
        if problem.needs[2]:
            part = d_bias[first:stop]
            part.add_(d.sum(0)) if accumulate else torch.sum(d, 0, out=part)
        if dx is not None:
            for at, w in _head(problem, p.ids, first, stop):
                _multiply(d[:, at - first : at - first + len(w)], w, dx, accumulate=at > 0)
    if dx is not None:
        d_hidden.view(-1, x.shape[1]).index_copy_(0, rows.flat, dx)


def _logits(rows: Rows, x: Tensor, ids: int, out: Tensor, first: int, again: bool = False) -> None:
    """Fills out (N, n) with the logits of n ids from `first` on; the rows' state takes them in unless it has."""
    for at, w in _head(rows.problem, ids, first, first + out.shape[1]):
        part = out[:, at - first : at - first + len(w)]
        _head_product(rows, x, w, part)
        if not again:
            rows.stats(part, at)


def backward(
    problem: Problem, grad_loss: Tensor, *kept: Tensor, needs: Sequence[bool] = (True, True, True)
) -> Sequence[Tensor | None]:
    """Returns the gradients of hidden, head_weight and head_bias in their dtypes, None where not needed."""
    p = plan(problem)
    if p.mode == "row_chunks":
        return _scaled(problem, grad_loss, kept, needs)
    rows, grads = Rows(problem, p.vocab), empty_grads(problem, needs)
    if rows.overflow:
        return [g if g is None else g.fill_(torch.nan) for g in grads]
    if p.mode == "logits":
        return _logits_backward(rows, grad_loss, kept[0]), None, None
    dx = _products(rows, grad_loss, kept[0][: rows.count], p, *grads)
    if grads[0] is not None:
        if problem.group:
            add_gradients(problem, dx)
        flat = grads[0].zero_().view(problem.masked.numel(), problem.hidden.shape[-1])
        flat.index_copy_(0, rows.flat, dx.to(flat.dtype))
    return grads


def _scaled(
    problem: Problem, grad_loss: Tensor, kept: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Returns the kept gradients times the upstream gradient. Times 1 they are copied only when somebody writes into
    them, and only if the graph, which a second backward needs, is still there."""
    grads, one = empty_grads(problem, (False,) * 3), grad_loss.item() == 1.0
    for i, (x, k) in enumerate(zip((problem.hidden, problem.head_weight, problem.head_bias), kept)):
        if needs[i] and x is not None:
            as_it_is = one and x.dtype == k.dtype
            grads[i] = (
                torch._lazy_clone(k) if as_it_is else torch.mul(k, grad_loss, out=torch.empty_like(k, dtype=x.dtype))
            )
    return grads


def _products(
    rows: Rows,
    grad_loss: Tensor,
    kept: Tensor,
    p: Plan,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> Tensor:
    """Fills the gradients of the head; returns that of the masked rows, (N, D) float32.

    One chunk: kept is d(loss) / d(logits) for an upstream gradient of 1, so that of a row multiplies that row of x
    and dx.
    """
    x, upstream = _gather(rows), rows.upstream(grad_loss)
    count, width = x.shape
    dx = _floats(count if d_hidden is not None else 0, width)
    one_chunk = p.mode == "one_chunk"
    if one_chunk:
        x *= upstream[:, None]
    else:
        coefficients, buffer = rows.coefficients(kept.double(), grad_loss), _floats(count * p.ids)
    part = None if d_weight is None or d_weight.dtype == torch.float32 else _floats(p.ids, width)
    for first, w in _head(rows.problem, p.ids):
        ids = slice(first, first + len(w))
        if one_chunk:
            d = kept[:, ids]
        else:
            d = buffer[: count * len(w)].view(count, len(w))
            _head_product(rows, x, w, d)
            rows.dlogits(d, d, first, coefficients)
        if d_hidden is not None:
            _multiply(d, w, dx, accumulate=first > 0)
        if d_weight is not None:
            out = d_weight[ids] if part is None else part[: len(w)]
            _multiply(d.T, x, out)
            if part is not None:
                d_weight[ids] = out
        if d_bias is not None:
            d_bias[ids] = torch.mv(d.T, upstream, out=_floats(len(w))) if one_chunk else d.sum(0)
    if one_chunk and d_hidden is not None:
        dx *= upstream[:, None]
    return dx


def _head(problem: Problem, ids: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yields (first id, up to `ids` rows of the head in float32): views, or one buffer filled in turn."""
    head = problem.head_weight
    assert head is not None
    stop = len(head) if stop is None else stop
    buffer = None if head.dtype == torch.float32 else _floats(min(ids, stop - start), head.shape[1])
    for first in range(start, stop, ids):
        part = head[first : min(first + ids, stop)]
        yield first, part if buffer is None else buffer[: len(part)].copy_(part)


def _gather(rows: Rows) -> Tensor:
    """Returns the masked rows of hidden in float32, (N, D); a new tensor."""
    hidden = rows.problem.hidden
    return (hidden[None] if hidden.dim() == 1 else hidden)[rows.where].float()


def _head_product(rows: Rows, x: Tensor, w: Tensor, out: Tensor) -> None:
    """Computes out = x @ w.T. Few rows: by the extension, which reads the head at the speed of memory."""
    if not 0 < len(x) <= FEW_ROWS:
        return _multiply(x, w.T, out)
    head = (w.data_ptr(), 0, DTYPES[w.dtype], w.stride(0), 0, len(w))
    where = (out.data_ptr(), out.stride(0), rows.threads)
    code = rows.extension.head_cpu(x.data_ptr(), DTYPES[x.dtype], *x.shape, *head, *where)
    if code:
        check("masked_loss", code)


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Computes out = a @ b, or out += a @ b; given an `out`, autocast leaves it alone."""
    out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)


def _floats(*shape: int) -> Tensor:
    """Returns uninitialised float32, whatever torch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32)


# ---- masked_loss_from_logits -----------------------------------------------------------------------------------------


def _logits_backward(rows: Rows, grad_loss: Tensor, kept: Tensor) -> Tensor:
    """Returns the gradient of the logits, in their dtype, contiguous."""
    logits = rows.problem.hidden
    out = torch.zeros(logits.shape, dtype=logits.dtype)
    flat, (x, index) = out.view(-1, logits.shape[-1]), _flat(logits, rows)
    coefficients = rows.coefficients(kept[: rows.count].double(), grad_loss)
    if index is None:
        rows.dlogits(x, x, 0, coefficients)
        flat.index_copy_(0, rows.flat, x)
    else:
        rows.dlogits(x, flat, 0, coefficients, index)
    return out


def _flat(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Returns (all rows (R, V), which are masked), or (a copy of the masked rows, None) where no view has all rows."""
    x = logits[None] if logits.dim() == 1 else logits
    try:
        return x.view(-1, x.shape[-1]), rows.flat
    except RuntimeError:
        return x[rows.where], None
