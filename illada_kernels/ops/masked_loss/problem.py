"""The validated call of masked_loss and masked_loss_from_logits: what the operator's schema is made of, and what every
backend takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor, Tensor]  # the loss, and three tensors kept for the backward


class Problem(NamedTuple):
    hidden: Tensor  # (..., D); the logits (..., V) where head_weight is None
    head_weight: Tensor | None  # (V, D), or with a group this rank's rows of it
    targets: Tensor  # (...) int64
    masked: Tensor  # (...) bool
    weight: Tensor | None = None  # (...) float32; None: 1
    head_bias: Tensor | None = None  # (V,)
    reduction: str = "sum"
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    forbid: Sequence[int] = ()  # ids, in any order, perhaps repeated
    max_masked: int | None = None
    memory_budget: int | None = None
    needs: Sequence[bool] = (False, False, False)  # which gradients there may be: of hidden, head_weight, head_bias
    group: str = ""  # the process group whose ranks share the vocab (illada_kernels.distributed); "": not shared
    vocab_start: int = 0  # the id of the first row of head_weight and head_bias, which are this rank's
    vocab_size: int = 0  # ids of all ranks
    backend: str = ""

    @property
    def op(self) -> str:
        return "masked_loss_from_logits" if self.head_weight is None else "masked_loss"

    @property
    def vocab(self) -> int:
        """Returns the number of ids; with a group that of all ranks."""
        return self.vocab_size if self.group else self.width

    @property
    def width(self) -> int:
        """Returns the number of ids whose logits are computed here."""
        return self.hidden.shape[-1] if self.head_weight is None else self.head_weight.shape[0]

    @property
    def capacity(self) -> int:
        """Returns the number of rows that may be masked."""
        rows = self.masked.numel()
        return rows if self.max_masked is None else min(self.max_masked, rows)

    @property
    def allowed(self) -> int:
        """Returns the number of ids that are not forbidden."""
        return self.vocab - len(set(self.forbid))

    def forbidden(self) -> tuple[int, ...]:
        """Returns the forbidden ids, ascending and without repetition."""
        return tuple(sorted(set(self.forbid)))

    def empty_loss(self) -> Tensor:
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        return self.hidden.new_empty(self.masked.shape if self.reduction == "none" else (), dtype=dtype)


def no_float64(problem: Problem) -> str | None:
    """Returns why a compiled backend cannot take the problem."""
    return "float64 runs on the reference only" if problem.hidden.dtype == torch.float64 else None


def bad_target(target: int, row: int, problem: Problem) -> ValueError:
    return ValueError(
        f"targets: expected ids in [0, {problem.vocab}) at masked rows, got {target} at row {row} of "
        f"{problem.masked.numel()}"
    )


def empty_grads(problem: Problem, needs: Sequence[bool]) -> list[Tensor | None]:
    """Returns an uninitialised gradient for each tensor that needs one."""
    tensors = (problem.hidden, problem.head_weight, problem.head_bias)
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need and x is not None else None
        for x, need in zip(tensors, needs)
    ]
