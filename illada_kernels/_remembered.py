"""Keeps what was computed from tensors, for calls that bring the same ones again: the layers of a model, mostly."""

from __future__ import annotations

import ctypes
import weakref
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from ._torch_ops import is_plain, is_watched

T = TypeVar("T")


def allows(tensors: Sequence[Tensor]) -> bool:
    """Returns whether results may be kept: nothing watches, and the tensors are plain ones with a version."""
    if is_watched() or not is_plain(tensors):
        return False
    for x in tensors:
        if x.is_inference():
            return False
    return True


class Remembered(Generic[T]):
    """Results by the tensors they were computed from, of which each may be a new view of the same tensor.

    A result is dropped with one of these tensors, and computed anew once one was written to: by its version, and on a
    CPU by its CRC-32, which .data and NumPy change too. At most `most` are kept, because a buffer that lives as long as
    its model is cut anew in each step of decoding.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: dict[Hashable, tuple[list[weakref.ref[Tensor]], list[tuple[int, int]], T]] = {}

    def get(self, tensors: Sequence[Tensor], also: Hashable, compute: Callable[[], T]) -> T:
        """Returns compute(), or what that gave for these tensors (`allows`) and `also`, all else that it reads."""
        bases, state, key = [], [], [also]
        for x in tensors:
            bases.append(base := x if x._base is None else x._base)
            state.append((x._version, crc(x)))
            key.append((id(base), x.data_ptr(), x.shape, x.stride(), x.dtype))
        name = tuple(key)
        kept = self.kept.get(name)
        if kept is not None and kept[1] == state:
            for owner, base in zip(kept[0], bases):
                if owner() is not base:
                    break
            else:
                return kept[2]
        result = compute()
        for oldest in list(self.kept)[: max(len(self.kept) - self.most + 1, 0)]:
            self.kept.pop(oldest, None)
        self.kept[name] = [weakref.ref(base, lambda _: self.kept.pop(name, None)) for base in bases], state, result
        return result


def crc(x: Tensor) -> int:
    """Returns the CRC-32 of the memory from a tensor's first to its last element, at 2 GB/s; 0 on other devices than
    the CPU."""
    if x.device.type != "cpu" or x.numel() == 0:
        return 0
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return zlib.crc32((ctypes.c_char * (elements * x.itemsize)).from_address(x.data_ptr()))
