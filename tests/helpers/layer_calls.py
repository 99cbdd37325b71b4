"""Inputs of illada_kernels.layer."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def heads(batch: int, length: int, many: int, few: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v as views of one product, as a layer has them."""
    qkv = torch.randn(batch, length, many + 2 * few, dim).to(dtype)
    return qkv.split((many, few, few), dim=2)


def angles(batch: int, length: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = 6 * torch.rand(batch, length, 1, dim // 2)
    return angle.cos(), angle.sin()
