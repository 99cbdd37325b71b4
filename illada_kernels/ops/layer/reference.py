"""Computes the row functions in torch's operations: the specification. It has gradients, runs on every device, and
a compiler fuses it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def available() -> None:
    return None


def supports(tensors: Sequence[Tensor]) -> None:
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, in_fp32: bool) -> Tensor:
    if in_fp32 and x.dtype != torch.float64:
        return (F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight.float()).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def write_to_cache(new: Tensor, held: Tensor, start: int | Tensor, keep: Tensor | None) -> None:
    """Writes new (B, S, kv_heads, D) into slots of held (B, slots, kv_heads, D), without a gradient or tangent."""
    batch, length = new.shape[:2]
    where: tuple[slice | Tensor, slice | Tensor]
    if isinstance(start, Tensor):
        places = torch.arange(length, device=new.device)[None] + start[:, None]
        where = (torch.arange(batch, device=new.device)[:, None], places.clamp(0, held.shape[1] - 1))
    else:
        where = (slice(None), slice(start, start + length))
    new = new.detach().to(held.dtype)
    held[where] = new if keep is None else torch.where(keep[..., None, None], new, held[where])
