"""generate: prompts to text, block by block. fill: given holes filled from both sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illada_kernels import Edit, Remask, TopK

from .config import ModelConfig
from .decoder import Block, Decoder, Rule, Sampling, Step
from .errors import PromptError
from .model import Model

__all__ = ["Generation", "GenerationConfig", "Step", "fill", "generate"]

Prompts = Sequence[Sequence[int] | Tensor] | Tensor


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode. Fields left None are chosen for the model.

    max_new_tokens: a multiple of block_length. block_length: None is causal_block for block-causal models, else 32.
    rule: which proposals a pass commits. None is LLaDA's schedule, steps_per_block passes that share a block's masks
        evenly; steps_per_block None is one token a pass.
    confidence, temperature, confidence_temperature, forbid, logit_bias: as in `illada_kernels.unmask`.
    seed: an int s gives sequence b the seed s + b; or one for each sequence.
    revise: Edit changes committed tokens of the block while that changes anything, for at most revise_steps passes more
        than without; Remask takes tokens back during the first revise_steps passes of a block.
    cache: None is "block_causal" for block-causal models, where it is exact, else "none". "prefix" and "dual" are for
        models that see everything, and approximate: keys outside the block are recomputed when a block begins, and
        every refresh_every passes (0: never; 1: every pass, which equals "none").
    stop_ids: tokens that end a sequence; None is eos_id, () none.
    variable_length: a block's masks appear when the block is reached (iLLaDA); False lets all max_new_tokens masks be
        seen from the start (LLaDA).
    guidance: classifier-free guidance w, which doubles the batch: logits u + (w + 1) (c - u), u with the prompt masked.
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    rule: Rule | None = None
    steps_per_block: int | None = None
    confidence: str = "probability"
    temperature: float = 0.0
    confidence_temperature: float = 1.0
    seed: int | Sequence[int] = 0
    revise: Edit | Remask | None = None
    revise_steps: int = 16
    cache: str | None = None
    refresh_every: int = 0
    stop_ids: Sequence[int] | None = None
    variable_length: bool = True
    guidance: float = 0.0
    forbid: Sequence[int] | None = None
    logit_bias: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Generation:
    """tokens: what was generated for each prompt, up to its stop token, which `stopped` says there was; for `fill` the
    whole sequences. passes and filled: in how many forward passes each sequence had masks, and how many were filled."""

    tokens: list[list[int]]
    stopped: list[bool]
    passes: list[int]
    filled: list[int]
    forward_passes: int

    @property
    def tokens_per_pass(self) -> float:
        """Tokens filled per forward pass of a sequence, over all sequences."""
        return sum(self.filled) / max(sum(self.passes), 1)


@torch.no_grad()
def generate(
    model: Model,
    prompts: Prompts,
    config: GenerationConfig | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Generation:
    """Continues prompts: token lists or 1-d tensors of any lengths, or one 2-d tensor. A sequence's result does not
    depend on the others in the batch. A prompt of length 0 generates without condition; no prompts, no sequences.

    Raises PromptError (a ValueError) for a prompt that does not fit max_seq_len together with max_new_tokens, holds ids
    outside the vocabulary or mask_id (`fill` takes those), and for settings that contradict each other or the model;
    RuntimeError if positions stay masked because the model gives NaN or `forbid` leaves no token.

    Synchronises with the host once per block to see whether all sequences have stopped (not with stop_ids=()), and,
    where the number of passes depends on the data (every rule but the schedule and TopK with a number, and every
    revision), once per pass to see whether masks are left. Memory: hidden rows of a window; logits are never stored.
    """
    config = config or GenerationConfig()
    rows = _token_lists(prompts, model.config)
    block_length = _block_length(config, model.config)
    for b, row in enumerate(rows):
        if model.config.mask_id in row:
            raise PromptError(f"prompt {b}: expected no mask_id ({model.config.mask_id}); fill() fills holes in a text")
        if len(row) + config.max_new_tokens > model.config.max_seq_len:
            raise PromptError(
                f"prompt {b}: {len(row)} tokens and max_new_tokens = {config.max_new_tokens} exceed max_seq_len = "
                f"{model.config.max_seq_len}; shorten the prompt or generate less"
            )
    sampling = _sampling(config, model.config, len(rows), block_length)
    own_stop = () if model.config.eos_id < 0 else (model.config.eos_id,)
    stop_ids = own_stop if config.stop_ids is None else tuple(config.stop_ids)
    return _Continuation(model, rows, config, block_length, stop_ids).run(sampling, callback)


@torch.no_grad()
def fill(
    model: Model,
    sequences: Prompts,
    config: GenerationConfig | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Generation:
    """Fills every mask_id in the sequences, seeing what stands on both sides; returns the whole sequences.

    block_length holes are filled at a time, from the left; None is all at once. Of the configuration, max_new_tokens,
    stop_ids and variable_length do not matter. Raises PromptError like `generate`, for a cache, and for models that
    do not see what comes later. Synchronises as `generate`, but not per block.
    """
    config = config or GenerationConfig()
    if model.config.causal_block:
        raise PromptError("fill: expected a model that sees both sides, this one sees no later blocks; use generate")
    if config.cache not in (None, "none"):
        raise PromptError(f"cache: expected none for fill, got {config.cache!r}")
    rows = _token_lists(sequences, model.config)
    for b, row in enumerate(rows):
        if len(row) > model.config.max_seq_len:
            raise PromptError(f"sequence {b}: {len(row)} tokens exceed max_seq_len = {model.config.max_seq_len}")
    holes = [[i for i, token in enumerate(row) if token == model.config.mask_id] for row in rows]
    at_once = config.block_length or max([1, *map(len, holes)])
    sampling = _sampling(config, model.config, len(rows), at_once)
    if not any(holes):
        return Generation(rows, [False] * len(rows), [0] * len(rows), [0] * len(rows), 0)
    length = max(map(len, rows))
    starts = [length - len(row) for row in rows]
    tokens = _left_padded(rows, model, starts, length)
    decoder = Decoder(model, tokens, starts, tokens != model.config.mask_id, sampling, callback)
    for index in range(-(-max(map(len, holes)) // at_once)):
        part = [[start + i for i in h[index * at_once : (index + 1) * at_once]] for h, start in zip(holes, starts)]
        width = max(map(len, part))
        positions = torch.tensor([p + [-1] * (width - len(p)) for p in part], dtype=torch.int64).to(model.device)
        decoder.run_block(Block(index, positions, list(map(len, part)), (0, length), length, scattered=True))
    done = [row[start:] for row, start in zip(tokens.tolist(), starts)]
    _check_filled(done, model.config)
    return Generation(done, [False] * len(rows), decoder.passes.tolist(), list(map(len, holes)), decoder.forward_passes)


class _Continuation:
    """The columns of `generate`: prompts end, or in block-causal models their last whole blocks end, in column `first`.

    Block-causal models know blocks from the sequence's start, so a prompt's incomplete last block is generated to its
    end, its prompt tokens frozen; what that adds beyond max_new_tokens is never a candidate.
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
        whole = model.config.causal_block or 1
        heads = [len(row) // whole * whole for row in rows]  # what lies before the first block
        self.first = max(heads, default=0)
        self.starts = [self.first - head for head in heads]
        self.prompt_ends = [start + len(row) for start, row in zip(self.starts, rows)]
        self.ends = [end + config.max_new_tokens for end in self.prompt_ends]
        self.blocks = -(-(max(self.ends, default=0) - self.first) // block_length)
        self.variable_length = config.variable_length or model.config.causal_block > 0
        self.filled = [0] * len(rows)

    def run(self, sampling: Sampling, callback: Callable[[Step], object] | None) -> Generation:
        if not self.rows:
            return Generation([], [], [], [], 0)
        model, columns = self.model, self.first + self.blocks * self.block_length
        tokens = _left_padded(self.rows, model, self.starts, columns)
        column = torch.arange(columns).to(model.device)
        prompt_ends, ends = (torch.tensor(e).to(model.device)[:, None] for e in (self.prompt_ends, self.ends))
        decoder = Decoder(model, tokens, self.starts, column < prompt_ends, sampling, callback)
        open_columns = (column >= prompt_ends) & (column < ends)  # (B, columns): what may be generated
        stops = torch.tensor(self.stop_ids, dtype=torch.int64).to(model.device)
        running = [True] * len(self.rows)
        for index in range(self.blocks):
            begin = self.first + index * self.block_length
            block = slice(begin, begin + self.block_length)
            masks = [self.masks_of(b, block) if on else 0 for b, on in enumerate(running)]
            self.filled = [f + m for f, m in zip(self.filled, masks)]
            positions = torch.where(open_columns[:, block], column[block], -1)
            end = block.stop if self.variable_length else columns
            decoder.run_block(Block(index, positions, masks, (block.start, block.stop), end))
            if self.stop_ids and index + 1 < self.blocks:
                ended = torch.isin(tokens[:, block], stops) & open_columns[:, block]
                open_columns &= ~ended.any(1, keepdim=True)
                running = open_columns.any(1).tolist()  # the one synchronisation of a block
                if not any(running):
                    break
        return self.result(tokens.tolist(), decoder)

    def masks_of(self, b: int, block: slice) -> int:
        return max(0, min(block.stop, self.ends[b]) - max(block.start, self.prompt_ends[b]))

    def result(self, table: list[list[int]], decoder: Decoder) -> Generation:
        texts, stopped = [], []
        for row, begin, end in zip(table, self.prompt_ends, self.ends):
            text = row[begin:end]
            stop = next((i for i, token in enumerate(text) if token in self.stop_ids), None)
            texts.append(text[:stop])
            stopped.append(stop is not None)
        _check_filled(texts, self.model.config)
        return Generation(texts, stopped, decoder.passes.tolist(), self.filled, decoder.forward_passes)


def _left_padded(rows: list[list[int]], model: Model, starts: list[int], columns: int) -> Tensor:
    """(B, columns) on the model's device: row b from column starts[b] on; padding before it, masks behind."""
    padding, mask = max(model.config.pad_id, 0), model.config.mask_id
    table = [[padding] * s + row + [mask] * (columns - s - len(row)) for s, row in zip(starts, rows)]
    return torch.tensor(table, dtype=torch.int64).to(model.device)


def _check_filled(rows: list[list[int]], config: ModelConfig) -> None:
    left = [(b, row.count(config.mask_id)) for b, row in enumerate(rows) if config.mask_id in row]
    if left:
        raise RuntimeError(
            f"sequence {left[0][0]}: {left[0][1]} positions stayed masked; the model's hidden rows are NaN or inf "
            "(wrong dtype or damaged weights?), or forbid leaves no token"
        )


# ---- checks ------------------------------------------------------------------------------------------------------


def _token_lists(prompts: Prompts, config: ModelConfig) -> list[list[int]]:
    if config.mask_id < 0:
        raise PromptError("model: expected one with a mask token, its mask_id is -1; set it in the ModelConfig")
    if isinstance(prompts, str) or not isinstance(prompts, (Sequence, Tensor)):
        raise PromptError(f"prompts: expected a list of token lists, got {type(prompts).__name__}; encode text first")
    rows = []
    for b, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not isinstance(prompt, (Sequence, Tensor)):
            raise PromptError(f"prompt {b}: expected token ids, got {type(prompt).__name__}; encode text first")
        if isinstance(prompt, Tensor) and (prompt.dim() != 1 or prompt.is_floating_point()):
            raise PromptError(f"prompt {b}: expected integers (n,), got {prompt.dtype} {tuple(prompt.shape)}")
        row = [int(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
        bad = next((token for token in row if not 0 <= token < config.vocab_size), None)
        if bad is not None:
            raise PromptError(f"prompt {b}: expected ids in [0, {config.vocab_size}), got {bad}")
        rows.append(row)
    return rows


def _block_length(config: GenerationConfig, model: ModelConfig) -> int:
    length = config.block_length or model.causal_block or min(32, config.max_new_tokens)
    if length < 1 or config.max_new_tokens < 1 or config.max_new_tokens % length:
        raise PromptError(
            f"max_new_tokens: expected a positive multiple of block_length = {length}, got {config.max_new_tokens}"
        )
    if model.causal_block and length != model.causal_block:
        raise PromptError(f"block_length: expected {model.causal_block}, the model's own blocks, got {length}")
    return length


def _cache_mode(config: GenerationConfig, model: ModelConfig) -> str:
    cache = config.cache or ("block_causal" if model.causal_block else "none")
    allowed = ("none", "block_causal") if model.causal_block else ("none", "prefix", "dual")
    if cache not in allowed:
        kind = "a block-causal model" if model.causal_block else "a model that sees everything"
        raise PromptError(f"cache: expected one of {', '.join(allowed)} for {kind}, got {cache!r}")
    if config.refresh_every and cache not in ("prefix", "dual"):
        raise PromptError(f"refresh_every: expected 0 with cache {cache!r}, which has nothing to refresh")
    return cache


def _seeds(config: GenerationConfig, batch: int) -> list[int]:
    seeds = [config.seed + b for b in range(batch)] if isinstance(config.seed, int) else [int(s) for s in config.seed]
    if len(seeds) != batch:
        raise PromptError(f"seed: expected an int or one for each of {batch} sequences, got {len(seeds)}")
    return seeds


def _sampling(config: GenerationConfig, model: ModelConfig, batch: int, block_length: int) -> Sampling:
    """Checks everything that does not depend on the prompts' tokens."""
    if config.rule is not None and config.steps_per_block is not None:
        raise PromptError("steps_per_block: expected None with a rule, for it is the schedule used without one")
    if config.steps_per_block is not None and config.steps_per_block < 1:
        raise PromptError(f"steps_per_block: expected at least 1, got {config.steps_per_block}")
    if isinstance(config.rule, TopK) and not isinstance(config.rule.k, Tensor) and config.rule.k == 0:
        raise PromptError("rule: expected TopK of at least 1, got 0, which never commits a token")
    if config.revise_steps < 0 or config.refresh_every < 0:
        raise PromptError("revise_steps, refresh_every: expected 0 or more")
    if config.logit_bias is not None and not isinstance(config.logit_bias[0], Tensor):
        if bad := [i for i in config.logit_bias[0] if not 0 <= i < model.vocab_size]:
            raise PromptError(f"logit_bias: expected ids in [0, {model.vocab_size}), got {bad[0]}")
    if not math.isfinite(config.guidance):
        raise PromptError(f"guidance: expected a finite number, got {config.guidance}")
    return Sampling(
        rule=config.rule,
        steps_per_block=config.steps_per_block or block_length,
        revise=config.revise,
        revise_steps=config.revise_steps if config.revise is not None else 0,
        cache=_cache_mode(config, model),
        refresh_every=config.refresh_every,
        guidance=config.guidance,
        seeds=_seeds(config, batch),
        most_passes=block_length + config.revise_steps,
        unmask={
            "confidence": config.confidence,
            "temperature": config.temperature,
            "confidence_temperature": config.confidence_temperature,
            "forbid": config.forbid,
            "logit_bias": config.logit_bias,
        },
    )
