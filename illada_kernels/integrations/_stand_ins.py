"""Replaces torch's functions for `patch`: the same arguments, our ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..key_ranges import KeyRanges
from ..ops.attention import scaled_dot_product_attention as ours
from ..ops.masked_loss import masked_loss_from_logits
from .transformers import MaskBounds, ranges_of


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | KeyRanges | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Computes `illada_kernels.scaled_dot_product_attention`.

    A mask may be what our mask function for transformers builds.
    """
    if isinstance(attn_mask, MaskBounds):
        attn_mask = ranges_of(attn_mask, key.shape[-2])
    return ours(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes torch.nn.functional.cross_entropy by `masked_loss_from_logits`, float32 whatever the logits are.

    Class weights, probabilities as targets and the old arguments go to torch. The mean of no token is NaN, as in torch.
    """
    plain = weight is None and size_average is None and reduce is None
    if not plain or target.dtype != torch.int64 or input.dim() not in (1, 2) or target.dim() != input.dim() - 1:
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    masked = target != ignore_index
    how = "sum" if reduction == "mean" else reduction
    loss = masked_loss_from_logits(input, target, masked, reduction=how, label_smoothing=label_smoothing)
    return (loss / masked.sum() if reduction == "mean" else loss).to(input.dtype)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss by `cross_entropy` above."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
