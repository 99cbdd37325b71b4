"""What unmask's GPU backends share on the host: parameters that stay on the device, the list of forbidden ids, the
matmuls of the many-row path. Nothing here synchronises or reads device data."""

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

# Up to this many candidate rows one kernel reads the head once; beyond, products by slices of the vocab. The head
# turns from bound by memory to bound by products at about 184 rows on an H200; where the two paths cross is unmeasured.
FUSED_ROWS = 128
# Ids that one part covers, where parts are not those of the fused head; products take a multiple of them, so that how a
# vocab is cut into products does not change a sum.
SLICE = 4096


class Parameter(NamedTuple):
    """A number of the call, or where there is a tensor what lies in it when the kernels run."""

    number: float  # an int for the seed, the step, least and Remask.n
    tensor: Tensor | None  # float32 (int64 for those four), contiguous, () or (B,)
    stride: int  # 1: sequence b has tensor[b]; 0: the same for all, but for the seed, which is then seed + b


class Parameters(NamedTuple):
    """In the order of illada_unmask_call of api.h."""

    temperature: Parameter
    confidence_temperature: Parameter
    rule_number: Parameter
    revise_number: Parameter
    seed: Parameter
    step: Parameter
    least: Parameter
    rank_temperature: Parameter


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
    )


@functools.cache  # kept for good: a captured graph holds the address
def device_list(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied to the device once: warm up before you capture a graph, as always."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


def forbidden(problem: Problem) -> Tensor | None:
    ids = tuple(sorted({i for i in problem.forbid if 0 <= i < problem.vocab}))
    return device_list(ids, problem.tokens.device) if ids else None


def deferred(problem: Problem) -> Tensor | None:
    return device_list(tuple(problem.defer), problem.tokens.device) if problem.defer else None


# ---- many rows: products by slices of the vocab -----------------------------------------------------------------
def product_rows(rows: int) -> int:
    """Rows of one product. Few sizes, with the last chunk filled up, so that cuBLAS sees the same shapes, chooses the
    same kernel and sums a row alike whatever the batch."""
    return 256 if rows <= 256 else 512 if rows <= 512 else 1024


def product_ids(at_once: int) -> int:
    """Ids of one product: 16 MiB of logits, of which two stay in an H200's L2 (50 MiB), and enough tiles for its
    multiprocessors. With more than 1024 rows, each chunk also finds part of the head there (32 MiB where D = 4096);
    with fewer there is one chunk, and the head is read once."""
    return SLICE * max(1, 1024 // at_once)


def head_products(problem: Problem, visit: Callable[[Tensor, int, int, int], None]) -> None:
    """Calls visit(logits, first row, rows, first id): logits (>= rows, ids) float32 of rows of (B * K) and a multiple
    of SLICE ids, or the last ones, without head_bias; they are overwritten after. It runs on a second stream, so that
    the next product does not wait for it. All rows are multiplied, also those that take no part: which they are, only
    the device knows."""
    source, head = problem.source, problem.head_weight
    assert head is not None
    rows, vocab = source.shape[0] * source.shape[1], head.shape[0]
    at_once = product_rows(rows)
    x = source.flatten(0, 1).to(head.dtype)  # (rows, D): a view where strides allow, and the dtypes are the same
    rest = rows % at_once
    last = x.new_zeros(at_once, x.shape[1]) if rest else x
    last[:rest].copy_(x[rows - rest :])
    ids = product_ids(at_once)
    with TwoBuffers(at_once * min(ids, vocab), torch.float32, source.device) as buffers:
        for first_id in range(0, vocab, ids):
            w = head[first_id : first_id + ids]
            for first_row in range(0, rows, at_once):
                here = min(at_once, rows - first_row)
                out = buffers.to_fill()[: at_once * w.shape[0]].view(at_once, w.shape[0])
                product(x[first_row : first_row + at_once] if here == at_once else last, w.T, out)
                with buffers.filled():
                    visit(out, first_row, here, first_id)
