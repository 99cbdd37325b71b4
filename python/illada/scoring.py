"""Scorer: noisy copies of many texts side by side in one forward pass, without padding; used by log_likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from illada_kernels import KeyRanges, TopK, masked_loss, unmask

from .config import ModelConfig
from .decoding.batch import guided
from .model import Model


@dataclass(frozen=True)
class Text:
    """A pair; `blocks` are the ranges of positions that are noisy together and hold a token of the continuation."""

    index: int
    tokens: np.ndarray  # (n,) context, continuation
    context: int  # tokens of the context
    blocks: list[tuple[int, int]]


@dataclass(frozen=True)
class Draw:
    """A noisy copy of positions start .. stop, with the positions that are masked and those that are scored."""

    start: int
    stop: int
    masked: np.ndarray  # positions
    scored: np.ndarray  # positions
    weight: float = 1.0


def continued(text: Text, start: int, stop: int) -> np.ndarray:
    """Returns the block's positions that belong to the continuation."""
    return np.arange(max(start, text.context), stop)


@dataclass(frozen=True)
class Part:
    """Rows [clean tokens ; noisy blocks] of one pair; rows and keys count from the part's first one."""

    text: Text
    draws: list[Draw]
    tokens: np.ndarray  # (n,)
    positions: np.ndarray  # (n,)
    bounds: np.ndarray  # (n, 4) key ranges
    rows: np.ndarray  # (m,) the rows that predict the scored positions of all draws
    scored: np.ndarray  # (m,) those positions
    weight: np.ndarray  # (m,)


def _part(config: ModelConfig, text: Text, draws: list[Draw]) -> Part:
    """Lays out clean rows, which see the blocks up to their own, then each noisy block, which sees what is before it.

    In a model that sees everything the only block is the whole sequence, and there are no clean rows.
    """
    block = config.causal_block
    clean = max(draw.start for draw in draws)
    position = np.arange(clean)
    end = (position // max(block, 1) + 1) * block
    tokens, positions, bounds = [text.tokens[:clean]], [position], [np.stack([0 * end, end, end, end], axis=1)]
    rows, size = [], clean
    for draw in draws:
        row = size + draw.scored - draw.start
        if config.shifted_logits:  # as in decoding: a block's first token is predicted by the clean one before it
            row = np.where(draw.scored > draw.start, row - 1, draw.start - 1 if draw.start else size)
        rows.append(row)
        if config.shifted_logits and draw.stop - draw.start == 1 and draw.start:
            continue  # nothing sees its row
        noisy, at = text.tokens[draw.start : draw.stop].copy(), np.arange(draw.start, draw.stop)
        noisy[draw.masked - draw.start] = config.mask_id
        tokens.append(noisy)
        positions.append(at)
        bounds.append(np.tile([0, draw.start, size, size + len(at)], (len(at), 1)))
        size += len(at)
    arrays = {"tokens": tokens, "positions": positions, "bounds": bounds, "rows": rows}
    arrays["scored"] = [draw.scored for draw in draws]
    arrays["weight"] = [np.full(len(draw.scored), draw.weight) for draw in draws]
    return Part(text, draws, **{name: np.concatenate(some) for name, some in arrays.items()})


class Scorer:
    """Runs parts of many pairs in passes of at most `rows_per_pass` rows."""

    def __init__(
        self,
        model: Model,
        rows_per_pass: int,
        guidance: float = 0.0,
        forbid_mask: bool | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self.model, self.guidance = model, guidance
        self.config = config or model.config  # which rows are read
        forbidden = self.config.forbid_mask if forbid_mask is None else forbid_mask
        self.mask: tuple[int, ...] = (self.config.mask_id,) if self.config.mask_id >= 0 else ()
        self.forbid = self.mask if forbidden else ()
        self.rows = max(rows_per_pass // (2 if guidance else 1), 1)

    def parts(self, made: Iterable[tuple[Text, Iterable[Draw]]]) -> Iterator[Part]:
        """Yields parts of at most `rows` rows, if one draw is not longer."""
        for text, draws in made:
            some: list[Draw] = []
            size = 0
            for draw in draws:
                size += draw.stop - draw.start
                if some and draw.start + size > self.rows:
                    yield _part(self.config, text, some)
                    some, size = [], draw.stop - draw.start
                some.append(draw)
            if some:
                yield _part(self.config, text, some)

    def passes(self, parts: Iterable[Part]) -> Iterator[list[Part]]:
        some: list[Part] = []
        size = 0
        for part in parts:
            size += len(part.tokens)
            if some and size > self.rows:
                yield some
                some, size = [], len(part.tokens)
            some.append(part)
        if some:
            yield some

    def hidden(self, parts: list[Part]) -> Tensor:
        """Returns the rows that predict the scored positions of all parts (m, dim)."""
        offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
        tokens, positions = (np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "positions"))
        bounds = np.concatenate([part.bounds + offset for part, offset in zip(parts, offsets)])
        rows = np.concatenate([part.rows + offset for part, offset in zip(parts, offsets)])
        if self.guidance:
            context = np.concatenate([part.positions < part.text.context for part in parts])
            tokens = np.concatenate([tokens, np.where(context, self.config.mask_id, tokens)])
            positions, bounds = np.tile(positions, 2), np.concatenate([bounds, bounds + offsets[-1]])
            rows = np.concatenate([rows, rows + offsets[-1]])
        device = self.model.device
        ranges = KeyRanges(torch.from_numpy(bounds.astype(np.int32))[None].to(device), len(tokens))
        at = torch.from_numpy(positions)[None].to(device)
        h = self.model(torch.from_numpy(tokens)[None].to(device), ranges, at, shift=False)[0]
        h = h[torch.from_numpy(rows).to(device)]
        if not self.guidance:
            return h
        given, free = h.chunk(2)
        return guided(given, free, self.guidance)

    def losses(self, parts: Iterable[Part]) -> Iterator[tuple[Part, np.ndarray]]:
        """Yields each part with the cross-entropy of its scored positions, float64 (m,)."""
        for some in self.passes(parts):
            right = np.concatenate([part.text.tokens[part.scored] for part in some])
            targets = torch.from_numpy(right).to(self.model.device)
            all_rows = torch.ones_like(targets, dtype=torch.bool)
            hidden, head = self.hidden(some), self.model.head_weight
            loss = masked_loss(
                hidden,
                head,
                targets,
                all_rows,
                reduction="none",
                forbid=self.forbid,
                max_masked=len(right),  # known, so that the loss does not wait for the device to count
            )
            yield from _split(some, loss.double().cpu().numpy())

    def proposals(self, parts: Iterable[Part]) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
        """Yields each part with the confidence in the best token of its scored positions, and whether it is right."""
        for some in self.passes(parts):
            right = np.concatenate([part.text.tokens[part.scored] for part in some])
            masks = torch.full((1, len(right)), self.config.mask_id, device=self.model.device)
            at = torch.arange(len(right), device=self.model.device)[None]
            hidden, head, mask = self.hidden(some)[None], self.model.head_weight, self.config.mask_id
            made = unmask(hidden, head, masks, at, TopK(0), mask_id=mask, forbid=self.mask)
            confidence, proposal = made.confidence[0].double().cpu().numpy(), made.proposal[0].cpu().numpy()
            for (part, sure), (_, matches) in zip(_split(some, confidence), _split(some, proposal == right)):
                yield part, sure, matches

    def reveal(
        self,
        texts: list[Text],
        run: Callable[[Iterable[Part]], Iterator[Any]],
        best: Callable[[np.ndarray], np.ndarray],
    ) -> Iterator[tuple[int, bool, float]]:
        """Starts from masks and reveals in each pass, of each block at work, the token for which `best` is least.

        Yields for each token the pair, whether `run` found it right (a pair is left when it did not) and its value.
        Blocks of one token do not depend on each other's proposals, so that they are at work together.
        """
        together = self.config.causal_block == 1
        left = {text.index: [continued(text, *block) for block in text.blocks] for text in texts}
        while left := {index: blocks for index, blocks in left.items() if blocks}:
            made = []
            for index, blocks in left.items():
                at_work = list(zip(texts[index].blocks[-len(blocks) :], blocks))[: None if together else 1]
                made.append((texts[index], [Draw(*block, masked, masked) for block, masked in at_work]))
            for part, values, *found in run(self.parts(made)):
                matches = found[0] if found else np.ones(len(values), dtype=bool)
                blocks = left[part.text.index]
                for draw, value, match in _by_draw(part, values, matches):
                    least = int(np.argmin(best(value)))
                    yield part.text.index, bool(match[least]), float(value[least])
                    if not match[least]:
                        blocks.clear()
                    if blocks:
                        blocks[0] = np.delete(draw.masked, least)
                        del blocks[: len(blocks[0]) == 0]


def _split(parts: list[Part], values: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    ends = np.cumsum([len(part.rows) for part in parts])[:-1]
    yield from zip(parts, np.split(values, ends))


def _by_draw(part: Part, values: np.ndarray, matches: np.ndarray) -> Iterator[tuple[Draw, np.ndarray, np.ndarray]]:
    ends = np.cumsum([len(draw.scored) for draw in part.draws])[:-1]
    yield from zip(part.draws, np.split(values, ends), np.split(matches, ends))
