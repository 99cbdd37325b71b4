"""unmask and unmask_from_logits: docstrings, validation, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import (
    FLOATS,
    cast_for_autocast,
    expect_choice,
    expect_contiguous,
    expect_device,
    expect_integer,
    expect_number,
    expect_per_sequence,
    expect_shape,
    expect_tensor,
    holds,
    known,
)
from ...rules import CONFIDENCES, MOST, THRESHOLD, Edit, Remask, Rule, flatten_revision, flatten_rule, range_of
from .op import OPERATOR
from .problem import FLOAT32_MAX, Problem

LogitBias = tuple[Tensor | Sequence[int], Tensor | Sequence[float]]


class Unmasked(NamedTuple):
    """What a step did."""

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
    """Runs one decoding step of a masked-diffusion language model from hidden states, in place on `tokens`.

    Proposes a token and a confidence for every candidate, chooses by `rule` which of the proposals to commit, and
    writes them. The (B, K, V) logits are never stored.

    Parameters
    ----------
    hidden : (B, K, D) float32, bfloat16 or float16 (float64 on the reference). The rows of the K candidates of each
        sequence. Rows of candidates that take no part may hold anything, NaN and inf included.
    head_weight : (V, D), hidden's dtype or float32.
    tokens : (B, L) int64, written in place.
    positions : (B, K) int64. Where in `tokens` each candidate lies; distinct within a sequence. A candidate outside
        [0, L) takes no part. Of duplicates it is not defined which is written.
    rule : TopK, Threshold, Factor or EntropyBound. Ranks the candidates that hold mask_id by falling confidence, ties
        to the lowest position, and commits some.
    mask_id : the token that stands for a mask. It may lie outside [0, V).
    confidence : "probability", "margin", "neg_entropy" or "random".
    temperature : T of the Gumbel noise that proposals are drawn with; 0 takes the most probable token.
    confidence_temperature : Tc of the softmax that confidences come from.
    seed : an int or a tensor () gives sequence b the seed + b; a tensor (B,) gives each its own.
    step : counts the calls of one generation, so that each draws other noise; 0 to 2**32 - 1.
    forbid : ids with probability 0. None: (mask_id,).
    logit_bias : (ids, values), sequences or int64 and float32 tensors (n,), added to every row's logits. Values of
        repeated ids add up. In a tensor, ids outside [0, V) are ignored.
    revise : Edit or Remask; None leaves candidates alone that hold a token.
    frozen : (B, L) bool. Candidates where it is true take no part.
    noise_positions : (B, K) int64. Takes the place of `positions` in the noise, so that padding does not shift it.
    head_bias : (V,), hidden's dtype or float32.
    backend : "cuda", "triton", "cpu" or "reference". None: ILLADA_BACKEND, else the first that can run the call.

    temperature, confidence_temperature, seed, step and the rules' numbers may be tensors of shape () or (B,) on the
    device of the call; a NaN or negative T counts as 0, a NaN or Tc <= 0 as Tc = 1.

    Returns
    -------
    Unmasked : proposal (B, K) int64, confidence (B, K) float32, committed (B, K) bool, remaining (B,) int32, the number
        of candidates that are masked now. A candidate that takes no part has proposal -1, confidence -inf. None is
        differentiable.

    Raises
    ------
    TypeError, ValueError : before anything runs, for a wrong dtype, shape, device, stride or number.
    RuntimeError : if the backend insisted on cannot run the call.

    Notes
    -----
    For each row, with l = hidden . head_weight + head_bias + logit_bias in float32, -inf at forbidden ids::

        proposal x = argmax_v l_v + T * g_v              g: Gumbel noise; ties to the lowest id
        p = softmax(l / Tc)                              no noise
        "probability"  p_x                               "margin"  p_(1) - p_(2), the two largest
        "neg_entropy"  sum_v p_v log p_v, in nats        "random"  uniform in [0, 1]

    A row with a NaN or +inf logit, or with every id at -inf, proposes -1 with confidence -inf and is never written. The
    noise depends on (seed, step, position, token id) alone, whatever the batch, the order of candidates or the backend.
    docs/concepts/unmasking.md defines it, compares the rules and says what is equal across backends bit for bit.

    Matmuls accumulate in float32; under autocast hidden, head_weight and head_bias are cast to its dtype first.
    Memory: slices of logits of at most 64 MB on a CPU, 16 MiB on a GPU. Synchronisation: none, but a logit_bias of
    sequences is copied to the device in each call. After LLaDA's generate.py; Zheng et al., arXiv 2409.02908, on why
    low-precision Gumbel noise biases.

    Examples
    --------
    >>> hidden, head = torch.eye(4)[None], 5 * torch.eye(4)  # candidate k prefers token k
    >>> tokens, positions = torch.full((1, 4), 9), torch.arange(4)[None]
    >>> unmask(hidden, head, tokens, positions, TopK(3), mask_id=9).remaining
    tensor([1], dtype=torch.int32)
    >>> tokens
    tensor([[0, 1, 2, 9]])
    """
    _check_source("hidden", hidden, "D")
    hidden, head_weight, head_bias = cast_for_autocast(hidden.device, hidden, head_weight, head_bias)
    _check_head(hidden, head_weight, head_bias)
    options = Options(
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
    )
    vocab = head_weight.shape[0]
    return _run("hidden", hidden, head_weight, head_bias, vocab, tokens, positions, rule, options, backend)


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
    """Runs `unmask` for models that already have logits.

    Parameters
    ----------
    logits : (B, K, V) float32, bfloat16 or float16 (float64 on the reference), one row per candidate. Never written to.

    The others, Returns and Raises are those of `unmask`.

    Notes
    -----
    Reads each logit of a row that takes part once, without a copy.

    Examples
    --------
    >>> tokens, positions = torch.full((1, 4), 9), torch.arange(4)[None]
    >>> step = unmask_from_logits(5 * torch.eye(4)[None], tokens, positions, TopK(1), mask_id=9, temperature=1.0)
    >>> step.committed.sum()
    tensor(1)
    """
    _check_source("logits", logits, "V")
    options = Options(
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
    )
    return _run("logits", logits, None, None, logits.shape[2], tokens, positions, rule, options, backend)


class Options(NamedTuple):
    """What both functions take by keyword, in the order of their signatures."""

    mask_id: int
    confidence: str
    temperature: float | Tensor
    confidence_temperature: float | Tensor
    seed: int | Tensor
    step: int | Tensor
    forbid: Sequence[int] | None
    logit_bias: LogitBias | None
    revise: Edit | Remask | None
    frozen: Tensor | None
    noise_positions: Tensor | None


def _run(
    name: str,
    source: Tensor,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    vocab: int,
    tokens: Tensor,
    positions: Tensor,
    rule: Rule,
    o: Options,
    backend: str | None,
) -> Unmasked:
    (batch, count, _), device = source.shape, source.device
    expect_choice("confidence", o.confidence, CONFIDENCES)
    expect_integer("mask_id", o.mask_id, -(2**63), 2**63 - 1)
    kind, label, number, least = flatten_rule(rule)
    revision, revision_label, tau, remasked, scores = flatten_revision(o.revise)
    if kind == THRESHOLD:
        expect_number(f'{label} with confidence="{o.confidence}"', number, *range_of(o.confidence), tensor=True)
    _check_tokens(name, batch, device, tokens)
    _check_like("positions", positions, torch.int64, device, batch, count)
    _check_like("noise_positions", o.noise_positions, torch.int64, device, batch, count)
    _check_like("frozen", o.frozen, torch.bool, device, *tokens.shape)
    _check_like("Remask.scores", scores, torch.float32, device, batch, count)

    def real(label: str, value: float | Tensor, low: float = -FLOAT32_MAX) -> tuple[Any, Tensor | None]:
        expect_number(label, value, low, FLOAT32_MAX, tensor=True)
        if not isinstance(value, Tensor):
            return torch.sym_float(value), None
        expect_per_sequence(label, value, batch, device)
        return 0.0, value.detach()

    def whole(label: str, value: int | Tensor, low: int, high: int) -> tuple[Any, Tensor | None]:
        expect_integer(label, value, low, high, tensor=True)
        if not isinstance(value, Tensor):
            return torch.sym_int(value), None
        expect_per_sequence(label, value, batch, device)
        return 0, value

    def detached(x: Tensor | None) -> Tensor | None:
        return x.detach() if x is not None and x.requires_grad else x

    fields: list[Any] = [
        detached(source),
        detached(head_weight),
        detached(head_bias),
        tokens,
        positions,
        torch.sym_int(o.mask_id),
        CONFIDENCES.index(o.confidence),
        kind,
        *real(label, number),
        *whole(label, least, 0, MOST),
        *real("temperature", o.temperature, 0.0),
        *real("confidence_temperature", o.confidence_temperature, 0.0),
        *whole("seed", o.seed, -(2**63), 2**63 - 1),
        *whole("step", o.step, 0, 2**32 - 1),
        _forbidden(o.forbid, o.mask_id, vocab),
        *_split_bias(o.logit_bias, vocab, device),
        revision,
        *real(revision_label, tau),
        *whole(revision_label, remasked, 0, MOST),
        scores,
        o.frozen,
        o.noise_positions,
        backend or "",
    ]
    return Unmasked(*OPERATOR(Problem(*fields)))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_source(name: str, source: Tensor, last: str) -> None:
    expect_tensor(name, source, *FLOATS)
    expect_shape(name, source, "B", "K", last)
    expect_contiguous(name, source)


def _check_head(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
    dtype, device = hidden.dtype, hidden.device
    expect_tensor("head_weight", head_weight, dtype, torch.float32)
    expect_shape("head_weight", head_weight, "V", hidden.shape[2], like="to match hidden")
    expect_contiguous("head_weight", head_weight)
    expect_device("head_weight", head_weight, device, "hidden")
    if head_bias is not None:
        expect_tensor("head_bias", head_bias, dtype, torch.float32)
        expect_shape("head_bias", head_bias, head_weight.shape[0], like="to match head_weight")
        expect_device("head_bias", head_bias, device, "hidden")


def _check_tokens(name: str, batch: int, device: torch.device, tokens: Tensor) -> None:
    expect_tensor("tokens", tokens, torch.int64)
    expect_shape("tokens", tokens, batch, "L", like=f"to match {name}")
    expect_contiguous("tokens", tokens)
    expect_device("tokens", tokens, device, name)
    length = tokens.shape[1]
    if known(length >= 2**31):
        raise ValueError(f"tokens: expected fewer than 2**31 columns, got {length}; split the sequences")
    if not known(batch < 2) and not holds(tokens.stride(0) >= length):
        raise ValueError(
            "tokens: expected rows that do not overlap, because they are written in place, got strides "
            f"{tuple(tokens.stride())}; use .clone()"
        )


def _check_like(name: str, value: Tensor | None, dtype: torch.dtype, device: torch.device, *shape: int) -> None:
    if value is not None:
        expect_tensor(name, value, dtype)
        expect_shape(name, value, *shape)
        expect_device(name, value, device)


def _forbidden(forbid: Sequence[int] | None, mask_id: int, vocab: int) -> Sequence[Any]:
    if forbid is None:
        return (torch.sym_int(mask_id),)
    if isinstance(forbid, Tensor):
        raise TypeError("forbid: expected a sequence of ints, got a tensor; use logit_bias=(ids, values of -inf)")
    for i in forbid:
        expect_integer("forbid", i, 0, vocab - 1)
    return [torch.sym_int(i) for i in forbid]


def _split_bias(logit_bias: LogitBias | None, vocab: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if logit_bias is None:
        return None, None
    if not isinstance(logit_bias, (tuple, list)) or len(logit_bias) != 2:
        raise TypeError(f"logit_bias: expected (ids, values), got {type(logit_bias).__name__}; pass two sequences")
    ids, values = logit_bias
    if not isinstance(ids, Tensor):
        for i in ids:
            expect_integer("logit_bias ids", i, 0, vocab - 1)
        ids = torch.tensor(list(ids), dtype=torch.int64, device=device)
    if not isinstance(values, Tensor):
        values = torch.tensor(list(values), dtype=torch.float32, device=device)
    expect_shape("logit_bias ids", ids, "n")
    _check_like("logit_bias ids", ids, torch.int64, device, *ids.shape)
    _check_like("logit_bias values", values, torch.float32, device, *ids.shape)
    return ids.detach(), values.detach()
