"""Runs masked_loss in Triton: checks what the row kernels take, and imports them, and Triton, at the first call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...._gpu import triton_reason
from .. import gpu
from ..problem import Problem, Results, no_float64
from ..row_kernels import RowKernels

available, supports, kept = triton_reason, no_float64, gpu.kept


def kernels() -> RowKernels:
    from .row_kernels import KERNELS

    return KERNELS


def forward(problem: Problem) -> Results:
    return gpu.forward(kernels(), problem)


def direct(problem: Problem) -> Results:
    """Runs `forward`, but saves only rows that are masked now, not the full capacity."""
    return gpu.forward(kernels(), problem, trim=True)


def backward(
    problem: Problem, grad_loss: Tensor, *kept: Tensor, needs: Sequence[bool] = (True, True, True)
) -> Sequence[Tensor | None]:
    return gpu.backward(kernels(), problem, grad_loss, (kept[0], kept[1], kept[2]), needs)
