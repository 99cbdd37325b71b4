"""The sizes and strides of a call of RoPE, which every layer of a pass shares: looked at once, then found."""

from __future__ import annotations

import array
import functools
from collections.abc import Sequence
from typing import NamedTuple


class Rope(NamedTuple):
    """strides: batch, token and head of q, k, v, keys and values, then the batch of the contiguous cos and sin."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    slots: int
    strides: array.array[int]


@functools.lru_cache(maxsize=4096)
def rope(shapes: Sequence[Sequence[int]], *strides: Sequence[int]) -> Rope | None:
    """Returns what kernels need to know of q, k, v, keys, values (`shapes`, `strides`), cos and sin (`shapes`), or None
    where they do not fit each other, a head does not lie in one piece or elements of a cache share memory."""
    q, k, v, keys, values, cos, sin = shapes
    if any(len(shape) != 4 for shape in shapes):
        return None
    (batch, length, heads, dim), kv_heads, slots = q, k[2], keys[1]
    fit = (
        tuple(k) == tuple(v) == (batch, length, kv_heads, dim)
        and tuple(keys) == tuple(values) == (batch, slots, kv_heads, dim)
        and tuple(cos) == tuple(sin)
        and tuple(cos[1:]) == (length, 1, dim // 2)
        and cos[0] in (1, batch)
        and dim % 2 == 0
        and all(stride[3] == 1 for stride in strides)
        and _lies_apart(keys, strides[3])
        and _lies_apart(values, strides[4])
    )
    if not fit:
        return None
    angles = length * (dim // 2) if cos[0] > 1 else 0
    return Rope(
        batch, length, heads, kv_heads, dim, slots, array.array("q", [*(s for x in strides for s in x[:3]), angles])
    )


def _lies_apart(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Returns whether no two elements share memory, so that no two programs write to one place."""
    reach = 1  # elements from the first to the last of the dimensions so far, from the smallest stride on
    for stride, size in sorted(zip(strides, shape)):
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return True
