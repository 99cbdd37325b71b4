"""One parallel decoding step: propose a token and a confidence at every masked position, choose which to commit, write
them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._dispatch import requested
from ...rules import (
    CONFIDENCES,
    Edit,
    Remask,
    Rule,
    Threshold,
    check_integer,
    check_number,
    flatten_revision,
    flatten_rule,
)
from .checks import (
    LogitBias,
    cast_for_autocast,
    check_forbid,
    check_head,
    check_like,
    check_parameter,
    check_source,
    check_tokens,
    split_bias,
)
from .op import BACKENDS, UNMASK

__all__ = ["BACKENDS", "Unmasked", "unmask", "unmask_from_logits"]


class Unmasked(NamedTuple):
    """What one step proposed, committed and left.

    Attributes
    ----------
    proposal
        (B, K) int64: a token for each candidate, -1 where there is none.
    confidence
        (B, K) float32: -inf where there is no proposal.
    committed
        (B, K) bool: written into tokens, by the rule or as an edit.
    remaining
        (B,) int32: candidates that are masked now.
    """

    proposal: Tensor
    confidence: Tensor
    committed: Tensor
    remaining: Tensor


def unmask(
    hidden: Tensor,
    head_weight: Tensor,
    tokens: Tensor,
    positions: Tensor,
    rule: Rule,
    *,
    mask_id: int,
    confidence: str = "probability",
    temperature: float | Tensor = 0.0,
    confidence_temperature: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    forbid: Sequence[int] | None = None,
    logit_bias: LogitBias | None = None,
    revise: Edit | Remask | None = None,
    frozen: Tensor | None = None,
    noise_positions: Tensor | None = None,
    head_bias: Tensor | None = None,
    backend: str | None = None,
) -> Unmasked:
    """Runs one decoding step of a masked-diffusion language model from hidden states, in place on `tokens`.

    Proposes a token and a confidence at every masked candidate, and commits those that `rule` picks:

        l_v = hidden . head_weight_v + head_bias_v + logit_bias_v    float32, -inf where v is in `forbid`
        proposal = argmax_v l_v + temperature * g_v    g: Gumbel noise; ties to the lowest id
        p_v = softmax(l / confidence_temperature)_v    no noise

    docs/concepts/decoding.md describes each part: candidates, confidences, rules, revision, noise.

    Parameters
    ----------
    hidden
        (B, K, D), the K candidate rows of each sequence, float32, bfloat16 or float16; float64 on the reference. Any
        strides with the last dimension contiguous.
    head_weight
        (V, D), hidden's dtype or float32.
    tokens
        (B, L) int64, written in place.
    positions
        (B, K) int64, where the candidates stand in `tokens`; distinct within a sequence. A position below 0 or from L
        on is no candidate. Duplicates stay in range; which of them is written is not defined.
    rule
        `TopK`, `Threshold`, `Factor` or `EntropyBound`: which masked candidates commit, ranked by falling confidence,
        ties to the lowest position.
    mask_id
        The mask token. A candidate that holds another token takes part only under `revise`.
    confidence
        "probability" of the proposal, "margin" of the two largest p, "neg_entropy" in nats, or "random" in [0, 1].
    temperature, confidence_temperature
        Numbers >= 0, or floating-point tensors () or (B,). Temperature 0 draws no noise.
    seed
        An int or 0-d tensor s gives sequence b the seed s + b; a (B,) int64 tensor gives each its own.
    step
        Counter of the noise, in [0, 2**32); must change from call to call.
    forbid
        Ids that are never proposed and have p = 0. None: (mask_id,); (): none.
    logit_bias
        (ids, values) added to every row: sequences, or int64 and float32 tensors (n,). Repeated ids add up; in a
        tensor, ids outside [0, V) are ignored.
    revise
        `Edit` replaces tokens that were committed before, `Remask` takes some back.
    frozen
        (B, L) bool: positions that never change.
    noise_positions
        (B, K) int64: the noise's counter in place of `positions`.
    head_bias
        (V,), hidden's dtype or float32.
    backend
        "cuda", "triton", "cpu" or "reference": insists on it. Default: ILLADA_BACKEND, else the first that can.

    Returns
    -------
    Unmasked
        (proposal, confidence, committed, remaining), not differentiable. A row that takes no part has proposal -1,
        confidence -inf and committed False, whatever its hidden row holds, NaN or inf included. So has a row with a
        NaN or +inf logit, or with every id at -inf.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device, stride or number.
    RuntimeError
        If `backend` cannot run the call.

    Notes
    -----
    Noise depends on (seed, step, position, token id) alone, whatever the batch, the order of candidates or the backend.
    Under autocast hidden, head_weight and head_bias are cast to its dtype; logits are accumulated and kept in float32.
    Memory: (rows, V) logits are never stored; at most about 60 MB beside inputs and outputs on a CPU for D <= 4096.
    Never synchronises, except that a logit_bias of sequences is copied to the device in each call.
    Source: LLaDA's generate.py (ML-GSAI/LLaDA).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import TopK, unmask
    >>> head = torch.eye(5)  # the token that hidden points at
    >>> hidden = torch.tensor([[[0.0, 3, 0, 0, 0], [0, 0, 9, 0, 0]]])
    >>> tokens = torch.tensor([[0, 4, 4]])  # 4 is the mask
    >>> unmask(hidden, head, tokens, torch.tensor([[1, 2]]), TopK(1), mask_id=4).proposal
    tensor([[1, 2]])
    >>> tokens  # the surer of the two was committed
    tensor([[0, 4, 2]])
    """
    check_source("hidden", hidden)
    hidden, head_weight, head_bias = cast_for_autocast(hidden, head_weight, head_bias)
    check_head(hidden, head_weight, head_bias)
    return _unmask(
        "hidden",
        hidden,
        head_weight,
        head_bias,
        tokens,
        positions,
        rule,
        mask_id,
        confidence,
        temperature,
        confidence_temperature,
        seed,
        step,
        forbid,
        logit_bias,
        revise,
        frozen,
        noise_positions,
        backend,
    )


def unmask_from_logits(
    logits: Tensor,
    tokens: Tensor,
    positions: Tensor,
    rule: Rule,
    *,
    mask_id: int,
    confidence: str = "probability",
    temperature: float | Tensor = 0.0,
    confidence_temperature: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    forbid: Sequence[int] | None = None,
    logit_bias: LogitBias | None = None,
    revise: Edit | Remask | None = None,
    frozen: Tensor | None = None,
    noise_positions: Tensor | None = None,
    backend: str | None = None,
) -> Unmasked:
    """Runs `unmask` for a model that already has its logits.

    All other arguments, results and errors as in `unmask`.

    Parameters
    ----------
    logits
        (B, K, V), one row per candidate, float32, bfloat16 or float16; float64 on the reference. Never written to.

    Notes
    -----
    Each logit of a row that takes part is read once; nothing is copied.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Threshold, unmask_from_logits
    >>> logits = torch.tensor([[[0.0, 3, 0, 0, 0], [0, 0, 9, 0, 0]]])
    >>> tokens = torch.tensor([[0, 4, 4]])  # 4 is the mask
    >>> unmask_from_logits(logits, tokens, torch.tensor([[1, 2]]), Threshold(0.8), mask_id=4).remaining
    tensor([0], dtype=torch.int32)
    """
    check_source("logits", logits)
    return _unmask(
        "logits",
        logits,
        None,
        None,
        tokens,
        positions,
        rule,
        mask_id,
        confidence,
        temperature,
        confidence_temperature,
        seed,
        step,
        forbid,
        logit_bias,
        revise,
        frozen,
        noise_positions,
        backend,
    )


def _unmask(
    name: str,
    source: Tensor,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    tokens: Tensor,
    positions: Tensor,
    rule: Rule,
    mask_id: int,
    confidence: str,
    temperature: float | Tensor,
    confidence_temperature: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    forbid: Sequence[int] | None,
    logit_bias: LogitBias | None,
    revise: Edit | Remask | None,
    frozen: Tensor | None,
    noise_positions: Tensor | None,
    backend: str | None,
) -> Unmasked:
    vocabulary = source.shape[2] if head_weight is None else head_weight.shape[0]
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence: expected one of {', '.join(CONFIDENCES)}, got {confidence!r}")
    check_integer("mask_id", mask_id, -(2**63), 2**63 - 1)
    check_number("temperature", temperature, 0, math.inf)
    check_number("confidence_temperature", confidence_temperature, 0, math.inf)
    check_integer("seed", seed, -(2**63), 2**63 - 1)
    check_integer("step", step, 0, 2**32 - 1)
    if isinstance(rule, Threshold) and not isinstance(rule.tau, Tensor):
        low, high = (-math.inf, 0.0) if confidence == "neg_entropy" else (0.0, 1.0)
        check_number(f'Threshold.tau with confidence="{confidence}"', rule.tau, low, high)
    rule_kind, rule_tensor, rule_number = flatten_rule(rule)
    revise_kind, revise_tensor, revise_number, scores = flatten_revision(revise)
    check_tokens(name, source, tokens)
    device = source.device
    check_like("positions", positions, torch.int64, source.shape[:2], device)
    check_like("noise_positions", noise_positions, torch.int64, source.shape[:2], device)
    check_like("frozen", frozen, torch.bool, tokens.shape, device)
    check_like("Remask.scores", scores, torch.float32, source.shape[:2], device)
    ids, values = split_bias(logit_bias, vocabulary, source.device)
    forbidden = (mask_id,) if forbid is None else check_forbid(forbid, vocabulary)
    for label, value in (
        ("temperature", temperature),
        ("confidence_temperature", confidence_temperature),
        ("seed", seed),
        ("step", step),
        (type(rule).__name__, rule_tensor),
        (type(revise).__name__, revise_tensor),
    ):
        check_parameter(label, value, source)
    detached = [t.detach() if t is not None and t.requires_grad else t for t in (source, head_weight, head_bias)]
    flat: list[Any] = [*detached, tokens, positions, mask_id, confidence, rule_kind, rule_number, rule_tensor]
    for value, number in ((temperature, 0.0), (confidence_temperature, 1.0), (seed, 0), (step, 0)):
        flat += [number, value.detach()] if isinstance(value, Tensor) else [type(number)(value), None]
    flat += [
        forbidden,
        ids,
        values,
        revise_kind,
        revise_number,
        revise_tensor,
        scores,
        frozen,
        noise_positions,
        requested(backend),
    ]
    return Unmasked(*UNMASK(*flat))
