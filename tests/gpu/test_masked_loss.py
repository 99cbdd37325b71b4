"""masked_loss on a GPU: numerics against float64 on the CPU, streams, graphs, synchronisations, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import masked_loss
from illada_kernels.ops.masked_loss import cases, gpu, op
from illada_kernels.testing import assert_close, masked_loss_rounding
from tests.helpers import masked_loss_reference as reference
from tests.helpers.masked_loss_calls import wanted

GPU_BACKENDS = [b for b in op.BACKENDS if b.name in ("cuda", "triton")]
REASONS = {b.name: "no CUDA GPU" if not torch.cuda.is_available() else b.available() for b in GPU_BACKENDS}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in REASONS.items()
]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)

ALL: dict[str, Any] = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4, "forbid": (1, 77)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(rows: int, dim: int, vocab: int, ratio: float, dtype: torch.dtype, scale: float = 1.0) -> Inputs:
    g = torch.Generator("cuda").manual_seed(vocab + rows)
    hidden = (scale * torch.randn(rows, dim, generator=g, device="cuda")).to(dtype)
    head = (torch.randn(vocab, dim, generator=g, device="cuda") * dim**-0.5).to(dtype)
    targets = torch.randint(min(78, vocab - 1), vocab, (rows,), generator=g, device="cuda")
    masked = torch.rand(rows, generator=g, device="cuda").argsort() < ratio * rows
    weight = 1 / torch.rand(rows, generator=g, device="cuda").clamp_min(1e-3)  # 1 .. 1000
    return hidden, head, targets, masked, weight


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    loss = function(*leaves)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss)))


def run(args: Inputs, backend: str, **options: Any) -> tuple[Tensor, ...]:
    return gradients(lambda h, c: masked_loss(h, c, *args[2:], backend=backend, **options), *args[:2])


def budgets(args: Inputs, dtype: torch.dtype) -> dict[str, int | None]:
    """One for each mode."""
    hidden, head, *_ = args
    rows, vocab, dim = len(hidden), *head.shape
    chunk = 4 * vocab * dim + rows * (gpu.ROW_BYTES + 4 * dim) + gpu.LEAST_CHUNK * dtype.itemsize * (vocab + dim)
    return {"one_chunk": 64 << 30, "row_chunks": chunk, "slices": 1}


def check_against_float64(args: Inputs, backend: str, z: Tensor, **options: Any) -> None:
    """As tests/ops/masked_loss/test_cpu.py does on the CPU, where the exact result is computed; z: torch's logits."""
    hidden, head, targets, masked, w = args
    up = [x.double().cpu() for x in (hidden, head)]
    beside = (targets.cpu(), masked.cpu(), w.double().cpu())
    exact = gradients(lambda h, c: reference.masked_loss(h, c, *beside), *up)
    peer = [x.cpu() for x in gradients(lambda h, c: cases.plain(h, c, targets, masked, w), hidden, head)]
    ours = [x.cpu() for x in run(args, backend, **options)]
    z_error = (z.double().cpu() - up[0][beside[1]] @ up[1].T).abs().amax(1)
    most = 2 * (2 * z_error * beside[2][beside[1]]).sum() + torch.finfo(torch.float32).eps * exact[0].abs()
    assert (ours[0] - exact[0]).abs() <= most
    extra = masked_loss_rounding(exact[0], beside[2][beside[1]], float(z.abs().max()), hidden, head, head.dtype)
    for mine, theirs, right, name in zip(ours[1:], peer[1:], exact[1:], ("dhidden", "dhead")):
        assert_close(mine, theirs, right, extra[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 257, 50257, 126464, 155136, 157184])
def test_as_exact_as_torch(vocab: int, dtype: torch.dtype, backend: str) -> None:
    for ratio in (0.05, 0.5, 0.95, 1.0):
        args = inputs(64, 64, vocab, ratio, dtype)
        z = args[0][args[3]] @ args[1].T
        for budget in (None, 1):
            check_against_float64(args, backend, z, memory_budget=budget)
    nothing = run(inputs(64, 64, vocab, 0.0, dtype), backend)
    assert not any(x.any() for x in nothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(dtype: torch.dtype, backend: str) -> None:
    args = inputs(64, 64, 5021, 0.5, dtype, scale=2500.0)
    z = args[0][args[3]] @ args[1].T
    assert z.abs().max() > 5e3
    for budget in (None, 1):
        check_against_float64(args, backend, z, memory_budget=budget)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_modes_agree_with_one_another_under_all_options(reduction: str, backend: str) -> None:
    args = inputs(6144, 64, 5021, 0.6, torch.bfloat16)
    results, seen = [], set()
    for mode, budget in budgets(args, torch.bfloat16).items():
        needs = (True, True, False)
        seen.add(gpu.plan(wanted(args[0], args[1], args[3], reduction, budget, needs)).mode)
        for capacity in (None, 6144):
            got = run(args, backend, reduction=reduction, memory_budget=budget, max_masked=capacity, **ALL)
            results.append((mode, capacity, got))
    assert seen >= {"one_chunk", "slices"} and (reduction == "none") == ("row_chunks" not in seen)
    for mode, capacity, got in results[1:]:
        for mine, first in zip(got, results[0][2]):  # logits, their gradients and results rounded to bfloat16
            off = float((mine.double() - first.double()).abs().max() / first.double().abs().max())
            assert off <= 2**-7, (mode, capacity, off)


def test_head_gradient_is_one_rounding_of_the_float32_sum(backend: str) -> None:
    """Logits of zero: their gradients are multiples of 1 / 64, exact in bfloat16, and so are their float32 sums."""
    hidden, head, targets, masked, w = inputs(8192, 128, 64, 1.0, torch.bfloat16)
    args = (hidden.sign(), torch.zeros_like(head), targets % 64, masked, torch.ones_like(w))
    beside = [x.cpu() for x in args[2:]]
    exact = gradients(
        lambda h, c: reference.masked_loss(h, c, *beside[:2], beside[2].double()), *(x.double().cpu() for x in args[:2])
    )
    for budget in budgets(args, torch.bfloat16).values():
        mine = run(args, backend, memory_budget=budget)[2].double().cpu()
        assert ((mine - exact[2]).abs() <= exact[2].abs() * 2**-8).all()


@pytest.mark.parametrize("mode", ["one_chunk", "row_chunks", "slices"])
def test_a_half_precision_mean_keeps_small_gradients(mode: str, backend: str) -> None:
    """p / rows is 2e-9, and a loss scaler's 2^16 comes in the backward, long after d(loss) / d(logits) was rounded."""
    hidden, head, targets, masked, _ = inputs(32768, 64, 16384, 1.0, torch.float16)
    ones = torch.ones(32768, device="cuda")
    budget = budgets((hidden, head, targets, masked, ones), torch.float16)[mode]
    assert gpu.plan(wanted(hidden, head, masked, "mean", budget, (True, True, False))).mode == mode

    def scaled(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        return lambda h, c: 2.0**16 * function(h, c, targets, masked, reduction="mean", **options)

    ours = gradients(scaled(masked_loss, backend=backend, memory_budget=budget), hidden, head)[1:]
    exact = gradients(scaled(masked_loss, backend=backend), hidden.float(), head.float())[1:]
    z = (hidden @ head.T).abs().max()
    bar = (z + 3) * 2**-11  # half an ulp of the logits, their gradients, hidden's rows, the result
    for mine, right in zip(ours, exact):
        assert (mine.float() - right).abs().max() <= bar * right.abs().max()


def test_same_bits_run_after_run_and_on_another_stream(backend: str) -> None:
    args = inputs(3000, 128, 32001, 0.5, torch.bfloat16)
    for budget in (None, 1):
        first = run(args, backend, memory_budget=budget, **ALL)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            second = run(args, backend, memory_budget=budget, **ALL)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["one_chunk", "row_chunks", "slices"])
def test_a_capacity_frees_the_call_of_synchronisation(mode: str, backend: str) -> None:
    args = inputs(4096, 64, 5021, 0.5, torch.bfloat16)
    options = {"memory_budget": budgets(args, torch.bfloat16)[mode], **ALL}
    run(args, backend, max_masked=4000, **options)  # compiles, uploads the forbidden ids
    with no_synchronisation():
        run(args, backend, max_masked=4000, **options)
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        run(args, backend, **options)


@pytest.mark.parametrize("mode", ["one_chunk", "row_chunks", "slices"])
def test_a_graph_replays_with_another_mask(mode: str, backend: str) -> None:
    args = hidden, head, targets, masked, w = inputs(4096, 64, 5021, 0.5, torch.bfloat16)
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    options = {"memory_budget": budgets(args, torch.bfloat16)[mode], "max_masked": 3000, "backend": backend, **ALL}

    def step() -> tuple[Tensor, ...]:
        loss = masked_loss(*leaves, targets, masked, w, **options)
        return (loss, *torch.autograd.grad(loss, leaves))

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for ratio in (0.3, 0.0, 0.7, 0.9):  # at last more than the capacity
        with torch.no_grad():
            masked.copy_(torch.rand(4096, device="cuda") < ratio)
            leaves[0].copy_(torch.randn_like(hidden))
        graph.replay()
        for got, want in zip(captured, step()):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert all(x.isnan().all() for x in captured)


def test_bad_targets_raise_or_with_a_capacity_make_nan(backend: str) -> None:
    args = inputs(300, 64, 5021, 1.0, torch.bfloat16)
    args[2][17] = 5021
    with pytest.raises(ValueError, match="got 5021 at row 17 of 300"):
        masked_loss(*args, backend=backend)
    losses = masked_loss(*args, reduction="none", max_masked=300, backend=backend)
    assert losses.isnan().nonzero().tolist() == [[17]]
    assert masked_loss(*args, max_masked=300, backend=backend).isnan()


@pytest.mark.large
def test_rows_times_vocabulary_beyond_2_to_31(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    hidden, head, targets, masked, w = inputs(14336, 64, 157184, 1.0, torch.bfloat16)
    whole = run((hidden, head, targets, masked, w), backend, memory_budget=64 << 30)
    last = torch.arange(14336, device="cuda") >= 14336 - 64
    few = run((hidden, head, targets, last, w), backend)
    torch.testing.assert_close(whole[1][last], few[1][last], rtol=2**-6, atol=float(few[1].abs().max()) * 2**-7)
    assert all(x.isfinite().all() for x in whole)


@pytest.mark.large
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_least_memory_is_a_tenth_of_the_logits_of_all_rows(ratio: float, backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    args = inputs(8192, 4096, 126464, ratio, torch.bfloat16)
    tenth = 2 * 8192 * 126464 // 10
    run(args, backend, memory_budget=tenth)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = run(args, backend, memory_budget=tenth)
    torch.cuda.synchronize()
    made = sum(x.numel() * x.element_size() for x in got)
    assert torch.cuda.max_memory_allocated() - before - made <= tenth + (1 << 20)  # the allocator rounds each tensor up
