"""Computes the bounds of KeyRanges on the device: int32 (B or 1, Sq or 1, 4), rows lo0, hi0, lo1, hi1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._checks import holds, known


def clamp_bounds(bounds: Tensor, num_keys: int) -> Tensor:
    """Returns bounds in normal form, as every backend reads them: each at least the one before it and at most
    num_keys."""
    return torch.cat(clamped(bounds, num_keys), dim=-1)


def clamped(bounds: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns clamp_bounds' parts, each (B, Sq, 1). To trace unbind and stack takes twice as long as split and cat."""
    lo0, hi0, lo1, hi1 = bounds.clamp(0, num_keys).split(1, -1)
    hi0 = torch.maximum(lo0, hi0)
    lo1 = torch.maximum(hi0, lo1)
    return lo0, hi0, lo1, torch.maximum(lo1, hi1)


def savable(bounds: Any) -> Any:
    """Returns bounds that autograd can save: not an inference tensor. A compiled call keeps what it is given."""
    if torch.compiler.is_compiling() or not isinstance(bounds, Tensor) or not bounds.is_inference():
        return bounds
    with torch.inference_mode(False):
        return bounds.clone()


def pack(lo0: Tensor, hi0: Tensor | int, lo1: Tensor | None = None, hi1: Tensor | None = None) -> Tensor:
    """Returns bounds from (B or 1, Sq or 1) parts. A missing second range is empty, at the end of the first."""
    end = hi0 if isinstance(hi0, Tensor) else torch.full_like(lo0, hi0)
    parts = torch.broadcast_tensors(lo0, end, end if lo1 is None else lo1, end if hi1 is None else hi1)
    return torch.stack(parts, dim=-1).to(torch.int32)


def documents(cu_seqlens: Tensor, tokens: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Returns start and end of the document of each token, both (..., N) like `tokens`; the token itself where it has
    none."""
    if not holds(cu_seqlens.shape[0] >= 1):
        raise ValueError("cu_seqlens: expected N + 1 offsets, got none; a batch without documents is [0]")
    tokens = tokens.to(cu_seqlens.dtype)
    after = torch.searchsorted(cu_seqlens.contiguous(), tokens.contiguous(), right=True)  # offsets at or before it
    last = cu_seqlens.shape[0] - 1
    inside = (after > 0) & (after <= last)
    start = torch.where(inside, cu_seqlens[(after - 1).clamp(0, last)], tokens)
    end = torch.where(inside, cu_seqlens[after.clamp(0, last)].clamp(max=limit), tokens)
    return start, end


def runs(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bounds (B, S, 4) of the first and the last run of True in bool (B, S, Sk), and how many runs there are,
    (B, S)."""
    num_keys = mask.shape[2]
    if known(num_keys == 0):
        zeros = torch.zeros(*mask.shape[:2], 4, dtype=torch.int32, device=mask.device)
        return zeros, zeros[..., 0]
    edge = torch.nn.functional.pad(mask, (1, 1))  # False on both sides
    starts = mask & ~edge[..., :-2]
    ends = mask & ~edge[..., 2:]
    key = torch.arange(num_keys, dtype=torch.int32, device=mask.device)
    count = starts.sum(-1, dtype=torch.int32)
    lo0 = torch.where(starts, key, num_keys).amin(-1)
    hi0 = torch.where(ends, key + 1, num_keys).amin(-1)
    hi1 = torch.where(ends, key + 1, 0).amax(-1)
    lo1 = torch.where(count > 1, torch.where(starts, key, 0).amax(-1), hi1)
    bounds = torch.stack([lo0, hi0, lo1, hi1], dim=-1)
    return torch.where(count[..., None] > 0, bounds, 0).to(torch.int32), count


def refuse(bad: Tensor, values: Tensor, expected: str, came: Callable[[int, int, int], str]) -> None:
    """Raises ValueError for the first True of bad (B, S): "expected, came(batch, row, value)". Synchronises once.

    Nothing else in a KeyRanges synchronises. A trace cannot: its graph asserts `expected` when it runs.
    """
    if torch.compiler.is_compiling() or is_fake(bad):
        torch._assert_async(~bad.any(), expected)
        return
    if bad.is_meta or bad.numel() == 0:
        return
    at = bad.flatten().to(torch.int32).argmax()
    first = torch.stack([bad.any().to(torch.int64), at, values.flatten()[at].to(torch.int64)])
    for found, index, value in _unwrapped(first).tolist():
        if found:
            batch, row = divmod(index, bad.shape[1])
            raise ValueError(f"{expected}, {came(batch, row, value)}")


def _unwrapped(x: Tensor) -> Tensor:
    """Returns x (n,) as (batch, n), where the batch is that of all torch.func.vmap around this call."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        where = functorch.maybe_get_bdim(x)
        x = functorch.get_unwrapped(x)
        x = x if where < 0 else x.movedim(where, 0)
    return x.reshape(-1, x.shape[-1])


def canonical(bounds: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Returns two ranges (..., 2) that do not touch; if only one has keys it is the first."""
    lo0, hi0, lo1, hi1 = clamped(bounds, num_keys)
    empty = lo0 == hi0
    join = empty | (hi0 == lo1)
    first = torch.cat([torch.where(empty, lo1, lo0), torch.where(join, hi1, hi0)], dim=-1)
    return first, torch.cat([torch.where(join, hi1, lo1), hi1], dim=-1)


def intersect(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns bounds of the intersection of two canonical pairs of ranges, and how many ranges it has; 3 do not fit.

    At most one of a0 & b1 and a1 & b0 has keys (ranges are ordered), and parts never touch (canonical ranges do not).
    """

    def meet(x: Tensor, y: Tensor) -> Tensor:
        low = torch.maximum(x[..., :1], y[..., :1])
        return torch.cat([low, torch.maximum(low, torch.minimum(x[..., 1:], y[..., 1:]))], dim=-1)

    def has_keys(x: Tensor) -> Tensor:
        return x[..., :1] < x[..., 1:]

    def else_next(this: Tensor, following: Tensor) -> Tensor:
        return torch.where(has_keys(this), this, following)

    first, middle, last = meet(a[0], b[0]), else_next(meet(a[0], b[1]), meet(a[1], b[0])), meet(a[1], b[1])
    parts = has_keys(first).int() + has_keys(middle).int() + has_keys(last).int()
    low = torch.where(parts > 0, else_next(else_next(first, middle), last), 0)
    high = torch.where(parts > 1, else_next(last, middle), low[..., 1:])
    return torch.cat([low, high], dim=-1), parts.squeeze(-1)
