"""A module for each op: it holds the op's options, nothing else; no parameters, no buffers.

`layers` holds the same without options, as the `kernels` package of Hugging Face loads them.
"""

from __future__ import annotations

from typing import Any

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


class _Op(torch.nn.Module):
    """Holds keyword arguments of an op, which `forward` adds to those of the call."""

    accepted: tuple[str, ...] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in self.accepted:
                kind = type(self).__name__
                raise TypeError(f"{kind}: expected options among {', '.join(self.accepted)}, got {name!r}")
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Attention(_Op):
    """Runs `illada_kernels.attention` as a module.

    Options, by keyword, are those of `attention`: scale, return_lse, deterministic, backend.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import KeyRanges
    >>> from illada_kernels.nn import Attention
    >>> attend = Attention(scale=0.125)
    >>> q = torch.randn(2, 6, 4, 8)
    >>> attend(q, q, q, KeyRanges.causal(6)).shape
    torch.Size([2, 6, 4, 8])
    """

    accepted = ("scale", "return_lse", "deterministic", "backend")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns (B, Sq, Hq, Dv) from q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv); with return_lse
        also lse (B, Hq, Sq)."""
        return attention(q, k, v, key_ranges, **self.options)


class ScaledDotProductAttention(_Op):
    """Runs `illada_kernels.scaled_dot_product_attention`, torch's signature, as a module.

    Options, by keyword, are those of `scaled_dot_product_attention`: dropout_p, is_causal, scale, enable_gqa,
    backend.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.nn import ScaledDotProductAttention
    >>> q = torch.randn(2, 4, 6, 8)  # heads first
    >>> ScaledDotProductAttention(is_causal=True)(q, q, q).shape
    torch.Size([2, 4, 6, 8])
    """

    accepted = ("dropout_p", "is_causal", "scale", "enable_gqa", "backend")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | KeyRanges | None = None) -> Tensor:
        """Returns (B, Hq, Sq, Dv) from query (B, Hq, Sq, D), key (B, Hkv, Sk, D) and value (B, Hkv, Sk, Dv)."""
        return scaled_dot_product_attention(query, key, value, attn_mask, **self.options)


class MaskedLoss(_Op):
    """Runs `illada_kernels.masked_loss` as a module.

    Options, by keyword, are those of `masked_loss`: reduction, softcap, label_smoothing, z_loss, forbid,
    max_masked, memory_budget, backend.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.nn import MaskedLoss
    >>> loss = MaskedLoss(reduction="mean")
    >>> targets, masked = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    >>> loss(torch.zeros(2, 3, 8), torch.randn(100, 8), targets, masked)  # log(100)
    tensor(4.6052)
    """

    accepted = (
        "reduction",
        "softcap",
        "label_smoothing",
        "z_loss",
        "forbid",
        "max_masked",
        "memory_budget",
        "backend",
    )

    def forward(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        masked: Tensor,
        weight: Tensor | None = None,
        head_bias: Tensor | None = None,
    ) -> Tensor:
        """Returns the float32 loss of hidden (..., D) under head_weight (V, D) against targets (...) where masked."""
        return masked_loss(hidden, head_weight, targets, masked, weight, head_bias=head_bias, **self.options)


class MaskedLossFromLogits(_Op):
    """Runs `illada_kernels.masked_loss_from_logits` as a module.

    Options, by keyword, are those of `masked_loss_from_logits`: reduction, softcap, label_smoothing, z_loss,
    forbid, max_masked, backend.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.nn import MaskedLossFromLogits
    >>> MaskedLossFromLogits()(torch.zeros(3, 100), torch.tensor([5, 6, -1]), torch.tensor([True, True, False]))
    tensor(9.2103)
    """

    accepted = ("reduction", "softcap", "label_smoothing", "z_loss", "forbid", "max_masked", "backend")

    def forward(self, logits: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the float32 loss of logits (..., V) against targets (...) where masked."""
        return masked_loss_from_logits(logits, targets, masked, weight, **self.options)


class Unmask(_Op):
    """Runs `illada_kernels.unmask`, one decoding step in place on `tokens`, as a module.

    Parameters
    ----------
    rule : rule of illada_kernels, such as TopK
    mask_id : int

    Notes
    -----
    Options, by keyword, are those of `unmask`: confidence, order, rank_temperature, temperature,
    confidence_temperature, seed, top_k, top_p, min_p, forbid, defer, logit_bias, revise, backend.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import TopK
    >>> from illada_kernels.nn import Unmask
    >>> step = Unmask(TopK(1), mask_id=4)
    >>> tokens = torch.tensor([[0, 4, 4]])
    >>> step(torch.randn(1, 2, 8), torch.randn(5, 8), tokens, torch.tensor([[1, 2]])).remaining
    tensor([1], dtype=torch.int32)
    """

    accepted = (
        "confidence",
        "order",
        "rank_temperature",
        "temperature",
        "confidence_temperature",
        "seed",
        "top_k",
        "top_p",
        "min_p",
        "forbid",
        "defer",
        "logit_bias",
        "revise",
        "backend",
    )

    def __init__(self, rule: Rule, *, mask_id: int, **options: Any) -> None:
        super().__init__(**options)
        self.rule, self.mask_id = rule, mask_id

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"{self.rule!r}, mask_id={self.mask_id}", super().extra_repr())))

    def forward(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        tokens: Tensor,
        positions: Tensor,
        step: int | Tensor = 0,
        frozen: Tensor | None = None,
        head_bias: Tensor | None = None,
        noise_positions: Tensor | None = None,
    ) -> Unmasked:
        """Commits into tokens (B, L) at positions (B, K) what hidden (B, K, D) and head_weight (V, D) propose."""
        return unmask(
            hidden,
            head_weight,
            tokens,
            positions,
            self.rule,
            mask_id=self.mask_id,
            step=step,
            frozen=frozen,
            head_bias=head_bias,
            noise_positions=noise_positions,
            **self.options,
        )


class UnmaskFromLogits(Unmask):
    """Runs `illada_kernels.unmask_from_logits` as a module; options as in `Unmask`.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Threshold
    >>> from illada_kernels.nn import UnmaskFromLogits
    >>> logits, tokens = torch.tensor([[[0.0, 3, 0, 0, 0], [0, 0, 9, 0, 0]]]), torch.tensor([[0, 4, 4]])
    >>> UnmaskFromLogits(Threshold(0.8), mask_id=4)(logits, tokens, torch.tensor([[1, 2]])).remaining
    tensor([0], dtype=torch.int32)
    """

    def forward(  # type: ignore[override]
        self,
        logits: Tensor,
        tokens: Tensor,
        positions: Tensor,
        step: int | Tensor = 0,
        frozen: Tensor | None = None,
        noise_positions: Tensor | None = None,
    ) -> Unmasked:
        """Commits into tokens (B, L) at positions (B, K) what logits (B, K, V) propose."""
        return unmask_from_logits(
            logits,
            tokens,
            positions,
            self.rule,
            mask_id=self.mask_id,
            step=step,
            frozen=frozen,
            noise_positions=noise_positions,
            **self.options,
        )
