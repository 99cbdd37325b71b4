"""GenerationConfig and its checks: what a user asked for, resolved for one model into `Sampling`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from illada_kernels import Edit, EntropyBound, Factor, Remask, Threshold, TopK

from ..config import ModelConfig
from ..errors import PromptError

Rule = TopK | Threshold | Factor | EntropyBound
Prompts = Sequence[Sequence[int] | Tensor] | Tensor


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode. A field left None takes the value that suits the model.

    Parameters
    ----------
    max_new_tokens : int
        Tokens to generate per sequence, a multiple of `block_length`.
    block_length : int, optional
        Tokens that are unmasked together. None: `causal_block` for block-causal models, else 32.
    rule : TopK, Threshold, Factor or EntropyBound, optional
        Which proposals a pass commits. None: LLaDA's schedule, which spreads a block's masks evenly over
        `steps_per_block` passes (None: one token a pass).
    confidence, temperature, confidence_temperature, forbid, logit_bias
        As in `illada_kernels.unmask`.
    seed : int or sequence of int
        An int s gives sequence b the seed s + b; a sequence gives one seed to each.
    revise : Edit or Remask, optional
        Edit replaces committed tokens of the block until nothing changes, for at most `revise_steps` passes more than
        without. Remask takes tokens back during the first `revise_steps` passes of a block.
    cache : str, optional
        "none", "block_causal" (exact, the default for block-causal models), "prefix" or "dual". The last two are
        approximations for models that see everything: keys outside the block are recomputed when a block begins and
        every `refresh_every` passes (0: never again; 1: every pass, which equals "none").
    stop_ids : sequence of int, optional
        Tokens that end a sequence. None: `eos_id`; (): none.
    variable_length : bool
        True: a block's masks appear when the block is reached (iLLaDA). False: all `max_new_tokens` masks are visible
        from the start (LLaDA).
    guidance : float
        Classifier-free guidance w: logits u + (w + 1) (c - u), where u sees a masked prompt. Doubles the batch.
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
class Sampling:
    """A `GenerationConfig` that was checked and resolved for one model."""

    rule: Rule | None  # None: the schedule
    steps_per_block: int
    revise: Edit | Remask | None
    revise_steps: int
    cache: str
    refresh_every: int
    guidance: float
    seeds: list[int]
    max_passes: int  # upper bound of the passes in a block, independent of the batch: it numbers the noise
    unmask: dict[str, Any]  # passed on to `illada_kernels.unmask`


def resolve(config: GenerationConfig, model: ModelConfig, batch: int, block_length: int) -> Sampling:
    """Checks every setting that does not depend on the prompts' tokens; raises PromptError."""
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
        max_passes=block_length + config.revise_steps,
        unmask={
            "confidence": config.confidence,
            "temperature": config.temperature,
            "confidence_temperature": config.confidence_temperature,
            "forbid": config.forbid,
            "logit_bias": config.logit_bias,
        },
    )


def resolve_block_length(config: GenerationConfig, model: ModelConfig) -> int:
    """Returns the block length of `generate`; raises PromptError if it does not fit the model or max_new_tokens."""
    length = config.block_length or model.causal_block or min(32, config.max_new_tokens)
    if length < 1 or config.max_new_tokens < 1 or config.max_new_tokens % length:
        raise PromptError(
            f"max_new_tokens: expected a positive multiple of block_length = {length}, got {config.max_new_tokens}"
        )
    if model.causal_block and length != model.causal_block:
        raise PromptError(f"block_length: expected {model.causal_block}, the model's own blocks, got {length}")
    return length


def token_lists(prompts: Prompts, config: ModelConfig) -> list[list[int]]:
    """Returns prompts as lists of ids; raises PromptError for anything but ids of the vocab."""
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
