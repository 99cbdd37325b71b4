"""Share: what one rank computes of a micro-batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from illada_kernels import KeyRanges

from ...config import ModelConfig
from ..objectives import Example


@dataclass(frozen=True)
class Share:
    """Holds what a rank computes of a micro-batch: B sequences, their rows of one context index, those scored."""

    tokens: Tensor  # (B, S) int64
    key_ranges: KeyRanges | None
    positions: Tensor  # (1 or B, S)
    rows: Tensor  # (N,) int64, into the B * S rows
    targets: Tensor  # (N,)
    weight: Tensor  # (N,) float32
    forbid: tuple[int, ...]

    @classmethod
    def of(cls, part: Example, config: ModelConfig, context: int = 1, index: int = 0) -> Share:
        """Returns the rows of one of `context` ranks, which is `index`. A length that they do not divide is padded."""
        batch, length = part.tokens.shape
        here = -(-length // context)
        own = slice(here * index, here * (index + 1))
        positions = torch.arange(length)[None] if part.positions is None else part.positions
        scored = _scored_rows(part, config, positions)
        kept = part.masked & (scored >= own.start) & (scored < own.stop)
        forbid = config.forbid_mask if part.forbid_mask is None else part.forbid_mask
        rows = (torch.arange(batch)[:, None] * here + scored - own.start)[kept]
        return cls(
            _columns(part.tokens, here * context)[:, own],
            _ranges(part, config, here * context, own) if context > 1 else part.key_ranges,
            _columns(positions, here * context)[:, own],
            rows,
            part.targets[kept],
            part.weight[kept],
            (config.mask_id,) if forbid and config.mask_id >= 0 else (),
        )

    def to(self, device: torch.device) -> Share:
        """Returns it on a device."""
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Share(**{name: x.to(device) if hasattr(x, "to") else x for name, x in fields.items()})


def _scored_rows(part: Example, config: ModelConfig, positions: Tensor) -> Tensor:
    """Returns which of the unshifted rows of `Model` gives the logits of each target, (B, S)."""
    rows = part.previous if config.shifted_logits else part.rows
    if rows is None:
        rows = torch.arange(part.targets.shape[1])[None]
        if config.shifted_logits:  # as Model.forward: a first row has no predecessor
            first = (positions[:, : rows.shape[1]] == 0) | (rows == 0)
            rows = torch.where(first, rows, rows - 1)
    return (rows if rows.dim() == 2 else rows[None]).expand_as(part.targets)


def _columns(x: Tensor, length: int) -> Tensor:
    """Returns x (B, T) with zeros up to this length."""
    return nn.functional.pad(x, (0, length - x.shape[1]))


def _ranges(part: Example, config: ModelConfig, length: int, own: slice) -> KeyRanges:
    """Returns what the rows `own` see of `length` keys, of which those that pad are seen by none."""
    ranges = part.key_ranges
    if ranges is None:
        tokens = part.tokens.shape[1]
        ranges = (
            KeyRanges.full(tokens) if not config.causal_block else KeyRanges.block_causal(tokens, config.causal_block)
        )
    bounds = ranges.bounds
    if bounds.shape[1] > 1:
        bounds = nn.functional.pad(bounds, (0, 0, 0, length - bounds.shape[1]))[:, own]
    return KeyRanges(bounds, length)
