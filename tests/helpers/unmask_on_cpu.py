"""Runs the cuda backend of unmask on CPU tensors: the kernels in the emulator, cuBLAS by torch."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import illada_kernels as ik
from illada_kernels.ops.unmask import cuda, gpu, op
from illada_kernels.testing import unmask_confidence_tolerance
from tests.cuda_on_cpu.emulated import Emulated, storage_of
from tests.cuda_on_cpu.library import GlobalArray, Kernels, compile_kernels, switchable, with_headers
from tests.helpers.triton_interpreter import on_cpu
from tests.helpers.unmask_oracle import MASK

SOURCES = (
    "csrc/cuda/unmask_select.cu",
    "csrc/cuda/unmask_rows.cu",
    "csrc/cuda/unmask_head_sm90a.cu",
    "csrc/cuda/unmask_bounds.cu",
    "csrc/cuda/unmask_draw_sm90a.cu",
)
HEADERS = ("unmask_bound.cuh", "unmask_lists.cuh", "unmask.cuh", "unmask_logits.cuh")
Faults = dict[str, tuple[str, str, str]]  # kernel, old, new, as `switchable` wants them
POINTERS = ("tokens", "forbid", "bias_ids", "bias_values", "head_bias", "defer", "partials", "bounds", "lists")
NESTED = {
    **dict.fromkeys(("positions", "noise_positions", "scores", "frozen"), "data"),
    **dict.fromkeys(gpu.Parameters._fields, "tensor"),
}


Launch = TypeVar("Launch", bound="OnCpu")


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


# ---- calls ----------------------------------------------------------------------------------------------------------
def operands(path: str, rows: tuple[int, int], vocabulary: int, dim: int = 72, seed: int = 0) -> tuple[Tensor, Any]:
    """(hidden, head) in bf16 of small integers / 8, exact in every order of summation, or (logits, None) of them."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-3, 4, (*rows, dim), generator=draw) / 8
    head = torch.randint(-8, 9, (vocabulary, dim), generator=draw) / 4
    return (hidden @ head.T, None) if path == "spans" else (hidden.bfloat16(), head.bfloat16())


def use(on_cpu: Backend, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu.processors = 2 if path == "head" else 0
    monkeypatch.setattr(gpu, "product_rows", lambda rows: 4)
    monkeypatch.setattr(gpu, "product_ids", lambda at_once: gpu.SLICE)


def where(rows: tuple[int, int], length: int, mask: int = MASK) -> tuple[Tensor, Tensor]:
    """All masked; positions in no order."""
    draw = torch.Generator().manual_seed(1)
    positions = torch.stack([torch.randperm(length, generator=draw)[: rows[1]] for _ in range(rows[0])])
    return torch.full((rows[0], length), mask), positions


def assert_same(got: Any, want: Any, vocabulary: int, by_entropy: bool = False) -> None:
    """Tokens and choices equal, confidences within the rounding of their sums."""
    (got, got_tokens), (want, want_tokens) = got, want
    assert torch.equal(got.proposal, want.proposal)
    rtol, atol = unmask_confidence_tolerance("neg_entropy" if by_entropy else "probability", vocabulary)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=rtol, atol=atol)
    assert torch.equal(got.committed, want.committed) and torch.equal(got.remaining, want.remaining)
    assert torch.equal(got_tokens, want_tokens)


# ---- planted faults --------------------------------------------------------------------------------------------------
@functools.cache
def with_faults(kernel: str, faults: tuple[tuple[str, str], ...], extended: bool, width: int) -> Kernels:
    """The kernel with the faults, a head for at most `width` rows, without the instances that are not called, which
    take most of the compiler's time."""
    text = with_headers(kernel, HEADERS)
    for other in {16, 32, 64} - {width}:
        text = text.replace(f"if (rows <= {other}) return run<T, {other}>(c, o, stream);", "")
    if width < 128:
        text = text.replace("return run<T, 128>(c, o, stream);", "return int(cudaErrorInvalidValue);")
    text = text.replace("if (dtype == ILLADA_F16) return choose<fp16>(c, o, on);", "")
    text = re.sub(r"case ILLADA_B?F16: return run<.*", "", text)
    if not extended:
        text = re.sub(r"[\w.]+ == ILLADA_RENOISE \? (\w+<.*true>) : (\w+<.*false>)", r"\2", text)
    text = re.sub(r"(?<!== )\b[\w.]+ \? (\w+<.*true>) : (\w+<.*false>)", r"\1" if extended else r"\2", text)
    return compile_kernels(kernel, text=switchable(text, faults))


def planted(
    faults: Faults,
    kernel: str,
    name: str | None,
    extended: bool = False,
    width: int = 16,
    of: type[Launch] = OnCpu,
    **run: Any,
) -> Launch:
    """The kernels, `kernel` with that one of its faults, or with none."""
    of_kernel = {key: (old, new) for key, (source, old, new) in faults.items() if source == kernel}
    one = with_faults(kernel, tuple(of_kernel.values()), extended, width)
    one.plant(list(of_kernel).index(name) + 1 if name else 0)
    launch = of(**run)
    launch.kernels[SOURCES.index(kernel)] = one
    return launch
