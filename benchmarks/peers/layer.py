"""RMSNorm and RoPE as plain PyTorch writes them, for the loops that our models are compared with."""

from __future__ import annotations

import torch
from illada.model import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F


def plain_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Computes what the module computes; an Identity returns x."""
    if not isinstance(module, RMSNorm):
        return x
    if module.in_fp32:
        return (F.rms_norm(x.float(), x.shape[-1:], None, module.eps) * module.weight.float()).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], None, module.eps) * module.weight


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim / 2]) of x (B, S, H, head_dim) in the dtype of cos."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
