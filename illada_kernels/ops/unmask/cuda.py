"""unmask in CUDA: csrc/cuda/unmask_{head_sm90a,draw_sm90a,bounds,rows,select}.cu, and what is launched when.

    few rows, bfloat16 or float16, Hopper       head, select            two launches, the head is read once
    the same with top_k, top_p or min_p         head, draw, select      three launches, the head is read once
    from logits                                 rows, select            two launches
    everything else, and Renoise                a product and rows for each slice of the vocab, then select

In the last two bounds comes before rows with top_k, top_p or min_p, and slices are then of gpu.TRUNCATED_ROWS rows and
all ids.

Which it is depends on shapes, dtypes, strides and the GPU alone. Within each the result of a row has the same bits
whatever the batch and the order of candidates. Nothing synchronises; a parameter that is a tensor of another type than
float32 or int64 costs a conversion, and the list of forbidden ids is copied to the device when it is first met.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ... import rules
from ..._extension import DTYPES, STALE, native
from ..._gpu import cuda_reason, launch, rows_reason
from . import gpu
from .problem import Outputs, Problem

FIELDS, TILE, SORT_IN_SHARED = 8, 256, 1024  # api.h, unmask_head_sm90a.cu
TILE_WORDS, PART_WORDS = 272, 64  # api.h


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride_b", ctypes.c_int64), ("stride_k", ctypes.c_int64)]


class Parameter(ctypes.Structure):
    _fields_ = [
        ("tensor", ctypes.c_void_p),
        ("integer", ctypes.c_int64),
        ("number", ctypes.c_float),
        ("per_sequence", ctypes.c_int32),
    ]


class Call(ctypes.Structure):
    """illada_unmask_call of api.h. `tensors`: what its pointers point to."""

    _fields_ = [
        ("tokens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("token_stride", "batch", "count", "length", "vocab", "mask_id")),
        *((name, View) for name in ("positions", "noise_positions", "scores", "frozen")),
        *((name, Parameter) for name in gpu.Parameters._fields),
        *((name, ctypes.c_void_p) for name in ("forbid", "bias_ids", "bias_values", "head_bias", "defer")),
        *((name, ctypes.c_int64) for name in ("forbids", "biases", "head_bias_dtype", "defers")),
        ("partials", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bounds", "lists")),
        *((name, ctypes.c_int32) for name in ("rule", "confidence", "revise", "needs", "order", "truncate")),
    ]

    tensors: list[Tensor]


def describe(problem: Problem, partials: Tensor, bounds: Tensor | None, lists: Tensor | None) -> Call:
    """Returns the record of a call. partials: (FIELDS, B * K, parts) float32; bounds or lists, as api.h describes them,
    where the call truncates."""
    tensors: list[Tensor] = []

    def pointer(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensors.append(tensor)
        return tensor.data_ptr()

    def view(tensor: Tensor | None) -> View:
        return View(pointer(tensor), *(tensor.stride() if tensor is not None else (0, 0)))

    def parameter(p: gpu.Parameter) -> Parameter:
        integer = p.number if isinstance(p.number, int) else 0
        return Parameter(pointer(p.tensor), integer, 0.0 if integer else p.number, p.stride)

    batch, count = problem.positions.shape
    forbid, defer = gpu.forbidden(problem), gpu.deferred(problem)
    bias_ids = None if problem.bias_ids is None else problem.bias_ids.contiguous()
    bias_values = None if problem.bias_values is None else problem.bias_values.contiguous()
    head_bias = None if problem.head_bias is None else problem.head_bias.contiguous()
    call = Call(
        pointer(problem.tokens),
        problem.tokens.stride(0),
        batch,
        count,
        problem.tokens.shape[1],
        problem.vocab,
        problem.mask_id,
        *map(view, (problem.positions, problem.noise_positions, problem.scores, problem.frozen)),
        *map(parameter, gpu.parameters(problem)),
        *map(pointer, (forbid, bias_ids, bias_values, head_bias, defer)),
        0 if forbid is None else forbid.shape[0],
        0 if bias_ids is None else bias_ids.shape[0],
        0 if head_bias is None else DTYPES[head_bias.dtype],
        0 if defer is None else defer.shape[0],
        pointer(partials),
        partials.shape[2],
        pointer(bounds),
        pointer(lists),
        problem.rule,
        problem.confidence,
        problem.revise,
        problem.needs(),
        problem.order,
        problem.truncation,
    )
    call.tensors = tensors
    return call


def forward(problem: Problem) -> Outputs:
    if problem.is_empty():
        return problem.nothing()
    device = problem.tokens.device
    batch, count = problem.positions.shape
    rows, vocab = batch * count, problem.vocab
    blocks = head_blocks(problem)
    parts = blocks or -(-vocab // gpu.SLICE)
    partials = torch.empty(FIELDS, rows, parts, dtype=torch.float32, device=device)
    bounds = partials.new_empty(rows) if problem.truncation and not blocks else None
    lists = partials.new_empty(rows, list_words(vocab, parts)) if problem.truncation and blocks else None
    call = describe(problem, partials, bounds, lists)

    def read(logits: Tensor, stride_b: int, first_row: int, here: int, first_id: int) -> None:
        operands = (DTYPES[logits.dtype], logits, stride_b, logits.stride(-2), first_row, here)
        if problem.truncation:
            launch("unmask_bounds_cuda", device, call, *operands)
        launch("unmask_rows_cuda", device, call, *operands, first_id, logits.shape[-1])

    if blocks:
        run_head(problem, call, blocks)
    elif problem.head_weight is None and vocab:
        read(problem.source, problem.source.stride(0), 0, rows, 0)
    elif vocab:
        gpu.head_products(problem, lambda logits, *where: read(logits, -1, *where))
    outputs = problem.new_outputs()
    padded = 1 << (count - 1).bit_length()
    fits = padded <= SORT_IN_SHARED
    workspace = None if fits else torch.empty(batch * padded, 2, dtype=torch.int64, device=device)
    launch("unmask_select_cuda", device, call, workspace, *outputs)
    return outputs


# ---- the head, fused ------------------------------------------------------------------------------------------------
@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Returns whether the GPU is a Hopper and the extension holds its kernels; NVRTC compiles those for any GPU."""
    return cuda_reason() is None and torch.cuda.get_device_capability(device) == (9, 0)


def head_blocks(problem: Problem) -> int:
    """Returns the blocks of the fused kernel, 0 where it cannot serve this call."""
    if problem.head_weight is None or unfused_reason(problem) or not is_hopper(problem.tokens.device):
        return 0
    return min(processors(problem.tokens.device), -(-problem.vocab // TILE))


def list_words(vocab: int, parts: int) -> int:
    """Returns the float32 words of a row's lists. Little of them is touched unless the call keeps most ids."""
    return (-(-vocab // TILE) + 1) * TILE_WORDS + parts * PART_WORDS


def unfused_reason(problem: Problem) -> str | None:
    """Returns None, or why hidden and head_weight do not suit the fused kernel: bulk copies take whole 16 bytes."""
    hidden, head = problem.source, problem.head_weight
    assert head is not None
    if problem.rule == rules.RENOISE:
        return "does not find the best token beside the one drawn, which Renoise reports"
    if hidden.dtype not in (torch.bfloat16, torch.float16) or head.dtype != hidden.dtype:
        return "takes bfloat16 or float16, hidden and head_weight alike"
    if not 0 < hidden.shape[0] * hidden.shape[1] <= gpu.FUSED_ROWS:
        return f"takes at most {gpu.FUSED_ROWS} candidate rows"
    if min(head.shape) == 0:
        return "takes a head that is not empty"
    for tensor in (hidden, head):
        strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
        if tensor.data_ptr() % 16 or any(stride <= 0 or stride % 8 for stride in strides):
            return "takes addresses and strides that are multiples of 16 bytes"
    return None


def run_head(problem: Problem, call: Call, blocks: int) -> None:
    hidden, head = problem.source, problem.head_weight
    assert head is not None
    head_stride = head.stride(0) if head.shape[0] > 1 else -(-head.shape[1] // 8) * 8
    strides = (hidden.stride(0), hidden.stride(1))
    operands = (DTYPES[hidden.dtype], hidden, *strides, head, head_stride, head.shape[1], blocks)
    launch("unmask_head_sm90a", problem.tokens.device, call, *operands)
    if problem.truncation:
        launch("unmask_draw_sm90a", problem.tokens.device, call)


# ---- the backend ----------------------------------------------------------------------------------------------------
def available() -> str | None:
    if (reason := rows_reason()) is not None:
        return reason
    if cuda_reason() is None and getattr(native(), "unmask_call_bytes", 0) != ctypes.sizeof(Call):
        return STALE
    return None


def supports(problem: Problem) -> str | None:
    if problem.group:
        return "ranks that share the vocab run on the reference"
    if problem.source.dtype == torch.float64:
        return "float64 is for the reference"
    if problem.vocab > 2**31 - 2**16:
        return "takes vocabularies below 2**31 - 2**16"
    return None
