"""The masked rows of a call on the CPU, and what csrc/cpu/masked_loss.cpp computes of each."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..._extension import DTYPES, check, native
from .problem import Problem, bad_target


class Rows:
    """The N masked rows, compacted, in order; or a chunk of them.

    Attributes
    ----------
    count : N.
    where : index of the rows into the leading dimensions, a tensor each; `flat` is the same as one number.
    targets : int64 (N,).
    weight : float64 (N,).
    allowed : the number of ids that are not forbidden.
    denominator : float64, the sum of all weights, under "mean"; else None.
    overflow : there are more than max_masked. Nothing else is meaningful then.
    state : float64 (N, 4), max of z, sum of exp(z - max), z at the target, sum of z over allowed ids; of no id yet.
    """

    def __init__(self, problem: Problem, vocab: int) -> None:
        """Raises ValueError if a target is not an id. vocab: the head's rows here."""
        vocab = problem.vocab_size or vocab
        self.problem, self.extension, self.threads = problem, native(), torch.get_num_threads()
        lead = (1,) if problem.masked.dim() == 0 else problem.masked.shape
        masked, targets = problem.masked.view(lead), problem.targets.view(lead)
        self.where = masked.nonzero(as_tuple=True)
        self.flat = self.where[0] if masked.dim() == 1 else masked.reshape(-1).nonzero().squeeze(1)
        self.targets = targets[self.where]
        self.count = len(self.targets)
        forbidden = problem.forbidden() if problem.forbid else ()
        if self.count and not (self.targets.amin() >= 0 and self.targets.amax() < vocab):
            wrong = int(((self.targets < 0) | (self.targets >= vocab)).nonzero()[0])
            raise bad_target(int(self.targets[wrong]), int(self.flat[wrong]), problem)
        if problem.weight is None:
            self.weight = torch.ones(self.count, dtype=torch.float64)
        else:
            self.weight = problem.weight.view(lead)[self.where].double()
        self.denominator = self.weight.sum() if problem.reduction == "mean" and self.count else None
        self.overflow = problem.max_masked is not None and self.count > problem.max_masked
        self.allowed = vocab - len(forbidden)
        self.forbid = torch.tensor(forbidden, dtype=torch.int64) if forbidden else None
        self.bias = None if problem.head_bias is None else problem.head_bias.float().contiguous()
        self.state = torch.zeros(self.count, 4, dtype=torch.float64)
        self.state[:, 0::2] = -torch.inf

    def chunk(self, start: int, stop: int) -> Rows:
        part = copy.copy(self)
        part.where = tuple(i[start:stop] for i in self.where)
        split = (self.flat, self.targets, self.weight, self.state)
        part.flat, part.targets, part.weight, part.state = (x[start:stop] for x in split)
        part.count = len(part.targets)
        return part

    def stats(self, logits: Tensor, first: int, index: Tensor | None = None) -> None:
        """Adds the columns of logits, of the head's rows from `first` on, to the state.

        logits: (N, ids); with `index` (R, ids), of which row index[i] belongs to row i.
        """
        code = self.extension.masked_loss_stats_cpu(
            logits.data_ptr(),
            DTYPES[logits.dtype],
            self.count,
            logits.stride(0),
            0 if index is None else index.data_ptr(),
            *self._columns(logits, first),
            int(self.problem.label_smoothing > 0),
            self.state.data_ptr(),
            self.threads,
        )
        if code:
            check("masked_loss", code)

    def coefficients(self, state: Tensor, grad_loss: Tensor | None = None) -> Tensor:
        """Returns what `dlogits` takes: max, factor of exp(z - max), subtrahend of each allowed id, and of the target.

        (N, 4) float32. grad_loss: the upstream gradient, a scalar or one of each of the R rows; None: 1.
        """
        high, total = state.unbind(1)[:2]
        smoothing, z_loss = self.problem.label_smoothing, self.problem.z_loss
        scale = self.weight if self.denominator is None else self.weight / self.denominator
        if grad_loss is not None:
            scale = scale * self.upstream(grad_loss).double()
        factor = (scale * (1 + 2 * z_loss * (high + total.log())) if z_loss else scale) / total
        return torch.stack((high, factor, scale * (smoothing / self.allowed), scale * (1 - smoothing)), 1).float()

    def dlogits(
        self,
        logits: Tensor,
        out: Tensor,
        first: int,
        coefficients: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        """Writes the gradient of the columns, of the head's rows from `first` on; out may be logits. coefficients:
        those of the state and an upstream gradient of 1 if None."""
        coefficients = self.coefficients(self.state) if coefficients is None else coefficients
        code = self.extension.masked_loss_dlogits_cpu(
            logits.data_ptr(),
            logits.stride(0),
            out.data_ptr(),
            out.stride(0),
            DTYPES[out.dtype],
            self.count,
            0 if index is None else index.data_ptr(),
            *self._columns(logits, first),
            coefficients.data_ptr(),
            self.threads,
        )
        if code:
            check("masked_loss", code)

    def loss(self) -> Tensor:
        """Returns the reduced loss, float32; NaN if there are too many rows."""
        masked, none = self.problem.masked, self.problem.reduction == "none"
        if self.overflow:
            return torch.full(masked.shape if none else (), torch.nan, dtype=torch.float32)
        high, total, at_target, sum_z = self.state.unbind(1)
        smoothing, z_loss = self.problem.label_smoothing, self.problem.z_loss
        log_total = total.log()
        losses = log_total + (1 - smoothing) * (high - at_target)
        if smoothing:
            losses = losses + smoothing * (high - sum_z / self.allowed)
        losses = (losses + z_loss * (high + log_total) ** 2 if z_loss else losses) * self.weight
        if none:
            zeros = torch.zeros(masked.numel(), dtype=torch.float32)
            return zeros.index_copy_(0, self.flat, losses.float()).view(masked.shape)
        return (losses.sum() if self.denominator is None else losses.sum() / self.denominator).float()

    def upstream(self, grad_loss: Tensor) -> Tensor:
        """Returns the upstream gradient of each row, (N,)."""
        if self.problem.reduction == "none":
            return grad_loss.reshape(-1)[self.flat]
        return grad_loss.expand(self.count)

    def _columns(self, logits: Tensor, first: int) -> tuple[int | float, ...]:
        bias = 0 if self.bias is None else self.bias[first:].data_ptr()
        forbid = (0, 0) if self.forbid is None else (self.forbid.data_ptr(), len(self.forbid))
        return (
            self.problem.vocab_start + first,
            logits.shape[1],
            bias,
            self.problem.softcap or 0.0,
            self.targets.data_ptr(),
            *forbid,
        )
