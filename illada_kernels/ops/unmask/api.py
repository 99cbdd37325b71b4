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
    plain,
)
from ...rules import CONFIDENCES, MOST, ORDERS, THRESHOLD, Edit, Remask, Rule, flatten_revision, flatten_rule, range_of
from .op import OPERATOR
from .problem import FLOAT32_MAX, Problem

LogitBias = tuple[Tensor | Sequence[int], Tensor | Sequence[float]]


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
    order: str = "confidence",
    rank_temperature: float | Tensor = 0.0,
    temperature: float | Tensor = 0.0,
    confidence_temperature: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    forbid: Sequence[int] | None = None,
    defer: Sequence[int] = (),
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
        "probability" of the proposal, "margin" of the two largest p, "neg_entropy" in nats, "random" in [0, 1], or
        "sampled", which thresholds meet at any temperature T: the smaller of max p and exp((l_x - max l) / T).
    order
        "confidence" ranks by falling confidence; "left" by position, for sequential decoding.
    rank_temperature
        Ranks by confidence + rank_temperature * Gumbel noise: drawing without replacement from
        softmax(confidence / rank_temperature), Dream's alg_temp. A number >= 0, or a floating-point tensor () or (B,).
    temperature, confidence_temperature
        Numbers >= 0, or floating-point tensors () or (B,). Temperature 0 draws no noise.
    seed
        An int or 0-d tensor s gives sequence b the seed s + b; a (B,) int64 tensor gives each its own.
    step
        Counter of the noise, in [0, 2**32); must change from call to call.
    forbid
        Ids that are never proposed and have p = 0. None: (mask_id,); (): none.
    defer
        Ids, for example of end-of-text tokens. Candidates that propose one rank after all others of the sequence, so
        that they commit only where all others do.
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
    _check_source("hidden", hidden, "D")
    hidden, head_weight, head_bias = cast_for_autocast(hidden.device, hidden, head_weight, head_bias)
    _check_head(hidden, head_weight, head_bias)
    options = Options(
        mask_id,
        confidence,
        order,
        rank_temperature,
        temperature,
        confidence_temperature,
        seed,
        step,
        forbid,
        defer,
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
    order: str = "confidence",
    rank_temperature: float | Tensor = 0.0,
    temperature: float | Tensor = 0.0,
    confidence_temperature: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    forbid: Sequence[int] | None = None,
    defer: Sequence[int] = (),
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
    _check_source("logits", logits, "V")
    options = Options(
        mask_id,
        confidence,
        order,
        rank_temperature,
        temperature,
        confidence_temperature,
        seed,
        step,
        forbid,
        defer,
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
    order: str
    rank_temperature: float | Tensor
    temperature: float | Tensor
    confidence_temperature: float | Tensor
    seed: int | Tensor
    step: int | Tensor
    forbid: Sequence[int] | None
    defer: Sequence[int]
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
    expect_choice("order", o.order, ORDERS)
    kind, number, least = flatten_rule(rule)
    revision, revision_label, edit_tau, remasked, scores = flatten_revision(o.revise)
    if kind == THRESHOLD:
        low, high = range_of(o.confidence)
        label = f'Threshold.tau with confidence="{o.confidence}"'
        expect_number(label, plain(number[1], torch.float64), low, high, tensor=True)
    _check_tokens(name, batch, device, tokens)
    _check_like("positions", positions, torch.int64, device, batch, count)
    _check_like("noise_positions", o.noise_positions, torch.int64, device, batch, count)
    _check_like("frozen", o.frozen, torch.bool, device, *tokens.shape)
    _check_like("Remask.scores", scores, torch.float32, device, batch, count)

    def real(label: str, value: Any, low: float = -FLOAT32_MAX) -> tuple[Any, Tensor | None]:
        given, value = value, plain(value, torch.float64)
        if isinstance(value, Tensor) and value is not given:  # a NumPy scalar, to a compiler
            value = value.to(device)
        expect_number(label, value, low, FLOAT32_MAX, tensor=True)
        if isinstance(value, Tensor):
            expect_per_sequence(label, value, batch, device)
            return 0.0, value.detach()
        if torch.compiler.is_compiling() and holds(value != 0.0):  # as a number it would make a graph for each value
            return 0.0, torch.ones((), dtype=torch.float32, device=device) * value
        return torch.sym_float(value), None

    def whole(label: str, value: Any, low: int, high: int) -> tuple[Any, Tensor | None]:
        given, value = value, plain(value)
        if isinstance(value, Tensor) and value is not given:
            value = value.to(device)
        expect_integer(label, value, low, high, tensor=True)
        if isinstance(value, Tensor):
            expect_per_sequence(label, value, batch, device)
            return 0, value
        return torch.sym_int(value), None

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
        *real(*number),
        *whole(*least, 0, MOST),
        ORDERS.index(o.order),
        *real("rank_temperature", o.rank_temperature, 0.0),
        *real("temperature", o.temperature, 0.0),
        *real("confidence_temperature", o.confidence_temperature, 0.0),
        *whole("seed", o.seed, -(2**63), 2**63 - 1),
        *whole("step", o.step, 0, 2**32 - 1),
        [torch.sym_int(o.mask_id)] if o.forbid is None else _ids("forbid", o.forbid, vocab),
        _ids("defer", o.defer, vocab),
        *_split_bias(o.logit_bias, vocab, device),
        revision,
        *real(revision_label, edit_tau),
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


def _ids(name: str, ids: Sequence[int], vocab: int) -> list[Any]:
    if isinstance(ids, Tensor):
        other = "; use logit_bias=(ids, values of -inf)" if name == "forbid" else "; use .tolist() once, before"
        raise TypeError(f"{name}: expected a sequence of ints, got a tensor{other}")
    for i in ids:
        expect_integer(name, i, 0, vocab - 1)
    return [torch.sym_int(i) for i in ids]


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
