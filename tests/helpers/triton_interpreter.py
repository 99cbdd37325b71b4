"""Runs the Triton kernels of a room on a CPU, in Triton's interpreter, within a `with` block and nowhere else.

    with interpreted(op):                      # op: the room's module that holds OPERATOR, or BACKENDS alone
        attention(q, k, v, backend="triton")   # tensors on the CPU

Triton chooses its interpreter while it decorates a kernel (TRITON_INTERPRET=1), once per process, and a process that
has chosen it can compile no kernel any more. Here a kernel stays a JITFunction, which tests/gpu_code compiles; only
within the block do launches and device calls of one, Triton's own library included, go to the interpreter. Import the
kernels before, and guard launches by `torch.cuda.device_of(x)`, which is nothing on a CPU. Beyond what Triton does
- every load and store must lie within a tensor passed to the launch, or KernelFault names the kernel and the address;
- lanes masked off without `other` load NaN (-1 for integers; scalars 0), as nothing is promised about them;
- bfloat16 products and conversions are right (Triton 3.6 multiplies the bits as integers and truncates); other bfloat16
  arithmetic is not: kernels convert to float32 first, as they should.
"""

from __future__ import annotations

import ast
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from illada_kernels._dispatch import Backend
from tests.helpers.triton_replay import assigned, replayed

triton = pytest.importorskip("triton", reason="no triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


class KernelFault(Exception):
    pass


class Available:
    """A backend's module that says it can run here."""

    DEVICE = "cpu"  # which the module of ops.layer names

    def __init__(self, module: Any) -> None:
        self.module = module

    def available(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def on_cpu(backend: Backend) -> Backend:
    """The backend, taking tensors on the CPU whatever this machine has."""
    return replace(backend, devices=("cpu",), module=lambda: Available(backend.module()))


@contextmanager
def interpreted(room: ModuleType, backend: str = "triton", overflow: bool = False) -> Iterator[None]:
    """`backend` of the room takes tensors on the CPU, and Triton kernels run in the interpreter. `overflow`: integer
    arithmetic that leaves its type is an error; half as fast."""
    holder, held = (room.OPERATOR, "backends") if hasattr(room, "OPERATOR") else (room, "BACKENDS")
    names = [b.name for b in getattr(holder, held)]
    assert backend in names, f"{room.__name__} has {names}"
    here = tuple(on_cpu(b) if b.name == backend else b for b in getattr(holder, held))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, held, here)
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=overflow, debug=overflow)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        _redirect(patch)
        yield


def _redirect(patch: pytest.MonkeyPatch) -> None:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(knobs.runtime, "interpret", True)
            _language(inner, interpreter.interpreter_builder.options.sanitize_overflow)
            _guard(inner, self.fn.__name__, tensors)
            try:
                with np.errstate(all="ignore"):  # a GPU says nothing about NaN and overflow
                    interpreter.GridExecutor(rewritten(self), self.arg_names, grid)(*args, **kwargs)
            except interpreter.InterpreterError as error:
                raise _innermost(error) from error

    def call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return rewritten(self)(*args, **kwargs)

    def bind(self: JITFunction, instance: Any, _: type) -> Any:  # x.sum(0): a JITFunction is an attribute of tl.tensor
        return self if instance is None else partial(self, instance)

    patch.setattr(JITFunction, "run", run)
    patch.setattr(JITFunction, "__call__", call)
    patch.setattr(JITFunction, "__get__", bind, raising=False)
    # tensors are on the CPU already; the copies there and back would take all of a storage of which a view is passed
    patch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    patch.setattr(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))
    patch.setattr(interpreter, "_implicit_cvt", _typed(interpreter._implicit_cvt))
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot(interpreter.InterpreterBuilder.create_dot))
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast(interpreter.InterpreterBuilder.cast_impl))


_functions: dict[Callable[..., Any], Callable[..., Any]] = {}
_codes: dict[str, CodeType] = {}  # by source: modules with a planted fault hold the same functions but one


def rewritten(kernel: JITFunction) -> Callable[..., Any]:
    """The kernel as Triton's interpreter has it: numbers that are assigned become tensors."""
    if kernel.fn not in _functions:
        if kernel.src not in _codes:
            tree = ast.fix_missing_locations(interpreter.ASTTransformer().visit(ast.parse(kernel.src)))
            before = len(kernel.raw_src) - len(kernel.src.splitlines())  # decorators
            ast.increment_lineno(tree, kernel.starting_line_number + before - 1)
            _codes[kernel.src] = compile(tree, kernel.fn.__code__.co_filename, "exec")
        names: dict[str, Any] = {}
        kernel.fn.__globals__["interpreter_semantic"] = interpreter.interpreter_semantic
        exec(_codes[kernel.src], kernel.fn.__globals__, names)
        _functions[kernel.fn] = names[kernel.fn.__name__]
    return _functions[kernel.fn]


def _by_name(original: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[str, Any] = {}

    def get(dtype: tl.dtype) -> Any:
        if dtype.name not in found:
            found[dtype.name] = original(dtype)
        return found[dtype.name]

    return get


def _typed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers that kernels are launched with, as their type: 2**31 is an int64, which Triton keeps as uint32."""

    def converted(argument: Any) -> Any:
        value = original(argument)
        if isinstance(value, tl.tensor):
            value.handle.data = value.handle.data.astype(interpreter._get_np_dtype(value.type))
        return value

    return converted


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


# ---- triton.language -------------------------------------------------------------------------------------------------
PLACES = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)  # what the interpreter patches


def _language(patch: pytest.MonkeyPatch, overflow: bool) -> None:
    for place, name, value in _members(overflow):
        patch.setattr(place, name, value, raising=False)
    patch.setattr(interpreter.interpreter_semantic, "to_tensor", assigned, raising=False)
    patch.setattr(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None))


@cache
def _members(overflow: bool) -> list[tuple[Any, str, Any]]:
    """What the interpreter makes of triton.language, with its wrappers of builtins replaced by ours."""
    before = [dict(vars(place)) for place in PLACES]
    try:
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        patched = [
            (place, name, value)
            for place, old in zip(PLACES, before)
            for name, value in vars(place).items()
            if old.get(name) is not value
        ]
    finally:
        for place, old in zip(PLACES, before):
            for name, value in list(vars(place).items()):
                if name not in old:
                    delattr(place, name)
                elif old[name] is not value:
                    setattr(place, name, old[name])
    members = []
    for place, name, value in patched:
        builtin = (getattr(value, "__kwdefaults__", None) or {}).get("member")
        members.append((place, name, replayed(builtin, overflow) if builtin else value))
    return members


# ---- memory ----------------------------------------------------------------------------------------------------------


def _guard(patch: pytest.MonkeyPatch, kernel: str, tensors: list[torch.Tensor]) -> None:
    spans = sorted(_span(x) for x in tensors if x.numel())
    merged: list[list[int]] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    starts = [0, *(start for start, _ in merged)]
    begins, ends = (np.array([0, *(m[i] for m in merged)], dtype=np.uint64) for i in (0, 1))

    def check(what: str, pointers: Any, mask: Any) -> None:
        addresses, used = pointers.data, mask.data
        if not used.all():
            addresses = addresses[np.broadcast_to(used.astype(bool), addresses.shape)]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if int(addresses.max()) + size <= ends[bisect_right(starts, int(addresses.min())) - 1]:
            return
        inside = addresses + np.uint64(size) <= ends[np.searchsorted(begins, addresses, side="right") - 1]
        if not inside.all():
            address, program = int(addresses[~inside][0]), tuple(interpreter.interpreter_builder.grid_idx)
            near = [f"{address - x.data_ptr():+d} bytes from {tuple(x.shape)} {x.dtype}" for x in tensors]
            raise KernelFault(f"{kernel}, program {program}: {what} outside of every tensor: {'; '.join(near)}")

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        check("loads", pointers, mask)
        if other is None:
            dtype = interpreter._get_np_dtype(pointers.get_element_ty())
            garbage = 0xFF if pointers.data.size > 1 else 0  # of a scalar, Triton itself takes `other=0` for none given
            other = np.full((*pointers.data.shape, dtype.itemsize), garbage, np.uint8).view(dtype)[..., 0]
            other = interpreter.TensorHandle(other, pointers.get_element_ty())
        return masked_load(self, pointers, mask, other, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check("stores", pointers, mask)
        return masked_store(self, pointers, value, mask, *rest, **options)

    masked_load = interpreter.InterpreterBuilder.create_masked_load
    masked_store = interpreter.InterpreterBuilder.create_masked_store
    patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)


def _span(x: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


# ---- bfloat16, whose bits the interpreter keeps as uint16 ------------------------------------------------------------


def _to_float(handle: Any) -> Any:
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _to_bfloat(x: Any) -> Any:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest_even).astype(np.uint16)


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_to_float(x), tl.float32) for x in (a, b))
        return original(self, a, b, d, *rest)

    return dot


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return interpreter.TensorHandle(_to_float(source), to.scalar)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat(source.data), to.scalar)
        return original(self, source, to)

    return cast
