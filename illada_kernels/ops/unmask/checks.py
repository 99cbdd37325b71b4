"""Makes a Problem of the arguments of unmask, unmask_from_logits and distributed.unmask, or says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import expect_choice, expect_integer, expect_layout, holds, is_number, known, largest, split_parameters
from ...rules import CONFIDENCES, MOST, ORDERS, RENOISE, Edit, Remask, Rule, flatten_revision, flatten_rule
from .problem import BY_MIN_P, BY_TOP_K, BY_TOP_P, Problem

INTEGERS = (torch.int64,)
INT64 = (-(2**63), 2**63 - 1)
LogitBias = tuple[Tensor | Sequence[int], Tensor | Sequence[float]]


class Options(NamedTuple):
    """Holds what the three functions take by keyword, in the order of their signatures."""

    mask_id: int
    confidence: str
    order: str
    rank_temperature: float | Tensor
    temperature: float | Tensor
    confidence_temperature: float | Tensor
    seed: int | Tensor
    step: int | Tensor
    top_k: int | Tensor | None
    top_p: float | Tensor | None
    min_p: float | Tensor | None
    forbid: Sequence[int] | None
    defer: Sequence[int]
    logit_bias: LogitBias | None
    revise: Edit | Remask | None
    frozen: Tensor | None
    noise_positions: Tensor | None


def checked(
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
    group: str = "",
    vocab_start: int = 0,
) -> Problem:
    """Returns the call, or raises for what is wrong with it. name: of `source`; vocab: of all ranks."""
    (batch, count, _), device = source.shape, source.device
    expect_choice("confidence", o.confidence, CONFIDENCES)
    expect_choice("order", o.order, ORDERS)
    expect_integer("mask_id", o.mask_id, *INT64)
    kind, number, least = flatten_rule(rule, o.confidence)
    revision, tau, remasked, scores = flatten_revision(o.revise)
    expect_layout("tokens", tokens, INTEGERS, batch, "L", device=device, like=name, contiguous=True)
    _check_rows_apart(tokens)
    expect_layout("positions", positions, INTEGERS, batch, count, device=device, like=name)
    if o.noise_positions is not None:
        expect_layout("noise_positions", o.noise_positions, INTEGERS, batch, count, device=device, like=name)
    if o.frozen is not None:
        expect_layout("frozen", o.frozen, (torch.bool,), *tokens.shape, device=device, like="tokens")
    if scores is not None:
        expect_layout("Remask.scores", scores, (torch.float32,), batch, count, device=device, like=name)
    if kind == RENOISE and o.revise is not None:
        raise ValueError(f"revise: expected None with Renoise, which writes every candidate, got {o.revise!r}")
    parameters = split_parameters(
        batch,
        device,
        number,
        least,
        tau,
        remasked,
        ("rank_temperature", o.rank_temperature, 0.0, largest()),
        ("temperature", o.temperature, 0.0, largest()),
        ("confidence_temperature", o.confidence_temperature, 0.0, largest()),
        ("seed", o.seed, *INT64),
        ("step", o.step, 0, 2**32 - 1),
        ("top_k", 0, 0, 0) if o.top_k is None else ("top_k", o.top_k, 1, MOST),
        ("top_p", 0.0 if o.top_p is None else o.top_p, 0.0, 1.0),
        ("min_p", 0.0 if o.min_p is None else o.min_p, 0.0, 1.0),
    )
    given = ((BY_TOP_K, o.top_k), (BY_TOP_P, o.top_p), (BY_MIN_P, o.min_p))
    parameters.insert(-6, sum(bit for bit, value in given if value is not None))
    mask_id = torch.sym_int(o.mask_id)
    fields: list[Any] = [
        *(x.detach() if x is not None and x.requires_grad else x for x in (source, head_weight, head_bias)),
        tokens,
        positions,
        mask_id,
        CONFIDENCES.index(o.confidence),
        kind,
        revision,
        ORDERS.index(o.order),
        *parameters,
        [mask_id] if o.forbid is None else _ids("forbid", o.forbid, vocab),
        _ids("defer", o.defer, vocab),
        *_split_bias(o.logit_bias, vocab, device),
        scores,
        o.frozen,
        o.noise_positions,
        group,
        vocab_start,
        vocab if group else 0,
        backend or "",
    ]
    return Problem(*fields)


def check_head(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, name: str = "head_weight", bias: str = "head_bias"
) -> None:
    dtypes, device = (hidden.dtype, torch.float32), hidden.device
    expect_layout(name, head_weight, dtypes, "V", hidden.shape[2], device=device, like="hidden", contiguous=True)
    if head_bias is not None:
        expect_layout(bias, head_bias, dtypes, head_weight.shape[0], device=device, like=name)


def _check_rows_apart(tokens: Tensor) -> None:
    (batch, length), stride = tokens.shape, tokens.stride(0)
    traced = torch.compiler.is_compiling()  # sizes and strides may then be symbolic
    if known(length >= 2**31) if traced else length >= 2**31:
        raise ValueError(f"tokens: expected fewer than 2**31 columns, got {length}; split the sequences")
    if not (known(batch < 2) or holds(stride >= length)) if traced else batch > 1 and stride < length:
        raise ValueError(
            "tokens: expected rows that do not overlap, because they are written in place, got strides "
            f"{tuple(tokens.stride())}; use .clone()"
        )


def _ids(name: str, ids: Sequence[int], vocab: int) -> list[Any]:
    if isinstance(ids, Tensor):
        other = "; use logit_bias=(ids, values of -inf)" if name == "forbid" else "; use .tolist() once, before"
        raise TypeError(f"{name}: expected a sequence of ints, got a tensor{other}")
    for i in ids:
        expect_integer(name, i, 0, vocab - 1)
    return [torch.sym_int(i) for i in ids]


def _expect_bias(value: Any) -> None:
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        return
    if not is_number(value):
        raise TypeError(f"logit_bias values: expected numbers, got {type(value).__name__}; use float(...) on the host")
    if not torch.compiler.is_compiling() and not (value == -math.inf or abs(value) <= largest()):
        raise ValueError(f"logit_bias values: expected finite float32 numbers or -inf, got {value}")


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
        for value in values:
            _expect_bias(value)
        values = torch.tensor(list(values), dtype=torch.float32, device=device)
    expect_layout("logit_bias ids", ids, INTEGERS, "n", device=device)
    expect_layout("logit_bias values", values, (torch.float32,), *ids.shape, device=device, like="logit_bias ids")
    return ids.detach(), values.detach()
