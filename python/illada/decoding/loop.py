"""The loop behind `generate`, `fill` and `Decoder`: forward passes over windows of columns, one `unmask` a pass.

A batch is a rectangle of columns. Sequences are padded on the left, so that a block has the same columns in all of
them. Sequence b begins in column starts[b] and counts its positions from there. Columns that a pass computes:

    cache           first pass of a block                  later passes
    none            all columns up to `end`                the same
    prefix          all, and all keys are written          from the block on; keys before it are as old as the block
    dual            all, and all keys are written          the block alone; keys behind it are as old too
    block_causal    from the last block that is not final  the block alone; exact, as final blocks never change

A block's last pass commits its last tokens, so its keys are final only after the next block's first pass, which covers
both. With shifted logits a window begins no later than one column before the block, because that row predicts the
block's first token. Autoregressive models (shifted logits, blocks of one) compute the column of the last token alone.

A pass never waits for the device. Its state lives in tensors that are allocated once, schedules compute on them, and
whether a block is done comes to the host one pass late (`LateFlag`). So later passes of a block, whose shapes are
equal, are captured as a CUDA graph (`Replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import illada_kernels
from illada_kernels import Edit, KeyRanges, Remask, Renoise, TopK

from ..config import ModelConfig
from ..errors import DecodingError, PromptError
from ..model import Model
from .cache import Cache
from .config import Sampling
from .replay import LateFlag, Replay
from .schedules import Always, Choose, Evenly, Pass


class Unmasked(NamedTuple):
    """As `illada_kernels.unmask` returns it, what a `Choose` committed included."""

    proposal: Tensor  # (B, K) int64
    confidence: Tensor  # (B, K) float32
    committed: Tensor  # (B, K) bool
    remaining: Tensor  # (B,)


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
    blank: bool = False  # some sequences are masks alone


class BlockLoop:
    """Holds the tokens, cache and state of a batch. Only `passes_of` and `run_block` change tokens."""

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
        batch = len(self.first_columns)
        self.starts = torch.tensor(self.first_columns, dtype=torch.int64, device=self.device)
        self.seeds = torch.tensor(sampling.seeds, dtype=torch.int64, device=self.device)
        self.unmask_options = dict(sampling.unmask)
        self.growth: Tensor | None = None  # of the logit bias, for each token generated
        self._bias_tensors()
        self.guided = sampling.guidance != 0
        self.forward_passes = 0
        self.limits: Tensor | None = None  # (B,) the column where each sequence ends, if they differ
        self.final = 0  # columns before this one have final keys in the cache
        self.cache: Cache | None = None
        if sampling.cache != "none":
            rows = batch * (2 if self.guided else 1)
            self.cache = Cache(self.config, rows, tokens.shape[1], device=self.device, dtype=model.dtype)
        # The state of a pass, written in place. (B,) unless said; "block" is the one that is being filled.
        counts = torch.zeros(6, batch, dtype=torch.int64, device=self.device)
        self.passes, self.masked, self.left, self.full_passes, self.noise_step, self.joined = counts
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)  # () passes made in the block
        self.active = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self.finished = torch.zeros((), dtype=torch.bool, device=self.device)  # () no sequence is active
        self.done = LateFlag(self.device)

    def _bias_tensors(self) -> None:
        """Puts logit_bias and the bias that grows on the device once."""
        bias, growing = self.sampling.unmask["logit_bias"], self.sampling.growing_bias
        if bias is None and growing is None:
            return
        ids, values = map(list, bias or ((), ()))
        more_ids, rates = map(list, growing or ((), ()))
        self.fixed_bias = torch.tensor([*values, *[0.0] * len(rates)], dtype=torch.float32, device=self.device)
        every = torch.tensor([*ids, *more_ids], dtype=torch.int64, device=self.device)
        self.unmask_options["logit_bias"] = (every, self.fixed_bias.clone())
        if growing is not None:
            self.growth = torch.tensor([0.0] * len(values) + rates, dtype=torch.float32, device=self.device)

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
        if self.config.shifted_logits:
            first = max(min(first, block.columns[0] - 1), 0)
        return first, last - 1 if self.autoregressive(block) else last

    def autoregressive(self, block: Block) -> bool:
        """Whether the block is one token, predicted from the token before it in every sequence, beside a cache."""
        one = self.config.shifted_logits and self.config.causal_block == 1 and not block.scattered
        return one and self.cache is not None and block.columns[0] > max(self.first_columns)

    def hidden(self, window: tuple[int, int], end: int, shift: bool = True) -> Tensor:
        """Returns hidden rows (B, window, dim); with guidance w, u + (w + 1) (c - u), since the head is linear."""
        first, last = window
        tokens, starts = self.tokens[:, first:last], self.starts
        if self.guided:
            hidden_prompt = torch.where(self.frozen[:, first:last], self.config.mask_id, tokens)
            tokens, starts = torch.cat([tokens, hidden_prompt]), torch.cat([starts, starts])
        column = torch.arange(first, last, device=self.device)
        positions = (column - starts[:, None]).clamp(min=0)
        cache = None if self.cache is None else self.cache.at(first, end)
        h = self.model(tokens, self.ranges(column, starts, end), positions, cache, shift)
        if not self.guided:
            return h
        with_prompt, without = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2)
        return (without + (self.sampling.guidance + 1) * (with_prompt - without)).to(h.dtype)

    def ranges(self, column: Tensor, starts: Tensor, end: int) -> KeyRanges:
        """Returns the key ranges over the first `end` columns: neither padding nor, with blocks, later blocks."""
        block = self.config.causal_block
        if not block and self.limits is None:
            return KeyRanges.padding(end - starts, end, side="left")
        if self.limits is not None and not block:
            high = torch.maximum(self.limits.clamp(max=end), starts)
            return KeyRanges(torch.stack([starts, high, high, high], dim=-1)[:, None].to(torch.int32), end)
        low = starts[:, None].expand(-1, column.shape[0])
        high = torch.maximum(((column // block + 1) * block).clamp(max=end), low)  # starts are multiples of the block
        return KeyRanges(torch.stack([low, high, high, high], dim=-1).to(torch.int32), end)

    def read_prompt(self, b: int, end: int) -> None:
        """Writes the keys of sequence b's columns before `end` into the cache."""
        assert self.cache is not None
        column, starts = torch.arange(end, device=self.device), self.starts[b : b + 1]
        positions = (column - starts[:, None]).clamp(min=0)
        window = self.cache.rows(b, b + 1).at(0, end)
        self.model(self.tokens[b : b + 1, :end], self.ranges(column, starts, end), positions, window)

    # ---- one block ------------------------------------------------------------------------------------------------

    def run_block(self, block: Block) -> None:
        """Fills the block's masks. A sequence takes part until none is left, with Edit until nothing changes."""
        for _ in self.passes_of(block):
            pass

    def passes_of(self, block: Block) -> Iterator[None]:
        """Fills the block's masks, one pass an iteration."""
        most = max(block.masks, default=0)
        if most == 0:
            return
        self.begin(block)
        (adaptive, limit), every = self.num_passes(most), self.sampling.refresh_every
        later = Replay(lambda remasking: self.one_pass(block, False, remasking), self.device)
        for step in range(limit):
            refresh = step == 0 or (every > 0 and step % every == 0)
            remasking = step < self.sampling.remask_steps
            candidates, out = self.one_pass(block, True, remasking) if refresh else later(remasking)
            self.done.write(self.finished)
            self.forward_passes += 1
            if refresh:
                self.final = block.columns[0]
            if self.callback is not None:
                where = (self.tokens, self.first_columns, block.index, step, candidates)
                self.callback(Step(*where, out.committed, out.confidence, self.forward_passes))
            yield
            if adaptive and step + 1 < limit and self.done.read():
                return

    def begin(self, block: Block) -> None:
        """Sets the state to what it is before the block's first pass."""
        self.masked.copy_(torch.tensor(block.masks, dtype=torch.int64, device="cpu"), non_blocking=True)
        self.left.copy_(self.masked)
        torch.gt(self.masked, 0, out=self.active)
        self.full_passes.zero_()
        self.step.zero_()
        torch.sub(block.index, self.joined, out=self.noise_step).mul_(self.sampling.max_passes)
        self.done.reset()
        if self.growth is not None:
            generated = block.index * self.sampling.block_length
            torch.add(self.fixed_bias, self.growth, alpha=generated, out=self.unmask_options["logit_bias"][1])

    def one_pass(self, block: Block, refresh: bool, remasking: bool) -> tuple[Tensor, Unmasked]:
        """Runs the model, commits, and brings the state up to date, without the host.

        Returns the candidates (B, K) and what became of them.
        """
        candidates = torch.where(self.active[:, None], block.positions, -1)
        places = candidates - self.starts[:, None]
        now = Pass(
            self.step,
            self.masked,
            self.left,
            places,
            self.seeds,
            self.noise_step,
            lambda: self.tokens.gather(1, candidates.clamp(min=0)),
            self.config.mask_id,
        )
        revise = self.revision(now, remasking)
        out = self.commit(self.candidate_rows(block, refresh), candidates, now, revise)
        self.passes += self.active
        self.full_passes += self.active & (self.left == 0)
        self.left.copy_(out.remaining)
        if not remasking:  # Remask may take tokens of a full sequence back in the next pass
            torch.gt(self.left, 0, out=self.active)
            if isinstance(revise, Edit):
                self.active |= out.committed.any(1) & (self.full_passes < self.sampling.revise_steps)
        self.step += 1
        self.noise_step += 1
        torch.logical_not(self.active.any(), out=self.finished)
        return candidates, out

    def commit(self, rows: Tensor, candidates: Tensor, now: Pass, revise: Edit | Remask | None) -> Unmasked:
        """Proposes tokens at the candidates and writes those that the schedule picks."""
        rule = self.sampling.schedule(now)
        if isinstance(rule, Renoise):
            raise PromptError("rule: expected one that fills masks, got Renoise; use sampler='canvas'")
        out = illada_kernels.unmask(
            rows,
            self.model.head_weight,
            self.tokens,
            candidates,
            TopK(0) if isinstance(rule, Choose) else rule,
            mask_id=self.config.mask_id,
            seed=self.seeds,
            step=self.noise_step,
            revise=revise,
            frozen=self.frozen,
            noise_positions=now.candidates,
            **self.unmask_options,
        )
        if not isinstance(rule, Choose):
            return Unmasked(*out)
        chosen = now.is_masked & (out.proposal >= 0) & rule.where(out.proposal, out.confidence)
        # Adding what differs leaves the column alone that stands in for those that are no candidates.
        change = torch.where(chosen, out.proposal - self.config.mask_id, 0)
        self.tokens.scatter_add_(1, candidates.clamp(min=0), change)
        return Unmasked(out.proposal, out.confidence, out.committed | chosen, out.remaining - chosen.sum(1))

    def candidate_rows(self, block: Block, refresh: bool) -> Tensor:
        """Runs one forward pass; returns its rows at the block's positions (B, K, dim), the only ones for the head."""
        window, before = self.window(block, refresh), self.autoregressive(block)
        hidden = self.hidden(window, block.end, shift=not before)
        if before:
            rows = hidden[:, -1:]
        elif block.scattered:
            row = torch.arange(block.positions.shape[0], device=self.device)[:, None]
            rows = hidden[row, (block.positions - window[0]).clamp(min=0)]
        else:
            rows = hidden[:, block.columns[0] - window[0] : block.columns[1] - window[0]]
        return self.equal_if_blank(rows, block.end) if block.blank else rows

    def equal_if_blank(self, rows: Tensor, end: int) -> Tensor:
        """Gives all rows of a sequence of masks alone the value of its first.

        They are equal but for rounding, because attention then averages equal values. Without this the rounding, and
        with it the batch, would decide which position is the most confident.
        """
        column = torch.arange(end, device=self.device)
        blank = ((self.tokens[:, :end] == self.config.mask_id) | (column < self.starts[:, None])).all(1)
        return torch.where(blank[:, None, None], rows[:, :1], rows)

    def num_passes(self, most: int) -> tuple[bool, int]:
        """Returns (whether the number of passes depends on the data, the upper bound of it) for `most` masks."""
        schedule, declared = self.sampling.schedule, getattr(self.sampling.schedule, "passes", None)
        if self.sampling.revise is not None:
            return True, max(most, declared or 0) + self.sampling.revise_steps
        if isinstance(schedule, Evenly):
            return False, min(schedule.passes, most)
        rule = schedule.rule if isinstance(schedule, Always) else None
        if isinstance(rule, TopK) and not isinstance(rule.k, Tensor):
            return False, -(-most // rule.k)
        return True, declared or most

    def revision(self, now: Pass, remasking: bool) -> Edit | Remask | None:
        """Returns the pass's revision. Remask ends after `revise_steps`, otherwise the block could not fill up."""
        revise = self.sampling.revise
        if isinstance(revise, Edit):
            return revise
        return (revise(now) if callable(revise) else revise) if remasking else None


def left_padded(rows: list[list[int]], model: Model, starts: list[int], columns: int) -> Tensor:
    """Returns (B, columns) on the model's device: row b from column starts[b] on, padding before, masks behind."""
    padding, mask = max(model.config.pad_id, 0), model.config.mask_id
    table = [[padding] * s + row + [mask] * (columns - s - len(row)) for s, row in zip(starts, rows)]
    return torch.tensor(table, dtype=torch.int64, device=model.device)


def check_filled(rows: list[list[int]], config: ModelConfig, name: str | None = None) -> None:
    """Raises DecodingError if a mask is left in rows."""
    left = [(b, row.count(config.mask_id)) for b, row in enumerate(rows) if config.mask_id in row]
    if left:
        name = name or f"sequence {left[0][0]}"
        raise DecodingError(
            f"{name}: {left[0][1]} positions stayed masked; the model's hidden rows are NaN or inf (wrong dtype or "
            "damaged weights?), or the rule or forbid leaves no token"
        )
