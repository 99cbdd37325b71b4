"""Host code of unmask's GPU backends: parameters that stay on the device, lists of ids, the matmuls of the many-row
path. Nothing here synchronises or reads device data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import rules
from ..._matmul import product
from ..._streams import TwoBuffers
from .problem import Problem

# Up to this many candidate rows one kernel reads the head once; more rows take matmuls by slices of the vocab. On an
# H200 the head turns from memory-bound to compute-bound at about 184 rows; where the two paths cross is unmeasured.
FUSED_ROWS = 128
# Ids of a part outside of the fused head. Matmuls take a multiple of it, so that no sum depends on the cuts.
SLICE = 4096
# Rows of a matmul with truncation, which needs whole rows of logits: 159 MB in two buffers where V = 155136.
TRUNCATED_ROWS = 128


class Parameter(NamedTuple):
    """A number of the call, or a tensor, whose values the kernels read."""

    number: float  # an int for the seed, the step, least, Remask.n and top_k
    tensor: Tensor | None  # float32 (int64 for those five), contiguous, () or (B,)
    stride: int  # 1: sequence b has tensor[b]; 0: the same for all, but for the seed, which is then seed + b


class Parameters(NamedTuple):
    """Holds them in the order of illada_unmask_call of api.h."""

    temperature: Parameter
    confidence_temperature: Parameter
    rule_number: Parameter
    revise_number: Parameter
    seed: Parameter
    step: Parameter
    least: Parameter
    rank_temperature: Parameter
    top_k: Parameter
    top_p: Parameter
    min_p: Parameter


def parameters(problem: Problem) -> Parameters:
    def parameter(number: float, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Parameter:
        if tensor is None:
            return Parameter(number, None, 0)
        tensor = tensor.to(dtype).contiguous()  # nothing happens if it is already
        return Parameter(number, tensor, tensor.ndim)

    p, whole = problem, torch.int64
    return Parameters(
        parameter(p.temperature, p.temperature_tensor),
        parameter(p.confidence_temperature, p.confidence_temperature_tensor),
        parameter(p.number, p.number_tensor),
        parameter(p.tau, p.tau_tensor) if p.revise == rules.EDIT else parameter(p.remasked, p.remasked_tensor, whole),
        parameter(p.seed, p.seed_tensor, whole),
        parameter(p.step, p.step_tensor, whole),
        parameter(p.least, p.least_tensor, whole),
        parameter(p.rank_temperature, p.rank_temperature_tensor),
        parameter(p.top_k, p.top_k_tensor, whole),
        parameter(p.top_p, p.top_p_tensor),
        parameter(p.min_p, p.min_p_tensor),
    )


@functools.cache  # kept for good: a captured graph holds the address
def device_list(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Uploads the ids at the first call, which must come before a graph is captured."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


def forbidden(problem: Problem) -> Tensor | None:
    ids = tuple(sorted({i for i in problem.forbid if 0 <= i < problem.vocab}))
    return device_list(ids, problem.tokens.device) if ids else None


def deferred(problem: Problem) -> Tensor | None:
    return device_list(tuple(problem.defer), problem.tokens.device) if problem.defer else None


# ---- many rows: matmuls by slices of the vocab -----------------------------------------------------------------------


def product_rows(rows: int) -> int:
    """Returns the rows of one matmul. There are four sizes and the last chunk is padded, so that cuBLAS chooses the
    same kernel, and a row's sum does not depend on the batch."""
    return next((size for size in (128, 256, 512) if rows <= size), 1024)


def product_ids(at_once: int) -> int:
    """Returns the ids of one matmul.

    Its logits take 16 MiB: two such buffers stay in an H200's L2 (50 MiB), and there are tiles for all multiprocessors.
    Beyond 1024 rows a chunk also finds part of the head in L2 (32 MiB where D = 4096); below, the head is read once.
    """
    return SLICE * max(1, 1024 // at_once)


def head_products(problem: Problem, visit: Callable[[Tensor, int, int, int], None]) -> None:
    """Calls visit(logits, first row, rows, first id) for each chunk of (B * K) rows and slice of ids.

    logits: (>= rows, ids) float32, without head_bias; ids is a multiple of SLICE, except for the last slice, and all
    of them where the call truncates. The next matmul overlaps the visit, which runs on a second stream, and later
    overwrites the logits. Multiplies all rows, because only the device knows which take part. Memory: two buffers, of
    16 MiB, or of TRUNCATED_ROWS * V float32.
    """
    source, head = problem.source, problem.head_weight
    assert head is not None
    rows, vocab = source.shape[0] * source.shape[1], head.shape[0]
    at_once = product_rows(rows)
    ids = product_ids(at_once)
    if problem.truncation:
        at_once, ids = min(at_once, TRUNCATED_ROWS), vocab
    x = source.flatten(0, 1).to(head.dtype)  # (rows, D): a view where strides allow, and the dtypes are the same
    rest = rows % at_once
    last = x.new_zeros(at_once, x.shape[1]) if rest else x
    last[:rest].copy_(x[rows - rest :])
    with TwoBuffers(at_once * min(ids, vocab), torch.float32, source.device) as buffers:
        for first_id in range(0, vocab, ids):
            w = head[first_id : first_id + ids]
            for first_row in range(0, rows, at_once):
                here = min(at_once, rows - first_row)
                out = buffers.to_fill()[: at_once * w.shape[0]].view(at_once, w.shape[0])
                product(x[first_row : first_row + at_once] if here == at_once else last, w.T, out)
                with buffers.filled():
                    visit(out, first_row, here, first_id)
