"""masked_loss in Triton: which calls it takes, and the way to its row kernels.

Those are imported at the first call: this module does without Triton.
"""

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
    """As forward, but keeps only as much as the rows need that are masked now."""
    return gpu.forward(kernels(), problem, trim=True)


def backward(
    problem: Problem, grad_loss: Tensor, *kept: Tensor, needs: Sequence[bool] = (True, True, True)
) -> Sequence[Tensor | None]:
    return gpu.backward(kernels(), problem, grad_loss, (kept[0], kept[1], kept[2]), needs)
