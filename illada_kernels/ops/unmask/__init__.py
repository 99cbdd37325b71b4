"""One parallel decoding step: propose a token and a confidence at every masked position, choose which to commit, write
them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._dispatch import requested
from ...rules import Edit, Remask, Rule, Threshold, check_integer, check_number, flatten_revision, flatten_rule
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

CONFIDENCES = ("probability", "margin", "neg_entropy", "random")


class Unmasked(NamedTuple):
    proposal: Tensor  # (B, K) int64
    confidence: Tensor  # (B, K) float32
    committed: Tensor  # (B, K) bool: written into tokens, by the rule or as an edit
    remaining: Tensor  # (B,) int32: candidates that are masked now


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
    """One decoding step of a masked-diffusion language model, from hidden states, in place on `tokens`.

    Candidates. hidden (B, K, D) holds the K candidate rows of each sequence, at `positions` (B, K) int64 of `tokens`
    (B, L) int64. A position below 0 or from L on is no candidate, nor is one where `frozen` (B, L) bool is true. A
    candidate whose token is `mask_id` takes part; one that holds another token takes part only under `revise`.
    Positions of a sequence must be distinct (duplicates stay in range, which of them is written is not defined).
    Whoever takes no part gets proposal -1, confidence -inf, committed False, and costs nothing; its hidden row may be
    anything, NaN included.

    Logits, for each row, T = temperature, Tc = confidence_temperature:
        l_v = hidden . head_weight_v + head_bias_v + logit_bias_v    in float32, -inf where v is in `forbid`
        proposal x = argmax_v l_v + T * g_v    (the argmax of l / T + g; T = 0: of l), ties to the lowest id
        p_v = exp(l_v / Tc) / sum_u exp(l_u / Tc)    no noise; forbidden ids have p = 0, so the rest sum to 1
    T and the noise do not enter p: with T = 1, Tc = 1 (LLaDA) p is the model's distribution, with Tc = T (Dream) the
    one that was sampled from. A T or Tc that is not above 0 means no noise, and Tc = 1.

    Confidence, float32:
        "probability"  p_x              "margin"  p_(1) - p_(2), the two largest, whatever x (0 if they tie)
        "neg_entropy"  sum_v p_v log p_v, in nats          "random"  uniform in [0, 1], from the seed

    The rule then ranks the candidates of a sequence that hold mask_id, by falling confidence, ties to the lowest
    position, and commits some: see TopK, Threshold, Factor, EntropyBound. `revise=Edit(tau)`: at a candidate that holds
    a token the proposal is argmax l, and replaces the token where it differs and p_x >= tau. `revise=Remask(n,
    scores)`: the n candidates of lowest score among those that held a token go back to mask_id; proposal is then the
    held token, confidence the score. A row with a NaN or +inf logit, or with every id at -inf, proposes -1 with
    confidence -inf and is never written.

    Noise depends on (seed, step, position, token id) alone, whatever the batch, the order of candidates or the backend:
    g = -log(-log1p(-u / 2**64)) in float32, u the 64 bits that Philox-4x32-10 gives for key = seed (an int or 0-d
    tensor s means s + b for sequence b; or (B,) int64, one each) and counter (v // 2, position, step, 0): its first two
    words for even ids v, the last two for odd ones; "random" takes the first two words of (0, position, step, 1).
    Position is `noise_positions` (B, K) int64 where given.

    dtypes: hidden float32, bfloat16, float16 (float64 on the reference); head_weight (V, D) and head_bias (V,) hidden's
    or float32; products are accumulated and kept in float32. Under autocast all three are cast to its dtype
    first. Strides are free but for the last dimension. forbid: ids, None means (mask_id,), () none. logit_bias =
    (ids, values): sequences, or int64 and float32 tensors (n,), added to every row; repeated ids add up, in a tensor
    ids outside [0, V) are ignored. temperature, confidence_temperature, seed, step and the rules' numbers may be
    tensors of shape () or (B,) on the device of the call.

    Returns Unmasked(proposal, confidence, committed, remaining); not differentiable. Raises TypeError or ValueError for
    a wrong dtype, shape, device, stride or number, RuntimeError if `backend` cannot run it.
    Cost: one product of the rows that take part with the head, in slices of the vocabulary: (rows, V) logits are never
    stored. On a CPU at most about 60 MB beside inputs and outputs for D <= 4096. No synchronisation with the host, but
    for a logit_bias of sequences, copied to the device in each call (for a graph give tensors). The GPU kernels cannot
    leave rows out before their product: up to 128 rows share one reading of the head, more are all multiplied, with 16
    MiB of logits at a time and 32 bytes for each row and 4096 ids.
    They, "cuda" and "triton", have not yet run on a GPU: until `doctor --selftest` has passed only backend= reaches
    them.
    Sources: LLaDA's generate.py (ML-GSAI/LLaDA); Zheng et al., arXiv 2409.02908, on why low-precision Gumbel noise
    biases.
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
    """`unmask` for models that already have logits: (B, K, V), one row per candidate, float32, bfloat16 or float16
    (float64 on the reference), never written to. Everything else as in `unmask`. Cost: each logit of a row that takes
    part is read once; no copy."""
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
