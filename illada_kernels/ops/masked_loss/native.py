"""Calls the compiled extension: the row kernels of masked_loss on the CPU, and masked_loss_from_logits there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._dispatch import check, extension_reason, native


class Options(NamedTuple):
    reduction: str
    softcap: float | None
    label_smoothing: float
    z_loss: float
    forbid: tuple[int, ...]
    max_masked: int | None


def cpu_reason() -> str | None:
    return extension_reason()


# ---- the masked rows, compacted ------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The masked rows of a call, compacted, in order."""

    where: tuple[Tensor, ...]  # index into the leading dimensions
    flat: Tensor  # the same index, flat, (N,)
    targets: Tensor  # (N,)
    weight: Tensor  # (N,) float64
    overflow: bool  # more than max_masked

    def chunk(self, start: int, stop: int) -> Rows:
        where = tuple(i[start:stop] for i in self.where)
        return Rows(where, self.flat[start:stop], self.targets[start:stop], self.weight[start:stop], self.overflow)


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
        return torch.full(masked.shape if reduction == "none" else (), torch.nan, dtype=torch.float32)
    weighted = losses * rows.weight
    if reduction == "none":
        zeros = torch.zeros(masked.numel(), dtype=torch.float32)
        return zeros.index_copy_(0, rows.flat, weighted.float()).view(masked.shape)
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
    return s * (grad_loss.reshape(-1)[rows.flat] if reduction == "none" else grad_loss).double()


# ---- row kernels on the CPU ----------------------------------------------------------------------------------------


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

    def stats(
        self, logits: Tensor, first: int, targets: Tensor, state: Tensor, row_index: Tensor | None = None
    ) -> None:
        """Adds the columns (rows, count) of the ids from `first` on to the state."""
        index = 0 if row_index is None else row_index.data_ptr()
        args = (logits.data_ptr(), dtype_code(logits), len(targets), logits.stride(0), index)
        common = self._common(first, logits.shape[1], targets)
        want_total = int(self.options.label_smoothing > 0)
        check("masked_loss", native().masked_loss_stats_cpu(*args, *common, want_total, state.data_ptr(), self.threads))

    def losses(self, state: Tensor) -> Tensor:
        """float64 (rows,), unweighted."""
        high, total, at_target, sum_z = state.unbind(1)
        smoothing, z_loss = self.options.label_smoothing, self.options.z_loss
        losses = total.log() + (1 - smoothing) * (high - at_target)
        if smoothing:
            losses = losses + smoothing * (high - sum_z / self.allowed)
        return losses + z_loss * (high + total.log()) ** 2 if z_loss else losses

    def coefficients(self, high: Tensor, total: Tensor, scale: Tensor) -> Tensor:
        """Those of masked_loss_dlogits_cpu, (rows, 4) float32."""
        smoothing = self.options.label_smoothing
        factor = scale * (1 + 2 * self.options.z_loss * (high + total.log())) / total
        uniform, at_target = scale * (smoothing / self.allowed), scale * (1 - smoothing)
        return torch.stack((high, factor, uniform, at_target), 1).float().contiguous()

    def dlogits(
        self,
        logits: Tensor,
        out: Tensor,
        first: int,
        targets: Tensor,
        coefficients: Tensor,
        row_index: Tensor | None = None,
    ) -> None:
        """Writes the gradient of the columns of the ids from `first` on; out may be logits."""
        index = 0 if row_index is None else row_index.data_ptr()
        args = (
            logits.data_ptr(),
            logits.stride(0),
            out.data_ptr(),
            out.stride(0),
            dtype_code(out),
            len(targets),
            index,
        )
        common = self._common(first, logits.shape[1], targets)
        check("masked_loss", native().masked_loss_dlogits_cpu(*args, *common, coefficients.data_ptr(), self.threads))


def dtype_code(x: Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[x.dtype]


# ---- masked_loss_from_logits -----------------------------------------------------------------------------------------


def rows_kept_shape(masked: Tensor) -> tuple[int, ...]:
    return (masked.numel(), 2)


def rows_forward(
    logits: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(loss, kept): the max and the sum of exponentials of each masked row; on the CPU those rows come first."""
    rows = masked_rows(targets, masked, weight, options.max_masked)
    math = RowMath(options, logits.shape[-1], None)
    flat, index = _flat_rows(logits, rows)
    state = math.state(len(rows.flat))
    math.stats(flat, 0, rows.targets, state, index)
    kept = torch.zeros(rows_kept_shape(masked), dtype=torch.float32)
    kept[: len(state)] = state[:, :2]
    return reduce(math.losses(state), rows, masked, options.reduction), kept


def rows_backward(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    kept: Tensor,
    options: Options,
) -> Tensor:
    """The gradient of the logits, in their dtype, contiguous."""
    rows = masked_rows(targets, masked, weight, options.max_masked)
    if rows.overflow:
        return torch.full(logits.shape, torch.nan, dtype=logits.dtype)
    math = RowMath(options, logits.shape[-1], None)
    flat, index = _flat_rows(logits, rows)
    high, total = kept[: len(rows.flat)].double().unbind(1)
    coefficients = math.coefficients(high, total, scale(rows, options.reduction, grad_loss))
    if index is None:  # the masked rows were copied
        out = torch.zeros(logits.shape, dtype=logits.dtype).view(-1, logits.shape[-1])
        math.dlogits(flat, flat, 0, rows.targets, coefficients)
        return out.index_copy_(0, rows.flat, flat).view(logits.shape)
    out = torch.zeros(logits.shape, dtype=logits.dtype)
    math.dlogits(flat, out.view(-1, logits.shape[-1]), 0, rows.targets, coefficients, index)
    return out


def _flat_rows(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """(all rows (R, V), which are masked), or (a copy of the masked rows, None) where no view of all rows exists."""
    x = logits[None] if logits.dim() == 1 else logits
    try:
        return x.view(-1, x.shape[-1]), rows.flat
    except RuntimeError:
        return x[rows.where], None
