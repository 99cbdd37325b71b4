"""Decoder: sequences come and go while others are decoded (continuous batching)."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DecodingError, PromptError
from ..model import Model
from .config import GenerationConfig
from .generation import first_stop
from .layout import Block
from .loop import BlockLoop, check_filled
from .samplers import of_model
from .settings import (
    checked,
    expect_prompts,
    has_numbers,
    resolve,
    resolve_block_length,
    seeds_of,
    stop_ids_of,
    token_lists,
)


@dataclass(frozen=True)
class Finished:
    """A sequence that `Decoder.collect` returns."""

    ticket: int  # what `submit` returned
    tokens: list[int]  # what was generated, up to the stop token
    stopped: bool  # whether a stop token was generated
    passes: int  # forward passes in which it had masks
    filled: int  # masks that were filled


@dataclass
class _Sequence:
    ticket: int
    prompt: list[int]
    seed: int
    end: int  # columns from its start to its last token's end
    before: int  # columns from its start to the block that is next
    text: list[int] = dataclasses.field(default_factory=list)  # prompt tokens within its first block included
    filled: int = 0


class Decoder:
    """Decodes sequences in `slots` rows; one joins where another ended, when a block ends.

    Parameters
    ----------
    model : Model
    config : GenerationConfig, optional
        Settings of all sequences. `seed` s gives the sequence with ticket n the seed s + n.
    slots : int
        Sequences that are decoded at a time.
    max_length : int, optional
        Room for a prompt and its new tokens. None: the model's max_seq_len.

    Raises
    ------
    PromptError
        For settings that contradict each other or the model, numbers for each sequence (tensors (B,) in a rule), and
        samplers with a loop of their own.

    Notes
    -----
    A sequence's tokens do not depend on the others, nor on when it joins. A pass computes the rows of the sequences
    that are there, on a GPU the next power of two of them, so that shapes are few. Synchronises once a block. Memory:
    the cache for slots * (max_length, without `variable_length` also max_new_tokens) tokens, where `config.cache` asks
    for one. `growing_bias` takes one call of `unmask` for each sequence.

    Examples
    --------
    >>> import torch
    >>> from illada import Decoder, GenerationConfig, Model, ModelConfig
    >>> _ = torch.manual_seed(0)
    >>> model = Model(ModelConfig.preset("demo", n_layers=1)).eval()
    >>> decoder = Decoder(model, GenerationConfig(max_new_tokens=4, stop_ids=()), slots=2)
    >>> tickets = [decoder.submit(prompt) for prompt in ([72, 105], [72], [33])]
    >>> while decoder.step():
    ...     pass
    >>> sorted((done.ticket, len(done.tokens)) for done in decoder.collect())
    [(0, 4), (1, 4), (2, 4)]
    """

    def __init__(
        self, model: Model, config: GenerationConfig | None = None, slots: int = 8, max_length: int | None = None
    ) -> None:
        c = model.config
        config = checked(of_model(config or GenerationConfig(), c), c)
        length = c.max_seq_len if max_length is None else max_length
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise PromptError(f"slots: expected an int of at least 1, got {slots!r}")
        fits = isinstance(length, int) and config.max_new_tokens <= length <= c.max_seq_len
        if isinstance(length, bool) or not fits:
            raise PromptError(
                f"max_length: expected {config.max_new_tokens} (max_new_tokens) to {c.max_seq_len} (max_seq_len), "
                f"got {length!r}"
            )
        self.model, self.settings, self.length = model, config, length
        self.block_length = resolve_block_length(config, c)
        self.whole = c.causal_block or 1  # a prompt's whole blocks lie before the first block that is decoded
        self.base_seed = seeds_of(config.seed, 1)[0]
        blocks = -(-config.max_new_tokens // self.block_length)
        if has_numbers(config.rule) or has_numbers(config.revise):
            raise PromptError(
                "rule: expected numbers or 0-d tensors in a Decoder, for which sequence has which row varies"
            )
        sampling = resolve(dataclasses.replace(config, seed=[0] * slots), c, slots, self.block_length, blocks)
        self.stop_ids = set(stop_ids_of(config, c))
        self.sees_all = not (config.variable_length or c.causal_block)  # masks of later blocks, too
        # Every sequence may end within a block. Where columns are short the rectangle moves, so that one begins in 0.
        columns = (-(-length // self.block_length) + 1 + blocks * self.sees_all) * self.block_length
        tokens = torch.full((slots, columns), c.mask_id, dtype=torch.int64, device=model.device)
        self.loop = BlockLoop(model, tokens, [0] * slots, torch.zeros_like(tokens, dtype=torch.bool), sampling, None)
        self.slots = slots
        self.rows: list[_Sequence | None] = []  # None: it has ended
        self.waiting: deque[_Sequence] = deque()
        self.finished: list[Finished] = []
        self.at = 0  # the column where the next block begins
        self.blocks = self.tickets = 0
        self.running: Iterator[None] | None = None
        self.failed: deque[DecodingError] = deque()  # of sequences that `step` has not named yet
        self.broken: str | None = None  # what ended a pass half way

    def submit(self, prompt: Sequence[int] | Tensor, seed: int | None = None) -> int:
        """Queues a prompt; returns its ticket.

        Raises PromptError for a prompt that does not fit max_length together with max_new_tokens, or holds a mask.
        """
        ticket = self.tickets
        row = token_lists([prompt], self.model.config)[0]
        expect_prompts([row], self.model.config)
        if len(row) + self.settings.max_new_tokens > self.length:
            raise PromptError(
                f"prompt: {len(row)} tokens and max_new_tokens = {self.settings.max_new_tokens} exceed max_length = "
                f"{self.length}; shorten the prompt, generate less or make a Decoder with more room"
            )
        seeds = seeds_of(self.base_seed + ticket if seed is None else seed, 1)
        whole = len(row) // self.whole * self.whole
        end = len(row) + self.settings.max_new_tokens
        self.waiting.append(_Sequence(ticket, row, seeds[0], end, whole, row[whole:]))
        self.tickets += 1
        return ticket

    @torch.no_grad()
    def step(self) -> bool:
        """Makes one forward pass; returns False if there was nothing to do.

        Raises DecodingError if positions of a sequence stay masked, because hidden rows are NaN: once for each such
        sequence, which has left then, while the others go on. After an error within a pass (Ctrl-C, a rule that raises)
        its sequences are lost, and every later call raises DecodingError; `collect` still has those that had ended.
        """
        while True:
            if self.failed:
                raise self.failed.popleft()
            if self.broken is not None:
                raise DecodingError(
                    f"step: {self.broken} has ended a pass half way; submit what `collect` does not return to a new "
                    "Decoder"
                )
            try:
                if self.running is None and not self._begin():
                    return False
                assert self.running is not None
                if next(self.running, self) is not self:
                    return True
                self._end()
            except BaseException as error:
                self.broken = type(error).__name__
                raise

    def collect(self) -> list[Finished]:
        """Returns the sequences that have ended since the last call, in the order in which they ended."""
        finished, self.finished = self.finished, []
        return finished

    # ---- at the border of two blocks --------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Lets waiting sequences join and begins a block; returns False if there is no sequence."""
        joiners = self._admit()
        live = [row for row in self.rows if row is not None]
        if not live:
            return False
        loop, batch = self.loop, self.loop.batch
        loop.use(loop.bucket(len(live)))
        columns = max([self.at + self.block_length, *(self.at - row.before + row.end for row in live if self.sees_all)])
        if joiners or columns > batch.tokens.shape[1]:  # others have ended that began further left
            self._move(max(row.before for row in live) - self.at)
            if len(joiners) == len(live):  # the first pass covers all columns
                loop.layout.final = 0
            for b in joiners:
                self._join(b, live[b], alone=len(joiners) < len(live))
        for b in range(len(live), loop.count):  # rows that are free, which nothing may depend on
            loop.layout.first_columns[b], loop.layout.joins[b] = 0, loop.layout.joins[0]
        free, stop = loop.count - len(live), self.at + self.block_length
        ends = [self.at - row.before + row.end for row in live]
        masks = [min(stop, end) - max(self.at, end - self.settings.max_new_tokens) for end in ends]
        for row, count in zip(live, masks):
            row.filled += count
        column = torch.arange(self.at, stop, device=loop.device)
        open_until = torch.tensor([*ends, *[self.at] * free], dtype=torch.int64, device="cpu")
        open_until = open_until.to(loop.device, non_blocking=True)
        is_open = (column < open_until[:, None]) & ~batch.frozen[:, self.at : stop]
        end = max(stop, *ends) if self.sees_all else stop
        batch.limits.copy_(open_until.clamp(max=end))
        if self.model.config.causal_block:  # whose blocks are whole
            batch.limits.fill_(end)
        blank = any(not row.prompt and not row.before for row in live)
        masks += [0] * free
        block = Block(self.blocks, torch.where(is_open, column, -1), masks, (self.at, stop), end, blank=blank)
        self.running = loop.passes_of(block)
        return True

    def _admit(self) -> list[int]:
        """Seats waiting sequences where others have ended, and lets the rows in use be the first ones.

        Returns the rows of those that have come.
        """
        joiners = [b for b, row in enumerate(self.rows) if row is None]
        joiners += range(len(self.rows), self.slots)
        joiners = joiners[: len(self.waiting)]
        for b in joiners:
            self.rows[b : b + 1] = [self.waiting.popleft()]
        while None in self.rows:
            last = self.rows.pop()
            if last is not None:  # it moves into the first gap
                gap = self.rows.index(None)
                self.loop.copy_row(len(self.rows), gap)
                self.rows[gap] = last
        return joiners

    def _move(self, by: int) -> None:
        """Moves the rows in use by columns."""
        if by:
            self.loop.batch.roll(by)
            if by < 0:  # what comes in on the right was padding
                self.loop.batch.tokens[:, by:] = self.model.config.mask_id
                self.loop.batch.frozen[:, by:] = False
            self.loop.batch.starts.add_(by).clamp_(min=0)  # of rows that are free
            self.at += by
            self.loop.layout.final = max(self.loop.layout.final + by, 0)
            self.loop.layout.first_columns = [first + by for first in self.loop.layout.first_columns]

    def _join(self, b: int, row: _Sequence, alone: bool) -> None:
        """Writes a sequence's prompt so that its first block begins in the next one's column.

        alone: other sequences are running, so the next pass does not cover the prompt.
        """
        loop, batch = self.loop, self.loop.batch
        start, padding = self.at - row.before, max(self.model.config.pad_id, 0)
        text = [*[padding] * start, *row.prompt]
        columns = batch.tokens.shape[1]
        line = torch.tensor(text + [self.model.config.mask_id] * (columns - len(text)), dtype=torch.int64, device="cpu")
        batch.tokens[b].copy_(line)
        batch.frozen[b, : len(text)], batch.frozen[b, len(text) :] = True, False
        loop.layout.first_columns[b], loop.layout.joins[b] = start, self.blocks
        batch.starts[b], batch.limits[b] = start, self.at
        loop.seeds[b], loop.joined[b], loop.passes[b] = row.seed, self.blocks, 0
        if alone and loop.sampling.cache == "block_causal" and row.before:
            batch.read_prompt(b, self.at)

    def _end(self) -> None:
        """Takes out the sequences that have ended. Reads the block's tokens, the one synchronisation of a block."""
        self.running, block = None, slice(self.at, self.at + self.block_length)
        found, passes = self.loop.batch.tokens[:, block].tolist(), self.loop.passes.tolist()
        self.at += self.block_length
        self.blocks += 1
        for b, row in enumerate(self.rows):
            if row is None:
                continue
            row.before += self.block_length
            row.text += found[b][len(row.text) % self.block_length :]
            inside = len(row.prompt) % self.whole  # prompt tokens in `text`
            text = row.text[inside:][: self.settings.max_new_tokens]
            end = first_stop(text, self.stop_ids)
            if end is None and self.settings.stop_when is not None and self.settings.stop_when(list(text)):
                end = len(text)
            if end is None and len(text) < self.settings.max_new_tokens:
                continue
            self.rows[b] = None
            try:
                check_filled([text[:end]], self.model.config, f"ticket {row.ticket}")
            except DecodingError as error:  # the others' rows must be brought up to date
                self.failed.append(error)
                continue
            self.finished.append(Finished(row.ticket, text[:end], end is not None, passes[b], row.filled))
