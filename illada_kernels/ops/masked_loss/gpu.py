"""masked_loss on a GPU: the large products by cuBLAS through torch.mm, the rest by a backend's row kernels (rows.py).

A call runs in one of four modes (`plan`). In all of them only masked rows are computed, products accumulate in float32,
and each gradient is rounded once:

    one_chunk   logits of all masked rows; they become their gradients in place, which are kept for the backward, where
                the upstream gradient multiplies rows of hidden and of its gradient. 3 products.
    row_chunks  the gradients are made in the forward, chunk by chunk, in float32, and kept but for powers of two that
                only the float32 backward multiplies by. 3 products.
    slices      slices of the vocabulary; the backward computes the logits again, writes each slice of the head's
                gradient once, and adds up hidden's. Keeps four numbers a row. 4 products.
    loss        no gradients: slices, forward only. 1 product.

Nothing is read back from the device, except by a forward without max_masked: the number of masked rows, and whether
their targets are ids, in one synchronisation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .native import Options
from .products import float32_sums, product
from .rows import POWER_TIMES_GRAD, SCALE_OVER_POWER, SCALE_TIMES_GRAD, Formula, RowKernels, Rows

DEFAULT_BUDGET = 256 << 20
LEAST_CHUNK = (
    1024  # rows; each chunk reads and writes the float32 head gradient: for fewer, a fourth product costs less
)
LEAST_SLICE = 256  # ids
SLICE_BYTES = 32 << 20  # of logits: they stay in the second-level cache (50 MB on Hopper, 40 on Ampere)
ROW_BYTES = 64  # of indices, states and factors
TILE = 128  # rows of a chunk and ids of a slice are multiples of it

Needs = tuple[bool, bool, bool]  # gradients of hidden, head_weight, head_bias
Kept = tuple[Tensor, Tensor, Tensor]


# ---- which mode ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    mode: str
    rows: int  # masked rows there can be
    step: int  # row_chunks: rows of a chunk at most
    ids: int  # slices, loss: ids of a slice


def plan(
    hidden: Tensor,
    head_weight: Tensor,
    masked: Tensor,
    reduction: str,
    max_masked: int | None,
    budget: int | None,
    needs: Needs,
) -> Plan:
    """The mode, from shapes and options alone.

    By default the budget is 8 bytes for each element of the head: as long as N < 4 D, the N x V half-precision logits
    of one chunk take less than a float32 head gradient and a chunk of 2 D rows together, and one chunk is fastest.
    """
    vocab, width = head_weight.shape
    rows = masked.numel() if max_masked is None else min(max_masked, masked.numel())
    size = head_weight.element_size()
    if budget is None:
        budget = max(DEFAULT_BUDGET, 8 * vocab * width)
    left = budget - rows * (ROW_BYTES + (4 * width if needs[0] else 0))  # hidden's gradient, compact, in float32
    row = size * (vocab + width)  # a row of logits and of hidden
    step = (left - (4 * vocab * width if needs[1] else 0)) // row
    ids = min(SLICE_BYTES, left - rows * size * width) // max(size * rows, 1)
    ids = min(max(ids // TILE * TILE, LEAST_SLICE), vocab)
    if not any(needs):
        mode = "loss"
    elif rows * row <= left:
        mode = "one_chunk"
    elif reduction != "none" and step >= LEAST_CHUNK:
        mode = "row_chunks"
    else:
        mode = "slices"
    return Plan(mode, rows, max(step, 1), ids)


def chunk_rows(count: int, step: int) -> int:
    """Rows of a chunk: equal shares of the fewest chunks, whole tiles."""
    share = -(-count // max(-(-count // step), 1))
    return min(-(-share // TILE) * TILE, max(step, 1))


def kept_like(p: Plan, head_weight: Tensor, needs: Needs, rows: int | None = None) -> Kept:
    """The three tensors that a forward keeps, uninitialised; for `rows` masked rows if given, else for the capacity."""
    vocab, width = head_weight.shape
    rows = p.rows if rows is None else rows
    empty = functools.partial(torch.empty, device=head_weight.device)
    none = empty(0, dtype=torch.float32)
    if p.mode == "one_chunk":
        return empty(rows, vocab, dtype=head_weight.dtype), none, none.clone()
    if p.mode == "row_chunks":
        shapes: tuple[tuple[int, ...], ...] = ((rows, width), (vocab, width), (vocab,))
        d_hidden, d_weight, d_bias = (
            empty(shape if need else (0,), dtype=torch.float32) for shape, need in zip(shapes, needs)
        )
        return d_hidden, d_weight, d_bias
    return empty((rows, 4) if p.mode == "slices" else (0,), dtype=torch.float32), none, none.clone()


# ---- what every mode needs ------------------------------------------------------------------------------------------


def masked_rows(
    kernels: RowKernels,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    vocab: int,
    options: Options,
    check: bool,
) -> Rows:
    """The masked rows, compacted: as many as max_masked, or as all rows. With `check` and without max_masked just as
    many as there are, after the one synchronisation; raises ValueError if a target is no id."""
    total = masked.numel()
    capacity = total if options.max_masked is None else min(options.max_masked, total)
    rows = kernels.compact(masked, targets, weight, vocab, options.reduction == "mean", capacity)
    if not check or options.max_masked is not None:
        return rows
    count, bad = rows.info.tolist()
    if bad >= 0:
        got = int(targets.reshape(-1)[bad])
        raise ValueError(f"targets: expected ids in [0, {vocab}) at masked rows, got {got} at row {bad} of {total}")
    return rows.chunk(0, count)


@functools.cache
def _forbid_on(device: torch.device, forbid: tuple[int, ...]) -> Tensor:
    """Uploaded once: a copy from the host at each call would synchronise and could not be captured in a graph. Kept for
    good, a few bytes each: a captured graph reads the list at its address, whatever other lists have come since."""
    return torch.tensor(forbid, dtype=torch.int64, device=device)


def formula(options: Options, vocab: int, bias: Tensor | None, device: torch.device) -> Formula:
    return Formula(
        vocab,
        None if bias is None else bias.float().contiguous(),
        options.softcap or 0.0,
        options.label_smoothing,
        options.z_loss,
        _forbid_on(device, tuple(options.forbid)) if options.forbid else None,
    )


class Head:
    """One call: its rows, its head, the row kernels."""

    def __init__(
        self,
        kernels: RowKernels,
        hidden: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        rows: Rows,
        options: Options,
        p: Plan,
        needs: Needs,
    ) -> None:
        self.kernels, self.hidden, self.weight, self.rows = kernels, hidden, head_weight, rows
        self.plan, self.needs, self.count = p, needs, len(rows.index)
        self.vocab, self.width = head_weight.shape
        self.formula = formula(options, self.vocab, head_bias, hidden.device)

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
        """(ids, their rows of the head, their logits): one buffer filled in turn."""
        ids = self.plan.ids
        buffer = self.empty(len(x) * ids, dtype=x.dtype)
        for first in range(0, self.vocab, ids):
            w = self.weight[first : first + ids]
            logits = buffer[: len(x) * len(w)].view(len(x), len(w))
            product(x, w.T, logits)
            yield slice(first, first + len(w)), w, logits


def _largest(factors: Tensor) -> Tensor:
    """Their largest magnitude, on the device; not 0, as of fillers alone, so that they can be divided by it."""
    return factors.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)


# ---- forward ---------------------------------------------------------------------------------------------------------


def forward(
    kernels: RowKernels,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    head_bias: Tensor | None,
    options: Options,
    budget: int | None,
    needs: Needs,
    trim: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and what is kept; with `trim`, kept for as many rows as are masked rather than for the capacity."""
    p = plan(hidden, head_weight, masked, options.reduction, options.max_masked, budget, needs)
    rows = masked_rows(kernels, targets, masked, weight, head_weight.shape[0], options, check=True)
    head = Head(kernels, hidden, head_weight, head_bias, rows, options, p, needs)
    kept = kept_like(p, head_weight, needs, head.count if trim else None)
    if p.mode == "slices":
        kept[0].zero_()  # fillers too
    elif not trim and (p.mode == "one_chunk" or needs[0]):
        kept[0][head.count :].zero_()
    state = kept[0][: head.count] if p.mode == "slices" else head.empty(head.count, 4)
    with float32_sums():
        if p.mode == "one_chunk":
            _one_chunk(head, kept[0][: head.count], state)
        elif p.mode == "row_chunks":
            _row_chunks(head, kept, state)
        else:
            for ids, _, logits in head.slices(head.gather(rows)):
                kernels.stats(logits, ids.start, rows, state, head.formula)
    loss = head.empty(*((masked.numel(),) if options.reduction == "none" else ()))
    kernels.losses(state, rows, head.formula, loss)
    return loss.view(masked.shape) if options.reduction == "none" else loss, *kept


def _one_chunk(head: Head, d: Tensor, state: Tensor) -> None:
    """d (N, V) becomes d(loss) / d(logits), but for a power of two of each row."""
    product(head.gather(head.rows), head.weight.T, d)
    head.kernels.gradients(d, head.rows, state, head.factors(SCALE_OVER_POWER), head.formula)


def _row_chunks(head: Head, kept: Kept, state: Tensor) -> None:
    """kept become d(loss) / d(hidden) of the masked rows over their powers, d(head_weight) and d(head_bias) over the
    largest power: half precision never holds a row's scale, only how its power compares with the largest."""
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
    kernels: RowKernels,
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
    """Gradients of hidden, head_weight and head_bias in their dtypes; empty where not needed. No synchronisation: it
    computes as many rows as were kept, fillers included."""
    of = (hidden, head_weight, head_bias)
    grads = [
        torch.empty(
            x.shape if need and x is not None else (0,), dtype=(hidden if x is None else x).dtype, device=hidden.device
        )
        for x, need in zip(of, needs)
    ]
    rows = masked_rows(kernels, targets, masked, weight, head_weight.shape[0], options, check=False)
    if p.mode != "row_chunks":
        rows = rows.chunk(0, len(kept[0]))
    head = Head(kernels, hidden, head_weight, head_bias, rows, options, p, needs)
    with float32_sums():
        if p.mode == "one_chunk":
            _one_chunk_backward(head, grad_loss, kept[0], grads)
        elif p.mode == "row_chunks":
            _row_chunks_backward(head, grad_loss, kept, grads)
        else:
            _slices_backward(head, grad_loss, kept[0], grads)
    if options.max_masked is not None and p.rows == 0:  # no row that could carry the NaN of an overflow
        for g in grads[1:]:
            g.copy_(torch.where(rows.info[0] > 0, torch.nan, 0.0))
    return grads[0], grads[1], grads[2]


def _scatter(head: Head, dx: Tensor, out: Tensor, factors: Tensor | None = None) -> None:
    head.kernels.scatter(dx, head.rows, out.view(len(head.rows.slot), head.width), factors)


def _one_chunk_backward(head: Head, grad_loss: Tensor, d: Tensor, grads: list[Tensor]) -> None:
    """d is d(loss) / d(logits) of each row, but for the factors of the rows."""
    factors = head.factors(POWER_TIMES_GRAD, grad_loss)
    if head.needs[0]:
        dx = head.empty(head.count, head.width)
        product(d, head.weight, dx)
        _scatter(head, dx, grads[0], factors)
        del dx
    if head.needs[1]:
        product(d.T, head.gather(head.rows, factors), grads[1])
    if head.needs[2]:
        grads[2].copy_(_weighted_sum(head, d, factors))


def _weighted_sum(head: Head, d: Tensor, factors: Tensor) -> Tensor:
    """(V,) float32: the rows of d, (N, V), times factors. Two columns hold each factor in half precision: one would
    round the upstream gradient the same way in all rows. They are relative to the largest, so that fp16 holds them."""
    if head.count == 0:
        return head.empty(head.vocab).zero_()
    largest = _largest(factors)
    ratio = factors / largest
    high = ratio.to(d.dtype)
    sums = head.empty(head.vocab, 2)
    product(d.T, torch.stack((high, (ratio - high).to(d.dtype)), 1), sums)
    return sums.sum(1) * largest


def _row_chunks_backward(head: Head, grad_loss: Tensor, kept: Kept, grads: list[Tensor]) -> None:
    if head.needs[0]:
        _scatter(head, kept[0], grads[0], head.factors(POWER_TIMES_GRAD, grad_loss)[: len(kept[0])])
    factor = _largest(head.factors(POWER_TIMES_GRAD)) * grad_loss
    for g, k, need in zip(grads[1:], kept[1:], head.needs[1:]):
        if need:
            torch.mul(k, factor, out=g)


def _slices_backward(head: Head, grad_loss: Tensor, state: Tensor, grads: list[Tensor]) -> None:
    x, scale = head.gather(head.rows), head.factors(SCALE_TIMES_GRAD, grad_loss)
    dx = head.empty(head.count if head.needs[0] else 0, head.width)
    d_bias = head.empty(head.vocab if head.needs[2] else 0, 1)
    ones = x.new_ones(head.count, 1)
    for ids, w, d in head.slices(x):
        head.kernels.dlogits(d, d, ids.start, head.rows, state, scale, head.formula)
        if head.needs[0]:
            product(d, w, dx, accumulate=ids.start > 0)
        if head.needs[1]:
            product(d.T, x, grads[1][ids])
        if head.needs[2]:
            product(d.T, ones, d_bias[ids])
    if head.needs[0]:
        _scatter(head, dx, grads[0])
    if head.needs[2]:
        grads[2].copy_(d_bias[:, 0])


# ---- masked_loss_from_logits -----------------------------------------------------------------------------------------


def rows_kept(masked: Tensor, max_masked: int | None) -> Tensor:
    """The state of each masked row there can be."""
    rows = masked.numel() if max_masked is None else min(max_masked, masked.numel())
    return torch.zeros(rows, 4, dtype=torch.float32, device=masked.device)


def rows_forward(
    kernels: RowKernels, logits: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(loss, the state of the masked rows)."""
    vocab, state = logits.shape[-1], rows_kept(masked, options.max_masked)
    rows = masked_rows(kernels, targets, masked, weight, vocab, options, check=True)
    terms = formula(options, vocab, None, logits.device)
    kernels.stats(logits, 0, rows, state[: len(rows.index)], terms, by_slot=True)
    none = options.reduction == "none"
    loss = torch.empty((masked.numel(),) if none else (), dtype=torch.float32, device=logits.device)
    kernels.losses(state[: len(rows.index)], rows, terms, loss)
    return loss.view(masked.shape) if none else loss, state


def rows_backward(
    kernels: RowKernels,
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    state: Tensor,
    options: Options,
) -> Tensor:
    vocab = logits.shape[-1]
    rows = masked_rows(kernels, targets, masked, weight, vocab, options, check=False)
    scale = torch.empty_like(rows.scale)
    kernels.factors(rows, SCALE_TIMES_GRAD, grad_loss, scale)
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out = d_logits.view(masked.numel(), vocab)
    kernels.dlogits(logits, out, 0, rows, state, scale, formula(options, vocab, None, logits.device), by_slot=True)
    return d_logits
