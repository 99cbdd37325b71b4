"""Implements masked_loss's row operations (../row_kernels.py) by the Triton kernels of rows.py and compact.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ...._gpu import row_strides
from ..row_kernels import POWER_TIMES_GRAD, SCALE_OVER_POWER, Formula, Rows, rows_of
from . import compact
from . import rows as rows_kernels

# (elements a program handles at a time, warps): one or two 16-byte loads of half precision a thread. `gradients` reads
# its row twice and should find it in L2 again, so few rows may be in flight: up to 1024 threads share a row. On Hopper
# (132 multiprocessors, 50 MB of L2) that is 310 KB of logits for each row in flight.
TILES = {
    "compact": (1024, 4),
    "copy": (2048, 8),
    "factors": (512, 4),
    "stats": (2048, 8),
    "dlogits": (4096, 16),
    "gradients": (16384, 32),
    "gradients, all terms": (8192, 16),
}


class TritonRows:
    def compact(
        self, masked: Tensor, targets: Tensor, weight: Tensor | None, vocab: int, mean: bool, capacity: int
    ) -> Rows:
        total, (block, warps) = masked.numel(), TILES["compact"]
        rows = rows_of(capacity, total, capacity, masked.device)
        flags, targets = masked.contiguous().view(torch.uint8), targets.contiguous()
        weight = None if weight is None else weight.contiguous()
        tiles = max(triton.cdiv(total, block), 1)
        counts, bads = torch.empty(2, tiles, dtype=torch.int32, device=masked.device)
        weights = torch.empty(tiles, dtype=torch.float64, device=masked.device)
        with torch.cuda.device_of(masked):
            compact.count_kernel[(tiles,)](
                flags, targets, weight, total, vocab, counts, bads, weights, BLOCK=block, num_warps=warps
            )
            compact.place_kernel[(tiles,)](
                flags,
                targets,
                weight,
                total,
                counts,
                bads,
                weights,
                tiles,
                capacity,
                rows.index,
                rows.targets,
                rows.scale,
                rows.slot,
                rows.info,
                MEAN=mean,
                BLOCK=block,
                num_warps=warps,
            )
        return rows

    def gather(self, x: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        x, *strides = row_strides(x)
        grid, block, warps = _rows_grid("copy", *out.shape)
        if _empty(grid):
            return
        with torch.cuda.device_of(x):
            compact.gather_kernel[grid](
                x, *strides, rows.index, rows.info, rows.start, out.shape[1], factors, out, BLOCK=block, num_warps=warps
            )

    def scatter(self, dx: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        grid, block, warps = _rows_grid("copy", *out.shape)
        if _empty(grid):
            return
        with torch.cuda.device_of(dx):
            compact.scatter_kernel[grid](
                dx,
                rows.slot,
                rows.info,
                rows.capacity,
                len(dx),
                out.shape[1],
                factors,
                out,
                BLOCK=block,
                num_warps=warps,
            )

    def factors(self, rows: Rows, what: int, grad_loss: Tensor | None, out: Tensor) -> None:
        block, warps = TILES["factors"]
        if len(out) == 0:
            return
        per_row = grad_loss is not None and grad_loss.dim() > 0
        grad_loss = None if grad_loss is None else grad_loss.contiguous()
        with torch.cuda.device_of(out):
            compact.factors_kernel[(triton.cdiv(len(out), block),)](
                rows.scale,
                rows.index,
                rows.info,
                rows.start,
                len(out),
                grad_loss,
                out,
                OVER=what == SCALE_OVER_POWER,
                POWER=what == POWER_TIMES_GRAD,
                PER_ROW=per_row,
                BLOCK=block,
                num_warps=warps,
            )

    def stats(
        self, logits: Tensor, first: int, rows: Rows, state: Tensor, formula: Formula, by_slot: bool = False
    ) -> None:
        width, held, (block, warps) = logits.shape[-1], len(rows.index), TILES["stats"]
        logits, *strides = row_strides(logits)
        grid = (len(rows.slot) if by_slot else held,)
        if _empty(grid) or held == 0:
            return
        with torch.cuda.device_of(logits):
            rows_kernels.stats_kernel[grid](
                logits,
                *strides,
                rows.slot if by_slot else None,
                rows.info,
                rows.start,
                held,
                first,
                width,
                rows.targets,
                *_capping(formula),
                state,
                CAPPED=formula.softcap > 0,
                SMOOTHED=formula.label_smoothing > 0,
                BLOCK=block,
                num_warps=warps,
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
        width, held = logits.shape[-1], len(rows.index)
        logits, *strides = row_strides(logits)
        grid, block, warps = _rows_grid("dlogits", len(rows.slot) if by_slot else held, width)
        if _empty(grid):
            return
        with torch.cuda.device_of(logits):
            rows_kernels.dlogits_kernel[grid](
                logits,
                *strides,
                out,
                out.stride(0),
                rows.slot if by_slot else None,
                rows.info,
                rows.start,
                held,
                rows.capacity,
                first,
                width,
                rows.targets,
                state,
                scale,
                formula.vocab,
                _allowed(formula),
                formula.label_smoothing,
                formula.z_loss,
                *_capping(formula),
                CAPPED=formula.softcap > 0,
                BLOCK=block,
                num_warps=warps,
            )

    def gradients(self, logits: Tensor, rows: Rows, state: Tensor, scale: Tensor, formula: Formula) -> None:
        held, vocab = logits.shape
        plain = not formula.softcap and not formula.label_smoothing and formula.bias is None and formula.forbid is None
        block, warps = TILES["gradients" if plain else "gradients, all terms"]
        if held == 0:
            return
        with torch.cuda.device_of(logits):
            rows_kernels.gradients_kernel[(held,)](
                logits,
                logits.stride(0),
                rows.info,
                rows.start,
                vocab,
                rows.targets,
                state,
                scale,
                _allowed(formula),
                formula.label_smoothing,
                formula.z_loss,
                *_capping(formula),
                CAPPED=formula.softcap > 0,
                SMOOTHED=formula.label_smoothing > 0,
                BLOCK=block,
                num_warps=warps,
            )

    def losses(self, state: Tensor, rows: Rows, formula: Formula, out: Tensor) -> None:
        block, warps = TILES["compact"]
        flags = {"SMOOTHED": formula.label_smoothing > 0, "Z_LOSS": formula.z_loss > 0, "BLOCK": block}
        terms = formula.vocab, _allowed(formula), formula.label_smoothing, formula.z_loss
        held, total = len(rows.index), len(rows.slot)
        with torch.cuda.device_of(out):
            if out.dim() == 0:
                compact.loss_sum_kernel[(1,)](
                    state,
                    rows.targets,
                    rows.scale,
                    rows.info,
                    rows.capacity,
                    held,
                    *terms,
                    out,
                    **flags,
                    num_warps=warps,
                )
            elif total > 0:
                compact.loss_rows_kernel[(triton.cdiv(total, block),)](
                    state,
                    rows.targets,
                    rows.scale,
                    rows.slot,
                    rows.info,
                    rows.capacity,
                    total,
                    held,
                    *terms,
                    out,
                    **flags,
                    num_warps=warps,
                )


def _rows_grid(kernel: str, rows: int, width: int) -> tuple[tuple[int, int], int, int]:
    """Returns (a program for each tile of each row, elements of a tile, warps)."""
    block, warps = TILES[kernel]
    return (rows, triton.cdiv(width, block)), block, warps


def _empty(grid: tuple[int, ...]) -> bool:
    return 0 in grid


def _allowed(formula: Formula) -> int:
    return formula.vocab - (0 if formula.forbid is None else len(formula.forbid))


def _capping(formula: Formula) -> tuple[Any, ...]:
    """Returns bias, softcap, forbid, n_forbid."""
    forbid = formula.forbid
    return formula.bias, float(formula.softcap), forbid, 0 if forbid is None else len(forbid)


KERNELS = TritonRows()


# ---- for tests/gpu_code: what to compile ahead of time ---------------------------------------------------------------

_ARGUMENTS = {
    "info": "*i32:16",
    "slot": "*i32:16",
    "index": "*i32:16",
    "counts": "*i32:16",
    "bads": "*i32:16",
    "masked": "*u8:16",
    "targets": "*i64:16",
    "kept_targets": "*i64:16",
    "forbid": "*i64:16",
    "weights": "*fp64:16",
    "weight": "*fp32:16",
    "scale": "*fp32:16",
    "factors": "*fp32:16",
    "grad_loss": "*fp32:16",
    "bias": "*fp32:16",
    "state": "*fp32:16",
    "dx": "*fp32:16",
    "softcap": "fp32",
    "smoothing": "fp32",
    "z_loss": "fp32",
    "stride": "i32:16",
    "outer_stride": "i32:16",
    "out_stride": "i32:16",
    "width": "i32:16",
}
PLAIN: dict[str, Any] = {"CAPPED": False, "SMOOTHED": False, "bias": None, "forbid": None}
ALL_TERMS: dict[str, Any] = {"CAPPED": True, "SMOOTHED": True}


def _configuration(name: str, kernel: Any, tile: str, element: str = "fp32", **constants: Any) -> tuple[Any, ...]:
    block, warps = TILES[tile]
    constants = {a: value for a, value in constants.items() if a in kernel.arg_names} | {"BLOCK": block}
    types = _ARGUMENTS | dict.fromkeys(("x", "logits", "out"), f"*{element}:16")
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    return f"{name} {element}", kernel, signature, constants, {"num_warps": warps}


def aot_configurations() -> Iterator[tuple[Any, ...]]:
    stats, dlogits, gradients = rows_kernels.stats_kernel, rows_kernels.dlogits_kernel, rows_kernels.gradients_kernel
    for name, terms, element in (
        ("", PLAIN, "bf16"),
        ("", PLAIN, "fp16"),
        (", all terms", ALL_TERMS, "bf16"),
        (", all terms", ALL_TERMS, "fp32"),
    ):
        yield _configuration(f"stats{name}", stats, "stats", element, slot=None, **terms)
        yield _configuration(f"dlogits{name}", dlogits, "dlogits", element, slot=None, **terms)
        yield _configuration(f"gradients{name}", gradients, f"gradients{name}", element, **terms)
    for element in ("bf16", "fp32"):
        yield _configuration("stats by slot", stats, "stats", element, **PLAIN)
        yield _configuration("dlogits by slot", dlogits, "dlogits", element, **PLAIN)
        yield _configuration("gather", compact.gather_kernel, "copy", element)
        yield _configuration("scatter", compact.scatter_kernel, "copy", element)
    yield _configuration("count", compact.count_kernel, "compact")
    yield _configuration("place", compact.place_kernel, "compact", MEAN=True)
    yield _configuration("factors", compact.factors_kernel, "factors", OVER=True, POWER=False, PER_ROW=True)
    for name, kernel in (("sum", compact.loss_sum_kernel), ("rows", compact.loss_rows_kernel)):
        yield _configuration(f"loss {name}", kernel, "compact", SMOOTHED=True, Z_LOSS=True)
