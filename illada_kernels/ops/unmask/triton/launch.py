"""Launches unmask's Triton kernels.

Up to gpu.FUSED_ROWS candidate rows: the head kernel, with top_k or min_p the draw kernel, then the selection. Logits,
more rows, or top_p: where the call truncates the bounds kernel, then the rows kernel, on the logits given or on matmuls
by slices of the vocab, then the selection.

Within a path results are bitwise the same for any batch, order of candidates and run: which ids make a tile, and which
tiles a group, depends on V alone; a logit is summed over D in steps of BLOCK_D in one order; sums over ids are of
integers; the rest is elementwise in order of id, or a maximum.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .... import rules
from .. import gpu
from ..problem import Outputs, Problem
from .bounds import bounds_kernel
from .draw import draw_kernel
from .head import RUN, head_kernel
from .partials import FIELDS
from .rows import rows_kernel
from .select import select_kernel

PAIRS = 64  # id pairs of a tile of the head kernel: the product's M, twice
GROUPS = 264  # of tiles, at most: two programs for each multiprocessor of an H200, 2.5 for each of an A100
BOUND_IDS = 2048  # ids that the bounds and draw kernels hold at once, for each of their thresholds
ROW_PAIRS = 512  # id pairs that the rows kernel holds at once
BLOCK = 1024  # candidates that the selection holds at once


def forward(problem: Problem) -> Outputs:
    if problem.is_empty():
        return problem.nothing()
    with torch.cuda.device_of(problem.tokens):
        call = Call(problem)
        source = problem.source
        if problem.vocab == 0:
            pass
        elif problem.head_weight is None:
            call.rows(source, source.stride(0), source.stride(1), 0, call.row_count, 0, False)
        elif call.fused:
            call.head()
        else:
            gpu.head_products(problem, call.product)
        return call.select()


class Call:
    """The arguments that kernels share."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.device = problem, problem.tokens.device
        (batch, self.count), self.vocab = problem.positions.shape, problem.vocab
        self.row_count = batch * self.count
        numbers = gpu.parameters(problem)
        self.numbers = numbers
        self.needs = problem.needs()
        few = self.row_count <= gpu.FUSED_ROWS
        self.fused = problem.head_weight is not None and few and not problem.needs_whole_rows
        self.tiles = -(-self.vocab // (2 * PAIRS))
        self.groups = min(GROUPS, self.tiles) if self.fused else -(-self.vocab // gpu.SLICE)
        self.partials = torch.empty(FIELDS, self.groups, self.row_count, dtype=torch.float32, device=self.device)
        self.best_ids = torch.empty(self.groups, self.row_count, dtype=torch.int32, device=self.device)
        frozen = None if problem.frozen is None else problem.frozen.view(torch.uint8)
        self.where = (
            problem.tokens,
            problem.tokens.stride(0),
            problem.tokens.shape[1],
            *strided(problem.positions),
            *strided(frozen),
            problem.mask_id,
            *strided(problem.noise_positions),
        )
        self.confidence_temperature = value(numbers.confidence_temperature)
        self.noise = (*value(numbers.seed), *value(numbers.step))
        forbidden = gpu.forbidden(problem)
        biases = 0 if problem.bias_ids is None else problem.bias_ids.shape[0]
        self.temperature = value(numbers.temperature)
        self.row_state = (*self.where, *self.temperature, *self.confidence_temperature, *self.noise)
        self.added = (
            contiguous(problem.bias_ids),
            contiguous(problem.bias_values),
            biases,
            forbidden,
            0 if forbidden is None else forbidden.shape[0],
        )
        self.parts = (self.partials, self.best_ids, self.groups)
        self.bounds = self.partials.new_empty(self.row_count) if problem.truncation and not self.fused else None
        revises = problem.revise in (rules.EDIT, rules.REMASK)
        self.constants = {"NEEDS": self.needs, "REVISES": revises, "enable_fp_fusion": False}

    def head(self) -> None:
        problem, head = self.problem, self.problem.head_weight
        assert head is not None
        dim = head.shape[1]
        options = head_options(self.row_count, head.dtype)
        new, slots, tops = self.partials.new_empty, self.groups, None
        if problem.truncation:
            slots, tops = self.tiles, new(self.row_count, self.tiles * PAIRS // RUN.value)
        scratch = new(slots, 2, PAIRS, options["BLOCK_N"])
        head_kernel[(self.groups,)](
            problem.source,
            problem.source.stride(0),
            problem.source.stride(1),
            head,
            head.stride(0),
            contiguous(problem.head_bias),
            dim,
            scratch,
            tops,
            self.vocab,
            self.row_count,
            self.count,
            *self.row_state,
            *self.added,
            *self.parts,
            PAIRS=PAIRS,
            NOISE=problem.noisy and tops is None,
            EVEN_D=dim % options["BLOCK_D"] == 0,
            **options,
            **self.constants,
        )
        if tops is not None:
            self.draw(scratch, tops)

    def draw(self, logits: Tensor, tops: Tensor) -> None:
        numbers, runs = self.numbers, tops.shape[1]
        draw_kernel[(self.row_count,)](
            logits,
            logits.shape[3],
            tops,
            torch.empty_like(tops, dtype=torch.int32),
            runs,
            self.vocab,
            self.row_count,
            self.count,
            *self.row_state,
            *self.parts,
            *limited(numbers.top_k),
            *value(numbers.min_p),
            TRUNCATE=self.problem.truncation,
            PAIRS=PAIRS,
            BLOCK=BOUND_IDS,
            **BOUNDS_OPTIONS,
            **self.constants,
        )

    def product(self, logits: Tensor, first_row: int, rows: int, first_id: int) -> None:
        self.rows(logits, 0, logits.stride(0), first_row, rows, first_id, True)

    def rows(
        self, logits: Tensor, stride_b: int, stride_k: int, first_row: int, rows: int, first_id: int, dense: bool
    ) -> None:
        ids = logits.shape[-1]
        bias = contiguous(self.problem.head_bias)
        if self.bounds is not None:
            bounds_kernel[(rows,)](
                logits,
                stride_b,
                stride_k,
                first_row,
                bias,
                self.vocab,
                self.row_count,
                self.count,
                *self.row_state,
                *self.added,
                *limited(self.numbers.top_k),
                *value(self.numbers.top_p),
                *value(self.numbers.min_p),
                self.bounds,
                TRUNCATE=self.problem.truncation,
                ONE=one(self.vocab),
                BLOCK=BOUND_IDS,
                DENSE=dense,
                **BOUNDS_OPTIONS,
                **self.constants,
            )
        rows_kernel[(rows * -(-ids // gpu.SLICE),)](
            logits,
            stride_b,
            stride_k,
            first_row,
            first_id,
            ids,
            bias,
            self.vocab,
            self.row_count,
            self.count,
            *self.row_state,
            *self.added,
            *self.parts,
            self.bounds,
            SPAN=gpu.SLICE,
            PAIRS=ROW_PAIRS,
            NOISE=self.problem.noisy,
            DENSE=dense,
            **ROWS_OPTIONS,
            **self.constants,
        )

    def select(self) -> Outputs:
        problem, results = self.problem, self.problem.new_outputs()
        proposal, confidence, committed, remaining = results
        scores, batch, options = strided(problem.scores), problem.tokens.shape[0], select_options(self.count)
        defer, reranked = gpu.deferred(problem), problem.is_reranked
        scratch = proposal  # not touched
        if reranked or not options["ONE_BLOCK"]:
            scratch = torch.empty(batch, 3, self.count, dtype=torch.int64, device=self.device)
        select_kernel[(batch,)](
            self.partials,
            self.best_ids,
            self.groups,
            self.row_count,
            self.count,
            scratch,
            *self.where,
            *self.confidence_temperature,
            *self.noise,
            *value(self.numbers.rule_number),
            *limited(self.numbers.revise_number),
            *limited(self.numbers.least),
            *self.temperature,
            *value(self.numbers.rank_temperature),
            defer,
            0 if defer is None else defer.shape[0],
            self.vocab,
            *scores,
            proposal,
            confidence,
            committed.view(torch.uint8),
            remaining,
            RULE=rules.ENTROPY_BOUND if problem.rule == rules.RENOISE else problem.rule,
            CONFIDENCE=problem.confidence,
            REVISE=problem.revise,
            ORDER=problem.order,
            RERANKED=reranked,
            NEEDS=self.needs,
            ONE=one(self.vocab),
            enable_fp_fusion=False,
            **options,
        )
        return results


def strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def value(parameter: gpu.Parameter) -> tuple[Tensor | None, float, int]:
    return parameter.tensor, parameter.number, parameter.stride


def limited(parameter: gpu.Parameter) -> tuple[Tensor | None, float, int]:
    """Returns a number of the rule. A count is held below 2**31, more than there are candidates: one type serves
    all."""
    number = parameter.number
    return parameter.tensor, min(number, 2**31 - 1) if isinstance(number, int) else number, parameter.stride


def one(vocab: int) -> float:
    """Returns 1 / unit of sums over all ids: V exponentials not above 1 fit 62 bits."""
    return 2.0 ** min(50, 62 - max(vocab, 1).bit_length())


# ---- launch configurations: by shape and type, nothing is tuned at run time ------------------------------------------
ROWS_OPTIONS = {"num_warps": 4, "num_stages": 2}
BOUNDS_OPTIONS = {"num_warps": 16, "num_stages": 2}


def head_options(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns a launch without spills on sm_80, sm_90 and sm_100. 4 warps leave room for a second program on a
    multiprocessor, which loads while the first reduces."""
    shape = {"BLOCK_N": max(16, triton.next_power_of_2(rows)), "CHUNK": 8}
    if dtype == torch.float32:
        return shape | {"BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
    return shape | {"BLOCK_D": 64, "num_warps": 4 if rows <= 64 else 8, "num_stages": 4 if rows <= 32 else 3}


def select_options(count: int) -> dict[str, int]:
    block = min(BLOCK, max(16, triton.next_power_of_2(count)))
    groups = max(2, min(64, 1024 // block))
    return {"BLOCK": block, "BLOCK_G": groups, "ONE_BLOCK": count <= block, "num_warps": 8}
