"""Implements masked_loss's row operations (row_kernels.py) by csrc/cuda/masked_loss_rows.cu and masked_loss_compact.cu.

`CudaRows` takes a function that launches an entry point by name, with tensors for pointers: _gpu.launch for the
extension, another for the same sources compiled otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._extension import DTYPES, extension_reason
from ..._gpu import cuda_reason, launch, row_strides, rows_reason
from . import gpu
from .problem import Problem, Results, no_float64
from .row_kernels import Formula, Rows, rows_of

Launch = Callable[..., None]  # (entry point, device, *arguments)


def available() -> str | None:
    if (reason := rows_reason()) is not None:
        return reason
    return extension_reason("masked_loss_compact_cuda") if cuda_reason() is None else None


supports, kept = no_float64, gpu.kept


def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory in which a block of `gradients` keeps its row: all that a block may have."""
    most: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return most


class CudaRows:
    def __init__(self, launch: Launch = launch, shared_memory: Callable[[torch.device], int] = shared_memory) -> None:
        self.launch, self.shared_memory = launch, shared_memory

    def compact(
        self, masked: Tensor, targets: Tensor, weight: Tensor | None, vocab: int, mean: bool, capacity: int
    ) -> Rows:
        total = masked.numel()
        rows = rows_of(capacity, total, capacity, masked.device)
        self.launch(
            "masked_loss_compact_cuda",
            masked.device,
            masked.contiguous(),
            targets.contiguous(),
            None if weight is None else weight.contiguous(),
            total,
            vocab,
            capacity,
            int(mean),
            rows.index,
            rows.targets,
            rows.scale,
            rows.slot,
            rows.info,
        )
        return rows

    def gather(self, x: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        x, inner, outer_stride, stride = row_strides(x)
        self.launch(
            "masked_loss_gather_cuda",
            x.device,
            x,
            DTYPES[x.dtype],
            inner,
            outer_stride,
            stride,
            rows.index,
            rows.info,
            rows.start,
            len(rows.index),
            out.shape[1],
            factors,
            out,
            DTYPES[out.dtype],
        )

    def scatter(self, dx: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        self.launch(
            "masked_loss_scatter_cuda",
            dx.device,
            dx,
            rows.slot,
            rows.info,
            rows.capacity,
            len(rows.slot),
            len(dx),
            out.shape[1],
            factors,
            out,
            DTYPES[out.dtype],
        )

    def factors(self, rows: Rows, what: int, grad_loss: Tensor | None, out: Tensor) -> None:
        per_row = grad_loss is not None and grad_loss.dim() > 0
        grad_loss = None if grad_loss is None else grad_loss.contiguous()
        self.launch(
            "masked_loss_factors_cuda",
            out.device,
            rows.scale,
            rows.index,
            rows.info,
            rows.start,
            len(rows.index),
            what,
            grad_loss,
            int(per_row),
            out,
        )

    def stats(
        self, logits: Tensor, first: int, rows: Rows, state: Tensor, formula: Formula, by_slot: bool = False
    ) -> None:
        width = logits.shape[-1]
        logits, *strides = row_strides(logits)
        self.launch(
            "masked_loss_rows_stats_cuda",
            logits.device,
            logits,
            DTYPES[logits.dtype],
            *strides,
            *_which(rows, by_slot),
            first,
            width,
            rows.targets,
            *_terms(formula),
            state,
        )

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
        width = logits.shape[-1]
        logits, *strides = row_strides(logits)
        self.launch(
            "masked_loss_rows_dlogits_cuda",
            logits.device,
            logits,
            DTYPES[logits.dtype],
            *strides,
            out,
            out.stride(0),
            *_which(rows, by_slot),
            rows.capacity,
            first,
            width,
            rows.targets,
            state,
            scale,
            *_terms(formula),
        )

    def gradients(self, logits: Tensor, rows: Rows, state: Tensor, scale: Tensor, formula: Formula) -> None:
        self.launch(
            "masked_loss_rows_gradients_cuda",
            logits.device,
            logits,
            DTYPES[logits.dtype],
            logits.stride(0),
            rows.info,
            rows.start,
            len(logits),
            rows.targets,
            scale,
            *_terms(formula),
            state,
            self.shared_memory(logits.device),
        )

    def losses(self, state: Tensor, rows: Rows, formula: Formula, out: Tensor) -> None:
        per_row = out.dim() > 0
        allowed = formula.vocab - (0 if formula.forbid is None else len(formula.forbid))
        self.launch(
            "masked_loss_losses_cuda",
            out.device,
            state,
            rows.targets,
            rows.scale,
            rows.slot,
            rows.info,
            rows.capacity,
            len(rows.slot),
            len(rows.index),
            formula.vocab,
            allowed,
            formula.label_smoothing,
            formula.z_loss,
            int(per_row),
            out,
        )


def _which(rows: Rows, by_slot: bool) -> tuple[Any, ...]:
    """Returns slot or null, info, start, rows of the grid, rows held."""
    held = len(rows.index)
    return rows.slot if by_slot else None, rows.info, rows.start, len(rows.slot) if by_slot else held, held


def _terms(formula: Formula) -> tuple[Any, ...]:
    """Returns vocab, bias, softcap, label_smoothing, z_loss, forbid, n_forbid."""
    forbid = formula.forbid
    return (
        formula.vocab,
        formula.bias,
        formula.softcap,
        formula.label_smoothing,
        formula.z_loss,
        forbid,
        0 if forbid is None else len(forbid),
    )


KERNELS = CudaRows()


def forward(problem: Problem) -> Results:
    return gpu.forward(KERNELS, problem)


def direct(problem: Problem) -> Results:
    """Runs `forward`, but saves only rows that are masked now, not the full capacity."""
    return gpu.forward(KERNELS, problem, trim=True)


def backward(
    problem: Problem, grad_loss: Tensor, *kept: Tensor, needs: Sequence[bool] = (True, True, True)
) -> Sequence[Tensor | None]:
    return gpu.backward(KERNELS, problem, grad_loss, (kept[0], kept[1], kept[2]), needs)
