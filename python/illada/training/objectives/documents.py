"""Documents packed into rows: where each token's document begins and ends, and the denominators of its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illada_kernels import KeyRanges

PER = ("tokens", "documents")


@dataclass(frozen=True)
class Packing:
    """B rows of S tokens; each tensor is (B, S)."""

    start: Tensor  # int64, first column of the token's document
    end: Tensor  # int64, the column behind its last token
    number: Tensor  # int64, counts documents over all rows
    learn: Tensor  # bool, tokens that may be masked
    whole: bool  # every row is one document

    @classmethod
    def of(cls, tokens: Tensor, documents: Tensor | None, learn: Tensor | None) -> Packing:
        """Returns the packing of tokens (B, S).

        Parameters
        ----------
        tokens : int64 (B, S)
        documents : int64 (B, S), optional
            The document of each token: equal ids for neighbours of one document; negative for padding, which is at the
            end of a row. None: a row is a document.
        learn : bool (B, S), optional
            Tokens that may be masked, such as answers. None: all.

        Raises
        ------
        ValueError
            For other shapes, padding elsewhere, or nothing to learn.
        """
        batch, length = tokens.shape
        for name, value in (("documents", documents), ("learn", learn)):
            if value is not None and value.shape != tokens.shape:
                raise ValueError(f"{name}: expected {tuple(tokens.shape)} like tokens, got {tuple(value.shape)}")
        whole = documents is None
        ids = torch.zeros_like(tokens) if documents is None else documents
        if bool(((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any()):
            raise ValueError(
                "documents: expected padding (negative ids) at the end of a row, got some before a document"
            )
        learn = (ids >= 0) if learn is None else learn & (ids >= 0)
        if not bool(learn.any()):
            raise ValueError("learn: expected at least one token to learn in the batch, got none")
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        column = torch.arange(length, device=tokens.device).expand(batch, length)
        start = torch.where(first, column, 0).cummax(1).values
        last = first.roll(-1, 1)
        last[:, -1] = True
        end = torch.where(last, column + 1, length).flip(1).cummin(1).values.flip(1)
        return cls(start, end, first.flatten().cumsum(0).view_as(ids) - 1, learn, whole)

    @property
    def positions(self) -> Tensor:
        """Positions (1 or B, S) that count from each document's start."""
        column = torch.arange(self.start.shape[1], device=self.start.device)
        return column[None] if self.whole else column - self.start

    @property
    def documents(self) -> int:
        """Returns the number of documents, a row's padding among them."""
        return int(self.number[-1, -1]) + 1

    def full_ranges(self) -> KeyRanges | None:
        """Returns the ranges in which a token sees its document; None where a row is one document."""
        if self.whole:
            return None
        bounds = torch.stack([self.start, self.end, self.end, self.end], -1)
        return KeyRanges(bounds.to(torch.int32), self.start.shape[1])

    def block_ranges(self, block: int, causal: str | None = None) -> KeyRanges:
        """Returns `KeyRanges.block_diffusion` of each row."""
        length = self.start.shape[1]
        if self.whole:
            return KeyRanges.block_diffusion(length, block, causal=causal, device=self.start.device)  # type: ignore[arg-type]
        rows, (starts, which) = [], self.start.unique(dim=0, return_inverse=True)
        for start in starts:
            edges = torch.cat([start.unique(), start.new_full((1,), length)])
            rows.append(KeyRanges.block_diffusion(length, block, edges, causal=causal).bounds)  # type: ignore[arg-type]
        return KeyRanges(torch.cat(rows)[which], 2 * length)

    def blocks(self, block: int) -> Tensor:
        """Returns the number of each token's block (B, S), counted over all rows; blocks restart at each document."""
        column = torch.arange(self.start.shape[1], device=self.start.device)
        first = (column - self.start) % block == 0
        return first.flatten().cumsum(0).view_as(self.start) - 1

    def denominator(self, per: str) -> Tensor:
        """Returns what a token's loss is divided by, float32 (B, S).

        "tokens": the batch's tokens to learn. "documents": its document's, times the documents that have any.
        """
        if per not in PER:
            raise ValueError(f"per: expected one of {', '.join(PER)}, got {per!r}")
        if per == "tokens":
            return self.learn.sum().float().expand_as(self.learn)
        count = torch.bincount(self.number[self.learn], minlength=self.documents)
        return (count[self.number].clamp(min=1) * (count > 0).sum()).float()
