"""The key/value cache: rotated keys and values of every layer in fixed slots, written in place.

Keys are stored after RoPE, because a token never changes its position. A slot is as fresh as the last window that
covered it. In a block-causal model keys of finished blocks never change, so the cache is exact. In a fully
bidirectional model every committed token changes all keys a little, so a cache is an approximation; refreshes bound its
error (Fast-dLLM, arXiv 2505.22618).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from illada_kernels.layer import rope_to_cache

from ..config import ModelConfig


class Cache:
    """Holds `capacity` slots per sequence: 2 * n_layers * batch * capacity * n_kv_heads * head_dim elements."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch < 0 or capacity < 0:
            raise ValueError(f"batch, capacity: expected sizes of at least 0, got {batch} and {capacity}")
        shape = (config.n_layers, batch, capacity, config.n_kv_heads, config.head_dim)
        # Zeros, because a slot that no window has covered yet must be finite if the ranges let a query see it.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.keys.shape[2]

    def rows(self, first: int, last: int) -> Cache:
        """Returns the cache of sequences first .. last - 1, which shares this one's memory."""
        part = object.__new__(Cache)
        part.keys, part.values = self.keys[:, first:last], self.values[:, first:last]
        return part

    def at(self, start: int | Tensor, num_keys: int | None = None, keep: Tensor | None = None) -> CacheWindow:
        """Returns the window whose first token has slot `start`, an int or int64 (B,).

        Queries see the first `num_keys` slots, all by default. Only tokens where `keep`, bool (B, S), is true are
        written; None: all. Raises ValueError for sizes that do not fit.
        """
        num_keys = self.capacity if num_keys is None else num_keys
        if not 0 <= num_keys <= self.capacity:
            raise ValueError(f"num_keys: expected 0 .. {self.capacity} (the capacity), got {num_keys}")
        if isinstance(start, Tensor) and (start.dim() != 1 or start.shape[0] != self.keys.shape[1]):
            raise ValueError(f"start: expected an int or a slot per sequence ({self.keys.shape[1]}), got {start.shape}")
        return CacheWindow(self, start, num_keys, keep)


@dataclass(frozen=True)
class CacheWindow:
    """Says where a forward pass writes and how many slots it reads.

    An int start is checked against num_keys. Starts per sequence are clamped to it on the device, so a wrong one
    overwrites the last slot and never leaves the cache.
    """

    cache: Cache
    start: int | Tensor
    num_keys: int
    keep: Tensor | None = None

    def slots(self, length: int) -> Tensor:
        """Returns the slots of `length` tokens, int64 (1, length) or (B, length)."""
        row = torch.arange(length, device=self.cache.keys.device)[None]
        return row + (self.start[:, None] if isinstance(self.start, Tensor) else self.start)

    def rotate(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        kernels: ModuleType | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Applies RoPE to q and k and writes k and v (B, S, n_kv_heads, head_dim) into this window.

        Returns q, and views of the layer's first num_keys keys and values.
        """
        keys, values = self.cache.keys[layer, :, : self.num_keys], self.cache.values[layer, :, : self.num_keys]
        q = rope_to_cache(q, k, v, cos, sin, keys, values, self.start, self.keep, kernels=kernels)
        return q, keys, values
