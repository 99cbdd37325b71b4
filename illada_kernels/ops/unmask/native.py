"""unmask through the compiled extension: which rows are needed, their logits (given, or a slice of the vocabulary at a
time), selection. All arithmetic but the matrix products is in csrc/cpu/unmask.cpp."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ... import _dispatch, rules
from .op import HIGHEST_CONFIDENCE_TEMPERATURE, Step

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Products of at most ROWS_AT_ONCE rows with a slice of the head; the slice depends on D and dtypes alone, so that
# neither batch size nor thread count changes a sum. Logits and, where it must be converted, the slice of the head fit
# SLICE_BYTES.
ROWS_AT_ONCE = 512
SLICE_BYTES = 32 << 20


def unmask(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = step.nothing()
    if step.positions.numel() == 0 or step.tokens.numel() == 0:
        return outputs
    native = _dispatch.native()
    threads = torch.get_num_threads()
    (batch, count), length = step.positions.shape, step.tokens.shape[1]
    positions = step.positions.contiguous()
    noise_positions = None if step.noise_positions is None else step.noise_positions.contiguous()
    scores = None if step.revise_scores is None else step.revise_scores.contiguous()
    frozen = None if step.frozen is None else step.frozen.contiguous()
    integers, numbers = parameters(step)
    rows = torch.empty(batch * count, native.unmask_row_bytes, dtype=torch.uint8)
    row_count = torch.zeros(1, dtype=torch.int64)
    tokens = (step.tokens.data_ptr(), step.tokens.stride(0), batch, length)
    where = (*tokens, positions.data_ptr(), count, pointer(frozen), length)
    values = (integers.data_ptr(), numbers.data_ptr())
    code = native.unmask_plan_cpu(
        *where, pointer(noise_positions), step.mask_id, step.revise, *values, rows.data_ptr(), row_count.data_ptr()
    )
    _dispatch.check("unmask", code)
    rows = rows[: int(row_count)]
    segments = -(-step.vocabulary // native.unmask_segment)
    partials = torch.empty(rows.shape[0], segments, native.unmask_partial_bytes, dtype=torch.uint8)
    if rows.shape[0] and step.vocabulary:
        scan = Scan(native, step, rows, partials, threads)
        if step.head_weight is None:
            scan.run(step.source, step.source.stride(0), step.source.stride(1), count, 0, step.vocabulary)
        else:
            from_hidden(scan, step)
    kinds = (step.rule, rules.CONFIDENCES.index(step.confidence), step.revise)
    data = (rows.data_ptr(), rows.shape[0], partials.data_ptr(), segments)
    results = [output.data_ptr() for output in outputs]
    code = native.unmask_select_cpu(*where, step.mask_id, *kinds, pointer(scores), *values, *data, *results, threads)
    _dispatch.check("unmask", code)
    return outputs


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def parameters(step: Step) -> tuple[Tensor, Tensor]:
    """(B, 4) int64: seed, step, k, n; (B, 4) float32: temperature, confidence temperature, the rule's number, tau."""
    batch = step.tokens.shape[0]
    k = int(step.rule_number) if step.rule == rules.TOP_K else 0
    n = int(step.revise_number) if step.revise in (rules.REMASK, rules.REMASK_BY_SCORES) else 0
    integers = torch.tensor([[0, step.step, k, n]] * batch)
    integers[:, 0:1] = step.seeds()
    number = [step.temperature, step.confidence_temperature, step.rule_number, step.revise_number]
    numbers = torch.tensor([number] * batch, dtype=torch.float32)
    for column, tensor in ((1, step.step_tensor), (2, step.rule_tensor), (3, step.revise_tensor)):
        if tensor is not None and not tensor.is_floating_point():
            integers[:, column] = tensor
    tensors = (step.temperature_tensor, step.confidence_temperature_tensor, step.rule_tensor, step.revise_tensor)
    for column, tensor in enumerate(tensors):
        if tensor is not None and tensor.is_floating_point():
            numbers[:, column] = tensor
    numbers[:, 1].clamp_(max=HIGHEST_CONFIDENCE_TEMPERATURE)
    return integers, numbers


def edits(step: Step) -> tuple[Tensor, Tensor]:
    """Rising ids and what is added to their logits: the sum of their biases, or -inf where forbidden."""
    forbidden = torch.tensor([i for i in step.forbid if 0 <= i < step.vocabulary], dtype=torch.int64)
    if step.bias_ids is None or step.bias_values is None:
        ids = forbidden.unique()
        return ids, torch.full(ids.shape, -torch.inf, dtype=torch.float32)
    known = (step.bias_ids >= 0) & (step.bias_ids < step.vocabulary)
    ids, inverse = torch.cat([step.bias_ids[known], forbidden]).unique(return_inverse=True)
    biases = int(known.sum())
    values = torch.zeros(ids.shape, dtype=torch.float32).index_add_(0, inverse[:biases], step.bias_values[known])
    values[inverse[biases:]] = -torch.inf
    return ids, values


class Scan:
    """Feeds logits of rows to the row kernel, some ids at a time."""

    def __init__(self, native: ModuleType, step: Step, rows: Tensor, partials: Tensor, threads: int) -> None:
        self.native, self.rows, self.partials, self.threads = native, rows, partials, threads
        self.ids, self.values = edits(step)
        by_entropy = step.rule in (rules.ENTROPY_BOUND, rules.ENTROPY_BOUND_INCLUSIVE)
        self.needs = int(by_entropy or step.confidence == "neg_entropy") + 2 * int(step.confidence == "margin")

    def run(
        self, logits: Tensor, stride_b: int, stride_k: int, count: int, first: int, ids: int, some: slice = slice(None)
    ) -> None:
        rows, partials = self.rows[some], self.partials[some]
        source = (logits.data_ptr(), DTYPES[logits.dtype], stride_b, stride_k, count)
        which = (rows.data_ptr(), rows.shape[0], first, ids, partials.shape[1])
        changes = (self.ids.data_ptr(), self.values.data_ptr(), self.ids.shape[0])
        code = self.native.unmask_rows_cpu(*source, *which, *changes, self.needs, partials.data_ptr(), self.threads)
        _dispatch.check("unmask", code)


def slice_length(dim: int, converted: bool, segment: int) -> int:
    floats = ROWS_AT_ONCE + (dim if converted else 0)
    return max(1, SLICE_BYTES // 4 // floats // segment) * segment


def from_hidden(scan: Scan, step: Step) -> None:
    """Products in float32 of the rows that take part with slices of the head, each consumed at once."""
    head, bias = step.head_weight, step.head_bias
    assert head is not None
    vocabulary, dim = head.shape
    count = step.positions.shape[1]
    converted = head.dtype != torch.float32
    length = slice_length(dim, converted, scan.native.unmask_segment)
    index = scan.rows.view(torch.int64)[:, 0]
    most = min(ROWS_AT_ONCE, index.shape[0])
    logits = torch.empty(most * min(length, vocabulary), dtype=torch.float32)
    weights = torch.empty(min(length, vocabulary), dim, dtype=torch.float32) if converted else None
    for start in range(0, index.shape[0], ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        at = index[some]
        x = step.source[at // count, at % count].float()  # (rows, D)
        for first in range(0, vocabulary, length):
            ids = min(length, vocabulary - first)
            part = head[first : first + ids]
            w = part if weights is None else weights[:ids].copy_(part)
            out = logits[: x.shape[0] * ids].view(x.shape[0], ids)
            if bias is None:
                torch.mm(x, w.T, out=out)
            else:
                torch.addmm(bias[first : first + ids].float(), x, w.T, out=out)
            scan.run(out, 0, ids, 0, first, ids, some)
