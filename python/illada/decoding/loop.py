"""The loop behind `generate`, `fill` and `Decoder`: forward passes over windows of columns, one `unmask` a pass.

Which columns a pass computes is said in layout.py. A pass never waits for the device: its state lives in tensors that
are allocated once, schedules compute on them, and whether a block is done comes to the host one pass late (`LateFlag`).
What the host knows of a pass is its `Shape`: on a GPU passes of one shape are one CUDA graph, whatever their block
(`Replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import illada_kernels
from illada_kernels import Edit, Remask, Renoise, TopK

from ..config import ModelConfig
from ..errors import DecodingError, PromptError
from ..model import Model
from .batch import Batch, Rows, Shape
from .config import Sampling
from .layout import Block, Layout
from .replay import LateFlag, Replay
from .schedules import Always, Choose, Evenly, OpenBlocks, Pass, Rule


class Unmasked(NamedTuple):
    """Holds what `illada_kernels.unmask` returns, what a `Choose` committed included."""

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


class BlockLoop(Rows):
    """Fills blocks of a `Batch`. The state of a pass is written in place; "block" is the one that is being filled."""

    seeds: Tensor  # (B,) int64, as all below
    passes: Tensor  # in which the sequence had masks
    masked: Tensor  # masks when the block began
    left: Tensor  # masks now
    full_passes: Tensor  # passes since the block was full
    noise_step: Tensor  # counts passes over all blocks
    joined: Tensor  # the block with which the sequence began
    cached: Tensor  # blocks in front whose keys are kept, what precedes them the first; with cache "delayed"
    seen: Tensor  # the pass, from 1 on, in which the block behind those was first seen full, else -1
    active: Tensor  # (B,) bool
    positions: Tensor  # (B, block_length) int64: the block's candidates
    sure: Tensor  # (B, block_length) float32: the confidence with which their tokens were committed
    bias: Tensor  # (B, ids) float32: values of logit_bias

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
        self.device = tokens.device
        self.batch = Batch(model, tokens, starts, frozen, sampling)
        self.layout = Layout(starts, self.config, sampling)
        self.forward_passes = 0
        self.unmask_options = dict(sampling.unmask)
        counts = torch.zeros(8, len(starts), dtype=torch.int64, device=self.device)
        names = ("passes", "masked", "left", "full_passes", "noise_step", "joined", "cached", "seen")
        super().__init__(
            **dict(zip(names, counts)),
            seeds=torch.tensor(sampling.seeds, dtype=torch.int64, device=self.device),
            active=torch.zeros(len(starts), dtype=torch.bool, device=self.device),
            positions=torch.full((len(starts), sampling.block_length), -1, dtype=torch.int64, device=self.device),
            sure=torch.zeros(len(starts), sampling.block_length, device=self.device, dtype=torch.float32),
            bias=self._bias(len(starts)),
        )
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)  # () passes made in the block
        self.finished = torch.zeros((), dtype=torch.bool, device=self.device)  # () no sequence is active
        self.done = LateFlag(self.device)
        self.ends = torch.tensor(sampling.ends, dtype=torch.int64, device=self.device)
        self.replay = Replay(self.one_pass, self.device)
        rule = sampling.schedule.rule if isinstance(sampling.schedule, Always) else None  # others are made in a pass
        if rule is not None and not isinstance(rule, Choose):
            self._try(rule)

    def _try(self, rule: Rule) -> None:
        """Gives `unmask_from_logits` the settings and no candidates; raises PromptError for what it refuses."""
        nothing, options = self.positions[:, :0], {**self.unmask_options, "mask_id": self.config.mask_id}
        options["revise"] = self.sampling.revise if isinstance(self.sampling.revise, Edit) else None
        logits = torch.empty(*nothing.shape, len(self.model.head_weight), dtype=torch.float32, device=self.device)
        try:
            illada_kernels.unmask_from_logits(logits, self.batch.tokens, nothing, rule, **options, backend="reference")
        except (TypeError, ValueError) as error:
            raise PromptError(str(error)) from None

    def _bias(self, rows: int) -> Tensor:
        """Puts logit_bias and the bias that grows on the device once; returns its values (rows, ids)."""
        bias, growing = self.sampling.unmask["logit_bias"], self.sampling.growing_bias
        ids, values = map(list, bias or ((), ()))
        more_ids, rates = map(list, growing or ((), ()))
        numbers = [*values, *[0.0] * len(rates)], [*[0.0] * len(values), *rates]
        self.fixed_bias, self.growth = (torch.tensor(n, dtype=torch.float32, device=self.device) for n in numbers)
        self.bias_ids = torch.tensor([*ids, *more_ids], dtype=torch.int64, device=self.device)
        return self.fixed_bias.repeat(rows, 1)

    def bucket(self, sequences: int) -> int:
        """Returns how many rows are computed for so many sequences: on a GPU a power of two, so that shapes are few."""
        return min(1 << (sequences - 1).bit_length(), len(self.layout.joins)) if self.replay.graphs else sequences

    def use(self, count: int) -> None:
        """Lets the first `count` rows take part."""
        super().use(count)
        self.batch.use(count)
        self.layout.count = count

    def copy_row(self, source: int, target: int) -> None:
        """Gives row `target` the sequence of row `source`."""
        super().copy_row(source, target)
        self.batch.copy_row(source, target)
        self.layout.copy_row(source, target)

    def shape(self, block: Block, step: int, due: list[bool]) -> Shape:
        """Returns what the host knows of a pass, and tells the device the rest of where it is."""
        first, last = self.layout.window(block, step, any(due))
        interval = self.sampling.cache == "interval"
        guarded = interval and any(due) and not (step == 0 and all(due))
        if guarded:
            own = self.layout.window(block, step, False)
            for b, whole in enumerate(due):
                for side, column in enumerate((0, last) if whole else own):
                    self.batch.span[b, side].fill_(column)
        delayed = self.sampling.cache == "delayed"
        if delayed:
            first = max(self.delayed(block) - self.config.shifted_logits, 0)
        keys = block.end
        if self.replay.graphs or delayed:
            self.batch.window_start.fill_(first)
        if self.replay.graphs:
            keys = last - first if self.batch.cache is None else self.batch.cache.capacity
        before = self.layout.autoregressive(block)
        # In all columns each block stands elsewhere; a delayed window may begin behind the first candidates.
        scattered = block.scattered or delayed or (self.replay.graphs and any(due))
        return Shape(
            rows=self.count,
            first=None if self.replay.graphs else first,
            length=last - first,
            keys=keys,
            offset=None if scattered else block.columns[0] - before - first,
            candidates=block.positions.shape[1],
            shift=not before,
            blank=block.blank,
            guarded=guarded or delayed,
            apart=self.sampling.growing_bias is not None and len(set(self.layout.joins[: self.count])) > 1,
            remasking=step < self.sampling.remask_steps,
        )

    def delayed(self, block: Block) -> int:
        """Says in `span` which keys each sequence writes in this pass; returns the first column of them all.

        The block's parts of `length`, and before them what precedes the block, are cached one after the other: `delay`
        passes after a part is seen full. A pass over all columns is made while one waits for that, and every
        `refresh_every` passes. Reads the column that it returns, so this cache alone waits for the device.
        """
        rule, now, span = self.sampling.schedule, self.step + 1, self.batch.span
        assert isinstance(rule, OpenBlocks)
        at = self.positions[:, : block.positions.shape[1]]
        masked = (at >= 0) & (self.batch.tokens.gather(1, at.clamp(min=0)) == self.config.mask_id)
        front = 1 + (rule.count(masked) == 0).cumprod(1).sum(1)  # parts without masks that follow each other
        waits = self.cached < front
        self.seen.copy_(torch.where(waits & (self.seen < 0), now, self.seen))
        ready = waits & (now - self.seen >= rule.delay)
        whole = waits & ~ready | (self.cached == 0)
        if self.sampling.refresh_every:
            whole |= ~ready & (now % self.sampling.refresh_every == 0)
        span[:, 0] = torch.where(whole, 0, block.columns[0] + (self.cached - 1) * rule.length)
        span[:, 1] = block.end
        self.cached += ready * (1 if rule.delay else front - self.cached)
        self.seen.copy_(torch.where(ready, torch.where(self.cached < front, now, -1), self.seen))
        return int(torch.where(self.active, span[:, 0], block.columns[1] - 1).min())

    # ---- one block --------------------------------------------------------------------------------------------------

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
        adaptive, limit = self.num_passes(most)
        passes = self.sampling.block_length if adaptive else self.num_passes(self.sampling.block_length)[1]
        for step in range(limit):
            due = self.layout.due(block.index, step, adaptive, passes)
            candidates, out = self.replay(self.shape(block, step, due))
            self.done.write(self.finished)
            self.forward_passes += 1
            if step == 0:
                self.layout.final = block.columns[0]
            if self.callback is not None:
                where = (self.batch.tokens, self.layout.first_columns[: self.count], block.index, step, candidates)
                self.callback(Step(*where, out.committed, out.confidence, self.forward_passes))
            yield
            if adaptive and step + 1 < limit and self.done.read():
                return

    def begin(self, block: Block) -> None:
        """Sets the state to what it is before the block's first pass."""
        self.masked.copy_(torch.tensor(block.masks, dtype=torch.int64, device="cpu"), non_blocking=True)
        self.left.copy_(self.masked)
        torch.gt(self.masked, 0, out=self.active)
        for count in (self.full_passes, self.step, self.cached, self.seen):
            count.zero_()
        self.positions[:, : block.positions.shape[1]].copy_(block.positions)
        torch.sub(block.index, self.joined, out=self.noise_step)
        generated = self.noise_step[:, None] * self.sampling.block_length
        self.bias.copy_(self.fixed_bias + self.growth * generated)
        self.noise_step.mul_(self.sampling.max_passes)
        self.done.reset()

    def one_pass(self, shape: Shape) -> tuple[Tensor, Unmasked]:
        """Runs the model, commits, and brings the state up to date, without the host.

        Returns the candidates (B, K) and what became of them.
        """
        candidates = torch.where(self.active[:, None], self.positions[:, : shape.candidates], -1)
        places = candidates - self.batch.starts[:, None]
        rows, sure = self.candidate_rows(shape, candidates), self.sure[:, : shape.candidates]
        now = Pass(
            self.step,
            self.masked,
            self.left,
            places,
            self.seeds,
            self.noise_step,
            lambda: self.batch.tokens.gather(1, candidates.clamp(min=0)),
            sure,
            self.config.mask_id,
        )
        parts = [slice(b, b + 1) for b in range(shape.rows)] if shape.apart else [slice(0, shape.rows)]
        outs = [self.commit(p, rows[p], candidates[p], now.part(p), shape.remasking) for p in parts]
        out = outs[0] if len(outs) == 1 else Unmasked(*map(torch.cat, zip(*outs)))
        self.passes += self.active
        self.full_passes += self.active & (self.left == 0)
        self.left.copy_(self.covered(candidates) if len(self.ends) else out.remaining)
        if callable(self.sampling.revise):
            sure.copy_(torch.where(out.committed, out.confidence, sure))
        if not shape.remasking:  # Remask may take tokens of a full sequence back in the next pass
            torch.gt(self.left, 0, out=self.active)
            if isinstance(self.sampling.revise, Edit):
                self.active |= out.committed.any(1) & (self.full_passes < self.sampling.revise_steps)
        self.step += 1
        self.noise_step += 1
        torch.logical_not(self.active.any(), out=self.finished)
        return candidates, out

    def candidate_rows(self, shape: Shape, candidates: Tensor) -> Tensor:
        """Runs one forward pass; returns the candidates' rows (B, K, dim), the only ones for the head."""
        hidden = self.batch.hidden(shape, self.active)
        if shape.offset is None:
            row = torch.arange(shape.rows, device=self.device)[:, None]
            hidden = hidden[row, (candidates - self.batch.window_start[:, None]).clamp(min=0)]
        else:
            hidden = hidden[:, shape.offset : shape.offset + shape.candidates]
        if not shape.blank:
            return hidden
        # Rows of a sequence of masks alone are equal but for rounding, because attention then averages equal values.
        # Without this the rounding, and with it the batch, would decide which position is the most confident.
        column, batch = torch.arange(self.batch.tokens.shape[1], device=self.device), self.batch
        outside = (column < batch.starts[:, None]) | (column >= batch.limits[:, None])
        blank = ((batch.tokens == self.config.mask_id) | outside).all(1)
        return torch.where(blank[:, None, None], hidden[:, :1], hidden)

    def commit(self, rows: slice, hidden: Tensor, candidates: Tensor, now: Pass, remasking: bool) -> Unmasked:
        """Proposes tokens at the candidates of `rows` and writes those that the schedule picks."""
        rule, tokens = self.sampling.schedule(now), self.batch.tokens[rows]
        masked = now.is_masked if isinstance(rule, Choose) else None  # before tokens are taken back
        if isinstance(rule, Renoise):
            raise PromptError("rule: expected one that fills masks, got Renoise; use sampler='canvas'")
        if len(self.bias_ids):
            self.unmask_options["logit_bias"] = (self.bias_ids, self.bias[rows.start])
        out = illada_kernels.unmask(
            hidden,
            self.model.head_weight,
            tokens,
            candidates,
            TopK(0) if isinstance(rule, Choose) else rule,
            mask_id=self.config.mask_id,
            seed=now.seeds,
            step=now.noise_step,
            revise=self.revision(now, remasking),
            frozen=self.batch.frozen[rows],
            noise_positions=now.candidates,
            **self.unmask_options,
        )
        if masked is None or not isinstance(rule, Choose):
            return Unmasked(*out)
        chosen = masked & (out.proposal >= 0) & rule.where(out.proposal, out.confidence)
        # Adding what differs leaves the column alone that stands in for those that are not candidates.
        change = torch.where(chosen, out.proposal - self.config.mask_id, 0)
        tokens.scatter_add_(1, candidates.clamp(min=0), change)
        return Unmasked(out.proposal, out.confidence, out.committed | chosen, out.remaining - chosen.sum(1))

    def covered(self, candidates: Tensor) -> Tensor:
        """Puts the first stop token among the candidates over all behind it; returns the masks left (B,)."""
        tokens, at, mask = self.batch.tokens, candidates.clamp(min=0), self.config.mask_id
        held = tokens.gather(1, at)
        stop = (held[..., None] == self.ends).any(-1) & (candidates >= 0)
        behind = (stop.cumsum(1) - stop.long() > 0) & (candidates >= 0)
        new = torch.where(behind, held.gather(1, stop.byte().argmax(1, keepdim=True)), held)
        tokens.scatter_add_(1, at, new - held)  # of those that are not candidates nothing changes
        return ((new == mask) & (candidates >= 0)).sum(1)

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
        if isinstance(revise, Edit) or revise is None or not remasking:
            return revise if isinstance(revise, Edit) else None
        found = revise(now) if callable(revise) else revise
        if not isinstance(found, Remask):
            raise PromptError(f"revise: expected a callable that returns a Remask, got {found!r} from it")
        return found


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
