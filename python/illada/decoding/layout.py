"""Layout: where sequences stand, and which columns each pass computes.

A batch is a rectangle of columns. Sequences are padded on the left, so that a block has the same columns in all of
them. Sequence b begins in column starts[b] and counts its positions from there. Columns that a pass computes:

    cache           first pass of a block                       later passes
    none            all columns up to `end`                     the same
    prefix          all, and all keys are written               from the block on; keys before it stay as they are
    dual            all, and all keys are written               the block alone; keys behind it stay, too
    vicinity        all, and all keys are written               the block and `vicinity` columns on each side of it
    interval        the block and the one before                the block alone
    delayed         all                                         what is not cached yet, or all: `BlockLoop.delayed`
    block_causal    from the last block that is not final       the block alone; exact, as final blocks never change

With `refresh_every` n, every n-th pass of prefix, dual, vicinity and interval is as the first pass of dual. They count
passes from the block's begin; interval counts over all blocks, and its very first pass is such a pass.

A block's last pass commits its last tokens, so its keys are final only after the next block's first pass, which covers
both. With shifted logits a window begins no later than one column before the block, because that row predicts the
block's first token. Autoregressive models (shifted logits, blocks of one) compute the column of the last token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..config import ModelConfig
from .config import Sampling


@dataclass(frozen=True)
class Block:
    """Candidates that are filled together. Unless `scattered`, candidate i stands in column columns[0] + i."""

    index: int
    positions: Tensor  # (B, K) int64: columns, -1 for no candidate
    masks: list[int]  # masked candidates of each sequence, a number the host knows
    columns: tuple[int, int]  # first and end column of the positions
    end: int  # columns from here on do not exist yet
    scattered: bool = False
    blank: bool = False  # some sequences are masks alone


class Layout:
    """Holds what the host knows of rows: `first_columns`, where each sequence begins, and `joins`, with which block."""

    def __init__(self, starts: Sequence[int], config: ModelConfig, sampling: Sampling) -> None:
        self.config, self.sampling = config, sampling
        self.first_columns, self.joins = list(starts), [0] * len(starts)
        self.final = 0  # columns before this one have keys that a block's first pass leaves alone
        self.count = len(starts)  # rows in use

    def copy_row(self, source: int, target: int) -> None:
        """Gives row `target` what row `source` has."""
        for numbers in (self.first_columns, self.joins):
            numbers[target] = numbers[source]

    def due(self, block: int, step: int, adaptive: bool, passes: int) -> list[bool]:
        """Says for each row whether this pass computes all columns; `passes` are those that a whole block takes.

        interval numbers passes as if all blocks took that many, so that the batch does not decide.
        """
        cache, every = self.sampling.cache, self.sampling.refresh_every
        if cache != "interval":
            begins = cache != "block_causal" and (step == 0 or (every > 0 and step % every == 0))
            return [begins or cache == "none"] * self.count
        found = []
        for joined in self.joins[: self.count]:
            now = (block - joined) * passes + step
            before = now - passes if step == 0 and adaptive else now - 1  # passes that were never made count too
            found.append(now == 0 or (every > 0 and now // every > before // every))
        return found

    def window(self, block: Block, step: int, whole: bool) -> tuple[int, int]:
        """Returns the first and the end column of a pass that computes all columns or what its cache asks for."""
        (first, last), cache = block.columns, self.sampling.cache
        if whole:
            first, last = 0, block.end
        elif step == 0:  # of block_causal and interval
            first = min(self.final, first)
            # Passes of the block before have written the column before it as well, as long as others went on.
            first = max(first - (cache == "interval" and self.config.shifted_logits), 0)
        elif cache in ("prefix", "delayed"):  # whose first column the device knows
            last = block.end
        elif cache == "vicinity":
            first = max(first - self.sampling.vicinity, 0)
            last = min(last + self.sampling.vicinity, block.end)
        if self.config.shifted_logits:
            first = max(min(first, block.columns[0] - 1), 0)
        return first, last - 1 if self.autoregressive(block) else last

    def autoregressive(self, block: Block) -> bool:
        """Returns whether the block is one token, predicted from the token before it in every sequence, beside a
        cache."""
        one = self.config.autoregressive and not block.scattered
        return one and self.sampling.cache != "none" and block.columns[0] > max(self.first_columns[: self.count])
