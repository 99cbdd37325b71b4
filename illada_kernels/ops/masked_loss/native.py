"""The compiled backends of masked_loss: products through torch.mm, rows through the extension.

The CPU backend works in float32 on the masked rows only. A call runs in one of three modes (see `plan`): what is kept
for the backward are the gradients of the logits, or the gradients themselves, or two numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._dispatch import check, extension_reason, native

DEFAULT_BUDGET = 256 << 20
LEAST_CHUNK = 32  # rows; products of fewer spend more on reading the head than on arithmetic
LEAST_SLICE = 64  # ids
CONVERTED_BYTES = 8 << 20  # of a half-precision head, in float32 at a time

Needs = tuple[bool, bool, bool]  # gradients of hidden, head_weight, head_bias
Kept = tuple[Tensor, Tensor, Tensor]


class Options(NamedTuple):
    reduction: str
    softcap: float | None
    label_smoothing: float
    z_loss: float
    forbid: tuple[int, ...]
    max_masked: int | None


def cpu_reason() -> str | None:
    return extension_reason()


def cuda_reason() -> str | None:
    return "row kernels not compiled in"


# ---- which mode --------------------------------------------------------------------------------------------------


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
    half = head_weight.dtype != torch.float32
    converted = min(vocab, max(LEAST_SLICE, min(CONVERTED_BYTES, budget // 4) // (4 * max(width, 1)))) if half else vocab
    left = budget - (4 * converted * width if half else 0)
    if any(needs):
        per_row = 4 * vocab + 8 * width  # logits, the row in float32 and its gradient
        if rows * per_row <= left:
            return Plan("one_chunk", rows, rows, converted)
        if reduction != "none" and left // per_row >= LEAST_CHUNK:
            return Plan("row_chunks", rows, left // per_row, converted)
    per_id = 4 * rows + (4 * width if half else 0)
    ids = (budget - 8 * rows * width) // max(per_id, 1)
    ids = max(LEAST_SLICE, min(ids, max(CONVERTED_BYTES // max(per_id, 1), 1024)))
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


# ---- the parts ---------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The masked rows of a call, compacted, in order."""

    where: tuple[Tensor, ...]  # index into the leading dimensions
    index: Tensor  # the same, flat, (N,)
    targets: Tensor  # (N,)
    weight: Tensor  # (N,) float64
    overflow: bool  # more than max_masked

    def chunk(self, start: int, stop: int) -> Rows:
        where = tuple(i[start:stop] for i in self.where)
        return Rows(where, self.index[start:stop], self.targets[start:stop], self.weight[start:stop], self.overflow)


def masked_rows(targets: Tensor, masked: Tensor, weight: Tensor | None, max_masked: int | None) -> Rows:
    if masked.dim() == 0:
        targets, masked = targets[None], masked[None]
        weight = None if weight is None else weight[None]
    where = masked.nonzero(as_tuple=True)
    index = masked.reshape(-1).nonzero().squeeze(1)
    w = torch.ones(len(index), dtype=torch.float64) if weight is None else weight[where].double()
    return Rows(where, index, targets[where], w, max_masked is not None and len(index) > max_masked)


def gather(x: Tensor, rows: Rows) -> Tensor:
    """The rows in float32, (N, D); a new tensor."""
    return (x[None] if x.dim() == 1 else x)[rows.where].float()


def reduce(losses: Tensor, rows: Rows, masked: Tensor, reduction: str) -> Tensor:
    """losses: float64 (N,), unweighted."""
    if rows.overflow:
        return torch.full(masked.shape if reduction == "none" else (), torch.nan)
    weighted = losses * rows.weight
    if reduction == "none":
        return torch.zeros(masked.numel()).index_copy_(0, rows.index, weighted.float()).view(masked.shape)
    total = weighted.sum()
    if reduction == "mean" and len(losses):
        total = total / rows.weight.sum()
    return total.float()


def scale(rows: Rows, reduction: str, grad_loss: Tensor | None = None) -> Tensor:
    """float64 (N,): what multiplies the gradient of a row's unweighted loss."""
    s = rows.weight
    if reduction == "mean" and len(s):
        s = s / s.sum()
    if grad_loss is None:
        return s
    return s * (grad_loss.reshape(-1)[rows.index] if reduction == "none" else grad_loss).double()


class RowMath:
    """The row kernels with the options of a call."""

    def __init__(self, options: Options, vocab: int, bias: Tensor | None) -> None:
        self.options, self.allowed = options, vocab - len(options.forbid)
        self.forbid = torch.tensor(options.forbid, dtype=torch.int64)
        self.bias = None if bias is None else bias.float().contiguous()
        self.threads = torch.get_num_threads()

    def state(self, rows: int) -> Tensor:
        return torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0], dtype=torch.float64).repeat(rows, 1)

    def _common(self, first: int, count: int, targets: Tensor) -> tuple[int | float, ...]:
        bias = 0 if self.bias is None else self.bias[first:].data_ptr()
        forbid = self.forbid
        return (first, count, bias, self.options.softcap or 0.0, targets.data_ptr(), forbid.data_ptr(), len(forbid))

    def stats(self, logits: Tensor, first: int, targets: Tensor, state: Tensor, row_index: Tensor | None = None) -> None:
        """Adds the columns (rows, count) of the ids from `first` on to the state."""
        index = 0 if row_index is None else row_index.data_ptr()
        args = (logits.data_ptr(), dtype_code(logits), len(targets), logits.stride(0), index)
        common = self._common(first, logits.shape[1], targets)
        want_total = int(self.options.label_smoothing > 0)
        check("masked_loss", native().masked_loss_stats(*args, *common, want_total, state.data_ptr(), self.threads))

    def losses(self, state: Tensor) -> Tensor:
        """float64 (rows,), unweighted."""
        high, total, at_target, sum_z = state.unbind(1)
        smoothing, z_loss = self.options.label_smoothing, self.options.z_loss
        losses = total.log() + (1 - smoothing) * (high - at_target)
        if smoothing:
            losses = losses + smoothing * (high - sum_z / self.allowed)
        return losses + z_loss * (high + total.log()) ** 2 if z_loss else losses

    def coefficients(self, high: Tensor, total: Tensor, scale: Tensor) -> Tensor:
        """Those of masked_loss_dlogits, (rows, 4) float32."""
        smoothing = self.options.label_smoothing
        factor = scale * (1 + 2 * self.options.z_loss * (high + total.log())) / total
        uniform, at_target = scale * (smoothing / self.allowed), scale * (1 - smoothing)
        return torch.stack((high, factor, uniform, at_target), 1).float().contiguous()

    def dlogits(
        self, logits: Tensor, out: Tensor, first: int, targets: Tensor, coefficients: Tensor, row_index: Tensor | None = None
    ) -> None:
        """Writes the gradient of the columns of the ids from `first` on; out may be logits."""
        index = 0 if row_index is None else row_index.data_ptr()
        args = (logits.data_ptr(), logits.stride(0), out.data_ptr(), out.stride(0), dtype_code(out), len(targets), index)
        common = self._common(first, logits.shape[1], targets)
        check("masked_loss", native().masked_loss_dlogits(*args, *common, coefficients.data_ptr(), self.threads))


def dtype_code(x: Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[x.dtype]


def head_slices(head_weight: Tensor, ids: int) -> Iterator[tuple[int, Tensor]]:
    """(first id, (ids, D) float32): views, or one buffer filled in turn."""
    vocab, width = head_weight.shape
    buffer = None if head_weight.dtype == torch.float32 else torch.empty(min(ids, vocab), width)
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
    hidden: Tensor, head_weight: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None, head_bias: Tensor | None,
    options: Options, budget: int | None, needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = plan(hidden, head_weight, masked, options.reduction, options.max_masked, budget, needs)
    shapes = kept_shapes(hidden, head_weight, masked, options.reduction, options.max_masked, budget, needs)
    kept = (torch.empty(shapes[0]), torch.empty(shapes[1]), torch.empty(shapes[2]))
    rows = masked_rows(targets, masked, weight, options.max_masked)
    count = len(rows.index)
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
    d = kept[: len(rows.index)]
    state = _logits(gather(hidden, rows), head_weight, rows, math, p.slice, d)
    coefficients = math.coefficients(state[:, 0], state[:, 1], scale(rows, math.options.reduction))
    math.dlogits(d, d, 0, rows.targets, coefficients)
    return math.losses(state)


def _forward_row_chunks(
    hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, p: Plan, kept: Kept, needs: Needs
) -> Tensor:
    """kept become d(loss) / d(hidden), d(head_weight), d(head_bias)."""
    count, scales = len(rows.index), scale(rows, math.options.reduction)
    d_hidden, d_weight, d_bias = kept
    d_hidden.zero_()
    if count == 0:
        d_weight.zero_(), d_bias.zero_()
    losses = torch.empty(count, dtype=torch.float64)
    step = even_chunks(count, p.chunk)
    logits = torch.empty(min(step, count), head_weight.shape[0])
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
            d_hidden.view(-1, x.shape[1]).index_copy_(0, part.index, dx)
    return losses


def even_chunks(count: int, most: int) -> int:
    """Rows per chunk for the fewest chunks of at most `most`, all about alike, in steps of 8 where that fits."""
    chunks = max(1, -(-count // most))
    even = -(-count // chunks)
    return max(1, min(most, -(-even // 8) * 8))


def _forward_slices(hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, p: Plan, kept: Tensor) -> Tensor:
    """kept[:N], where there are to be gradients, becomes the max and the sum of exponentials of each row."""
    x, state = gather(hidden, rows), math.state(len(rows.index))
    buffer = torch.empty(len(x) * p.slice)
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
        grads[0].zero_().view(-1, hidden.shape[-1]).index_copy_(0, rows.index, d_hidden.to(hidden.dtype))
    return grads[0], grads[1], grads[2]


def _backward_products(
    grad_loss: Tensor, hidden: Tensor, head_weight: Tensor, rows: Rows, math: RowMath, kept: Tensor, p: Plan,
    grads: list[Tensor], needs: Needs,
) -> Tensor:  # fmt: skip
    """Fills the gradients of the head; returns that of the masked rows, (N, D) float32.

    One chunk: kept is d(loss) / d(logits) for an upstream gradient of 1, so that of a row multiplies that row of x and dx.
    """
    x = gather(hidden, rows)
    count, width = x.shape
    dx = torch.empty(count if needs[0] else 0, width)
    one_chunk = p.mode == "one_chunk"
    upstream = grad_loss.reshape(-1)[rows.index] if math.options.reduction == "none" else grad_loss.expand(count)
    if one_chunk:
        x *= upstream[:, None]
    else:
        high, total = kept[:count].double().unbind(1)
        coefficients = math.coefficients(high, total, scale(rows, math.options.reduction, grad_loss))
        buffer = torch.empty(count * p.slice)
    d_weight = None if head_weight.dtype == torch.float32 else torch.empty(p.slice if needs[1] else 0, width)
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


# ---- from logits -------------------------------------------------------------------------------------------------


def rows_kept_shape(masked: Tensor) -> tuple[int, ...]:
    return (masked.numel(), 2)


def rows_forward(
    logits: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    rows = masked_rows(targets, masked, weight, options.max_masked)
    math = RowMath(options, logits.shape[-1], None)
    flat, index = _flat_rows(logits, rows)
    state = math.state(len(rows.index))
    math.stats(flat, 0, rows.targets, state, index)
    kept = torch.zeros(rows_kept_shape(masked))
    kept[: len(state)] = state[:, :2]
    return reduce(math.losses(state), rows, masked, options.reduction), kept


def rows_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None, kept: Tensor, options: Options
) -> Tensor:
    rows = masked_rows(targets, masked, weight, options.max_masked)
    if rows.overflow:
        return torch.full(logits.shape, torch.nan, dtype=logits.dtype)
    math = RowMath(options, logits.shape[-1], None)
    flat, index = _flat_rows(logits, rows)
    high, total = kept[: len(rows.index)].double().unbind(1)
    coefficients = math.coefficients(high, total, scale(rows, options.reduction, grad_loss))
    if index is None:  # the masked rows were copied
        out = torch.zeros(logits.shape, dtype=logits.dtype).view(-1, logits.shape[-1])
        math.dlogits(flat, flat, 0, rows.targets, coefficients)
        return out.index_copy_(0, rows.index, flat).view(logits.shape)
    out = torch.zeros(logits.shape, dtype=logits.dtype)
    math.dlogits(flat, out.view(-1, logits.shape[-1]), 0, rows.targets, coefficients, index)
    return out


def _flat_rows(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """(all rows (R, V), which are masked), or (a copy of the masked rows, None) where no view of all rows exists."""
    x = logits[None] if logits.dim() == 1 else logits
    try:
        return x.view(-1, x.shape[-1]), rows.index
    except RuntimeError:
        return x[rows.where], None
