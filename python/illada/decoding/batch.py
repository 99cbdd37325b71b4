"""Batch: rows and columns of tokens, their cache, and one forward pass over some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illada_kernels import KeyRanges

from ..model import Model
from .cache import Cache
from .config import Sampling


class Rows:
    """Tensors with a row for each sequence. As attributes they show the first `count` rows, those in use."""

    def __init__(self, **whole: Tensor) -> None:
        self.whole = whole
        self.use(min(map(len, whole.values())))

    def use(self, count: int) -> None:
        """Shows the first `count` rows. Views of one count have the same addresses whenever they are made."""
        self.count = count
        for name, tensor in self.whole.items():
            setattr(self, name, tensor[:count])

    def copy_row(self, source: int, target: int) -> None:
        """Copies everything that belongs to a row."""
        for tensor in self.whole.values():
            tensor[target].copy_(tensor[source])


@dataclass(frozen=True)
class Shape:
    """Holds what a pass knows on the host: passes of equal shape run the same operators, so they are one CUDA graph."""

    rows: int
    first: int | None  # the window's first column; None: the device knows it, `window_start`
    length: int  # columns in the window
    keys: int  # columns in sight of the queries
    offset: int | None  # of the candidates in the window; None: the device knows where they are
    candidates: int
    shift: bool = True
    blank: bool = False  # some sequences are masks alone
    guarded: bool = False  # rows write keys in their `span` alone, and only while they have masks
    apart: bool = False  # each sequence has a logit bias of its own
    remasking: bool = False


class Batch(Rows):
    """Holds tokens and cache. With guidance, rows 2 b, 2 b + 1 of the cache are sequence b with and without prompt."""

    tokens: Tensor  # (B, columns) int64
    frozen: Tensor  # (B, columns) bool: never changes
    starts: Tensor  # (B,) int64: the column where each sequence begins
    limits: Tensor  # (B,) int64: the column before which it sees keys
    window_start: Tensor  # (B,) int64, equal: where a pass begins whose shape has no `first`
    span: Tensor  # (B, 2) int64: first and end column of the keys that a guarded pass writes

    def __init__(self, model: Model, tokens: Tensor, starts: Sequence[int], frozen: Tensor, sampling: Sampling) -> None:
        self.model, self.config, self.guidance, self.device = model, model.config, sampling.guidance, model.device
        batch, columns = tokens.shape
        self.fold = 2 if sampling.guidance else 1
        self.whole_cache: Cache | None = None
        if sampling.cache != "none":
            cache = Cache(self.config, batch * self.fold, columns, device=self.device, dtype=model.dtype)
            self.whole_cache = cache
        begin = torch.tensor(starts, dtype=torch.int64, device=self.device)
        limits, spans = torch.full_like(begin, columns), torch.zeros(batch, 2, dtype=torch.int64, device=self.device)
        super().__init__(
            tokens=tokens,
            frozen=frozen,
            starts=begin,
            limits=limits,
            window_start=torch.zeros_like(begin),
            span=spans,
        )

    def use(self, count: int) -> None:
        super().use(count)
        self.cache = None if self.whole_cache is None else self.whole_cache.rows(0, count * self.fold)

    def copy_row(self, source: int, target: int) -> None:
        super().copy_row(source, target)
        if self.whole_cache is not None:
            for layers in (self.whole_cache.keys, self.whole_cache.values):
                pairs = layers.unflatten(1, (-1, self.fold))
                pairs[:, target].copy_(pairs[:, source])

    def roll(self, by: int) -> None:
        """Moves all columns of the rows in use. Keys stay what they are, for they know their positions, not columns."""
        for table in (self.tokens, self.frozen):
            table.copy_(table.roll(by, 1))
        if self.cache is not None:
            for layer in [*self.cache.keys, *self.cache.values]:
                layer.copy_(layer.roll(by, 1))

    def hidden(self, shape: Shape, active: Tensor) -> Tensor:
        """Returns hidden rows (B, window, dim)."""
        here = torch.arange(shape.length, device=self.device)[None]
        if shape.first is None:
            columns = self.window_start[:, None] + here
            tokens, frozen = self.tokens.gather(1, columns), self.frozen.gather(1, columns)
        else:
            columns, part = here + shape.first, slice(shape.first, shape.first + shape.length)
            tokens, frozen = self.tokens[:, part], self.frozen[:, part]
        keep = None
        if shape.guarded:
            keep = (columns >= self.span[:, :1]) & (columns < self.span[:, 1:]) & active[:, None]
        return self._forward(slice(0, self.count), columns, tokens, frozen, shape, keep)

    def read_prompt(self, b: int, end: int) -> None:
        """Writes the keys of sequence b's columns before `end` into the cache."""
        columns, rows = torch.arange(end, device=self.device)[None], slice(b, b + 1)
        shape = Shape(1, 0, end, end, None, 0)
        self._forward(rows, columns, self.tokens[rows, :end], self.frozen[rows, :end], shape, None)

    def _forward(
        self, rows: slice, columns: Tensor, tokens: Tensor, frozen: Tensor, shape: Shape, keep: Tensor | None
    ) -> Tensor:
        """Runs the model, with guidance on both rows of each sequence."""
        positions = (columns - self.starts[rows, None]).clamp(min=0)  # (B, S)
        bounds = self.bounds(rows, columns)
        if self.guidance:
            tokens = torch.stack([tokens, torch.where(frozen, self.config.mask_id, tokens)], 1).flatten(0, 1)
            positions, bounds = positions.repeat_interleave(2, 0), bounds.repeat_interleave(2, 0)
            keep = None if keep is None else keep.repeat_interleave(2, 0)
        if self.config.mask_id < 0:  # what stands for a mask is not in the vocab, and nothing sees it
            tokens = tokens.clamp(min=0)
        window = None
        if self.cache is not None:
            start = self.window_start[rows].repeat_interleave(self.fold) if shape.first is None else shape.first
            window = self.cache.rows(rows.start * self.fold, rows.stop * self.fold).at(start, shape.keys, keep)
        h = self.model(tokens, KeyRanges(bounds, shape.keys), positions, window, shape.shift)
        if not self.guidance:
            return h
        given, free = h.unflatten(0, (-1, 2)).unbind(1)
        return guided(given, free, self.guidance)

    def bounds(self, rows: slice, columns: Tensor) -> Tensor:
        """Returns the bounds of KeyRanges: no padding, nothing beyond `limits`, and with blocks no later block."""
        block, low, high = self.config.causal_block, self.starts[rows, None], self.limits[rows, None]
        if block:  # starts are multiples of it
            high = torch.minimum((columns // block + 1) * block, high)
        low, high = torch.broadcast_tensors(low, torch.maximum(high, low))
        return torch.stack([low, high, high, high], dim=-1).to(torch.int32)


def guided(given: Tensor, free: Tensor, guidance: float) -> Tensor:
    """Returns free + (guidance + 1) (given - free), the rows for guided logits because the head is linear.

    given, free: hidden rows with and without the prompt.
    """
    dtype, wide = given.dtype, torch.promote_types(given.dtype, torch.float32)
    given, free = given.to(wide), free.to(wide)
    return (free + (guidance + 1) * (given - free)).to(dtype)
