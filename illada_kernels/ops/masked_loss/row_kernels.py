"""What a GPU backend of masked_loss implements: the row operations between the large products (gpu.py).

All of them enqueue on the current stream, never synchronise, read no device value on the host, and give equal bits for
equal inputs. Offsets are 64-bit. `cuda.py` implements them in CUDA, triton/row_kernels.py in Triton, and the tests'
helpers in plain torch.

A row is *live* if its place among the masked rows is below their number on the device, info[0]. Rows behind that number
are fillers: no operation reads their data, those that write rows write zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """N masked rows of the R rows of a call, compacted, in order; or a chunk of them."""

    index: Tensor  # (N,) int32: place among the R rows, ascending; 0 for fillers
    targets: Tensor  # (N,) int64; 0 for fillers
    scale: Tensor  # (N,) float32: d(loss) / d(unweighted loss of the row); 0 for fillers, all NaN on overflow
    slot: Tensor  # (R,) int32: place among the masked rows, -1 where not masked
    info: Tensor  # (2,) int32: number of masked rows; the first of the R whose target is no id, or -1
    capacity: int  # masked rows there may be; overflow is info[0] > capacity
    start: int = 0  # place of the first row held here: row i is live if start + i < info[0]

    def chunk(self, start: int, stop: int) -> Rows:
        index, targets, scale = (x[start:stop] for x in (self.index, self.targets, self.scale))
        return replace(self, index=index, targets=targets, scale=scale, start=self.start + start)


class Formula(NamedTuple):
    """z = softcap * tanh((logit + bias) / softcap), -inf at forbidden ids, and the terms of the loss."""

    vocab: int  # of the whole head, also where a call sees a slice of it
    bias: Tensor | None  # (vocab,) float32
    softcap: float  # 0: none
    label_smoothing: float
    z_loss: float
    forbid: Tensor | None  # ascending ids, int64, on the device


# What `factors` gives. power = min(1, 2^floor(log2(scale))) is exact to multiply by; scale / power is for the gradients
# of logits that are kept in half precision: weights below 1, as "mean" has them, would push those under its range.
SCALE_TIMES_GRAD, SCALE_OVER_POWER, POWER_TIMES_GRAD = 0, 1, 2


class RowKernels(Protocol):
    """x, d_hidden, logits: float32, bfloat16, float16. Tensors that a method writes are contiguous; so are all
    one-dimensional ones, and logits except where they are read by slot."""

    def compact(
        self, masked: Tensor, targets: Tensor, weight: Tensor | None, vocab: int, mean: bool, capacity: int
    ) -> Rows:
        """The masked rows. Tensors of any leading dimensions and strides; weight float32, None: 1. scale is the weight,
        divided by the sum of the masked rows' weights (float64, fixed order) if `mean`."""

    def gather(self, x: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        """out (n, D), x's dtype or float32 = x[index], times factors (n,) float32 if given, rounded once; zeros for
        fillers. x: (..., D), R rows of any strides, the last dimension contiguous."""

    def scatter(self, dx: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        """out (R, D), any dtype: row r = dx[slot[r]], times factors[slot[r]] if given, rounded once; zeros where not
        masked. NaN everywhere on overflow. dx: (N, D) float32 of all rows (start 0)."""

    def factors(self, rows: Rows, what: int, grad_loss: Tensor | None, out: Tensor) -> None:
        """out (n,) float32: scale * g, scale / power or power * g; 0 for fillers. g is the upstream gradient, float32:
        a scalar, or of each of the R rows (then g[index]; those of unmasked rows are never read)."""

    def stats(
        self, logits: Tensor, first: int, rows: Rows, state: Tensor, formula: Formula, by_slot: bool = False
    ) -> None:
        """Adds the columns of logits, the ids first .. first + width, to state (n, 4) float32: max of z, sum of
        exp(z - max), z at the target, sum of z over allowed ids (only with label smoothing). first = 0 begins anew;
        slices come in ascending order. Fillers are left alone.

        logits: (n, width), row i that of rows.index[i]. by_slot: (..., V), all R rows of any strides; row r belongs to
        state[slot[r]]; unmasked rows are not read. A NaN makes the sum NaN; a row of -inf has sum 0, or NaN."""

    def dlogits(
        self,
        logits: Tensor,
        out: Tensor,
        first: int,
        rows: Rows,
        state: Tensor,
        scale: Tensor,
        formula: Formula,
        by_slot: bool = False,
    ) -> None:
        """out = scale ((1 + 2 z_loss lse) exp(z - lse) - e / allowed - [target] (1 - e)) dz/dlogit, e the label
        smoothing, lse of the whole row from `state`; 0 at forbidden ids and for fillers. A row whose scale is NaN or
        whose target is no id is NaN throughout. out has logits' dtype and may be logits. scale: (n,) float32.

        by_slot: out is (R, V), contiguous; unmasked rows are zeros, and all rows NaN on overflow."""

    def gradients(self, logits: Tensor, rows: Rows, state: Tensor, scale: Tensor, formula: Formula) -> None:
        """stats and then dlogits in place, of whole rows (n, V), in one pass over memory."""

    def losses(self, state: Tensor, rows: Rows, formula: Formula, out: Tensor) -> None:
        """out float32, of scale * loss of the rows, start 0: scalar, their sum in a fixed order, at least compensated;
        or (R,), 0 where not masked. A target that is no id makes its row NaN, overflow everything."""


def row_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, inner, outer_stride, stride): row r of the flattened leading dimensions of x starts at element
    r // inner * outer_stride + r % inner * stride. Copies x only where its rows need three strides or more."""
    dims: list[tuple[int, int]] = []  # (size, stride), outermost first, neighbours merged
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return row_strides(x.contiguous())
    if len(dims) == 2:
        return x, dims[1][0], dims[0][1], dims[1][1]
    return x, max(x.shape[:-1].numel(), 1), 0, dims[0][1] if dims else x.shape[-1]


def rows_of(rows: int, of: int, capacity: int, device: torch.device) -> Rows:
    """Uninitialised: what `compact` fills. `of` is R."""
    return Rows(
        index=torch.empty(rows, dtype=torch.int32, device=device),
        targets=torch.empty(rows, dtype=torch.int64, device=device),
        scale=torch.empty(rows, dtype=torch.float32, device=device),
        slot=torch.empty(of, dtype=torch.int32, device=device),
        info=torch.empty(2, dtype=torch.int32, device=device),
        capacity=capacity,
    )
