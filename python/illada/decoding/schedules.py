"""Rules that change from pass to pass: what a schedule sees, LLaDA's schedule, counts, choices, open blocks.

A schedule is a callable that takes a `Pass` and returns a rule of `illada_kernels` or a `Choose`. It computes on
tensors alone, so that nothing waits for the device. Its attribute `passes`, where it has one, bounds the passes of a
block; without one each pass is expected to commit at least a token. `any_batch = True` says that it treats each row by
what `Pass` says of it, so that sequences that have ended may leave the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

import illada_kernels
from illada_kernels import Renoise, TopK
from illada_kernels.rules import Rule

FILLING = tuple(rule for rule in get_args(Rule) if rule is not Renoise)  # the rules that fill masks


@dataclass(frozen=True, eq=False)
class Pass:
    """Holds what is known when a pass begins. All tensors live on the device; a host that reads one waits for it."""

    step: Tensor  # () int64: passes made in this block
    masked: Tensor  # (B,) int64: masks when the block began
    left: Tensor  # (B,) int64: masks now
    candidates: Tensor  # (B, K) int64: positions from each sequence's start, negative where there is no candidate
    seeds: Tensor  # (B,) int64
    noise_step: Tensor  # (B,) int64: counts passes over all blocks
    held: Callable[[], Tensor]  # the candidates' tokens
    sure: Tensor  # (B, K) float32: the confidence with which a candidate's token was committed; for a callable `revise`
    mask_id: int

    @functools.cached_property
    def is_masked(self) -> Tensor:
        """Candidates that hold a mask, bool (B, K)."""
        return (self.candidates >= 0) & (self.held() == self.mask_id)

    def part(self, rows: slice) -> Pass:
        """Returns the pass as these rows alone would see it."""
        each = (self.masked, self.left, self.candidates, self.seeds, self.noise_step)
        masked, left, candidates, seeds, noise_step = (tensor[rows] for tensor in each)
        held, sure = lambda: self.held()[rows], self.sure[rows]
        return Pass(self.step, masked, left, candidates, seeds, noise_step, held, sure, self.mask_id)

    def uniform(self, draw: int = 1) -> Tensor:
        """Returns numbers in [0, 1), float32 (B, K), a function of seed, pass, position and `draw` on every device.

        Draw 0 is that of `confidence="random"`.
        """
        batch, count = self.candidates.shape
        nothing = torch.zeros(batch, count, 1, device=self.candidates.device)
        tokens = torch.zeros(batch, count, dtype=torch.int64, device=self.candidates.device)
        at = torch.arange(count, device=self.candidates.device).expand(batch, count)
        out = illada_kernels.unmask_from_logits(
            nothing,
            tokens,
            at,
            TopK(0),
            mask_id=0,
            forbid=(),
            confidence="random",
            seed=self.seeds,
            step=self.noise_step + draw * 2**31,  # beyond the passes
            noise_positions=self.candidates.clamp(min=0),
        )
        return out.confidence


class Table:
    """Numbers per pass, (passes,) or (passes, B). They go to the device once, when first used."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return self.values.shape[0]

    def at(self, now: Pass) -> Tensor:
        """Returns the entry of this pass, () or (B,); the last one from then on."""
        if self.values.device != now.step.device:
            self.values = self.values.to(now.step.device)
        return self.values.index_select(0, now.step.clamp(max=len(self) - 1).view(1))[0]


@dataclass(frozen=True)
class Choose:
    """Commits the proposals where `where(proposal, confidence)`, bool (B, K), is true.

    For rules that are none of `illada_kernels`'. Rows without a proposal have confidence -inf and are never committed.
    """

    where: Callable[[Tensor, Tensor], Tensor]


Schedule = Callable[[Pass], Rule | Choose]


@dataclass(frozen=True)
class Always:
    """Gives every pass the same rule."""

    rule: Rule | Choose

    def __call__(self, now: Pass) -> Rule | Choose:
        return self.rule


@dataclass(frozen=True)
class Evenly:
    """Spreads a block's masks evenly over `passes`; the first passes take the remainder. LLaDA's generate.py."""

    passes: int

    def __call__(self, now: Pass) -> TopK:
        passes = now.masked.clamp(1, self.passes)
        return TopK(now.masked // passes + (now.step % passes < now.masked % passes))


@dataclass(frozen=True, eq=False)
class Counts:
    """Commits counts[step] tokens, (passes,) or (passes, B); what is left in the last pass."""

    counts: Table

    @property
    def passes(self) -> int:
        return len(self.counts)

    def __call__(self, now: Pass) -> TopK:
        return TopK(torch.where(now.step + 1 < self.passes, self.counts.at(now), now.left))


def best(confidence: Tensor, count: Tensor, candidates: Tensor) -> Tensor:
    """Returns where the most confident are, `count` () or (B,) of them; ties go to the lowest position."""
    order = candidates.argsort(dim=1, stable=True)
    order = order.gather(1, confidence.gather(1, order).argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return rank < count[:, None]


@dataclass(frozen=True)
class OpenBlocks:
    """Decodes several blocks at once, after d3LLM: see `illada.decoding.samplers.d3llm`.

    Block j is open once `open_at` of block j - 1 is decoded. Commits what is at least `least` confident in open blocks,
    always the most confident of all of it, and in the first block that is not full at least its most confident. With
    cache "delayed" a block's keys are kept `delay` passes after it is seen full.
    """

    any_batch = True

    length: int
    open_at: float
    least: float
    delay: int = 2

    def count(self, candidates: Tensor) -> Tensor:
        """Returns how many are true in each block, int64 (B, blocks), of bool (B, K)."""
        padded = F.pad(candidates.long(), (0, -candidates.shape[1] % self.length))
        return padded.view(len(candidates), -1, self.length).sum(-1)

    def __call__(self, now: Pass) -> Choose:
        count = now.candidates.shape[1]
        masks, sizes = self.count(now.is_masked), self.count(now.candidates >= 0)
        decoded = (sizes - masks).double() >= self.open_at * sizes.double()
        is_open = torch.cat([torch.ones_like(decoded[:, :1]), decoded[:, :-1]], 1).cumprod(1).bool()
        first = (masks > 0) & ((masks > 0).cumsum(1) == 1)  # the first block that is not full

        def where(proposal: Tensor, confidence: Tensor) -> Tensor:
            in_open, in_first = (
                x.repeat_interleave(self.length, 1, output_size=x.shape[1] * self.length)[:, :count]
                for x in (is_open, first)
            )
            one = torch.ones_like(now.left)
            most, first_most = (
                best(torch.where(here & now.is_masked, confidence, -torch.inf), one, now.candidates) & here
                for here in (in_open, in_first)
            )
            chosen = (in_open & (confidence >= self.least)) | most
            return chosen | first_most & ~(chosen & in_first & now.is_masked).any(1, keepdim=True)

        return Choose(where)
