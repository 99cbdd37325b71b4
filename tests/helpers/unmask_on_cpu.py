"""Runs the cuda backend of unmask on CPU tensors: the kernels in the emulator, cuBLAS by torch."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

import illada_kernels as ik
from illada_kernels.ops.unmask import cuda, gpu, op
from tests.cuda_on_cpu.emulated import Emulated, storage_of
from tests.cuda_on_cpu.library import GlobalArray
from tests.helpers.triton_interpreter import on_cpu

SOURCES = ("csrc/cuda/unmask_select.cu", "csrc/cuda/unmask_rows.cu", "csrc/cuda/unmask_head_sm90a.cu")
POINTERS = ("tokens", "forbid", "bias_ids", "bias_values", "head_bias", "defer", "partials")
NESTED = {
    **dict.fromkeys(("positions", "noise_positions", "scores", "frozen"), "data"),
    **dict.fromkeys(gpu.Parameters._fields, "tensor"),
}


class OnCpu(Emulated):
    """Also what the record of a call points to is copied into guarded memory and back. `launches`: the names."""

    def __init__(self, *sources: str, **options: Any) -> None:
        super().__init__(*(sources or SOURCES), **options)
        self.launches: list[str] = []

    def __call__(self, function: str, device: torch.device, record: cuda.Call, *arguments: Any) -> None:
        self.launches.append(function)
        copy, arrays = cuda.Call.from_buffer_copy(record), []
        by_pointer = {t.data_ptr(): t for t in record.tensors if t.numel()}

        def place(holder: Any, field: str) -> None:
            tensor = by_pointer.get(getattr(holder, field))
            if tensor is not None:
                array = GlobalArray(storage_of(tensor), field)
                arrays.append((tensor, array))
                setattr(holder, field, array.pointer)

        for name in POINTERS:
            place(copy, name)
        for name, field in NESTED.items():
            place(getattr(copy, name), field)
        super().__call__(function, device, ctypes.c_void_p(ctypes.addressof(copy)), *arguments)
        for tensor, array in arrays:
            storage_of(tensor).copy_(array.tensor)
        self.last = {}  # the emulator may be gone before a cached instance is


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a.float(), b.float(), out=out)


class Backend:
    """Calls the cuda backend on the CPU. processors: blocks of the fused head, 0 for a GPU without Hopper."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: OnCpu, processors: int = 2) -> None:
        self.launch, self.processors = launch, processors
        monkeypatch.setattr(cuda, "launch", launch)
        monkeypatch.setattr(cuda, "is_hopper", lambda device: self.processors > 0)
        monkeypatch.setattr(cuda, "processors", lambda device: self.processors)
        monkeypatch.setattr(gpu, "product", product)
        operator = op.OPERATOR
        here = tuple(on_cpu(b) if b.name == "cuda" else b for b in operator.backends)
        monkeypatch.setattr(operator, "backends", here)


def unmask(backend: str, source: Tensor, head: Tensor | None, tokens: Tensor, *args: Any, **options: Any) -> Any:
    """(result, tokens after), of `unmask` or, without a head, `unmask_from_logits`."""
    tokens = tokens.clone()
    operands = (source,) if head is None else (source, head)
    function = ik.unmask_from_logits if head is None else ik.unmask
    return function(*operands, tokens, *args, backend=backend, **options), tokens
