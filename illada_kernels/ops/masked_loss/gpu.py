"""masked_loss on a GPU: matmuls by cuBLAS through torch.mm, the rest by a backend's row kernels (row_kernels.py).

A call runs in one of five modes (`plan`). Every mode computes masked rows only, accumulates matmuls in float32 and
rounds each gradient once:

    one_chunk   Computes the logits of all masked rows and turns them into their gradients in place. The backward takes
                these, and multiplies rows of hidden and of its gradient by the upstream gradient. 3 matmuls.
    row_chunks  Computes the gradients in the forward, chunk by chunk, in float32, each divided by a power of two, which
                the float32 backward multiplies back. 3 matmuls.
    slices      Computes the logits by slices of the vocab. The backward computes them again, writes each slice of the
                head's gradient once, and accumulates hidden's. Saves four numbers a row. 4 matmuls.
    loss        Slices without gradients, forward only. 1 matmul.
    logits      masked_loss_from_logits: one pass each way. Saves four numbers a row.

Only a forward without max_masked reads from the device: the number of masked rows and whether their targets are ids, in
one synchronisation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._matmul import float32_sums, product
from ..._streams import TwoBuffers
from .problem import Problem, Results, bad_target, empty_grads
from .ranks import add_gradients, merge
from .row_kernels import POWER_TIMES_GRAD, SCALE_OVER_POWER, SCALE_TIMES_GRAD, Formula, RowKernels, Rows

DEFAULT_BUDGET = 256 << 20
LEAST_CHUNK = 1024  # rows; with fewer, a fourth matmul costs less than a chunk's pass over the float32 head gradient
LEAST_SLICE = 256  # ids
SLICE_BYTES = 32 << 20  # of logits; they stay in L2 (50 MB on Hopper, 40 on Ampere)
ROW_BYTES = 64  # of indices, states and factors
TILE = 128  # rows of a chunk and ids of a slice are multiples of it

Kept = tuple[Tensor, Tensor, Tensor]


# ---- which mode ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    mode: str
    rows: int  # masked rows there can be
    step: int = 0  # row_chunks: rows of a chunk at most
    ids: int = 0  # slices, loss: ids of a slice


def plan(problem: Problem) -> Plan:
    """Returns the mode, from shapes and options alone.

    The default budget is 8 bytes for each element of the head. While N < 4 D, the N x V half-precision logits of one
    chunk take less memory than a float32 head gradient and a chunk of 2 D rows together, and one chunk is fastest.
    """
    rows, head_weight, needs = problem.capacity, problem.head_weight, problem.needs
    if head_weight is None:
        return Plan("logits", rows)
    vocab, width = head_weight.shape
    size = head_weight.element_size()
    budget = problem.memory_budget
    if budget is None:
        budget = max(DEFAULT_BUDGET, 8 * vocab * width)
    left = budget - rows * (ROW_BYTES + (4 * width if needs[0] else 0))  # hidden's gradient, compact, in float32
    row = size * (vocab + width)  # a row of logits and of hidden
    if any(needs) and rows * row <= left:
        return Plan("one_chunk", rows)
    step = (left - (4 * vocab * width if needs[1] else 0)) // row
    if any(needs) and problem.reduction != "none" and step >= LEAST_CHUNK and not problem.group:
        return Plan("row_chunks", rows, step)
    ids = min(SLICE_BYTES, left - rows * size * width) // max(size * rows, 1)
    ids = min(max(ids // TILE * TILE, LEAST_SLICE), vocab)
    return Plan("slices" if any(needs) else "loss", rows, ids=ids)


def chunk_rows(count: int, step: int) -> int:
    """Returns the rows of a chunk: whole tiles, of the fewest chunks, equally long."""
    share = -(-count // max(-(-count // step), 1))
    return min(-(-share // TILE) * TILE, max(step, 1))


def kept(problem: Problem) -> Kept:
    """Returns the three tensors that `forward` keeps, uninitialised."""
    return _kept(problem, plan(problem))


def _kept(problem: Problem, p: Plan) -> Kept:
    hidden, head_weight, rows = problem.hidden, problem.head_weight, p.rows
    shapes: list[tuple[int, ...]] = [(0,), (0,), (0,)]
    if head_weight is None or p.mode == "slices":
        shapes[0] = (rows, 4)
    elif p.mode == "one_chunk":
        shapes[0] = (rows, problem.width)
    elif p.mode == "row_chunks":
        of = ((rows, hidden.shape[-1]), head_weight.shape, (problem.vocab,))
        shapes = [tuple(shape) if need else (0,) for shape, need in zip(of, problem.needs)]
    dtype = head_weight.dtype if head_weight is not None and p.mode == "one_chunk" else torch.float32
    first, *rest = (hidden.new_empty(shape, dtype=d) for shape, d in zip(shapes, (dtype, torch.float32, torch.float32)))
    return first, rest[0], rest[1]


# ---- shared by all modes ---------------------------------------------------------------------------------------------


def masked_rows(kernels: RowKernels, problem: Problem, check: bool) -> Rows:
    """Returns the masked rows, compacted, filled up to max_masked or else to the number of all rows.

    With `check` and without max_masked the exact number, after one synchronisation; raises ValueError if a target is
    not an id.
    """
    mean = problem.reduction == "mean"
    masked, targets = problem.masked, problem.targets
    rows = kernels.compact(masked, targets, problem.weight, problem.vocab, mean, problem.capacity)
    if not check or problem.max_masked is not None:
        return rows
    count, bad = rows.info.tolist()
    if bad >= 0:
        raise bad_target(int(targets.reshape(-1)[bad]), bad, problem)
    return rows.chunk(0, count)


@functools.cache
def _forbid_on(device: torch.device, forbid: tuple[int, ...]) -> Tensor:
    """Uploads the ids once, because a copy from the host at each call would synchronise and could not be captured.

    The list is never freed: a captured graph reads it at its address.
    """
    return torch.tensor(forbid, dtype=torch.int64, device=device)


def formula(problem: Problem) -> Formula:
    bias, forbid = problem.head_bias, problem.forbidden()
    if bias is not None:
        bias = bias.float().contiguous()
    if bias is not None and problem.group:  # kernels read it by id
        bias = F.pad(bias, (problem.vocab_start, problem.vocab - problem.vocab_start - problem.width))
    return Formula(
        problem.vocab,
        bias,
        problem.softcap or 0.0,
        problem.label_smoothing,
        problem.z_loss,
        _forbid_on(problem.hidden.device, forbid) if forbid else None,
    )


class Head:
    """One call of masked_loss: its rows, its head, the row kernels."""

    def __init__(self, kernels: RowKernels, problem: Problem, rows: Rows, p: Plan, needs: Sequence[bool]) -> None:
        assert problem.head_weight is not None
        self.kernels, self.hidden, self.weight, self.rows = kernels, problem.hidden, problem.head_weight, rows
        self.plan, self.needs, self.count = p, needs, len(rows.index)
        self.vocab, self.width = problem.head_weight.shape
        self.problem, self.start, self.formula = problem, problem.vocab_start, formula(problem)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.hidden.device)

    def gather(self, rows: Rows, factors: Tensor | None = None) -> Tensor:
        x = self.empty(len(rows.index), self.width, dtype=self.weight.dtype)
        self.kernels.gather(self.hidden, rows, x, factors)
        return x

    def factors(self, what: int, grad_loss: Tensor | None = None) -> Tensor:
        out = self.empty(self.count)
        self.kernels.factors(self.rows, what, grad_loss, out)
        return out

    def slices(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (ids, their rows of the head, their logits). The logits of all slices share one buffer."""
        ids = self.plan.ids
        buffer = self.empty(len(x) * ids, dtype=x.dtype)
        for first in range(0, self.vocab, ids):
            w = self.weight[first : first + ids]
            logits = buffer[: len(x) * len(w)].view(len(x), len(w))
            product(x, w.T, logits)
            yield slice(first, first + len(w)), w, logits


def _largest(factors: Tensor) -> Tensor:
    """Returns the largest magnitude, on the device; at least the smallest normal number, because it is a divisor."""
    return factors.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


# ---- forward ---------------------------------------------------------------------------------------------------------


def forward(kernels: RowKernels, problem: Problem, trim: bool = False) -> Results:
    """Returns the loss and the tensors saved for the backward. trim: save only rows that are masked now, not the full
    capacity."""
    p, rows = plan(problem), masked_rows(kernels, problem, check=True)
    count, none = len(rows.index), problem.reduction == "none"
    trim = trim and p.mode != "logits"  # whose state is 16 bytes a row, and read by slot
    kept = _kept(problem, p._replace(rows=count) if trim else p)
    if p.mode in ("slices", "logits"):
        kept[0].zero_()  # fillers too
    elif not trim and (p.mode == "one_chunk" or problem.needs[0]):
        kept[0][count:].zero_()
    state = kept[0][:count] if p.mode in ("slices", "logits") else rows.scale.new_empty(count, 4)
    if problem.group:  # kernels begin anew at id 0 alone
        state[:, 0::2], state[:, 1::2] = -torch.inf, 0.0
    if p.mode == "logits":
        terms = formula(problem)
        kernels.stats(problem.hidden, 0, rows, state, terms, by_slot=True)
    else:
        head = Head(kernels, problem, rows, p, problem.needs)
        terms = head.formula
        with float32_sums():
            if p.mode == "one_chunk":
                _one_chunk(head, kept[0][:count], state)
            elif p.mode == "row_chunks":
                _row_chunks(head, kept, state)
            elif p.mode == "slices":  # the same slices as in the backward, so that the logits round alike
                for ids, _, logits in head.slices(head.gather(rows)):
                    kernels.stats(logits, head.start + ids.start, rows, state, terms)
                merge(problem, state)
            else:
                _stats(head, state)
                merge(problem, state)
    loss = state.new_empty((problem.masked.numel(),) if none else ())
    kernels.losses(state, rows, terms, loss)
    return loss.view(problem.masked.shape) if none else loss, *kept


def _stats(head: Head, state: Tensor) -> None:
    """Fills `state`. The next slice's matmul overlaps the reading of this one; both share the room of one slice."""
    x, ids = head.gather(head.rows), -(-head.plan.ids // (2 * TILE)) * TILE
    with TwoBuffers(len(x) * min(ids, head.vocab), x.dtype, x.device) as buffers:
        for first in range(0, head.vocab, ids):
            w = head.weight[first : first + ids]
            logits = buffers.to_fill()[: len(x) * len(w)].view(len(x), len(w))
            product(x, w.T, logits)
            with buffers.filled():
                head.kernels.stats(logits, head.start + first, head.rows, state, head.formula)


def _one_chunk(head: Head, d: Tensor, state: Tensor) -> None:
    """Fills d (N, V) with d(loss) / d(logits), each row divided by a power of two."""
    product(head.gather(head.rows), head.weight.T, d)
    scale = head.factors(SCALE_OVER_POWER)
    if not head.problem.group:
        head.kernels.gradients(d, head.rows, state, scale, head.formula)
        return
    head.kernels.stats(d, head.start, head.rows, state, head.formula)
    merge(head.problem, state)
    head.kernels.dlogits(d, d, head.start, head.rows, state, scale, head.formula)


def _row_chunks(head: Head, kept: Kept, state: Tensor) -> None:
    """Fills `kept`: d(loss) / d(hidden) of the masked rows, each divided by its power of two, and d(head_weight) and
    d(head_bias), divided by the largest power. Half precision then holds a row's power relative to the largest, never
    its scale."""
    d_hidden, d_weight, d_bias = kept
    if head.count == 0:
        d_weight.zero_(), d_bias.zero_()
        return
    scale, power = head.factors(SCALE_OVER_POWER), head.factors(POWER_TIMES_GRAD)
    power /= _largest(power)
    step = chunk_rows(head.count, head.plan.step)
    buffer = head.empty(min(step, head.count) * head.vocab, dtype=head.weight.dtype)
    for start in range(0, head.count, step):
        at = slice(start, start + step)
        part = head.rows.chunk(start, start + step)
        d = buffer[: len(part.index) * head.vocab].view(-1, head.vocab)
        product(head.gather(part), head.weight.T, d)
        head.kernels.gradients(d, part, state[at], scale[at], head.formula)
        if head.needs[0]:
            product(d, head.weight, d_hidden[start : start + len(d)])
        if head.needs[1]:
            product(d.T, head.gather(part, power[at]), d_weight, accumulate=start > 0)
        if head.needs[2]:
            product(d.T, power[at, None].to(d.dtype), d_bias[:, None], accumulate=start > 0)


# ---- backward --------------------------------------------------------------------------------------------------------


def backward(
    kernels: RowKernels, problem: Problem, grad_loss: Tensor, kept: Kept, needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Returns the gradients of hidden, head_weight and head_bias in their dtypes, None where not needed. Does not
    synchronise: computes all saved rows, fillers too."""
    p, rows = plan(problem), masked_rows(kernels, problem, check=False)
    grads = empty_grads(problem, needs)
    if p.mode == "logits":
        _logits_backward(kernels, problem, grad_loss, rows, kept[0], grads[0])
        return grads
    if p.mode != "row_chunks":
        rows = rows.chunk(0, len(kept[0]))
    head = Head(kernels, problem, rows, p, needs)
    with float32_sums():
        if p.mode == "one_chunk":
            _one_chunk_backward(head, grad_loss, kept[0], *grads)
        elif p.mode == "row_chunks":
            _row_chunks_backward(head, grad_loss, kept, *grads)
        else:
            _slices_backward(head, grad_loss, kept[0], *grads)
    if problem.max_masked is not None and p.rows == 0:  # no row can carry the NaN of an overflow
        for g in grads[1:]:
            if g is not None:
                g.copy_(torch.where(rows.info[0] > 0, torch.nan, 0.0))
    return grads


def _scatter(head: Head, dx: Tensor, out: Tensor, factors: Tensor | None = None) -> None:
    head.kernels.scatter(dx, head.rows, out.view(len(head.rows.slot), head.width), factors)


def _one_chunk_backward(
    head: Head, grad_loss: Tensor, d: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None
) -> None:
    """Writes the gradients. `d`: d(loss) / d(logits), without the factors of the rows."""
    factors = head.factors(POWER_TIMES_GRAD, grad_loss)
    if d_hidden is not None:
        dx = head.empty(head.count, head.width)
        product(d, head.weight, dx)
        add_gradients(head.problem, dx)
        _scatter(head, dx, d_hidden, factors)
        del dx
    if d_weight is not None:
        product(d.T, head.gather(head.rows, factors), d_weight)
    if d_bias is not None:
        d_bias.copy_(_weighted_sum(head, d, factors))


def _weighted_sum(head: Head, d: Tensor, factors: Tensor) -> Tensor:
    """Returns the sum of the rows of d (N, V) times factors, (V,) float32.

    A factor is split over two half-precision columns, because one would round the upstream gradient the same way in all
    rows. Factors are divided by the largest, so that float16 holds them.
    """
    if head.count == 0:
        return head.empty(head.vocab).zero_()
    largest = _largest(factors)
    ratio = factors / largest
    high = ratio.to(d.dtype)
    sums = head.empty(head.vocab, 2)
    product(d.T, torch.stack((high, (ratio - high).to(d.dtype)), 1), sums)
    return sums.sum(1) * largest


def _row_chunks_backward(
    head: Head, grad_loss: Tensor, kept: Kept, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None
) -> None:
    if d_hidden is not None:
        _scatter(head, kept[0], d_hidden, head.factors(POWER_TIMES_GRAD, grad_loss)[: len(kept[0])])
    factor = _largest(head.factors(POWER_TIMES_GRAD)) * grad_loss
    for g, k in ((d_weight, kept[1]), (d_bias, kept[2])):
        if g is not None:
            torch.mul(k, factor, out=g)


def _slices_backward(
    head: Head,
    grad_loss: Tensor,
    state: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    x, scale = head.gather(head.rows), head.factors(SCALE_TIMES_GRAD, grad_loss)
    dx = head.empty(head.count if d_hidden is not None else 0, head.width)
    sums = head.empty(head.vocab if d_bias is not None else 0, 1)
    ones = x.new_ones(head.count, 1)
    for ids, w, d in head.slices(x):
        head.kernels.dlogits(d, d, head.start + ids.start, head.rows, state, scale, head.formula)
        if d_hidden is not None:
            product(d, w, dx, accumulate=ids.start > 0)
        if d_weight is not None:
            product(d.T, x, d_weight[ids])
        if d_bias is not None:
            product(d.T, ones, sums[ids])
    if d_hidden is not None:
        add_gradients(head.problem, dx)
        _scatter(head, dx, d_hidden)
    if d_bias is not None:
        d_bias.copy_(sums[:, 0])


def _logits_backward(
    kernels: RowKernels, problem: Problem, grad_loss: Tensor, rows: Rows, state: Tensor, d_logits: Tensor | None
) -> None:
    assert d_logits is not None
    scale = torch.empty_like(rows.scale)
    kernels.factors(rows, SCALE_TIMES_GRAD, grad_loss, scale)
    out = d_logits.view(problem.masked.numel(), problem.vocab)
    kernels.dlogits(problem.hidden, out, 0, rows, state, scale, formula(problem), by_slot=True)
