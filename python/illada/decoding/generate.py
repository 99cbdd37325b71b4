"""generate: prompts to text, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..errors import PromptError
from ..model import Model
from . import canvas, samplers, speculation
from .config import GenerationConfig, Prompts, Sampling
from .generation import Generation, until_stop
from .layout import Block
from .loop import BlockLoop, Step, check_filled, left_padded
from .settings import checked, expect_mask, expect_prompts, resolve, resolve_block_length, stop_ids_of, token_lists


@torch.no_grad()
def generate(
    model: Model,
    prompts: Prompts,
    config: GenerationConfig | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Generation:
    """Continues prompts, block by block. A sequence's result does not depend on the others in the batch.

    Parameters
    ----------
    model : Model
    prompts : sequence of sequences of int, or int64 (B, n)
        Token ids, rows of any lengths. A prompt of length 0 generates without condition.
    config : GenerationConfig, optional
    callback : callable, optional
        Called with a `Step` after each forward pass.

    Returns
    -------
    Generation

    Raises
    ------
    PromptError
        For a prompt that does not fit max_seq_len together with max_new_tokens, that holds ids outside the vocab or
        mask_id (`fill` takes those), and for settings that contradict each other or the model.
    DecodingError
        If positions stay masked because hidden rows are NaN, or `forbid` leaves no token.

    Notes
    -----
    Synchronisation: before the first pass prompts and settings that are tensors on a device are read, to check them
    (`rule`, `seed`, ids, biases; not numbers of `unmask` in 0-d tensors); then once per block, to see whether all
    sequences have stopped (not with stop_ids=()), with `stop_when` once per canvas or draft, too. Never in a pass, but
    for cache "delayed", whose windows depend on what is full: where the number of passes depends on the data, it is
    read one pass late, so that on a GPU such a block makes one pass too many, which changes nothing. Memory: the hidden
    rows of one window; logits are never stored.

    Examples
    --------
    >>> import torch
    >>> from illada import GenerationConfig, Model, ModelConfig, generate
    >>> _ = torch.manual_seed(0)
    >>> model = Model(ModelConfig.preset("demo", n_layers=1)).eval()
    >>> done = generate(model, [[72, 105]], GenerationConfig(max_new_tokens=4, stop_ids=()))
    >>> len(done.tokens[0]), done.forward_passes
    (4, 4)
    """
    sampler, sampler_options, asked = None, {}, config or GenerationConfig()
    config = samplers.of_model(asked, model.config)
    if config.sampler in samplers.ALONE:
        sampler, sampler_options = config.sampler, dict(config.sampler_options)
        try:
            (canvas if sampler == "canvas" else speculation).check(config)
        except PromptError as error:
            default = "; models with next_token have it by default: name another" if asked.sampler is None else ""
            raise PromptError(f"{error}{default}") from None
        config = dataclasses.replace(config, sampler=None, sampler_options={})
    config = checked(config, model.config)
    rows = token_lists(prompts, model.config)
    if sampler is not None:
        expect_mask(model.config, f"sampler {sampler!r}")
    expect_prompts(rows, model.config)
    block_length = 1 if sampler else resolve_block_length(config, model.config)
    for b, row in enumerate(rows):
        if len(row) + config.max_new_tokens > model.config.max_seq_len:
            raise PromptError(
                f"prompt {b}: {len(row)} tokens and max_new_tokens = {config.max_new_tokens} exceed max_seq_len = "
                f"{model.config.max_seq_len}; shorten the prompt or generate less"
            )
    stop_ids = stop_ids_of(config, model.config)
    if sampler == "canvas":
        return canvas.paint(model, rows, config, sampler_options, stop_ids, callback)
    if sampler is not None:
        return speculation.speculate(model, rows, config, stop_ids, callback, verify=sampler != "draft")
    sampling = resolve(config, model.config, len(rows), block_length, -(-config.max_new_tokens // block_length))
    return _Continuation(model, rows, config, block_length, stop_ids).run(sampling, callback)


class _Continuation:
    """Lays a batch out in columns: prompts, in block-causal models their whole blocks, end in column `first`.

    Block-causal models count blocks from the sequence's start, so a prompt's incomplete last block is generated with
    its prompt tokens frozen. Columns beyond max_new_tokens are never candidates.
    """

    def __init__(
        self,
        model: Model,
        rows: list[list[int]],
        config: GenerationConfig,
        block_length: int,
        stop_ids: tuple[int, ...],
    ) -> None:
        self.model, self.rows, self.block_length, self.stop_ids = model, rows, block_length, stop_ids
        self.stop_when, self.ended = config.stop_when, [False] * len(rows)
        whole = model.config.causal_block or 1
        before = [len(row) // whole * whole for row in rows]  # columns before the first block
        self.first = max(before, default=0)
        self.starts = [self.first - n for n in before]
        self.prompt_ends = [start + len(row) for start, row in zip(self.starts, rows)]
        self.ends = [end + config.max_new_tokens for end in self.prompt_ends]
        self.blocks = -(-(max(self.ends, default=0) - self.first) // block_length)
        self.columns = self.first + self.blocks * block_length
        if not model.config.causal_block:  # whose blocks are whole
            self.columns = max(self.ends, default=0)
        self.variable_length = config.variable_length or model.config.causal_block > 0
        self.filled, self.running = [0] * len(rows), [True] * len(rows)
        self.live = list(range(len(rows)))  # the sequence in each row of the batch

    def run(self, sampling: Sampling, callback: Callable[[Step], object] | None) -> Generation:
        if not self.rows:
            return Generation([], [], [], [], 0)
        model, columns = self.model, self.columns
        self.table = left_padded(self.rows, model, self.starts, columns)
        self.passes = torch.zeros(len(self.rows), dtype=torch.int64, device=model.device)
        column = torch.arange(columns, device=model.device)
        prompt_ends, ends = (torch.tensor(e, device=model.device)[:, None] for e in (self.prompt_ends, self.ends))
        watch = None if callback is None else lambda step: callback(self.shown(step))
        loop = BlockLoop(model, self.table.clone(), self.starts, column < prompt_ends, sampling, watch)
        open_columns = (column >= prompt_ends) & (column < ends)  # (B, columns): True where a token may be generated
        stops = torch.tensor(self.stop_ids, dtype=torch.int64, device=model.device)
        blank = not all(self.rows)
        for index in range(self.blocks):
            begin = self.first + index * self.block_length
            block = slice(begin, min(begin + self.block_length, columns))
            masks = [self.masks_of(b, block) if self.running[b] else 0 for b in self.live]
            for b, count in zip(self.live, masks):
                self.filled[b] += count
            end = block.stop if self.variable_length else columns
            loop.batch.limits.fill_(end)
            positions = torch.where(open_columns[:, block], column[block], -1)
            loop.run_block(Block(index, positions, masks, (block.start, block.stop), end, blank=blank and index == 0))
            if self.stop_ids and index + 1 < self.blocks:
                ended = torch.isin(loop.batch.tokens[:, block], stops) & open_columns[:, block]
                open_columns &= ~ended.any(1, keepdim=True)
                for b, on in zip(self.live, open_columns.any(1).tolist()):  # the one synchronisation of a block
                    self.running[b] &= on
            if self.stop_when is not None:
                self.ask(self.stop_when, loop.batch.tokens[:, : block.stop].tolist())
            if not any(self.running):
                break
            if not sampling.by_sequence and not all(self.running[b] for b in self.live):
                open_columns = open_columns[self.leave(loop)]
        self.save(loop)
        return self.result(self.table.tolist(), loop)

    def save(self, loop: BlockLoop) -> None:
        """Writes what the batch holds to the table of all sequences."""
        at = torch.tensor(self.live, device=self.model.device)
        self.table[at], self.passes[at] = loop.batch.tokens, loop.passes

    def leave(self, loop: BlockLoop) -> list[int]:
        """Takes sequences that have ended out of the batch; returns the rows that the others had."""
        self.save(loop)
        rows = [row for row, b in enumerate(self.live) if self.running[b]]
        ended = [row for row, b in enumerate(self.live) if not self.running[b]]
        rows = sorted([*rows, *ended[: loop.bucket(len(rows)) - len(rows)]])  # ascending: a copy overwrites no source
        for target, source in enumerate(rows):
            if source != target:
                loop.copy_row(source, target)
        loop.use(len(rows))
        self.live = [self.live[row] for row in rows]
        return rows

    def shown(self, step: Step) -> Step:
        """Returns the step with a row for each sequence, also for those that have left; `tokens` is one tensor."""
        if len(self.live) == len(self.rows):
            return dataclasses.replace(step, tokens=self.table.copy_(step.tokens))
        at, batch = torch.tensor(self.live, device=self.model.device), len(self.rows)
        self.table[at] = step.tokens
        nothing = {"positions": -1, "committed": False, "confidence": 0.0}
        wide = {name: getattr(step, name) for name in nothing}
        wide = {n: t.new_full((batch, t.shape[1]), nothing[n]).index_copy_(0, at, t) for n, t in wide.items()}
        return dataclasses.replace(step, tokens=self.table, starts=self.starts, **wide)

    def ask(self, stop_when: Callable[[list[int]], bool], table: list[list[int]]) -> None:
        """Asks of each sequence that is running whether its tokens so far end it."""
        for b, row in zip(self.live, table):
            if self.running[b] and not self.ended[b] and stop_when(row[self.prompt_ends[b] : self.ends[b]]):
                self.ended[b], self.ends[b] = True, min(self.ends[b], len(row))
                self.running[b] = False

    def masks_of(self, b: int, block: slice) -> int:
        return max(0, min(block.stop, self.ends[b]) - max(block.start, self.prompt_ends[b]))

    def result(self, table: list[list[int]], loop: BlockLoop) -> Generation:
        new = [row[begin:end] for row, begin, end in zip(table, self.prompt_ends, self.ends)]
        texts, stopped = until_stop(new, self.stop_ids, self.ended)
        check_filled(texts, self.model.config)
        return Generation(texts, stopped, self.passes.tolist(), self.filled, loop.forward_passes)
