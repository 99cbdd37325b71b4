"""unmask under torch.compile, export, torch.func, forward-mode AD and the FLOP counter; freed storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import illada_kernels as ik

MASK = 3
LOGITS = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))


def step(rule: Any = None, **options: Any) -> tuple[torch.Tensor, ...]:
    tokens = torch.tensor([[MASK, MASK, MASK, 5]] * 2)
    positions = torch.arange(4).expand(2, 4)
    rule = ik.TopK(1) if rule is None else rule
    result = ik.unmask_from_logits(LOGITS, tokens, positions, rule, mask_id=MASK, backend="reference", **options)
    return *result, tokens


# What varies: (a call with it, the numbers of each of the calls that follow each other).
NUMBERS: dict[str, tuple[Callable[..., Any], list[tuple[float, ...]]]] = {
    "TopK.k, Remask.n, seed, step, top_k": (
        lambda k, n, s, at, top_k: step(ik.TopK(k), revise=ik.Remask(n), seed=s, step=at, top_k=top_k, temperature=1.0),
        [(1, 1, 1, 1, 2), (2, 2, 2, 2, 3), (3, 3, -7, 0, 5), (0, 0, 2**62, 2**32 - 1, 9), (2**40, 7, 0, 5, 2**40)],
    ),
    "Threshold.tau, Edit.tau, top_p, min_p": (
        lambda tau, e, p, q: step(ik.Threshold(tau), revise=ik.Edit(e), top_p=p, min_p=q, temperature=1.0),
        [(0.1, 0.1, 0.3, 0.3), (0.2, 0.2, 0.5, 0.5), (0.9, 0.9, 0.9, 0.9), (1.0, 1.0, 0.99, 0.01)],
    ),
    "Factor.f": (lambda x: step(ik.Factor(x)), [(0.1,), (0.2,), (2.5,), (4.0,)]),
    "EntropyBound.gamma": (lambda x: step(ik.EntropyBound(x)), [(0.1,), (0.2,), (2.5,), (4.0,)]),
    "Renoise.gamma": (lambda x: step(ik.Renoise(x)), [(0.1,), (0.2,), (2.5,), (4.0,)]),
    "temperatures": (
        lambda x, y: step(temperature=x, confidence_temperature=y),
        [(0.5, 0.6), (0.7, 0.8), (1.0, 1.0), (0.0, 0.0), (2.0, 3.0)],
    ),
}
KINDS: dict[str, Any] = {
    "Python": lambda x: x,
    "NumPy": lambda x: np.float32(x) if isinstance(x, float) else np.int64(x),
    "tensor": torch.tensor,
}


CALLS = [(names, kind, None) for names in NUMBERS for kind in KINDS]
CALLS += [(names, "Python", True) for names in NUMBERS if names not in ("EntropyBound.gamma", "Renoise.gamma")]


@pytest.mark.parametrize("names, kind, dynamic", CALLS)
def test_numbers_that_vary_compile_into_few_graphs(names: str, kind: str, dynamic: bool | None) -> None:
    """One for the first values, one for all others, and one each for a temperature of 0 and for 1, which Dynamo takes
    for constants: a number that needed one for each value would make those beside it need them too."""
    function, calls = NUMBERS[names]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for numbers in calls:
        given = [*map(KINDS[kind], numbers)]
        assert all(map(torch.equal, compiled(*given), function(*given))), numbers
    assert counter.frame_count <= (4 if names == "temperatures" else 2)


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_that_vary_compile_into_two_graphs(dynamic: bool | None) -> None:
    def function(hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        positions = torch.arange(hidden.shape[1]).expand(hidden.shape[0], -1)
        return *ik.unmask(hidden, head, tokens, positions, ik.Threshold(0.2), mask_id=2, temperature=0.5), tokens

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch, count, vocab in ((2, 3, 7), (3, 4, 8), (4, 6, 20), (5, 2, 9)):
        draw = torch.Generator().manual_seed(vocab)
        hidden, head = torch.randn(batch, count, 5, generator=draw), torch.randn(vocab, 5, generator=draw)
        got, want = (f(hidden, head, torch.full((batch, count + 1), 2)) for f in (compiled, function))
        assert all(map(torch.equal, got, want))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_symbolic_batch_and_length(strict: bool) -> None:
    class Decode(torch.nn.Module):
        def forward(self, logits: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(logits.shape[1]).expand(logits.shape[0], -1)
            k = logits.shape[1] // 2
            rule = ik.TopK(k)
            return ik.unmask_from_logits(
                logits, tokens, positions, rule, mask_id=2, temperature=temperature, seed=k
            ).proposal

    auto = torch.export.Dim.AUTO
    inputs = (torch.randn(2, 4, 9), torch.full((2, 4), 2), torch.tensor(0.5))
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, {})
    program = torch.export.export(Decode(), inputs, dynamic_shapes=shapes, strict=strict)
    logits = torch.randn(3, 6, 9)
    got_tokens, want_tokens = torch.full((3, 6), 2), torch.full((3, 6), 2)
    got, want = (
        f(logits, tokens, torch.tensor(2.0)) for f, tokens in ((program.module(), got_tokens), (Decode(), want_tokens))
    )
    assert torch.equal(got, want) and torch.equal(got_tokens, want_tokens) and (got_tokens == 2).sum() == 9


def test_torch_func_and_forward_mode_are_refused_in_words() -> None:
    def confidence(logits: torch.Tensor) -> torch.Tensor:
        tokens, positions = torch.full((2, 4), MASK), torch.arange(4).expand(2, 4)
        return ik.unmask_from_logits(logits, tokens, positions, ik.TopK(1), mask_id=MASK).confidence.sum()

    for transformed in (
        lambda: torch.func.grad(confidence)(LOGITS),
        lambda: torch.func.jvp(confidence, (LOGITS,), (LOGITS,)),
        lambda: torch.vmap(confidence)(LOGITS[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"unmask: has no derivative and writes in place.*\.detach\(\)"):
            transformed()
        for fullgraph in (False, True):
            torch._dynamo.reset()
            with pytest.raises(
                Exception, match=r"unmask: (has no derivative|torch.func.grad and jvp cannot be traced)"
            ):
                torch.compile(transformed, fullgraph=fullgraph, backend="aot_eager")()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(LOGITS, LOGITS)
        with pytest.raises(NotImplementedError, match="unmask: has no derivative"):
            confidence(dual)
        assert confidence(LOGITS).isfinite()


@pytest.mark.parametrize("name", ["hidden", "head_weight", "tokens", "noise_positions"])
def test_freed_storage_is_an_error_not_a_crash(name: str) -> None:
    tensors = {"hidden": torch.randn(1, 4, 5), "head_weight": torch.randn(9, 5), "tokens": torch.full((1, 4), MASK)}
    tensors |= {"positions": torch.arange(4)[None], "noise_positions": torch.arange(4)[None].clone()}
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has lost its storage"):
        ik.unmask(**tensors, rule=ik.TopK(1), mask_id=MASK)  # type: ignore[arg-type]


def test_the_flop_counter_knows_the_matmul() -> None:
    tokens, positions = torch.full((2, 4), MASK), torch.arange(4).expand(2, 4)
    with FlopCounterMode(display=False) as counter:
        ik.unmask(torch.randn(2, 4, 5), torch.randn(9, 5), tokens, positions, ik.TopK(1), mask_id=MASK)
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 9
    with FlopCounterMode(display=False) as counter:
        ik.unmask_from_logits(LOGITS, tokens, positions, ik.TopK(1), mask_id=MASK)
    assert counter.get_total_flops() == 0
