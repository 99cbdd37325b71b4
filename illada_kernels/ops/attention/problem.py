"""The validated call of attention: what the operator's schema is made of, and what every backend takes."""

import array
from typing import NamedTuple

import torch
from torch import Tensor

MAX_GPU_SCALE = 1e38  # beyond it scale * log2(e) overflows float32


class Problem(NamedTuple):
    q: Tensor  # (B, Sq, Hq, D)
    k: Tensor  # (B, Sk, Hkv, D)
    v: Tensor  # (B, Sk, Hkv, Dv)
    bounds: Tensor | None = None  # int32 (B or 1, Sq or 1, 4); None: every query sees every key
    scale: float = 1.0
    deterministic: bool = True
    backend: str = ""

    def sizes(self) -> tuple[int, ...]:
        """Returns batch, queries, keys, heads, kv_heads, D and Dv."""
        batch, queries, heads, dim = self.q.shape
        return batch, queries, self.k.shape[1], heads, self.k.shape[2], dim, self.v.shape[3]


def element_strides(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, *rest: Tensor) -> "array.array[int]":
    """Returns the strides of batch, row and head of q, k and v, then of batch and row of the bounds (0 where they are
    broadcast), then of batch, row and head of the rest."""
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    strides += [0, 0] if bounds is None else [bounds.stride(i) if bounds.shape[i] > 1 else 0 for i in (0, 1)]
    return array.array("q", strides + [s for x in rest for s in x.stride()[:3]])


def contiguous_bounds(bounds: Tensor | None) -> Tensor | None:
    """Returns the bounds with the four numbers of a row side by side."""
    return bounds if bounds is None or bounds.stride(2) == 1 else bounds.contiguous()


def upstream(dout: Tensor | None, out: Tensor) -> Tensor:
    """Returns the gradient of out with a contiguous last dimension, zeros for None. An expanded one has stride 0."""
    if dout is None:
        return torch.zeros_like(out)
    return dout if dout.stride(3) == 1 or dout.shape[3] == 1 else dout.contiguous()
