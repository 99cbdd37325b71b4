"""unmask through the compiled extension: csrc/cpu/unmask.cpp and head.cpp.

Lists the rows that are needed, reduces their logits (given, or a slice of the vocab at a time) and selects. All
arithmetic but the parameters' is in C++. With top_k, top_p or min_p a row's logits are needed more than once: then all
of the vocab at a time, for as many rows as fit.
"""

from __future__ import annotations

import copy
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..._extension import DTYPES, check, extension_reason, native, pointer
from ..._ranks import gathered, gathered_pieces
from .problem import (
    BY_MIN_P,
    BY_TOP_K,
    BY_TOP_P,
    HIGHEST_CONFIDENCE_TEMPERATURE,
    HIGHEST_TEMPERATURE,
    NEEDS_NO_DRAW,
    Outputs,
    Problem,
)
from .ranks import log_of, lower_bound

# Rows and ids whose logits are in memory at once: 32 MB. IDS_AT_ONCE is a multiple of the segment.
ROWS_AT_ONCE = 512
IDS_AT_ONCE = 16384


def available() -> str | None:
    return extension_reason("unmask_rows_cpu", "head_cpu")


def supports(problem: Problem) -> str | None:
    return None if problem.source.dtype in DTYPES else "float64 is for the reference"


def forward(problem: Problem) -> Outputs:
    """Returns (proposal, confidence, committed, remaining); writes into problem.tokens. Memory: 48 bytes per row and
    2048 ids, and what ROWS_AT_ONCE and IDS_AT_ONCE allow."""
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
    what = (pointer(noise_positions), problem.mask_id, problem.rule, problem.revise, *values)
    check("unmask", module.unmask_plan_cpu(*where, *what, rows.data_ptr(), row_count.data_ptr()))
    rows = rows[: int(row_count)]
    segments = -(-vocab // module.unmask_segment)
    partials = torch.empty(rows.shape[0], segments, module.unmask_partial_bytes, dtype=torch.uint8)
    if problem.group:
        partials.fill_(255)  # NaN: no bar for the noise to beat from the ids of other ranks
    if rows.shape[0] and vocab:
        scan = Scan(module, problem, vocab, rows, partials, threads)
        if problem.head_weight is None:
            source = problem.source
            all_rows = (source, source.stride(0), source.stride(1), count)
            scan.truncate(*all_rows) if problem.truncation else scan.run(*all_rows, 0, vocab)
        else:
            from_hidden(scan, problem)
    if problem.group:
        partials = of_all_ranks(problem, partials, module.unmask_segment)
        segments = partials.shape[1]
    defer = torch.tensor(problem.defer, dtype=torch.int64)
    kinds = (problem.mask_id, vocab, problem.rule, problem.confidence, problem.revise, problem.order)
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


def truncations(problem: Problem, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (B,) top_k, top_p and log min_p; 0, 1 and -inf where they truncate nothing."""
    top_k, top_p, min_p = torch.zeros(batch, dtype=torch.int64), torch.ones(batch), torch.zeros(batch)
    if problem.truncate & BY_TOP_K:
        top_k[:] = problem.top_k if problem.top_k_tensor is None else problem.top_k_tensor
    if problem.truncate & BY_TOP_P:
        top_p[:] = problem.top_p if problem.top_p_tensor is None else problem.top_p_tensor
    if problem.truncate & BY_MIN_P:
        min_p[:] = problem.min_p if problem.min_p_tensor is None else problem.min_p_tensor
    return top_k, top_p, log_of(min_p)


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
        self.vocab = vocab
        self.ids, self.values = edits(problem, vocab)
        self.changes = (self.ids.data_ptr(), self.values.data_ptr(), self.ids.shape[0])
        self.needs = problem.needs() | (NEEDS_NO_DRAW if problem.truncation else 0)
        self.per_sequence = problem.positions.shape[1]
        self.truncations = truncations(problem, problem.positions.shape[0]) if problem.truncation else ()

    def run(
        self, logits: Tensor, stride_b: int, stride_k: int, count: int, first: int, ids: int, some: slice = slice(None)
    ) -> None:
        rows, partials = self.rows[some], self.partials[some]
        source = (logits.data_ptr(), DTYPES[logits.dtype], stride_b, stride_k, count)
        which = (rows.data_ptr(), rows.shape[0], first, ids, partials.shape[1])
        code = self.module.unmask_rows_cpu(
            *source, *which, *self.changes, self.needs, partials.data_ptr(), self.threads
        )
        check("unmask", code)

    def truncate(self, logits: Tensor, stride_b: int, stride_k: int, count: int, some: slice = slice(None)) -> None:
        """Runs as run, of all ids, but draws from what top_k, top_p and min_p keep."""
        rows, partials = self.rows[some], self.partials[some]
        source = (logits.data_ptr(), DTYPES[logits.dtype], stride_b, stride_k, count)
        which = (rows.data_ptr(), rows.shape[0], self.vocab, partials.shape[1])
        how = (self.per_sequence, *(t.data_ptr() for t in self.truncations))
        code = self.module.unmask_truncate_cpu(
            *source, *which, *self.changes, self.needs, *how, partials.data_ptr(), self.threads
        )
        check("unmask", code)


def from_hidden(scan: Scan, problem: Problem) -> None:
    """Multiplies the rows that take part with slices of the head, in float32, and consumes each slice at once.

    The extension's own product sums each logit in one order, so that equal rows tie whatever lies beside them; a BLAS
    chooses the order by the number of rows and threads.
    """
    head, vocab = problem.head_weight, problem.vocab
    assert head is not None
    bias = None if problem.head_bias is None else problem.head_bias.float().contiguous()
    index = scan.rows.view(torch.int64)[:, 0]
    count = problem.positions.shape[1]
    own = slice(problem.vocab_start, problem.vocab_start + head.shape[0])
    begin = own.start // scan.module.unmask_segment * scan.module.unmask_segment
    ids_at_once = vocab if problem.truncation else min(IDS_AT_ONCE, vocab)
    most = ROWS_AT_ONCE * IDS_AT_ONCE // ids_at_once if problem.truncation else ROWS_AT_ONCE
    rows_at_once = max(1, min(ROWS_AT_ONCE, most, index.shape[0]))
    logits = torch.empty(rows_at_once * ids_at_once, dtype=torch.float32)
    weight = (head.data_ptr(), pointer(bias), DTYPES[head.dtype], head.stride(0))
    for start in range(0, index.shape[0], rows_at_once):
        some = slice(start, start + rows_at_once)
        at = index[some]
        x = problem.source[at // count, at % count]  # (rows, D)
        x = x if x.dtype == head.dtype else x.float()
        for first in range(begin, own.stop, ids_at_once):
            low, ids = max(first, own.start), min(ids_at_once, own.stop - first) - max(own.start - first, 0)
            out = logits[: x.shape[0] * ids].view(x.shape[0], ids)
            where = (low - own.start, ids, out.data_ptr(), ids, scan.threads)
            check("unmask", scan.module.head_cpu(x.data_ptr(), DTYPES[x.dtype], *x.shape, *weight, *where))
            if low > first:  # a segment that another rank begins
                out = torch.nn.functional.pad(out, (low - first, 0), value=-torch.inf)
            scan.run(out, 0, out.shape[1], 0, first, out.shape[1], some)
            if problem.truncation and problem.group:
                draw_over_ranks(scan, problem, out, first, some)
        if problem.truncation and not problem.group:
            scan.truncate(logits, 0, vocab, 0, some)


PARTIAL = np.dtype(  # of unmask_rows.h
    [(name, "f8") for name in ("sum", "sum_ez")]
    + [(name, "f4") for name in ("top", "second", "best_score", "best_logit", "held_logit")]
    + [(name, "i4") for name in ("top_id", "best_id", "bad")]
)


def draw_over_ranks(scan: Scan, problem: Problem, logits: Tensor, first: int, some: slice) -> None:
    """Draws rows that `run` has seen from what all ranks keep: `logits` (rows, ids from `first` on) are this rank's."""
    own = (scan.ids >= first) & (scan.ids < first + logits.shape[1])
    edited = logits.clone()
    edited[:, scan.ids[own] - first] += scan.values[own]
    edited[:, scan.ids[own & (scan.values == -torch.inf)] - first] = -torch.inf  # whatever stood there
    b = scan.rows[some].view(torch.int64)[:, 0] // scan.per_sequence
    temperature = parameters(problem, problem.positions.shape[0])[1][b, :1]
    top_k, top_p, log_min_p = (t[b, None] for t in scan.truncations)
    least = lower_bound(problem, edited, temperature, top_k, top_p, log_min_p)
    edited.masked_fill_(edited < least, -torch.inf)
    drawn = torch.full_like(scan.partials[some], 255)
    again = copy.copy(scan)
    again.needs, again.changes, again.rows, again.partials = 0, (0, 0, 0), scan.rows[some], drawn
    again.run(edited, 0, edited.shape[1], 0, first, edited.shape[1])
    mine, other = (x.numpy().view(PARTIAL) for x in (scan.partials[some], drawn))
    for field in ("best_score", "best_logit", "best_id"):
        mine[field] = other[field]


def of_all_ranks(problem: Problem, partials: Tensor, segment: int) -> Tensor:
    """Returns the partials (rows, segments, bytes) of all ids in their order. A segment that two ranks share is there
    twice, each time with one rank's ids."""
    assert problem.head_weight is not None
    start, size = problem.vocab_start, problem.head_weight.shape[0]
    own = torch.tensor([start // segment, -(-(start + size) // segment)], dtype=torch.float32)
    edges = gathered_pieces(problem.group, own, start, size, problem.vocab_size).long()
    low, most = int(own[0]), int((edges[:, 1] - edges[:, 0]).amax())
    mine = partials[:, low : low + most]
    mine = torch.nn.functional.pad(mine, (0, 0, 0, most - mine.shape[1]))
    each = gathered(problem.group, mine)  # (ranks, rows, most, bytes)
    return torch.cat([x[:, : int(high - low)] for x, (low, high) in zip(each, edges)], 1)
