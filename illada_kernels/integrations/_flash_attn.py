"""Replaces flash-attn's functions for `patch`: the same arguments, our attention."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from .._remembered import Remembered, allows
from .._streams import reuse
from ..key_ranges import KeyRanges
from ..ops.attention import attention


def wanted() -> dict[str, tuple[Any, Any]]:
    """Returns {name: (theirs, ours)}; nothing where flash-attn is not imported."""
    theirs = sys.modules.get("flash_attn")
    ours = (flash_attn_func, flash_attn_varlen_func)
    return {f.__name__: (getattr(theirs, f.__name__), f) for f in ours if hasattr(theirs, f.__name__)}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Computes attention of q (B, Sq, Hq, D) to k and v (B, Sk, Hkv, D); a causal mask ends in the last key."""
    _refuse(dropout_p, softcap, alibi_slopes, return_attn_probs)
    ranges = None
    if causal or tuple(window_size) != (-1, -1):
        where = reuse(q.device)
        make = _of_batch if where is None else _cached_of_batch
        ranges = make(q.shape[1], k.shape[1], causal, tuple(window_size), q.device, where)
    return attention(q, k, v, ranges, scale=softmax_scale)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Computes attention within sequences that lie end to end: q (total, Hq, D), k and v (total, Hkv, D). Rows outside
    of all sequences, such as padding behind the last offset, give 0."""
    _refuse(dropout_p, softcap, alibi_slopes, return_attn_probs)
    if block_table is not None:
        raise ValueError("block_table: expected None, paged caches are not supported; unpatch the model")
    offsets, where, window = (cu_seqlens_q, cu_seqlens_k), reuse(q.device), tuple(window_size)
    make = functools.partial(_of_sequences, *offsets, len(q), len(k), causal, window)
    if where is None or not allows(offsets):
        ranges = make()
    else:
        ranges = _sequences.get(offsets, (len(q), len(k), causal, window, where), make)
    return attention(q[None], k[None], v[None], ranges, scale=softmax_scale)[0]


# ---- masks, which all layers share -----------------------------------------------------------------------------------


def _of_batch(
    queries: int, keys: int, causal: bool, window: tuple[int, ...], device: torch.device, where: Any
) -> KeyRanges:
    last = torch.arange(keys - queries, keys, device=device)
    return _ranges(torch.zeros_like(last), torch.full_like(last, keys), last, causal, window, keys)


_cached_of_batch = functools.lru_cache(64)(_of_batch)
_sequences = Remembered[KeyRanges](256)


def _of_sequences(
    of_q: Tensor, of_k: Tensor, queries: int, keys: int, causal: bool, window: tuple[int, ...]
) -> KeyRanges:
    row = torch.arange(queries, device=of_q.device)
    begins, ends = (torch.cat([x, x[-1:]]).long() for x in (of_q, of_k))  # then rows that follow see no key
    sequence = torch.searchsorted(begins[:-1], row, right=True) - 1
    low, high = ends[sequence], ends[sequence + 1]
    last = high - begins[sequence + 1] + row
    return _ranges(low, high, last, causal, window, keys)


def _ranges(low: Tensor, high: Tensor, last: Tensor, causal: bool, window: tuple[int, ...], keys: int) -> KeyRanges:
    """Returns ranges of queries that see keys from `low` to `high` and stand at the key `last`, all (Sq,)."""
    left, right = window[0], 0 if causal else window[1]
    if left >= 0:
        low = torch.minimum(torch.maximum(low, last - left), high)
    if right >= 0:
        high = torch.maximum(torch.minimum(high, last + right + 1), low)
    return KeyRanges(torch.stack([low, high, high, high], -1)[None].to(torch.int32), keys)


def _refuse(dropout_p: float, softcap: float, alibi_slopes: Tensor | None, return_attn_probs: bool) -> None:
    asked = {
        "dropout_p": dropout_p,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "return_attn_probs": return_attn_probs,
    }
    for name, value in asked.items():
        if value is not None and (isinstance(value, Tensor) or value):
            raise ValueError(
                f"{name}: expected none in a patched model, got {value!r}; leave it out, or unpatch the model"
            )
