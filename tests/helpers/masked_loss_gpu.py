"""masked_loss as a GPU runs it, on a CPU: the CUDA kernels emulated, a budget for each mode, what holds in all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from illada_kernels.ops.masked_loss import gpu
from illada_kernels.ops.masked_loss.cuda import CudaRows
from illada_kernels.ops.masked_loss.problem import Problem
from illada_kernels.ops.masked_loss.row_kernels import RowKernels
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import missing
from tests.helpers import masked_loss_contract as contract
from tests.helpers.masked_loss_calls import wanted
from tests.helpers.masked_loss_reference import Options

MODES = ("one_chunk", "row_chunks", "slices")


emulated = pytest.mark.skipif(missing() is not None, reason=str(missing()))
Use = Callable[[RowKernels], None]


def cuda_rows(seed: int = 0) -> CudaRows:
    """The CUDA kernels, with shared memory for the first ten vectors of a row."""
    launch = Emulated("csrc/cuda/masked_loss_rows.cu", "csrc/cuda/masked_loss_compact.cu", seed=seed)
    return CudaRows(launch, lambda device: 128 + 160)


def budget_for(mode: str, hidden: Tensor, head_weight: Tensor, rows: int) -> int | None:
    """A budget that leaves this mode, with chunks of 8 rows or the smallest slices."""
    vocab, width = head_weight.shape
    if mode == "row_chunks":
        least = rows * (gpu.ROW_BYTES + 4 * width) + 4 * vocab * width
        return least + 8 * head_weight.element_size() * (vocab + width)
    return None if mode == "one_chunk" else 1


def from_logits(
    kernels: RowKernels, args: tuple[Tensor, ...], options: Options, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the loss and the gradient of the logits."""
    logits, targets, masked, weight = args
    problem = Problem(logits, None, targets, masked, weight, None, *options)
    loss, *kept = gpu.forward(kernels, problem)
    gradient = gpu.backward(kernels, problem, upstream, (kept[0], kept[1], kept[2]), (True, False, False))[0]
    assert gradient is not None
    return loss, gradient


def mode_of(args: tuple[Tensor, ...], budget: int | None, reduction: str = "sum") -> str:
    hidden, head_weight, _, masked, _ = args
    return gpu.plan(wanted(hidden, head_weight, masked, reduction, budget)).mode


SEMANTICS: dict[str, Callable[..., None]] = {
    "nan in unmasked rows": contract.nan_in_unmasked_rows_never_reaches_loss_or_gradients,
    "a forbidden target": contract.a_forbidden_target_has_infinite_loss_and_finite_gradients,
    "a second derivative": contract.a_second_derivative_raises,
    "no masked rows": contract.no_masked_rows_give_zero_loss_and_zero_gradients,
    "overflow": contract.more_masked_rows_than_the_capacity_make_everything_nan,
}


def check_semantics(name: str, budget: int | None) -> None:
    for reduction in ("sum", "mean", "none") if name in ("no masked rows", "overflow") else (None,):
        SEMANTICS[name]("cuda", budget, *([reduction] if reduction else []))
