"""Example: a corrupted batch and its loss."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illada_kernels import KeyRanges, masked_loss

from ...model import Model


@dataclass(frozen=True)
class Example:
    """A corrupted batch: S of the model's T rows are scored against the targets where masked.

    `rows` and `previous` say which rows of `model(..., shift=False)` these are: `rows` where row i predicts token i,
    `previous` with shifted logits. None stands for the first S rows of `model(...)`.
    """

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, S) int64
    masked: Tensor  # (B, S) bool
    weight: Tensor  # (B, S) float32
    key_ranges: KeyRanges | None = None
    positions: Tensor | None = None  # (1 or B, T) int64
    previous: Tensor | None = None  # (S,) or (B, S) int64
    rows: Tensor | None = None  # (S,) or (B, S) int64
    forbid_mask: bool | None = None  # whether the mask's logit is -inf; None: what the model's configuration says

    def to(self, device: torch.device | str) -> Example:
        """Returns the batch on a device."""
        return Example(*(x.to(device) if isinstance(x, Tensor | KeyRanges) else x for x in self._parts()))  # type: ignore[arg-type]

    def split(self, parts: int) -> list[Example]:
        """Returns micro-batches of consecutive sequences, views, whose losses and gradients sum to this batch's.

        Raises ValueError unless 1 <= parts <= B.
        """
        batch = len(self.tokens)
        if not 1 <= parts <= batch:
            raise ValueError(f"parts: expected 1 to {batch}, the number of sequences, got {parts}")
        edges = [batch * i // parts for i in range(parts + 1)]
        return [self[low:high] for low, high in itertools.pairwise(edges)]

    def __getitem__(self, sequences: slice) -> Example:
        """Views some sequences; what all of them share stays as it is."""

        def part(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x[sequences] if x.dim() == 2 and len(x) == len(self.tokens) else x
            return x[sequences] if isinstance(x, KeyRanges) else x

        return Example(*(part(x) for x in self._parts()))

    def _parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def loss(
        self, model: Model, reduction: str = "sum", forbid_mask: bool | None = None, max_masked: int | None = None
    ) -> Tensor:
        """Returns the weighted sum, a float32 scalar; with reduction "none" the weighted losses (B, S).

        max_masked: as in `masked_loss`; with the number of scored tokens nothing waits for a GPU.
        forbid_mask: whether the mask's logit is -inf; None is what the example, then the model's configuration says.
        """
        c = model.config
        rows = self.previous if c.shifted_logits else self.rows
        if rows is None:
            hidden = model(self.tokens, self.key_ranges, self.positions)[:, : self.targets.shape[1]]
        else:
            hidden = model(self.tokens, self.key_ranges, self.positions, shift=False)
            hidden = hidden[:, rows] if rows.dim() == 1 else hidden.take_along_dim(rows[..., None], 1)
        said = next(f for f in (forbid_mask, self.forbid_mask, c.forbid_mask) if f is not None)
        forbid = (c.mask_id,) if said and c.mask_id >= 0 else ()
        return masked_loss(
            hidden,
            model.head_weight,
            self.targets,
            self.masked,
            self.weight,
            reduction=reduction,
            forbid=forbid,
            max_masked=max_masked,
        )
