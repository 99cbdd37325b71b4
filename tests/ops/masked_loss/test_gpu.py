"""masked_loss as a GPU runs it (gpu.py), on a CPU: the row operations in plain torch, or the CUDA kernels emulated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import masked_loss
from illada_kernels.ops.masked_loss import gpu, op
from illada_kernels.ops.masked_loss.problem import Problem
from tests.cuda_on_cpu.library import missing
from tests.helpers import masked_loss_contract as contract
from tests.helpers import masked_loss_reference as reference
from tests.helpers.masked_loss_calls import ALL, check_against_float64, gradients, inputs
from tests.helpers.masked_loss_gpu import (
    MODES,
    SEMANTICS,
    Use,
    budget_for,
    check_semantics,
    cuda_rows,
    emulated,
    mode_of,
)
from tests.helpers.masked_loss_oracle import TorchRows

# ---- values --------------------------------------------------------------------------------------------------------


def agree_with_float64(reduction: str, kind: str, rows: int, width: int, vocab: int) -> None:
    """All modes, with and without all options, under an upstream gradient that is not a power of two."""
    eps = torch.finfo(torch.float32).eps
    hidden, weight, targets, masked, w = inputs(rows, width, vocab, 0.7, torch.float32)
    hidden = hidden.to(torch.bfloat16) if "bfloat16" in kind else hidden
    weight = weight.to(torch.bfloat16) if kind == "bfloat16" else weight
    targets[(targets == 1) | (targets == 4)] = 7
    torch.manual_seed(0)
    bias = torch.randn(vocab)
    upstream = torch.randn(rows) if reduction == "none" else torch.tensor(-1.7)
    seen = set()
    capacities = (None, rows, int(masked.sum())) if rows > 30 else (None, rows)
    for mode, capacity, options in itertools.product(MODES, capacities, ({}, ALL)):
        budget = budget_for(mode, hidden, weight, rows)
        seen.add(mode_of((hidden, weight, targets, masked, w), budget, reduction))

        def ours(h: Tensor, c: Tensor, b: Tensor, o: Any = options, m: Any = capacity, y: Any = budget) -> Tensor:
            return masked_loss(
                h,
                c,
                targets,
                masked,
                w,
                head_bias=b,
                backend="cuda",
                reduction=reduction,
                memory_budget=y,
                max_masked=m,
                **o,
            )

        def exact(h: Tensor, c: Tensor, b: Tensor, o: Any = options) -> Tensor:
            return reference.masked_loss(h, c, targets, masked, w.double(), head_bias=b, reduction=reduction, **o)

        leaves = (hidden, weight, bias)
        right = gradients(exact, tuple(x.double() for x in leaves), upstream.double())
        # logits and their gradients are rounded to bfloat16 as torch's would be, the upstream gradient is not (below)
        half = kind == "bfloat16"
        for mine, want in zip(gradients(ours, leaves, upstream), right):
            rounding = 2**-7 if half else torch.finfo(mine.dtype).eps / 2 if mine.dtype != torch.float32 else 0
            assert (mine.double() - want).abs().max() <= (8 * vocab**0.5 * eps + rounding) * want.abs().max()
    assert seen == ({"one_chunk", "slices"} if reduction == "none" else set(MODES))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 hidden, float32 head"])
def test_all_modes_agree_with_float64_under_any_upstream_gradient(reduction: str, kind: str, use: Use) -> None:
    use(TorchRows())
    agree_with_float64(reduction, kind, 40, 12, 57)


@emulated
@pytest.mark.parametrize(
    "reduction, kind", [("sum", "bfloat16"), ("mean", "float32"), ("none", "bfloat16 hidden, float32 head")]
)
def test_all_modes_agree_with_float64_with_the_cuda_kernels(reduction: str, kind: str, use: Use) -> None:
    use(cuda_rows(seed=len(kind)))
    agree_with_float64(reduction, kind, 30, 9, 57)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab, dim, rows", [(2, 5, 40), (257, 33, 40), (2051, 64, 40)])
def test_as_exact_as_torch_at_every_mask_ratio_and_weight(
    dtype: torch.dtype, vocab: int, dim: int, rows: int, use: Use
) -> None:
    use(TorchRows())
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    for seed, (ratio, budget) in enumerate(itertools.product((0.0, 0.05, 0.5, 0.95, 1.0), (None, 1))):
        args = inputs(rows, dim, vocab, ratio, dtype, seed)
        if ratio:
            check_against_float64(args, bias if seed % 2 else None, "cuda", memory_budget=budget)
        else:
            got = gradients(lambda h, c, a=args: masked_loss(h, c, *a[2:], backend="cuda"), args[:2])
            assert not any(x.any() for x in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_stay_exact(dtype: torch.dtype, use: Use) -> None:
    use(TorchRows())
    hidden, weight, targets, masked, w = inputs(20, 16, 300, 0.5, dtype)
    big = (hidden * (1e4 / (hidden.float() @ weight.float().T).abs().max())).to(dtype)
    for budget in (None, 1):
        check_against_float64((big, weight, targets, masked, w), None, "cuda", memory_budget=budget)


@pytest.mark.parametrize("weights", ["equal", "one row of 1000"])
@pytest.mark.parametrize("mode", MODES)
def test_a_half_precision_mean_keeps_small_gradients(mode: str, weights: str, use: Use) -> None:
    """scale of "mean" is about 1 / rows, here the weights of a sum: times p about 1 / V it lies below fp16's numbers,
    which start at 6e-8. A loss scaler's 2^16 comes in the backward, when d(loss) / d(logits) has long been rounded. A
    row's own gradient must not suffer from another's weight, either."""
    use(TorchRows())
    hidden, weight, targets, masked, w = inputs(300, 8, 3000, 1.0, torch.float16)
    w.fill_(1 / 32768)
    if weights != "equal":
        w[3] *= 1000
    bias, budget = torch.zeros(3000), budget_for(mode, hidden, weight, 300)
    assert mode_of((hidden, weight, targets, masked, w), budget) == mode

    def loss(function: Any, w: Tensor, **options: Any) -> Callable[..., Tensor]:
        return lambda h, c, b: function(h, c, targets, masked, w, head_bias=b, **options)

    leaves = hidden, weight, bias
    exact = gradients(loss(reference.masked_loss, w.double()), tuple(x.double() for x in leaves), 2.0**16)
    ours = gradients(loss(masked_loss, w, backend="cuda", memory_budget=budget), leaves, 2.0**16)
    targeted = torch.zeros(3000, dtype=torch.bool).index_fill_(0, targets, True)
    few = w == w.max()
    z = (hidden.double() @ weight.double().T).abs().max()
    bar = (z + 3) * 2**-11  # half an ulp of the logits, which p takes on, of d, hidden's rows, the result
    for got, right, where in zip(ours[1:], exact[1:], (few, targeted, targeted)):
        for rows in (where, ~where):  # apart: the smaller gradients must not hide behind the larger
            if rows.any():
                off = (got.double() - right)[rows].abs().max()
                assert off <= bar * right[rows].abs().max()


def test_head_gradient_over_chunks_is_one_rounding_of_the_float32_sum(use: Use) -> None:
    use(TorchRows())
    args = hidden, weight, targets, masked, w = inputs(400, 16, 64, 1.0, torch.bfloat16)
    hidden.copy_(hidden.sign()), weight.zero_()  # so that logits and their gradients are exact in bfloat16: p is 1 / 64
    w.fill_(1)
    budget = budget_for("row_chunks", hidden, weight, 400)
    assert mode_of(args, budget) == "row_chunks"
    exact = gradients(
        lambda h, c: reference.masked_loss(h, c, targets, masked, w.double()), (hidden.double(), weight.double())
    )
    ours = gradients(
        lambda h, c: masked_loss(h, c, targets, masked, w, memory_budget=budget, backend="cuda"), (hidden, weight)
    )
    # half an ulp of the element, of a sum of multiples of 1/64 that float32 holds; 63/64 takes 6 bits
    assert ((ours[2].double() - exact[2]).abs() <= exact[2].abs() * 2**-8).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "mode, reduction", [("one_chunk", "sum"), ("one_chunk", "mean"), ("one_chunk", "none"), ("row_chunks", "mean")]
)
def test_no_upstream_gradient_is_rounded_into_the_gradient_of_the_bias(
    mode: str, reduction: str, dtype: torch.dtype, use: Use
) -> None:
    """Half an ulp of 0.3 would shift the sum over all rows by 2^-9. Logits of zero: d(loss) / d(logits) but for the
    upstream gradient is exact in half precision (p is 1 / 64, rows a power of two), so nothing else is rounded either,
    but for the second of the two columns that hold each factor, by 2^-18 of it, and for sums in float32."""
    use(TorchRows())
    hidden, weight, targets, masked, _ = inputs(512, 16, 64, 1.0, dtype)
    weight.zero_()
    bias, budget = torch.zeros(64), budget_for(mode, hidden, weight, 512)
    assert mode_of((hidden, weight, targets, masked, bias), budget, reduction) == mode
    upstream = 0.3 + torch.arange(512) / 3000 if reduction == "none" else torch.tensor(0.3)

    def loss(function: Any, h: Tensor, c: Tensor, **options: Any) -> Callable[..., Tensor]:
        return lambda b: function(h, c, targets, masked, head_bias=b, reduction=reduction, **options)

    exact = gradients(loss(reference.masked_loss, hidden.double(), weight.double()), (bias.double(),), upstream)[1]
    ours = gradients(loss(masked_loss, hidden, weight, backend="cuda", memory_budget=budget), (bias,), upstream)[1]
    per_row = upstream.expand(512) / (512 if reduction == "mean" else 1)
    eps = torch.finfo(torch.float32).eps
    count = torch.bincount(targets, minlength=64)
    magnitude = per_row.max() * (count + 512 / 64)  # of the addends' sum
    assert ((ours.double() - exact).abs() <= (2**-18 + 512**0.5 * eps) * magnitude).all()


# ---- semantics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SEMANTICS)
def test_what_holds_for_every_backend(name: str, mode: str, use: Use) -> None:
    use(TorchRows())
    args = inputs(dtype=torch.float32)
    budget = budget_for(mode, args[0], args[1], 12)
    assert mode_of(args, budget) == mode
    check_semantics(name, budget)


@emulated
@pytest.mark.parametrize("mode", MODES)
def test_what_holds_for_every_backend_holds_with_the_cuda_kernels(mode: str, use: Use) -> None:
    use(cuda_rows(seed=7))
    args = inputs(dtype=torch.float32)
    for name in SEMANTICS:
        check_semantics(name, budget_for(mode, args[0], args[1], 12))


@pytest.mark.parametrize("lead, dim", [((0,), 4), ((3, 0), 4), ((), 4), ((2, 3, 2), 4), ((5,), 0)])
def test_any_leading_dimensions_and_empty_ones(lead: tuple[int, ...], dim: int, use: Use) -> None:
    for kernels in [TorchRows(), *([cuda_rows()] if missing() is None else [])]:
        use(kernels)
        contract.any_leading_dimensions_and_empty_ones("cuda", lead, dim)


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_target_raises_or_with_a_capacity_makes_its_row_nan(mode: str, use: Use) -> None:
    use(TorchRows())
    args = hidden, weight, targets, masked, _ = inputs(dtype=torch.float32)
    budget = budget_for(mode, hidden, weight, 12)
    place = int(masked.nonzero()[1])
    targets[~masked], targets[place] = 99, 11
    with pytest.raises(ValueError, match=rf"targets: expected ids in \[0, 11\) .* got 11 at row {place} of 12"):
        masked_loss(*args, backend="cuda", memory_budget=budget)
    options = {"backend": "cuda", "memory_budget": budget, "max_masked": 12}
    got = gradients(lambda h, c: masked_loss(h, c, *args[2:], **options), (hidden, weight))
    rows = torch.arange(12) == place
    assert got[0].isnan() and got[1][rows].isnan().all() and got[1][~rows].isfinite().all()
    losses = masked_loss(*args, reduction="none", **options)
    assert torch.equal(losses.isnan(), rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_masked", [None, 40])
def test_backward_runs_again_after_another_upstream_gradient(mode: str, max_masked: int | None, use: Use) -> None:
    use(TorchRows())
    hidden, weight, targets, masked, w = inputs(40, 12, 57, 0.7, torch.bfloat16)
    budget = budget_for(mode, hidden, weight, 40)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss() -> Tensor:
        return masked_loss(*leaves, targets, masked, w, max_masked=max_masked, memory_budget=budget, backend="cuda")

    once = torch.autograd.grad(loss(), leaves)
    again = loss()
    torch.autograd.grad(again * -3.3, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again, leaves), once))


def test_strided_inputs_give_what_contiguous_ones_give(use: Use) -> None:
    use(TorchRows())
    hidden, weight, targets, masked, w = inputs(24, 10, 31, dtype=torch.float32)
    h = torch.zeros(6, 4, 13).transpose(0, 1)[..., 1:11].copy_(hidden.view(4, 6, 10))
    c = torch.zeros(31, 14)[:, 2:12].copy_(weight)
    t, m, v = (torch.stack((x, x), -1)[..., 0].view(4, 6) for x in (targets, masked, w))
    want = gradients(lambda x, y: masked_loss(x, y, targets, masked, w, backend="cuda"), (hidden, weight))
    for mode in MODES:
        budget = budget_for(mode, hidden, weight, 24)
        got = gradients(lambda x, y, b=budget: masked_loss(x, y, t, m, v, memory_budget=b, backend="cuda"), (h, c))
        for g, x in zip(got, want):
            torch.testing.assert_close(g, x.view(g.shape))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_masked", [None, 30])
def test_operators_pass_opcheck_and_compile(mode: str, max_masked: int | None, use: Use) -> None:
    use(TorchRows())
    hidden, weight, targets, masked, w = inputs(40, 6, 50, 0.5, torch.float32)
    budget = budget_for(mode, hidden, weight, max_masked or 40)
    options = ("mean", 3.0, 0.1, 0.01, [1], max_masked)
    targets[targets == 1] = 0
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    args = (*leaves, targets, masked, w, torch.randn(50), *options, budget, [True, True, False], "", 0, 0, "cuda")
    torch.library.opcheck(op.OPERATOR.op, args)
    logits = (hidden @ weight.T).detach().requires_grad_()
    args = (logits, None, targets, masked, w, None, *options, None, [True, False, False], "", 0, 0, "cuda")
    torch.library.opcheck(op.OPERATOR.op, args)

    def train(h: Tensor, c: Tensor) -> Tensor:
        return masked_loss(h * 2, c, targets, masked, w, max_masked=max_masked, memory_budget=budget, backend="cuda")

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, leaves), gradients(train, leaves)):
        torch.testing.assert_close(got, want)


def test_forbidden_ids_stay_where_a_captured_graph_reads_them() -> None:
    def ids(last: int) -> Tensor | None:
        rows = torch.zeros(1, dtype=torch.int64)
        return gpu.formula(Problem(torch.zeros(1, 2000), None, rows, rows == 0, forbid=(last, 1))).forbid

    first = ids(2)
    for last in range(3, 503):
        ids(last)
    assert first is not None and ids(2) is first
