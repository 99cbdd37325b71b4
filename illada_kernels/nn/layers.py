"""The ops as layers of the `kernels` package of Hugging Face, which puts a layer's forward into a foreign module.

It asks that a layer have no constructor and no members but `forward`, `has_backward` and `can_torch_compile`; so each
runs its op with the default options. `self` is the foreign module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..key_ranges import KeyRanges
from ..ops.attention import attention, scaled_dot_product_attention
from ..ops.masked_loss import masked_loss, masked_loss_from_logits
from ..ops.unmask import Unmasked, unmask, unmask_from_logits
from ..rules import Rule

__all__ = [
    "Attention",
    "MaskedLoss",
    "MaskedLossFromLogits",
    "ScaledDotProductAttention",
    "Unmask",
    "UnmaskFromLogits",
]


class Attention(torch.nn.Module):
    """`attention` with heads third, grouped heads unrepeated."""

    has_backward = True
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges | None = None) -> Tensor:
        return attention(q, k, v, key_ranges)


class ScaledDotProductAttention(torch.nn.Module):
    """`scaled_dot_product_attention` with heads second, grouped heads unrepeated."""

    has_backward = True
    can_torch_compile = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | KeyRanges | None = None) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=True)


class MaskedLoss(torch.nn.Module):
    """`masked_loss`, the weighted sum."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden: Tensor, head_weight: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        return masked_loss(hidden, head_weight, targets, masked, weight)


class MaskedLossFromLogits(torch.nn.Module):
    """`masked_loss_from_logits`, the weighted sum."""

    has_backward = True
    can_torch_compile = True

    def forward(self, logits: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None = None) -> Tensor:
        return masked_loss_from_logits(logits, targets, masked, weight)


class Unmask(torch.nn.Module):
    """`unmask`, one greedy step in place on tokens."""

    has_backward = False
    can_torch_compile = True

    def forward(
        self, hidden: Tensor, head_weight: Tensor, tokens: Tensor, positions: Tensor, rule: Rule, mask_id: int
    ) -> Unmasked:
        return unmask(hidden, head_weight, tokens, positions, rule, mask_id=mask_id)


class UnmaskFromLogits(torch.nn.Module):
    """`unmask_from_logits`, one greedy step in place on tokens."""

    has_backward = False
    can_torch_compile = True

    def forward(self, logits: Tensor, tokens: Tensor, positions: Tensor, rule: Rule, mask_id: int) -> Unmasked:
        return unmask_from_logits(logits, tokens, positions, rule, mask_id=mask_id)
