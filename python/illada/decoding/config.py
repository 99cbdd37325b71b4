"""GenerationConfig: what a user asks for; settings.py resolves it for one model into `Sampling`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from illada_kernels import Edit, Remask

from .schedules import Choose, Pass, Rule, Schedule

Prompts = Sequence[Sequence[int] | Tensor] | Tensor


@dataclass(frozen=True)
class GenerationConfig:
    r"""Says how to decode. A field left None takes the value that suits the model.

    Parameters
    ----------
    max_new_tokens : int
        Tokens to generate per sequence. The last block is shorter where it is not a multiple of `block_length`.
    block_length : int, optional
        Tokens that are unmasked together. None: `causal_block` for block-causal models, else 32.
    sampler : str, optional
        A published sampler by its name, one of `illada.decoding.samplers.SAMPLERS`. It sets the fields that make it;
        setting one of these too is an error. None: "self-speculation" for models with `next_token`, else what the
        other fields say.
    sampler_options : dict, optional
        Numbers of the sampler, for example {"tau": 0.95}.
    steps : int, optional
        Passes in all, a multiple of the number of blocks. None: as `steps_per_block` says.
    steps_per_block : int, optional
        Passes of each block. None: one token a pass. Neither goes with a `rule`.
    rule : rule of illada_kernels, tensor or callable, optional
        Which proposals a pass commits: `TopK`, `Threshold` or another rule that fills masks. An integer tensor
        (passes,) or (passes, B) gives the number of tokens for each pass of a block, read once before the first; the
        last pass commits what is left. A callable is a schedule: see `illada.decoding.schedules`. None: LLaDA's
        schedule, which spreads a block's masks evenly over its passes.
    confidence, order, rank_temperature, temperature, confidence_temperature, defer
        As in `illada_kernels.unmask`.
    top_k, top_p, min_p : int, float, float, optional
        Bound what is drawn, as in `illada_kernels.unmask`. They need a temperature.
    forbid : collection of int, optional
        Ids that are never proposed, beside mask_id, which never is.
    logit_bias : dict or (ids, values), optional
        Finite numbers added to the logits of these ids.
    seed : int or sequence of int
        An int s gives sequence b the seed s + b; a sequence gives one seed to each.
    growing_bias : dict, optional
        {id: number}: added to the id's logit for each token of the blocks that are done (iLLaDA raises that of a token
        which ends a train of thought).
    revise : Edit, Remask or callable, optional
        Edit replaces committed tokens of the block until nothing changes, for at most `revise_steps` passes after the
        block is full. Remask takes tokens back during the first `revise_steps` passes of a block. A callable takes a
        `Pass` and returns a Remask.
    cache : str, optional
        "none", "block_causal" (exact, the default for block-causal models), "prefix", "dual", "vicinity", "interval" or
        "delayed". The last five are approximations for models that see everything. "dual" recomputes the block in each
        pass, "prefix" also all that comes after it, "vicinity" also `vicinity` tokens on each side; all keys when a
        block begins and every `refresh_every` passes. "interval" recomputes all keys in the first pass and every
        `refresh_every` passes of the whole generation; a token's key is final after the block's end. "delayed" belongs
        to sampler "d3llm".
    refresh_every : int
        0: never again. 1: every pass, which equals "none".
    vicinity : int
        With cache "vicinity", as above. 0 equals "dual", as many as there are tokens equals "none".
    stop_ids : int or collection of int, optional
        Tokens that end a sequence. None: the model's `eos_ids`; (): none.
    stop_when : callable, optional
        Takes the tokens that a sequence has generated so far, a list of int, when one of its blocks is done (or canvas,
        or draft); True ends the sequence there, its tokens uncut. For stop strings:
        `lambda ids: "\n\n" in tokenizer.decode(ids)`.
    end_early : bool
        Puts a stop token over everything behind it in its block as soon as it is committed, so that what would be cut
        off costs no pass (d3LLM). What stands before it sees stop tokens there instead of masks.
    variable_length : bool, optional
        True: a block's masks appear when the block is reached (iLLaDA). False: all `max_new_tokens` masks are visible
        from the start (LLaDA). None: as published for the model's family.
    guidance : float
        Weight w >= 0 of classifier-free guidance: logits u + (w + 1) (c - u), where u sees a masked prompt. 0: none.
        Doubles the batch.

    Examples
    --------
    >>> from illada import GenerationConfig
    >>> from illada_kernels import Threshold
    >>> settings = GenerationConfig(max_new_tokens=256, rule=Threshold(0.9), cache="dual", temperature=0.2, seed=1)
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    sampler: str | None = None
    sampler_options: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    rule: Rule | Choose | Tensor | Schedule | None = None
    steps_per_block: int | None = None
    confidence: str = "probability"
    order: str = "confidence"
    rank_temperature: float = 0.0
    temperature: float = 0.0
    confidence_temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | Sequence[int] = 0
    revise: Edit | Remask | Callable[[Pass], Remask] | None = None
    revise_steps: int = 16
    cache: str | None = None
    refresh_every: int = 0
    vicinity: int = 16
    stop_ids: int | Iterable[int] | None = None
    stop_when: Callable[[list[int]], bool] | None = None
    end_early: bool = False
    variable_length: bool | None = None
    guidance: float = 0.0
    forbid: int | Iterable[int] | None = None
    defer: int | Iterable[int] = ()
    logit_bias: Mapping[int, float] | tuple[Any, Any] | None = None
    growing_bias: Mapping[int, float] | tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Sampling:
    """A `GenerationConfig` that was checked and resolved for one model."""

    schedule: Schedule
    block_length: int
    revise: Edit | Remask | Callable[[Pass], Remask] | None
    revise_steps: int
    cache: str
    refresh_every: int
    vicinity: int
    guidance: float
    seeds: list[int]
    max_passes: int  # upper bound of the passes in a block, independent of the batch: it numbers the noise
    growing_bias: tuple[Any, Any] | None
    unmask: dict[str, Any]  # passed on to `illada_kernels.unmask`
    ends: tuple[int, ...]  # stop tokens that are put over what follows them
    by_sequence: bool  # the schedule may hold numbers for each sequence of the batch, so that all must stay in it

    @property
    def remask_steps(self) -> int:
        """Passes of a block in which tokens may be taken back."""
        return 0 if self.revise is None or isinstance(self.revise, Edit) else self.revise_steps
