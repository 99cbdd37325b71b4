"""What holds for every backend of masked_loss, as functions that the tests of each of them call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import masked_loss, masked_loss_from_logits
from tests.helpers.masked_loss_calls import TINY, gradients, inputs

MODES = [None, 64 * 1024, TINY]


def run(backend: str, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    """(loss, d hidden, d head_weight) and (loss, d logits), flat."""
    hidden, weight, targets, masked, *w = args
    budget = options.pop("memory_budget", None)
    upstream = options.pop("upstream", 1.0)

    def loss(h: Tensor, c: Tensor) -> Tensor:
        return masked_loss(h, c, targets, masked, *w, backend=backend, memory_budget=budget, **options)

    logits = hidden.detach() @ weight.detach().T

    def rows(x: Tensor) -> Tensor:
        return masked_loss_from_logits(x, targets, masked, *w, backend=backend, **options)

    return (*gradients(loss, (hidden, weight), upstream), *gradients(rows, (logits,), upstream))


def nan_in_unmasked_rows_never_reaches_loss_or_gradients(backend: str, budget: int | None) -> None:
    hidden, weight, targets, masked, w = inputs(dtype=torch.float32)
    clean = run(backend, hidden, weight, targets, masked, w, memory_budget=budget)
    hidden[~masked], w[~masked], targets[~masked] = torch.nan, torch.nan, -7
    for got, want in zip(run(backend, hidden, weight, targets, masked, w, memory_budget=budget), clean):
        assert torch.equal(got, want)
    for got in run(backend, hidden, weight, targets, masked, w, reduction="none", max_masked=12, memory_budget=budget):
        assert got.isfinite().all()


def no_masked_rows_give_zero_loss_and_zero_gradients(backend: str, budget: int | None, reduction: str) -> None:
    hidden, weight, targets, masked, w = inputs(ratio=0, dtype=torch.float32)
    for max_masked in (None, 0, 5):
        options = {"reduction": reduction, "max_masked": max_masked, "memory_budget": budget}
        for got in run(backend, hidden, weight, targets, masked, w, **options):
            assert (got == 0).all()


def any_leading_dimensions_and_empty_ones(backend: str, lead: tuple[int, ...], dim: int) -> None:
    hidden, weight = torch.randn(*lead, dim), torch.randn(7, dim)
    targets, masked = torch.randint(7, lead), torch.rand(lead) < 2
    flat = run("reference", hidden.reshape(targets.numel(), dim), weight, targets.reshape(-1), masked.reshape(-1))
    shaped = run(backend, hidden, weight, targets, masked)
    for got, want in zip(shaped, flat):
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-5, atol=1e-6)
    assert shaped[1].shape == hidden.shape and shaped[4].shape == (*lead, 7)
    assert run(backend, hidden, weight, targets, masked, reduction="none", upstream=torch.ones(lead))[0].shape == lead


def more_masked_rows_than_the_capacity_make_everything_nan(backend: str, budget: int | None, reduction: str) -> None:
    hidden, weight, targets, masked, w = inputs(dtype=torch.float32)
    count = int(masked.sum())
    for capacity in (0, count - 1):
        options = {"reduction": reduction, "max_masked": capacity, "memory_budget": budget, "forbid": (10,)}
        targets[targets == 10] = 0
        for got in run(backend, hidden, weight, targets, masked, w, **options):
            assert got.isnan().all()
    fits = run(backend, hidden, weight, targets, masked, w, reduction=reduction, max_masked=count, memory_budget=budget)
    for got, want in zip(fits, run(backend, hidden, weight, targets, masked, w, reduction=reduction)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def a_forbidden_target_has_infinite_loss_and_finite_gradients(backend: str, budget: int | None) -> None:
    hidden, weight, targets, masked, _ = inputs(dtype=torch.float32)
    targets[0] = 3
    loss, d_hidden, d_weight, _, d_logits = run(
        backend, hidden, weight, targets, masked, forbid=(3,), memory_budget=budget
    )
    assert loss == torch.inf
    assert d_hidden.isfinite().all() and d_logits.isfinite().all()
    assert (d_weight[3] == 0).all() and (d_logits[:, 3] == 0).all()
    z = (hidden[0] @ weight.T)[torch.arange(11) != 3]
    torch.testing.assert_close(d_logits[0][torch.arange(11) != 3], z.softmax(0))


def a_second_derivative_raises(backend: str, budget: int | None) -> None:
    hidden, weight, targets, masked, w = inputs(dtype=torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = masked_loss(*leaves, targets, masked, w, backend=backend, memory_budget=budget)
    d_hidden, _ = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        d_hidden.sum().backward()
