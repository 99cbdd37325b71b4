"""The GPU backends of masked_loss_from_logits on one: numerics, streams, graph capture, large offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import masked_loss_from_logits
from illada_kernels.ops.masked_loss import op
from illada_kernels.testing import assert_close, masked_loss_rounding
from tests.helpers import masked_loss_reference as reference

REASONS = {b.name: b.available() for b in op.BACKENDS if b.name in ("cuda", "triton")}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in REASONS.items()
]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS: dict[str, Any] = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4, "forbid": (1, 77)}


def inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    logits = (4 * torch.randn(rows, vocab, generator=g, device="cuda")).to(dtype)
    targets = torch.randint(100, vocab, (rows,), generator=g, device="cuda")
    masked = torch.rand(rows, generator=g, device="cuda") < 0.5
    return logits, targets, masked, 1 / torch.rand(rows, generator=g, device="cuda").clamp_min(1e-3)


def loss_and_gradient(function: Any, logits: Tensor, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, *args, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [257, 5021, 126464, 157184])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_rows_meet_the_bar(dtype: torch.dtype, vocab: int, options: dict[str, Any], backend: str) -> None:
    logits, targets, masked, w = inputs(64, vocab, dtype)
    exact = loss_and_gradient(
        reference.masked_loss_from_logits, logits.double(), targets, masked, w.double(), **options
    )
    peer = loss_and_gradient(reference.masked_loss_from_logits, logits, targets, masked, w, **options)
    ours = loss_and_gradient(masked_loss_from_logits, logits, targets, masked, w, backend=backend, **options)
    extra = masked_loss_rounding(exact[0], w[masked], options.get("softcap", float(logits.abs().max())))
    for name, mine, theirs, right in zip(("loss", "dlogits"), ours, peer, exact):
        assert_close(mine, theirs, right, extra[name], name)


def test_same_bits_run_after_run_and_on_another_stream(backend: str) -> None:
    args = inputs(256, 32001, torch.bfloat16)
    first = loss_and_gradient(masked_loss_from_logits, *args, backend=backend, **OPTIONS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = loss_and_gradient(masked_loss_from_logits, *args, backend=backend, **OPTIONS)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_graph_with_a_capacity_replays_on_new_data(backend: str) -> None:
    logits, targets, masked, w = inputs(64, 5021, torch.bfloat16)
    leaf = logits.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = masked_loss_from_logits(leaf, targets, masked, w, max_masked=64, backend=backend, **OPTIONS)
        return loss, torch.autograd.grad(loss, leaf)[0]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    masked.logical_not_()
    graph.replay()
    for got, want in zip(captured, step()):
        assert torch.equal(got, want)


@pytest.mark.large
def test_more_than_2_to_31_elements(backend: str) -> None:
    rows, vocab = 14000, 157184
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 5.0
    targets = torch.full((rows,), vocab - 1, device="cuda")
    masked = torch.zeros(rows, dtype=torch.bool, device="cuda")
    masked[-1] = True
    loss, d = loss_and_gradient(masked_loss_from_logits, logits, targets, masked, backend=backend)
    z = logits[-1].double()
    assert loss.item() == pytest.approx((z.logsumexp(0) - 5).item(), rel=1e-6)
    torch.testing.assert_close(
        d[-1].double(), z.softmax(0) - (torch.arange(vocab, device="cuda") == vocab - 1), rtol=1e-2, atol=1e-9
    )
    assert not d[:-1].any()
