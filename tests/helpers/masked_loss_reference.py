"""The reference of masked_loss with the arguments of the public functions, differentiable by autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from illada_kernels.ops.masked_loss import reference
from illada_kernels.ops.masked_loss.problem import Problem


class Options(NamedTuple):
    """The fields of a Problem that say which loss."""

    reduction: str = "sum"
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    forbid: tuple[int, ...] = ()
    max_masked: int | None = None


def masked_loss(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    return reference.forward(Problem(hidden, head_weight, targets, masked, weight, **options))[0]


def masked_loss_from_logits(
    logits: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    return reference.forward(Problem(logits, None, targets, masked, weight, **options))[0]
