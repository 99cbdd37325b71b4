"""Inputs of masked_loss, its loss and gradients, and its numerics bar, for the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import masked_loss
from illada_kernels._extension import extension_reason
from illada_kernels.ops.masked_loss import cases, cpu, op
from illada_kernels.ops.masked_loss.problem import Problem
from illada_kernels.testing import assert_close, masked_loss_rounding
from tests.helpers import masked_loss_reference as reference

needs_extension = pytest.mark.skipif(extension_reason() is not None, reason=str(extension_reason()))
BACKENDS = [
    pytest.param(b.name, marks=pytest.mark.skipif(b.available() is not None, reason=str(b.available())))
    for b in op.BACKENDS
    if b.devices is None or "cpu" in b.devices
]
ALL = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01, "forbid": (1, 4)}
TINY = 1  # a budget that leaves slices of the vocabulary only


def inputs(
    rows: int = 12, dim: int = 6, vocab: int = 11, ratio: float = 0.5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocab, dim, generator=g, dtype=torch.float64) * dim**-0.5).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    masked = torch.rand(rows, generator=g) < ratio
    masked[0] = ratio > 0
    if ratio == 1:
        masked[:] = True
    return hidden, weight, targets, masked, 1 / torch.rand(rows, generator=g).clamp_min(1e-3)


def gradients(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], upstream: Any = 1.0) -> tuple[Tensor, ...]:
    """(loss, gradient of each leaf)."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    loss = function(*leaves)
    return (loss.detach(), *torch.autograd.grad((loss * upstream).sum(), leaves))


def wanted(
    hidden: Tensor,
    head_weight: Tensor,
    masked: Tensor,
    reduction: str,
    budget: int | None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    max_masked: int | None = None,
) -> Problem:
    """What decides on the mode of a call."""
    options = {"reduction": reduction, "max_masked": max_masked, "memory_budget": budget, "needs": needs}
    return Problem(hidden, head_weight, masked.long(), masked, **options)


def check_against_float64(args: tuple[Tensor, ...], bias: Tensor | None, backend: str = "cpu", **options: Any) -> None:
    """Loss and gradients under the numerics bar; the loss through the error of PyTorch's own logits, because the
    cross-entropy of a row moves by at most 2 max|dz|."""
    hidden, weight, targets, masked, w = args
    leaves = (hidden, weight) if bias is None else (hidden, weight, bias)
    up = tuple(x.double() for x in leaves)

    def of(loss: Callable[..., Tensor], **extra: Any) -> Callable[..., Tensor]:
        return lambda h, c, b=None: loss(h, c, targets, masked, w.to(extra.pop("as_", w.dtype)), head_bias=b, **extra)

    exact = gradients(of(reference.masked_loss, as_=torch.float64), up)
    peer = gradients(lambda h, c, b=None: cases.plain(h, c, targets, masked, w, b), leaves)
    ours = gradients(of(masked_loss, backend=backend, **options), leaves)
    z = torch.nn.functional.linear(hidden[masked], weight, bias).double()
    z_error = (z - torch.nn.functional.linear(up[0][masked], up[1], *up[2:])).abs().amax(1)
    most = 2 * (2 * z_error * w[masked]).sum() + torch.finfo(torch.float32).eps * exact[0].abs()
    assert (ours[0] - exact[0]).abs() <= most
    slices = -(-len(weight) // cpu.LEAST_SLICE) if options["memory_budget"] == TINY else 1
    added = slices**0.5 * torch.finfo(torch.float32).eps / 2  # a rounding per slice of the vocabulary, at random
    kept = torch.float32 if backend == "cpu" else weight.dtype
    extra = masked_loss_rounding(exact[0], w[masked], float(z.abs().max()), hidden, weight, kept)
    for mine, theirs, right, name in zip(ours[1:], peer[1:], exact[1:], ("dhidden", "dhead", "dbias")):
        assert_close(mine, theirs, right, extra[name] + added * float(right.abs().max()), name)
