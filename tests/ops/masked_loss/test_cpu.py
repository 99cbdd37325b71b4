"""masked_loss: the reference against calculus, the CPU backend against the reference, semantics of every argument."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak_memory
from illada_kernels import masked_loss, masked_loss_from_logits
from illada_kernels.ops.masked_loss import cases, cpu
from illada_kernels.testing import tolerance
from tests.helpers import masked_loss_reference as reference
from tests.helpers.masked_loss_calls import (
    ALL,
    TINY,
    check_against_float64,
    gradients,
    inputs,
    needs_extension,
    wanted,
)

# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_reference_and_its_operator_pass_gradcheck(reduction: str, options: dict[str, Any]) -> None:
    hidden, weight, targets, masked, w = inputs(6, 3, 7)
    targets[targets == 1] = 2  # a forbidden target has an infinite loss
    targets[targets == 4] = 3
    bias = torch.randn(7, dtype=torch.float64)
    for function in (reference.masked_loss, masked_loss):

        def run(h: Tensor, c: Tensor, b: Tensor, f: Any = function) -> Tensor:
            return f(h, c, targets, masked, w.double(), reduction=reduction, head_bias=b, **options)

        assert torch.autograd.gradcheck(run, tuple(x.requires_grad_() for x in (hidden, weight, bias)))
    for function in (reference.masked_loss_from_logits, masked_loss_from_logits):

        def rows(x: Tensor, f: Any = function) -> Tensor:
            return f(x, targets, masked, w.double(), reduction=reduction, **options)

        assert torch.autograd.gradcheck(rows, torch.randn(6, 7, dtype=torch.float64, requires_grad=True))


def test_reference_is_weighted_cross_entropy_of_the_masked_rows() -> None:
    hidden, weight, targets, masked, w = inputs()
    z = hidden @ weight.T
    rows = [i for i in range(12) if masked[i]]
    expected = sum(w[i].double() * (z[i].exp().sum().log() - z[i, targets[i]]) for i in rows)
    assert reference.masked_loss(hidden, weight, targets, masked, w.double()).item() == pytest.approx(
        expected.item(), rel=1e-12
    )
    mean = reference.masked_loss(hidden, weight, targets, masked, w.double(), reduction="mean")
    assert mean.item() == pytest.approx(expected.item() / w[masked].double().sum().item(), rel=1e-12)


def test_smoothing_and_z_loss_are_their_formulas_over_allowed_ids() -> None:
    logits, targets, masked = torch.randn(1, 5, dtype=torch.float64), torch.tensor([2]), torch.tensor([True])
    z = (2 * torch.tanh(logits / 2))[0, [0, 2, 4]]  # 1 and 3 are forbidden
    lse = z.exp().sum().log()
    expected = 0.8 * (lse - z[1]) + 0.2 * (lse - z.mean()) + 0.5 * lse**2
    options = {"softcap": 2.0, "label_smoothing": 0.2, "z_loss": 0.5, "forbid": (3, 1, 3)}
    assert masked_loss_from_logits(logits, targets, masked, **options).item() == pytest.approx(
        expected.item(), rel=1e-13
    )


# ---- the CPU backend against float64 --------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab, dim, rows", [(2, 5, 40), (257, 33, 40), (5021, 64, 60), (32768, 16, 16)])
def test_cpu_is_as_exact_as_torch_at_every_mask_ratio_and_weight(
    dtype: torch.dtype, vocab: int, dim: int, rows: int
) -> None:
    torch.manual_seed(vocab)
    bias = torch.randn(vocab).to(dtype)
    for seed, (ratio, budget) in enumerate(itertools.product((0.05, 0.5, 0.95, 1.0), (None, TINY))):
        args = inputs(rows, dim, vocab, ratio, dtype, seed)
        check_against_float64(args, bias if seed % 2 else None, memory_budget=budget)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_stay_exact(dtype: torch.dtype) -> None:
    hidden, weight, targets, masked, w = inputs(20, 16, 300, 0.5, dtype)
    big = (hidden * (1e4 / (hidden.float() @ weight.float().T).abs().max())).to(dtype)
    for budget in (None, TINY):
        check_against_float64((big, weight, targets, masked, w), None, memory_budget=budget)
    logits = (torch.rand(20, 301) * 2e4 - 1e4).to(dtype)
    exact = gradients(lambda x: reference.masked_loss_from_logits(x, targets, masked, w.double()), (logits.double(),))
    peer = gradients(lambda x: reference.masked_loss_from_logits(x, targets, masked, w), (logits,))
    ours = gradients(lambda x: masked_loss_from_logits(x, targets, masked, w, backend="cpu"), (logits,))
    for mine, theirs, right in zip(ours, peer, exact):
        assert (mine.double() - right).abs().max() <= tolerance(theirs, right)


@needs_extension
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 hidden, float32 head"])
def test_all_modes_agree_with_the_reference_under_any_upstream_gradient(
    reduction: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 of the same inputs. A gradient of n float32 terms is off by at most about n eps of its largest
    sum; here 4 sqrt(257) eps of the largest element is asked for, and the final rounding of the dtype."""
    vocab, eps = 257, torch.finfo(torch.float32).eps
    hidden, weight, targets, masked, w = inputs(60, 40, vocab, 0.95, torch.float32)
    weight[:, 0] += 0.3
    hidden = hidden.to(torch.bfloat16) if "bfloat16" in kind else hidden
    weight = weight.to(torch.bfloat16) if kind == "bfloat16" else weight
    targets[(targets == 1) | (targets == 4)] = 7
    bias = torch.randn(vocab)
    upstream = torch.randn(60) if reduction == "none" else torch.tensor(-1.7)
    some_rows = (110 if kind == "bfloat16" else 74) * 1024  # a half-precision head also needs room to be converted
    modes = set()
    whole_rows, parts_twice = (some_rows, 0), (some_rows, cpu.CHUNK_COST)  # two chunks, or one that holds half
    for (budget, cost), z_loss, smoothing in itertools.product(
        ((None, 0), whole_rows, parts_twice, (TINY, 0)), (0.0, 0.01), (0.0, 0.1)
    ):
        monkeypatch.setattr(cpu, "CHUNK_COST", cost)
        options = {
            "reduction": reduction,
            "softcap": 3.0,
            "forbid": (1, 4),
            "z_loss": z_loss,
            "label_smoothing": smoothing,
        }
        modes.add(cpu.plan(wanted(hidden, weight, masked, reduction, budget)).mode)

        def ours(h: Tensor, c: Tensor, b: Tensor, budget: Any = budget, options: Any = options) -> Tensor:
            return masked_loss(h, c, targets, masked, w, head_bias=b, memory_budget=budget, backend="cpu", **options)

        def exact(h: Tensor, c: Tensor, b: Tensor, options: Any = options) -> Tensor:
            return reference.masked_loss(h, c, targets, masked, w.double(), head_bias=b, **options)

        leaves = (hidden, weight, bias)
        right = gradients(exact, tuple(x.double() for x in leaves), upstream.double())
        for mine, want in zip(gradients(ours, leaves, upstream), right):
            rounding = torch.finfo(mine.dtype).eps / 2 if mine.dtype != torch.float32 else 0
            assert (mine.double() - want).abs().max() <= (4 * vocab**0.5 * eps + rounding) * want.abs().max()
    assert modes == ({"one_chunk", "slices"} if reduction == "none" else {"one_chunk", "row_chunks", "slices"})


@needs_extension
def test_bf16_head_gradient_is_one_rounding_of_the_float32_sum_over_chunks() -> None:
    hidden, weight, targets, masked, w = inputs(400, 16, 64, 1.0, torch.bfloat16)
    budget = 4 * 64 * 16 + 400 * 256 + 40 * (4 * 64 + 8 * 16)  # chunks of 40 rows at most
    room = cpu.plan(wanted(hidden, weight, masked, "sum", budget, (True, True, False))).room
    assert cpu.row_chunks(400, room, 64, 16)[0] < 100
    exact = gradients(
        lambda h, c: reference.masked_loss(h, c, targets, masked, w.double()), (hidden.double(), weight.double())
    )
    ours = gradients(
        lambda h, c: masked_loss(h, c, targets, masked, w, memory_budget=budget, backend="cpu") / 3, (hidden, weight)
    )
    right = exact[2] / 3
    # half an ulp of the element, and the float32 sum of 400 terms, sqrt(400) roundings of the largest
    most = right.abs() * 2**-8 + 20 * torch.finfo(torch.float32).eps * right.abs().max()
    assert ((ours[2].double() - right).abs() <= most).all()


# ---- what it costs --------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("share", [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
def test_memory_beside_the_gradients_stays_within_the_budget(share: float) -> None:
    case = cases.Case("", 1024, 512, 256, 8192, share)
    hidden, weight, targets, masked, w = case.inputs(torch.float32, "cpu")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    grads = 4 * (hidden.numel() + weight.numel())

    def job() -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            masked_loss(hidden, weight, targets, masked, w, memory_budget=case.memory_budget), leaves
        )

    job()
    assert peak_memory(job, "cpu") - grads <= case.memory_budget


@needs_extension
def test_without_gradients_memory_is_a_slice_of_the_logits() -> None:
    hidden, weight, targets, masked, w = cases.Case("", 512, 512, 16, 32768).inputs(torch.float32, "cpu")
    assert peak_memory(lambda: masked_loss(hidden, weight, targets, masked, w), "cpu") < 10 << 20  # all logits: 64 MiB


@needs_extension
@pytest.mark.parametrize("mode", ["one_chunk", "row_chunks", "slices"])
def test_frozen_parts_skip_their_products(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of one product over all masked rows."""
    hidden, weight, targets, masked, w = inputs(160, 8, 2048, 1.0, torch.float32)
    room = 50 * (4 * 2048 + 8 * 8)  # for the logits of 50 rows
    budget = {"one_chunk": None, "row_chunks": room + 160 * 256, "slices": TINY}[mode]
    again = 0.0
    if mode == "row_chunks":
        rows, held = cpu.row_chunks(160, room, 2048, 8)
        assert 2 <= -(-160 // rows) < 4 and held < 2048
        again = 1 - held / 2048
    whole = {"one_chunk": 3, "row_chunks": 3 + again, "slices": 4}[mode]
    work: list[int] = []
    product = cpu._multiply

    def counted(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> None:
        work.append(a.shape[0] * a.shape[1] * b.shape[1])
        product(a, b, *rest, **options)

    head_product = cpu._head_product

    def counted_head(rows: Any, x: Tensor, w: Tensor, out: Tensor) -> None:
        before = len(work)
        head_product(rows, x, w, out)
        if len(work) == before:  # the extension's own product
            work.append(x.numel() * len(w))

    monkeypatch.setattr(cpu, "_multiply", counted)
    monkeypatch.setattr(cpu, "_head_product", counted_head)

    def products(hidden_grad: bool, weight_grad: bool) -> float:
        work.clear()
        h, c = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)
        loss = masked_loss(h, c, targets, masked, w, memory_budget=budget, backend="cpu")
        if loss.requires_grad:
            loss.backward()
        return sum(work) / (160 * 8 * 2048)

    assert products(True, True) == pytest.approx(whole)
    assert products(True, False) == products(False, True) == pytest.approx(whole - 1)
    assert products(False, False) == 1
    with torch.no_grad():
        assert products(True, True) == 1


@needs_extension
@pytest.mark.parametrize("count", [1, 7, 40, 512, 1000])
@pytest.mark.parametrize("vocab", [2, 300, 32768])
def test_chunks_of_rows_fit_their_room_and_compute_at_most_half_twice(count: int, vocab: int) -> None:
    width = 64
    for rows_that_fit in (32, 48, 100, 511):
        room = rows_that_fit * (4 * vocab + 8 * width)
        rows, held = cpu.row_chunks(count, room, vocab, width)
        assert 1 <= rows <= count and vocab <= 2 * held <= 2 * vocab
        assert rows * (4 * held + 8 * width) <= room
        assert held == vocab if count <= rows_that_fit else True
