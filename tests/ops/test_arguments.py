"""Every number and id that a public function takes: what is wrong is named, in eager mode and traced."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
import torch

import illada_kernels as ik

HIDDEN, HEAD = torch.randn(1, 4, 8), torch.randn(9, 8)
TARGETS, MASKED = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool)
Q = torch.randn(1, 4, 2, 8)
LARGEST = torch.finfo(torch.float32).max
INT64 = (-(2**63), 2**63 - 1)
UP = 2**62


def loss(**options):
    return ik.masked_loss(HIDDEN, HEAD, TARGETS, MASKED, **options)


def step(rule=ik.TopK(1), mask_id=8, **options):  # noqa: B008
    tokens, positions = torch.full((1, 4), 8), torch.arange(4)[None]
    return ik.unmask(HIDDEN, HEAD, tokens, positions, rule, mask_id=mask_id, **options).confidence


# name in the message: (call, lowest, highest, whether a tensor may stand in its place)
NUMBERS = {
    "scale": (lambda x: ik.attention(Q, Q, Q, scale=x), -LARGEST, LARGEST, False),
    "dropout_p": (lambda x: ik.scaled_dot_product_attention(Q, Q, Q, dropout_p=x), 0.0, 0.0, False),
    "softcap": (lambda x: loss(softcap=x), 1e-37, LARGEST, False),
    "label_smoothing": (lambda x: loss(label_smoothing=x), 0.0, 0.99, False),
    "z_loss": (lambda x: loss(z_loss=x), 0.0, LARGEST, False),
    "temperature": (lambda x: step(temperature=x), 0.0, LARGEST, True),
    "confidence_temperature": (lambda x: step(confidence_temperature=x), 0.0, LARGEST, True),
    "rank_temperature": (lambda x: step(rank_temperature=x), 0.0, LARGEST, True),
    "top_p": (lambda x: step(top_p=x), 0.1, 1.0, True),
    "min_p": (lambda x: step(min_p=x), 0.0, 1.0, True),
    "logit_bias values": (lambda x: step(logit_bias=([1], [x])), -LARGEST, LARGEST, True),
    "Threshold.tau": (lambda x: step(ik.Threshold(x)), 0.0, 1.0, True),
    "Factor.f": (lambda x: step(ik.Factor(x)), 0.0, LARGEST, True),
    "EntropyBound.gamma": (lambda x: step(ik.EntropyBound(x)), 0.0, LARGEST, True),
    "Edit.tau": (lambda x: step(revise=ik.Edit(x)), 0.0, 1.0, True),
}
INTEGERS = {
    "max_masked": (lambda x: loss(max_masked=x), 0, UP, False),
    "memory_budget": (lambda x: loss(memory_budget=x), 1, UP, False),
    "forbid": (lambda x: step(forbid=(x,)), 0, 8, False),
    "defer": (lambda x: step(defer=(x,)), 0, 8, False),
    "logit_bias ids": (lambda x: step(logit_bias=([x], [1.0])), 0, 8, False),
    "mask_id": (lambda x: step(mask_id=x), *INT64, False),
    "seed": (lambda x: step(seed=x), *INT64, True),
    "step": (lambda x: step(step=x), 0, 2**32 - 1, True),
    "top_k": (lambda x: step(top_k=x), 1, UP, True),
    "TopK.k": (lambda x: step(ik.TopK(x)), 0, UP, True),
    "Threshold.at_least": (lambda x: step(ik.Threshold(0.5, at_least=x)), 0, UP, True),
    "Remask.n": (lambda x: step(revise=ik.Remask(x)), 0, UP, True),
    "s": (ik.KeyRanges.causal, 0, 2**31 - 1, False),
    "num_keys": (ik.KeyRanges.full, 0, 2**31 - 1, False),
    "left": (lambda x: ik.KeyRanges.window(4, x, 1), 0, UP, False),
    "block": (lambda x: ik.KeyRanges.block_causal(4, x), 1, 2**31 - 1, False),
    "num_tokens": (lambda x: ik.KeyRanges.packed(torch.tensor([0, 4]), x), 0, 2**31 - 1, False),
}


def message_of(call, value) -> str:
    with pytest.raises((TypeError, ValueError)) as raised:
        call(value)
    return str(raised.value)


def check(name: str, message: str) -> None:
    """A message begins with the argument, says what was expected and what came, and has no hole where a limit was."""
    assert re.match(rf"{re.escape(name)}( with [^:]*)?: expected .+ got .+", message), message
    assert not re.search(r"  | ,|,,|of at least (,|and|$)|of at most (,|and|$)|\band,", message), message


@pytest.mark.parametrize("name", [*NUMBERS, *INTEGERS])
def test_what_is_not_a_number_is_named(name):
    call, *_ = {**NUMBERS, **INTEGERS}[name]
    for value in ("1", True, 1j, [1], torch.tensor([1j])):
        check(name, message_of(call, value))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_beyond_their_limits_are_named(name):
    call, low, high, tensor = NUMBERS[name]
    bad = [math.nan, math.inf, -sys.float_info.max, sys.float_info.max, np.float64("nan"), low - 1.0 - abs(low)]
    bad += [] if name == "logit_bias values" else [-math.inf]
    for value in bad:
        check(name, message_of(call, value))
    for value in (low, high, np.float32(low), np.float64(high), *([torch.tensor(high)] if tensor else [])):
        call(value)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_beyond_their_limits_are_named_with_the_limit_that_they_pass(name):
    call, low, high, _ = INTEGERS[name]
    for value in (low - 1, -(2**70), high + 1 if high != UP else 2**70, 2**70):
        message = message_of(call, value)
        check(name, message)
        limits = re.search(r"(?:from (-?\d+) to (-?\d+)|of at least (-?\d+))", message)
        assert limits, message
        least, most = int(limits[1] or limits[3]), int(limits[2]) if limits[2] else math.inf
        assert least == low and not least <= value <= most, message
    check(name, message_of(call, 1.0))


# Numbers that one call takes and whose graph serves any of their values. Other floats have a graph for each value.
TOGETHER = {
    ("temperature", "confidence_temperature", "rank_temperature", "top_p", "min_p", "Threshold.tau", "Edit.tau"): (
        lambda t, c, r, p, q, tau, edit: step(
            ik.Threshold(tau),
            temperature=t,
            confidence_temperature=c,
            rank_temperature=r,
            top_p=p,
            min_p=q,
            revise=ik.Edit(edit),
        )
    ),
    ("Factor.f",): NUMBERS["Factor.f"][0],
    ("EntropyBound.gamma",): NUMBERS["EntropyBound.gamma"][0],
    ("max_masked", "memory_budget"): lambda x, y: loss(max_masked=x, memory_budget=y),
    ("mask_id", "forbid", "defer", "logit_bias ids", "seed", "step", "top_k", "TopK.k", "Remask.n"): (
        lambda m, f, d, b, seed, at, top_k, k, n: step(
            ik.TopK(k),
            m,
            forbid=(f,),
            defer=(d,),
            logit_bias=([b], [1.0]),
            seed=seed,
            step=at,
            top_k=top_k,
            revise=ik.Remask(n),
        )
    ),
    ("Threshold.at_least",): INTEGERS["Threshold.at_least"][0],
    **{(name,): INTEGERS[name][0] for name in ("s", "num_keys", "left", "block", "num_tokens")},
}


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("dropout_p", "logit_bias values")])
def test_a_traced_number_is_refused_as_an_eager_one_is(name):
    torch._dynamo.reset()
    compiled = torch.compile(NUMBERS[name][0], fullgraph=True, dynamic=True, backend="eager")
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(Exception, match=rf"{re.escape(name)}.*: expected a finite number"):
            compiled(value)


@pytest.mark.parametrize("name", INTEGERS)
def test_a_traced_integer_is_refused_as_an_eager_one_is(name):
    call, low, _, _ = INTEGERS[name]
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: (call(x), torch.ones(1))[1], fullgraph=True, dynamic=dynamic, backend="eager"
        )
        with pytest.raises(Exception, match=rf"{re.escape(name)}.*: expected an int (of at least|from) "):
            compiled(low - 1)


@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_a_graph_of_any_value_does_not_serve_what_is_refused(names):
    """So that such a call is traced, and refused as above: a graph which Dynamo makes when a number varies is the one
    that dynamic=True makes at once."""
    function = TOGETHER[names]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: (function(*x), torch.ones(1))[1], fullgraph=True, backend="eager")
    for part in (0.5, 0.25, 0.75):
        right = [within(name, part) for name in names]
        compiled(*right)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*(within(name, 0.625) for name in names))
        for place, name in enumerate(names):
            for value in (INTEGERS[name][1] - 1,) if name in INTEGERS else (math.nan, math.inf, -math.inf):
                with pytest.raises(RuntimeError, match="fail_on_recompile"):
                    compiled(*right[:place], value, *right[place + 1 :])


def within(name: str, part: float) -> float:
    """A number within the limits of this one, another for each part."""
    low, high = {**NUMBERS, **INTEGERS}[name][1:3]
    if name in INTEGERS:
        return max(low, 0) + round(8 * part) - 1
    return part if low < -1 else low + (min(high, 1.0) - low) * part
