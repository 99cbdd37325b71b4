"""The loop behind `generate` and `fill`: forward passes over windows of columns, one `unmask` a pass.

A batch is a rectangle of columns. Sequences are padded on the left, so that a block has the same columns in all of
them; sequence b begins in column starts[b] and counts its positions from there. What a window computes and reads:

    cache           first pass of a block                  later passes
    none            all columns up to `end`                the same
    prefix          all, and all keys are written          from the block on; keys before it are as old as the block
    dual            all, and all keys are written          the block alone; keys behind it are as old too
    block_causal    from the last block that is not final  the block alone; exact, as final blocks never change

A block's last pass commits its last tokens, so its keys are final only after the next block's first pass, which covers
both.
With shifted logits a window begins one column earlier: that row predicts the block's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import illada_kernels
from illada_kernels import Edit, EntropyBound, Factor, KeyRanges, Remask, Threshold, TopK

from .cache import Cache
from .model import Model

Rule = TopK | Threshold | Factor | EntropyBound


@dataclass(frozen=True)
class Step:
    """What a callback gets after each pass. Tensors live on the model's device; `tokens` is the one being written."""

    tokens: Tensor  # (B, columns) int64
    starts: list[int]  # the column where each sequence begins; padding lies before it
    block: int
    step: int  # within the block
    positions: Tensor  # (B, K) int64, the columns that were candidates, -1 for none
    committed: Tensor  # (B, K) bool
    confidence: Tensor  # (B, K) float32
    forward_passes: int


@dataclass(frozen=True)
class Sampling:
    """How candidates become tokens: `GenerationConfig`, checked and resolved for one model."""

    rule: Rule | None  # None: the schedule
    steps_per_block: int
    revise: Edit | Remask | None
    revise_steps: int
    cache: str
    refresh_every: int
    guidance: float
    seeds: list[int]
    most_passes: int  # upper bound of passes in a block, whatever the batch: numbers the noise
    unmask: dict[str, Any]  # passed on to the op


@dataclass(frozen=True)
class Block:
    """What is filled together. Unless `scattered`, candidate i stands in column columns[0] + i."""

    index: int
    positions: Tensor  # (B, K) int64: columns, -1 for no candidate
    masks: list[int]  # how many candidates of each sequence are masked, known to the host
    columns: tuple[int, int]  # all positions lie within
    end: int  # columns from here on do not exist yet
    scattered: bool = False


class Decoder:
    """One call's state. `run_block` fills the masks at given columns; nothing else changes tokens."""

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        starts: Sequence[int],
        frozen: Tensor,
        sampling: Sampling,
        callback: Callable[[Step], object] | None,
    ) -> None:
        self.model, self.config, self.sampling, self.callback = model, model.config, sampling, callback
        self.tokens, self.frozen, self.first_columns = tokens, frozen, list(starts)
        self.device = tokens.device
        self.starts = torch.tensor(self.first_columns, dtype=torch.int64).to(self.device)
        self.seeds = torch.tensor(sampling.seeds, dtype=torch.int64).to(self.device)
        self.unmask_options = dict(sampling.unmask)
        if (bias := sampling.unmask["logit_bias"]) is not None:  # as tensors: lists would be copied in every pass
            kinds = (torch.int64, torch.float32)
            self.unmask_options["logit_bias"] = tuple(
                torch.as_tensor(x, dtype=kind).to(self.device) for x, kind in zip(bias, kinds)
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
        """The columns of the next forward pass."""
        first, last = block.columns
        if self.sampling.cache == "block_causal":
            first = self.final if refresh else first
        elif refresh or self.sampling.cache == "none":
            first, last = 0, block.end
        elif self.sampling.cache == "prefix":
            last = block.end
        return max(first - 1, 0) if self.config.shifted_logits else first, last

    def hidden(self, window: tuple[int, int], end: int) -> Tensor:
        """(B, window, dim). With guidance w it is u + (w + 1) (c - u), the head being linear; u has no prompt."""
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
        """Who sees whom among the first `end` columns: never the padding, and with blocks none that lie ahead."""
        block = self.config.causal_block
        if not block:
            return KeyRanges.padding(end - starts, end, side="left")
        low = starts[:, None].expand(-1, column.shape[0])
        high = torch.maximum(((column // block + 1) * block).clamp(max=end), low)  # starts are multiples of the block
        return KeyRanges(torch.stack([low, high, high, high], dim=-1).to(torch.int32), end)

    # ---- one block ------------------------------------------------------------------------------------------------

    def run_block(self, block: Block) -> None:
        """Fills the block's masks. A sequence takes part until it has none left, or with Edit until nothing changes."""
        if max(block.masks, default=0) == 0:
            return
        masked = torch.tensor(block.masks, dtype=torch.int64).to(self.device, non_blocking=True)
        active, (adaptive, limit) = masked > 0, self.plan(block.masks)
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
                step=block.index * self.sampling.most_passes + step,
                revise=revise,
                frozen=self.frozen,
                noise_positions=candidates - self.starts[:, None],
                **self.unmask_options,
            )
            self.passes += active
            if not isinstance(revise, Remask):  # which goes on: what is full now may lose tokens in the next pass
                active = out.remaining > 0
                if isinstance(revise, Edit):
                    active = (active | out.committed.any(1)) & (step + 1 < masked + self.sampling.revise_steps)
            if self.callback is not None:
                where = (self.tokens, self.first_columns, block.index, step, candidates)
                self.callback(Step(*where, out.committed, out.confidence, self.forward_passes))
            if adaptive and step + 1 < limit and not bool(active.any()):  # the one synchronisation of a pass
                return

    def candidate_rows(self, block: Block, step: int) -> Tensor:
        """(B, K, dim), one forward pass, and of it the rows at the block's positions: no other meets the head."""
        every = self.sampling.refresh_every
        refresh = step == 0 or (every > 0 and step % every == 0)
        window = self.window(block, refresh)
        hidden = self.hidden(window, block.end)
        if refresh:
            self.final = block.columns[0]
        if not block.scattered:
            return hidden[:, block.columns[0] - window[0] : block.columns[1] - window[0]]
        row = torch.arange(block.positions.shape[0], device=self.device)[:, None]
        return hidden[row, (block.positions - window[0]).clamp(min=0)]

    def plan(self, masks: Sequence[int]) -> tuple[bool, int]:
        """(whether the number of passes depends on the data, the most there can be)."""
        most, rule = max(masks), self.sampling.rule
        if self.sampling.revise is not None:
            return True, most + self.sampling.revise_steps
        if rule is None:
            return False, min(self.sampling.steps_per_block, most)
        if isinstance(rule, TopK) and not isinstance(rule.k, Tensor):
            return False, -(-most // rule.k)
        return True, most

    def rule(self, step: int, masked: Tensor) -> Rule:
        """LLaDA's schedule spreads a block's masks evenly over its passes; the first passes take what is left over."""
        if self.sampling.rule is not None:
            return self.sampling.rule
        passes = masked.clamp(1, self.sampling.steps_per_block)
        return TopK(masked // passes + (step % passes < masked % passes))

    def revision(self, step: int) -> Edit | Remask | None:
        """Remasking comes first and ends, so that the block can fill up; edits go on until nothing changes."""
        revise = self.sampling.revise
        return None if isinstance(revise, Remask) and step >= self.sampling.revise_steps else revise
