"""The loop behind `generate` and `fill`: forward passes over windows of columns, one `unmask` a pass.

A batch is a rectangle of columns. Sequences are padded on the left, so that a block has the same columns in all of
them. Sequence b begins in column starts[b] and counts its positions from there. Columns that a pass computes:

    cache           first pass of a block                  later passes
    none            all columns up to `end`                the same
    prefix          all, and all keys are written          from the block on; keys before it are as old as the block
    dual            all, and all keys are written          the block alone; keys behind it are as old too
    block_causal    from the last block that is not final  the block alone; exact, as final blocks never change

A block's last pass commits its last tokens, so its keys are final only after the next block's first pass, which covers
both. With shifted logits a window begins one column earlier, because that row predicts the block's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import illada_kernels
from illada_kernels import Edit, KeyRanges, Remask, TopK

from ..config import ModelConfig
from ..model import Model
from .cache import Cache
from .config import Rule, Sampling


@dataclass(frozen=True)
class Step:
    """A pass, as a callback sees it. Tensors live on the model's device; `tokens` is the buffer being written."""

    tokens: Tensor  # (B, columns) int64
    starts: list[int]  # the column where each sequence begins; padding lies before it
    block: int
    step: int  # within the block
    positions: Tensor  # (B, K) int64, the columns that were candidates, -1 for none
    committed: Tensor  # (B, K) bool
    confidence: Tensor  # (B, K) float32
    forward_passes: int


@dataclass(frozen=True)
class Block:
    """Candidates that are filled together. Unless `scattered`, candidate i stands in column columns[0] + i."""

    index: int
    positions: Tensor  # (B, K) int64: columns, -1 for no candidate
    masks: list[int]  # masked candidates of each sequence, a number the host knows
    columns: tuple[int, int]  # first and end column of the positions
    end: int  # columns from here on do not exist yet
    scattered: bool = False


class Decoder:
    """Holds one call's tokens and cache. Only `run_block` changes tokens.

    `blank`: some sequences begin as masks alone.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        starts: Sequence[int],
        frozen: Tensor,
        sampling: Sampling,
        callback: Callable[[Step], object] | None,
        blank: bool = False,
    ) -> None:
        self.model, self.config, self.sampling, self.callback = model, model.config, sampling, callback
        self.tokens, self.frozen, self.first_columns = tokens, frozen, list(starts)
        self.blank, self.device = blank, tokens.device
        self.starts = torch.tensor(self.first_columns, dtype=torch.int64, device=self.device)
        self.seeds = torch.tensor(sampling.seeds, dtype=torch.int64, device=self.device)
        self.unmask_options = dict(sampling.unmask)
        if (bias := sampling.unmask["logit_bias"]) is not None:  # tensors, not copied in each pass
            kinds = (torch.int64, torch.float32)
            self.unmask_options["logit_bias"] = tuple(
                torch.as_tensor(x, dtype=kind, device=self.device) for x, kind in zip(bias, kinds)
            )
        self.guided = sampling.guidance != 0
        self.forward_passes = 0
        self.passes = torch.zeros(len(self.first_columns), dtype=torch.int64, device=self.device)
        self.final = 0  # columns before this one have final keys in the cache
        self.cache: Cache | None = None
        if sampling.cache != "none":
            batch = len(self.first_columns) * (2 if self.guided else 1)
            self.cache = Cache(self.config, batch, tokens.shape[1], device=self.device, dtype=model.dtype)

    # ---- hidden rows ----------------------------------------------------------------------------------------------

    def window(self, block: Block, refresh: bool) -> tuple[int, int]:
        """Returns the columns of the next forward pass."""
        first, last = block.columns
        if self.sampling.cache == "block_causal":
            first = self.final if refresh else first
        elif refresh or self.sampling.cache == "none":
            first, last = 0, block.end
        elif self.sampling.cache == "prefix":
            last = block.end
        return max(first - 1, 0) if self.config.shifted_logits else first, last

    def hidden(self, window: tuple[int, int], end: int) -> Tensor:
        """Returns hidden rows (B, window, dim); with guidance w, u + (w + 1) (c - u), since the head is linear."""
        first, last = window
        tokens, starts = self.tokens[:, first:last], self.starts
        if self.guided:
            hidden_prompt = torch.where(self.frozen[:, first:last], self.config.mask_id, tokens)
            tokens, starts = torch.cat([tokens, hidden_prompt]), torch.cat([starts, starts])
        column = torch.arange(first, last, device=self.device)
        positions = (column - starts[:, None]).clamp(min=0)
        cache = None if self.cache is None else self.cache.at(first, end)
        h = self.model(tokens, self.ranges(column, starts, end), positions, cache)
        self.forward_passes += 1
        if not self.guided:
            return h
        with_prompt, without = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2)
        return (without + (self.sampling.guidance + 1) * (with_prompt - without)).to(h.dtype)

    def ranges(self, column: Tensor, starts: Tensor, end: int) -> KeyRanges:
        """Returns the key ranges over the first `end` columns: neither padding nor, with blocks, later blocks."""
        block = self.config.causal_block
        if not block:
            return KeyRanges.padding(end - starts, end, side="left")
        low = starts[:, None].expand(-1, column.shape[0])
        high = torch.maximum(((column // block + 1) * block).clamp(max=end), low)  # starts are multiples of the block
        return KeyRanges(torch.stack([low, high, high, high], dim=-1).to(torch.int32), end)

    # ---- one block ------------------------------------------------------------------------------------------------

    def run_block(self, block: Block) -> None:
        """Fills the block's masks. A sequence takes part until none is left, with Edit until nothing changes."""
        if max(block.masks, default=0) == 0:
            return
        left = masked = torch.tensor(block.masks, dtype=torch.int64, device=self.device)
        full_passes = torch.zeros_like(masked)  # that a sequence made without a mask
        active, (adaptive, limit) = masked > 0, self.num_passes(block.masks)
        for step in range(limit):
            candidates = torch.where(active[:, None], block.positions, -1)
            revise = self.revision(step)
            out = illada_kernels.unmask(
                self.candidate_rows(block, step),
                self.model.head_weight,
                self.tokens,
                candidates,
                self.rule(step, masked),
                mask_id=self.config.mask_id,
                seed=self.seeds,
                step=block.index * self.sampling.max_passes + step,
                revise=revise,
                frozen=self.frozen,
                noise_positions=candidates - self.starts[:, None],
                **self.unmask_options,
            )
            self.passes += active
            full_passes += active & (left == 0)
            if not isinstance(revise, Remask):  # Remask may take tokens of a full sequence back in the next pass
                left = out.remaining
                active = left > 0
                if isinstance(revise, Edit):
                    active |= out.committed.any(1) & (full_passes < self.sampling.revise_steps)
            if self.callback is not None:
                where = (self.tokens, self.first_columns, block.index, step, candidates)
                self.callback(Step(*where, out.committed, out.confidence, self.forward_passes))
            if adaptive and step + 1 < limit and not bool(active.any()):  # the one synchronisation of a pass
                return

    def candidate_rows(self, block: Block, step: int) -> Tensor:
        """Runs one forward pass; returns its rows at the block's positions (B, K, dim), the only ones for the head."""
        every = self.sampling.refresh_every
        refresh = step == 0 or (every > 0 and step % every == 0)
        window = self.window(block, refresh)
        hidden = self.hidden(window, block.end)
        if refresh:
            self.final = block.columns[0]
        if block.scattered:
            row = torch.arange(block.positions.shape[0], device=self.device)[:, None]
            rows = hidden[row, (block.positions - window[0]).clamp(min=0)]
        else:
            rows = hidden[:, block.columns[0] - window[0] : block.columns[1] - window[0]]
        return self.equal_if_blank(rows, block.end) if self.blank and block.index == 0 else rows

    def equal_if_blank(self, rows: Tensor, end: int) -> Tensor:
        """Gives all rows of a sequence of masks alone the value of its first.

        They are equal but for rounding, because attention then averages equal values. Without this the rounding, and
        with it the batch, would decide which position is the most confident.
        """
        column = torch.arange(end, device=self.device)
        blank = ((self.tokens[:, :end] == self.config.mask_id) | (column < self.starts[:, None])).all(1)
        return torch.where(blank[:, None, None], rows[:, :1], rows)

    def num_passes(self, masks: Sequence[int]) -> tuple[bool, int]:
        """Returns (whether the number of passes depends on the data, the upper bound of it)."""
        most, rule = max(masks), self.sampling.rule
        if self.sampling.revise is not None:
            return True, most + self.sampling.revise_steps
        if rule is None:
            return False, min(self.sampling.steps_per_block, most)
        if isinstance(rule, TopK) and not isinstance(rule.k, Tensor):
            return False, -(-most // rule.k)
        return True, most

    def rule(self, step: int, masked: Tensor) -> Rule:
        """Returns the pass's rule. LLaDA's schedule spreads masks evenly; the first passes take the remainder."""
        if self.sampling.rule is not None:
            return self.sampling.rule
        passes = masked.clamp(1, self.sampling.steps_per_block)
        return TopK(masked // passes + (step % passes < masked % passes))

    def revision(self, step: int) -> Edit | Remask | None:
        """Returns the pass's revision. Remask ends after `revise_steps`, otherwise the block could not fill up."""
        revise = self.sampling.revise
        return None if isinstance(revise, Remask) and step >= self.sampling.revise_steps else revise


def left_padded(rows: list[list[int]], model: Model, starts: list[int], columns: int) -> Tensor:
    """Returns (B, columns) on the model's device: row b from column starts[b] on, padding before, masks behind."""
    padding, mask = max(model.config.pad_id, 0), model.config.mask_id
    table = [[padding] * s + row + [mask] * (columns - s - len(row)) for s, row in zip(starts, rows)]
    return torch.tensor(table, dtype=torch.int64, device=model.device)


def check_filled(rows: list[list[int]], config: ModelConfig) -> None:
    """Raises RuntimeError if a mask is left in rows."""
    left = [(b, row.count(config.mask_id)) for b, row in enumerate(rows) if config.mask_id in row]
    if left:
        raise RuntimeError(
            f"sequence {left[0][0]}: {left[0][1]} positions stayed masked; the model's hidden rows are NaN or inf "
            "(wrong dtype or damaged weights?), or forbid leaves no token"
        )
