"""Makes the types of Triton's interpreter cheap: it makes new ones for every operation, which takes three quarters of
its time. Types, shapes and constants are never changed, so that equal ones may be one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("triton", reason="no triton")

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def made_once(patch: pytest.MonkeyPatch) -> None:
    """Patches triton.language until `patch` is undone."""
    _tuples(patch)
    _blocks(patch)
    _tensors(patch)
    _numpy_types(patch)


def _tuples(patch: pytest.MonkeyPatch) -> None:
    """A tl.tuple computes its type when asked for it; the interpreter never asks. It compares values without copies."""
    make, find, compare = tl.tuple.__init__, tl.tuple.__getattr__, tl.tuple.__eq__

    def init(self: Any, args: Sequence[Any], type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            make(self, args, type)

    def getattr(self: Any, name: str) -> Any:
        if name != "type":
            return find(self, name)
        self.type = tl.core._type_for_tuple_values(self.values)
        return self.type

    def equal(self: Any, other: Any) -> tl.constexpr:
        if not isinstance(other, (tl.tuple, list, tuple)):
            return compare(self, other)
        return tl.constexpr(self.values == [tl.core._unwrap_if_constexpr(value) for value in other])

    patch.setattr(tl.tuple, "__init__", init)
    patch.setattr(tl.tuple, "__getattr__", getattr)
    patch.setattr(tl.tuple, "__eq__", equal)


def _blocks(patch: pytest.MonkeyPatch) -> None:
    """Types of blocks are made once, and shapes. Nothing is compared of a thing with itself."""
    make, made, shapes = tl.block_type.__init__, {}, {}  # type: ignore[var-annotated]
    equal, broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if type(size) is tl.constexpr else size for size in shape]
        if not all(type(size) is int for size in sizes):
            return make(self, element_ty, shape)  # which says what is wrong
        key = (element_ty.name, getattr(element_ty, "address_space", None), *sizes)
        if key not in made:
            make(self, element_ty, shape)
            self.shape = shapes.setdefault(tuple(sizes), self.shape)
            made[key] = self.__dict__
        self.__dict__ = made[key]

    def same_shape(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        return (lhs, rhs) if a.is_block() and b.is_block() and a.shape is b.shape else broadcast(self, lhs, rhs)

    patch.setattr(tl.block_type, "__init__", init)
    patch.setattr(tl.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    patch.setattr(TritonSemantic, "broadcast_impl_value", same_shape)


def _tensors(patch: pytest.MonkeyPatch) -> None:
    shapes: dict[tuple[int, ...], tuple[tl.tuple, tl.constexpr]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        self.shape, self.numel = shapes[sizes]
        self.handle, self.type, self.dtype = handle, type, type.scalar

    patch.setattr(tl.tensor, "__init__", init)


def _numpy_types(patch: pytest.MonkeyPatch) -> None:
    find, found = interpreter._get_np_dtype, {}  # type: ignore[var-annotated]

    def get(tt_dtype: Any) -> Any:
        if tt_dtype.name not in found:
            found[tt_dtype.name] = find(tt_dtype)
        return found[tt_dtype.name]

    patch.setattr(interpreter, "_get_np_dtype", get)
