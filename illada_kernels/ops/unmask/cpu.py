"""unmask through the compiled extension: csrc/cpu/unmask.cpp.

Lists the rows that are needed, reduces their logits (given, or a slice of the vocab at a time) and selects. All
arithmetic but the matmuls is in C++.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ... import rules
from ..._extension import DTYPES, check, extension_reason, native, pointer
from .problem import HIGHEST_CONFIDENCE_TEMPERATURE, HIGHEST_TEMPERATURE, Outputs, Problem

# A matmul takes at most ROWS_AT_ONCE rows and a slice of the head. The slice depends on D and dtypes alone, so that
# neither batch size nor thread count changes a sum. Logits and, where it must be converted, the slice of the head fit
# SLICE_BYTES.
ROWS_AT_ONCE = 512
SLICE_BYTES = 32 << 20


def available() -> str | None:
    return extension_reason("unmask_rows_cpu")


def supports(problem: Problem) -> str | None:
    if problem.truncation:
        return "does not truncate (top_k, top_p, min_p)"
    if problem.rule == rules.RENOISE:
        return "does not renoise"
    return None if problem.source.dtype in DTYPES else "float64 is for the reference"


def forward(problem: Problem) -> Outputs:
    """Returns (proposal, confidence, committed, remaining); writes into problem.tokens. Memory: 48 bytes per row and
    2048 ids, and what SLICE_BYTES allows."""
    tokens, positions, vocab = problem.tokens, problem.positions.contiguous(), problem.vocab
    (batch, count), length = positions.shape, tokens.shape[1]
    if batch * count * length == 0:
        return problem.nothing()
    outputs = problem.new_outputs()
    module = native()
    threads = torch.get_num_threads()
    noise_positions, scores, frozen = map(contiguous, (problem.noise_positions, problem.scores, problem.frozen))
    integers, numbers = parameters(problem, batch)
    rows = torch.empty(batch * count, module.unmask_row_bytes, dtype=torch.uint8)
    row_count = torch.zeros(1, dtype=torch.int64)
    where = (tokens.data_ptr(), tokens.stride(0), batch, length, positions.data_ptr(), count, pointer(frozen), length)
    values = (integers.data_ptr(), numbers.data_ptr())
    what = (pointer(noise_positions), problem.mask_id, problem.revise, *values, rows.data_ptr(), row_count.data_ptr())
    check("unmask", module.unmask_plan_cpu(*where, *what))
    rows = rows[: int(row_count)]
    segments = -(-vocab // module.unmask_segment)
    partials = torch.empty(rows.shape[0], segments, module.unmask_partial_bytes, dtype=torch.uint8)
    if rows.shape[0] and vocab:
        scan = Scan(module, problem, vocab, rows, partials, threads)
        if problem.head_weight is None:
            source = problem.source
            scan.run(source, source.stride(0), source.stride(1), count, 0, vocab)
        else:
            from_hidden(scan, problem)
    defer = torch.tensor(problem.defer, dtype=torch.int64)
    kinds = (problem.mask_id, problem.rule, problem.confidence, problem.revise, problem.order)
    ids = (defer.data_ptr(), len(problem.defer), pointer(scores))
    data = (rows.data_ptr(), rows.shape[0], partials.data_ptr(), segments)
    results = [output.data_ptr() for output in outputs]
    check("unmask", module.unmask_select_cpu(*where, *kinds, *ids, *values, *data, *results, threads))
    return outputs


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def parameters(problem: Problem, batch: int) -> tuple[Tensor, Tensor]:
    """Returns (B, 4) int64, seed, step, least, n of Remask, and (B, 5) float32, temperature, confidence temperature,
    the rule's number, tau of Edit, rank temperature."""
    seed = problem.seed_tensor
    one_each = seed is not None and seed.ndim == 1  # a single seed s means s + b for sequence b
    first = [wrapped(problem.seed + (0 if one_each else b)) for b in range(batch)]
    integers = torch.tensor([[s, problem.step, problem.least, problem.remasked] for s in first])
    number = [
        problem.temperature,
        problem.confidence_temperature,
        problem.number,
        problem.tau,
        problem.rank_temperature,
    ]
    numbers = torch.tensor([number] * batch, dtype=torch.float32)
    if seed is not None:
        integers[:, 0] += seed
    for column, tensor in ((1, problem.step_tensor), (2, problem.least_tensor), (3, problem.remasked_tensor)):
        if tensor is not None:
            integers[:, column] = tensor
    tensors = (problem.temperature_tensor, problem.confidence_temperature_tensor, problem.number_tensor)
    for column, tensor in enumerate((*tensors, problem.tau_tensor, problem.rank_temperature_tensor)):
        if tensor is not None:
            numbers[:, column] = tensor
    numbers[:, ::4].clamp_(max=HIGHEST_TEMPERATURE)
    numbers[:, 1].clamp_(max=HIGHEST_CONFIDENCE_TEMPERATURE)
    return integers, numbers


def wrapped(seed: int) -> int:
    """Returns the seed as 64 bits, signed."""
    return (seed + 2**63) % 2**64 - 2**63


def edits(problem: Problem, vocab: int) -> tuple[Tensor, Tensor]:
    """Returns rising ids and what is added to their logits: the sum of their biases, or -inf where forbidden."""
    forbidden = sorted({i for i in problem.forbid if 0 <= i < vocab})
    if problem.bias_ids is None or problem.bias_values is None:
        values = torch.full((len(forbidden),), -torch.inf, dtype=torch.float32)
        return torch.tensor(forbidden, dtype=torch.int64), values
    known = (problem.bias_ids >= 0) & (problem.bias_ids < vocab)
    barred = torch.tensor(forbidden, dtype=torch.int64)
    ids, inverse = torch.cat([problem.bias_ids[known], barred]).unique(return_inverse=True)
    biases = int(known.sum())
    values = torch.zeros(ids.shape, dtype=torch.float32).index_add_(0, inverse[:biases], problem.bias_values[known])
    values[inverse[biases:]] = -torch.inf
    return ids, values


class Scan:
    """Feeds logits of rows to the row kernel, some ids at a time."""

    def __init__(
        self, module: ModuleType, problem: Problem, vocab: int, rows: Tensor, partials: Tensor, threads: int
    ) -> None:
        self.module, self.rows, self.partials, self.threads = module, rows, partials, threads
        self.ids, self.values = edits(problem, vocab)
        self.needs = problem.needs()

    def run(
        self, logits: Tensor, stride_b: int, stride_k: int, count: int, first: int, ids: int, some: slice = slice(None)
    ) -> None:
        rows, partials = self.rows[some], self.partials[some]
        source = (logits.data_ptr(), DTYPES[logits.dtype], stride_b, stride_k, count)
        which = (rows.data_ptr(), rows.shape[0], first, ids, partials.shape[1])
        changes = (self.ids.data_ptr(), self.values.data_ptr(), self.ids.shape[0])
        code = self.module.unmask_rows_cpu(*source, *which, *changes, self.needs, partials.data_ptr(), self.threads)
        check("unmask", code)


def slice_length(dim: int, converted: bool, segment: int) -> int:
    floats = ROWS_AT_ONCE + (dim if converted else 0)
    return max(1, SLICE_BYTES // 4 // floats // segment) * segment


def from_hidden(scan: Scan, problem: Problem) -> None:
    """Multiplies the rows that take part with slices of the head, in float32, and consumes each slice at once."""
    head, bias = problem.head_weight, problem.head_bias
    assert head is not None
    vocab, dim = head.shape
    count = problem.positions.shape[1]
    converted = head.dtype != torch.float32
    length = slice_length(dim, converted, scan.module.unmask_segment)
    index = scan.rows.view(torch.int64)[:, 0]
    most = min(ROWS_AT_ONCE, index.shape[0])
    logits = torch.empty(most * min(length, vocab), dtype=torch.float32)
    weights = torch.empty(min(length, vocab), dim, dtype=torch.float32) if converted else None
    for start in range(0, index.shape[0], ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        at = index[some]
        x = problem.source[at // count, at % count].float()  # (rows, D)
        for first in range(0, vocab, length):
            ids = min(length, vocab - first)
            part = head[first : first + ids]
            w = part if weights is None else weights[:ids].copy_(part)
            out = logits[: x.shape[0] * ids].view(x.shape[0], ids)
            if bias is None:
                torch.mm(x, w.T, out=out)
            else:
                torch.addmm(bias[first : first + ids].float(), x, w.T, out=out)
            scan.run(out, 0, ids, 0, first, ids, some)
