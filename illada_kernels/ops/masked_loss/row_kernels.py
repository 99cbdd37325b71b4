"""Declares what a GPU backend of masked_loss implements: the row operations between the matmuls (gpu.py).

Each operation enqueues on the current stream, never synchronises, reads no device value on the host, and gives equal
bits for equal inputs. Offsets are 64-bit. cuda.py implements them in CUDA, triton/row_kernels.py in Triton, the tests'
helpers in plain torch.

A row is *live* if its place among the masked rows is below info[0], their number on the device. Later rows are fillers:
no operation reads their data; operations that write rows write zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The N masked rows of a call's R rows, compacted, in order; or a chunk of them."""

    index: Tensor  # (N,) int32: place among the R rows, ascending; 0 for fillers
    targets: Tensor  # (N,) int64; 0 for fillers
    scale: Tensor  # (N,) float32: d(loss) / d(unweighted loss of the row); 0 for fillers, all NaN on overflow
    slot: Tensor  # (R,) int32: place among the masked rows, -1 where not masked
    info: Tensor  # (2,) int32: number of masked rows; the first of the R whose target is not an id, or -1
    capacity: int  # masked rows there may be; overflow is info[0] > capacity
    start: int = 0  # place of the first row held here: row i is live if start + i < info[0]

    def chunk(self, start: int, stop: int) -> Rows:
        index, targets, scale = (x[start:stop] for x in (self.index, self.targets, self.scale))
        return replace(self, index=index, targets=targets, scale=scale, start=self.start + start)


class Formula(NamedTuple):
    """z = softcap * tanh((logit + bias) / softcap), -inf at forbidden ids, and the terms of the loss."""

    vocab: int  # of the whole head, also if the call passes a slice of it
    bias: Tensor | None  # (vocab,) float32
    softcap: float  # 0: none
    label_smoothing: float
    z_loss: float
    forbid: Tensor | None  # ascending ids, int64, on the device


# What `factors` computes. power = min(1, 2^floor(log2(scale))), an exact factor. Half-precision gradients of logits are
# multiplied by scale / power only, because weights below 1, as under "mean", would make them underflow.
SCALE_TIMES_GRAD, SCALE_OVER_POWER, POWER_TIMES_GRAD = 0, 1, 2


class RowKernels(Protocol):
    """x, d_hidden and logits are float32, bfloat16 or float16. All outputs, all one-dimensional tensors, and logits
    unless `by_slot`, are contiguous."""

    def compact(
        self, masked: Tensor, targets: Tensor, weight: Tensor | None, vocab: int, mean: bool, capacity: int
    ) -> Rows:
        """Returns the masked rows. The tensors have any leading dimensions and strides; weight is float32, None: 1.

        scale is the weight; under `mean` it is divided by the sum of masked rows' weights (float64, fixed order)."""

    def gather(self, x: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        """Computes out = x[index] * factors, rounded once; zeros for fillers.

        out: (n, D), x's dtype or float32. factors: (n,) float32, None: 1. x: (..., D), R rows of any strides, the last
        dimension contiguous."""

    def scatter(self, dx: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        """Computes out[r] = dx[slot[r]] * factors[slot[r]], rounded once; zeros where not masked, NaN everywhere on
        overflow.

        out: (R, D), any dtype. dx: (N, D) float32 of all rows (start 0)."""

    def factors(self, rows: Rows, what: int, grad_loss: Tensor | None, out: Tensor) -> None:
        """Computes out (n,) float32: scale * g, scale / power or power * g; 0 for fillers.

        g is the upstream gradient, float32: a scalar, or one for each of the R rows, of which unmasked rows are never
        read."""

    def stats(
        self, logits: Tensor, first: int, rows: Rows, state: Tensor, formula: Formula, by_slot: bool = False
    ) -> None:
        """Adds the logits of ids first .. first + width to state (n, 4) float32: max of z, sum of exp(z - max), z at
        the target, sum of z over allowed ids (only with label smoothing).

        first = 0 resets the state; slices come in ascending order. Leaves fillers alone. A NaN makes the sum NaN; a row
        of -inf has sum 0 or NaN.

        logits: (n, width); row i belongs to rows.index[i]. by_slot: (..., V), all R rows of any strides; row r belongs
        to state[slot[r]]; unmasked rows are not read."""

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
        """Computes out = scale ((1 + 2 z_loss lse) exp(z - lse) - e / allowed - [target] (1 - e)) dz/dlogit.

        e is the label smoothing; `state` gives the lse of the whole row. Zero at forbidden ids and for fillers. A row
        whose scale is NaN or whose target is not an id is NaN. out has logits' dtype and may be logits. scale: (n,)
        float32.

        by_slot: out is (R, V), contiguous; unmasked rows are zeros; all rows are NaN on overflow."""

    def gradients(self, logits: Tensor, rows: Rows, state: Tensor, scale: Tensor, formula: Formula) -> None:
        """Runs stats, then dlogits in place, on whole rows (n, V), in one pass over memory."""

    def losses(self, state: Tensor, rows: Rows, formula: Formula, out: Tensor) -> None:
        """Computes scale * loss of all rows (start 0).

        out: float32, a scalar, the sum in a fixed order, compensated or wider; or (R,), 0 where not masked. A target
        that is not an id makes its row NaN, overflow all rows."""


def rows_of(rows: int, of: int, capacity: int, device: torch.device) -> Rows:
    """Returns uninitialised Rows for `compact` to fill. of: R."""
    return Rows(
        index=torch.empty(rows, dtype=torch.int32, device=device),
        targets=torch.empty(rows, dtype=torch.int64, device=device),
        scale=torch.empty(rows, dtype=torch.float32, device=device),
        slot=torch.empty(of, dtype=torch.int32, device=device),
        info=torch.empty(2, dtype=torch.int32, device=device),
        capacity=capacity,
    )
