"""masked_loss as an operator: what arguments mean, what bad ones raise, what never happens, on every CPU backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import masked_loss, masked_loss_from_logits
from illada_kernels.ops.masked_loss.op import OPERATOR
from tests.helpers import masked_loss_contract as contract
from tests.helpers import masked_loss_reference as reference
from tests.helpers.instruction_sets import run_under_each
from tests.helpers.masked_loss_calls import BACKENDS, TINY, gradients, inputs, needs_extension
from tests.helpers.masked_loss_contract import MODES, run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", MODES)
def test_nan_in_unmasked_rows_never_reaches_loss_or_gradients(backend: str, budget: int | None) -> None:
    contract.nan_in_unmasked_rows_never_reaches_loss_or_gradients(backend, budget)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_masked_rows_give_zero_loss_and_zero_gradients(backend: str, budget: int | None, reduction: str) -> None:
    contract.no_masked_rows_give_zero_loss_and_zero_gradients(backend, budget, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead, dim", [((0,), 4), ((3, 0), 4), ((), 4), ((2, 3, 2), 4), ((5,), 0)])
def test_any_leading_dimensions_and_empty_ones(backend: str, lead: tuple[int, ...], dim: int) -> None:
    contract.any_leading_dimensions_and_empty_ones(backend, lead, dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_more_masked_rows_than_the_capacity_make_everything_nan(
    backend: str, budget: int | None, reduction: str
) -> None:
    contract.more_masked_rows_than_the_capacity_make_everything_nan(backend, budget, reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", MODES)
def test_a_forbidden_target_has_infinite_loss_and_finite_gradients(backend: str, budget: int | None) -> None:
    contract.a_forbidden_target_has_infinite_loss_and_finite_gradients(backend, budget)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_logits_make_their_row_nan_and_minus_infinity_is_a_probability_of_zero(backend: str) -> None:
    logits = torch.randn(4, 600)
    logits[1, 599], logits[2, 5:], logits[3] = torch.nan, -torch.inf, -torch.inf
    targets, masked = torch.tensor([3, 3, 3, 3]), torch.ones(4, dtype=torch.bool)
    ones = torch.ones(4)
    losses, d = gradients(
        lambda x: masked_loss_from_logits(x, targets, masked, reduction="none", backend=backend), (logits,), ones
    )
    assert losses[0].isfinite() and losses[1].isnan() and losses[3].isnan()
    torch.testing.assert_close(losses[2], logits[2, :5].logsumexp(0) - logits[2, 3])
    assert d[1].isnan().any() and (d[2, 5:] == 0).all() and d[[0, 2]].isfinite().all()


@needs_extension
@pytest.mark.parametrize("budget", MODES)
@pytest.mark.parametrize("upstream", [1.0, -0.3])
def test_backward_runs_twice_with_the_same_result(budget: int | None, upstream: float) -> None:
    hidden, weight, targets, masked, w = inputs(40, 16, 500, 1.0, dtype=torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for reduction in ("sum", "none"):
        loss = masked_loss(*leaves, targets, masked, w, reduction=reduction, memory_budget=budget, backend="cpu")
        total = (loss * upstream).sum()
        total.backward(retain_graph=True)
        once = [x.grad.clone() for x in leaves]
        total.backward(retain_graph=True)
        assert all(torch.equal(x.grad, 2 * g) for x, g in zip(leaves, once))
        total.backward()
        for x in leaves:
            x.grad = None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", MODES)
def test_a_second_derivative_raises(backend: str, budget: int | None) -> None:
    contract.a_second_derivative_raises(backend, budget)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_give_what_contiguous_ones_give(dtype: torch.dtype) -> None:
    hidden, weight, targets, masked, w = inputs(24, 10, 31, dtype=dtype)
    shape = (4, 6)
    plain = [x.reshape(*shape, *x.shape[1:]) for x in (hidden, targets, masked, w)]

    def strided(x: Tensor) -> Tensor:  # every second row, transposed leading dimensions, a longer last dimension
        room = x.new_zeros(6, 8, *(n + 3 for n in x.shape[2:]))
        view = room.transpose(0, 1)[::2]
        view = view[..., 1:-2] if x.dim() == 3 else view
        view.copy_(x)
        return view

    h, t, m, v = map(strided, plain)
    c = torch.zeros(31, 14, dtype=dtype)[:, 2:12].copy_(weight)
    assert h.stride(-1) == 1 and not h.is_contiguous() and not c.is_contiguous()
    want = run("cpu", plain[0], weight, *plain[1:])
    for budget in MODES:
        got = gradients(lambda x, y, b=budget: masked_loss(x, y, t, m, v, memory_budget=b, backend="cpu"), (h, c))
        for g, x in zip(got, want):
            torch.testing.assert_close(g, x)
    logits = strided(plain[0] @ weight.T)
    got = gradients(lambda x: masked_loss_from_logits(x, t, m, v, backend="cpu"), (logits,))
    for g, x in zip(got, want[3:]):
        torch.testing.assert_close(g, x)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 515])
def test_row_kernels_touch_nothing_outside_their_rows(dtype: torch.dtype, vocab: int) -> None:
    """Rows of an odd-aligned view, poison around the logits and a sentinel around the gradient."""
    from illada_kernels.ops.masked_loss.cpu_rows import Rows
    from illada_kernels.ops.masked_loss.problem import Problem

    rows, stride, guard = 3, vocab + 5, 64
    room = torch.full((guard + rows * stride + guard + 1,), torch.nan, dtype=dtype)
    out = torch.full_like(room, 77.0)
    view = room[guard + 1 :].as_strided((rows, vocab), (stride, 1))
    out_view = out[guard + 1 :].as_strided((rows, vocab), (stride, 1))
    view.copy_(torch.randn(rows, vocab))
    targets = torch.tensor([0, vocab - 1, vocab // 2])
    masked = torch.ones(rows, dtype=torch.bool)
    math = Rows(Problem(view, None, targets, masked, None, None, "sum", 3.0, 0.1, 0.01), view.shape[-1])
    math.stats(view, 0)
    assert math.state.isfinite().all()
    math.dlogits(view, out_view, 0)
    assert out_view.isfinite().all() and (out_view != 77).all()
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[guard + 1 :].as_strided((rows, vocab), (stride, 1)).fill_(True)
    assert (out[~touched] == 77).all() and room[~touched].isnan().all()


@needs_extension
@pytest.mark.parametrize("budget", MODES)
def test_same_bits_run_after_run_and_rows_do_not_depend_on_threads(budget: int | None) -> None:
    args = inputs(130, 24, 3000, 0.7, torch.float32)
    first = run("cpu", *args, memory_budget=budget)
    for got, want in zip(run("cpu", *args, memory_budget=budget), first):
        assert torch.equal(got, want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for got, want in zip(run("cpu", *args, memory_budget=budget)[3:], first[3:]):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_hidden_head_and_bias_but_not_logits(backend: str) -> None:
    hidden, weight, targets, masked, w = inputs(dtype=torch.float32)
    bias = torch.randn(11)
    half = [x.to(torch.bfloat16) for x in (hidden, weight, bias)]
    want = masked_loss(*half[:2], targets, masked, w, head_bias=half[2], backend=backend)
    logits = masked_loss_from_logits(hidden @ weight.T, targets, masked, w, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = hidden.requires_grad_()
        got = masked_loss(leaf, weight, targets, masked, w, head_bias=bias, backend=backend)
        got.backward()
        assert torch.equal(got, want) and leaf.grad.dtype == torch.float32
        z = (hidden.double() @ weight.double().T).float().detach()
        torch.testing.assert_close(masked_loss_from_logits(z, targets, masked, w, backend=backend), logits)


# ---- what raises ----------------------------------------------------------------------------------------------------

H, C = torch.zeros(4, 6), torch.zeros(9, 6)
T, M, W = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool), torch.ones(4)
BAD = {
    "hidden list": ((TypeError, "hidden: expected a tensor of torch.float32 or .*, got list"), {"hidden": [1.0]}),
    "hidden int": (
        (TypeError, "hidden: expected torch.float32 or .*, got torch.int64; convert it"),
        {"hidden": H.long()},
    ),
    "hidden scalar": ((ValueError, r"hidden: expected shape \(..., D\), got \(\)"), {"hidden": torch.zeros(())}),
    "hidden stride": (
        (ValueError, r"hidden: expected a contiguous last dimension, got strides \(1, 4\); use .contiguous\(\)"),
        {"hidden": torch.zeros(6, 4).T},
    ),
    "head dtype": ((TypeError, "head_weight: expected torch.float32, got torch.float16"), {"head_weight": C.half()}),
    "head shape": (
        (ValueError, r"head_weight: expected shape \(V, 6\) to match hidden, got \(9, 5\)"),
        {"head_weight": C[:, :5]},
    ),
    "head device": (
        (ValueError, "head_weight: expected device cpu like hidden, got meta; move it"),
        {"head_weight": C.to("meta")},
    ),
    "head empty": ((ValueError, "a vocab of at least one id, got V = 0"), {"head_weight": C[:0]}),
    "targets dtype": ((TypeError, "targets: expected torch.int64, got torch.int32"), {"targets": T.int()}),
    "targets shape": (
        (ValueError, r"targets: expected shape \(4,\) to match the rows of hidden, got \(3,\)"),
        {"targets": T[:3]},
    ),
    "targets device": ((ValueError, "targets: expected device cpu like hidden, got meta"), {"targets": T.to("meta")}),
    "masked shape": ((ValueError, r"masked: expected shape \(4,\) .* got \(3,\)"), {"masked": M[:3]}),
    "masked column": ((ValueError, r"masked: expected shape \(4,\) .* got \(4, 1\)"), {"masked": M[:, None]}),
    "masked device": ((ValueError, "masked: expected device cpu like hidden, got meta"), {"masked": M.to("meta")}),
    "weight shape": ((ValueError, r"weight: expected shape \(4,\) .* got \(1,\)"), {"weight": W[:1]}),
    "weight device": ((ValueError, "weight: expected device cpu like hidden, got meta"), {"weight": W.to("meta")}),
    "rows": ((ValueError, r"targets: expected shape \(5,\) .* got \(4,\)"), {"hidden": torch.zeros(5, 6)}),
    "head of columns": ((ValueError, r"head_weight: expected shape \(V, 6\)"), {"head_weight": C[..., None]}),
    "head dimensions": ((ValueError, r"head_weight: expected shape \(V, 6\)"), {"head_weight": C[None]}),
    "head stride": ((ValueError, "head_weight: expected a contiguous last"), {"head_weight": torch.zeros(6, 9).T}),
    "masked dtype": ((TypeError, "masked: expected torch.bool, got torch.float32"), {"masked": W}),
    "weight dtype": ((TypeError, "weight: expected torch.float32, got torch.float64"), {"weight": W.double()}),
    "weight grad": (
        (ValueError, r"weight: expected requires_grad=False .* pass weight.detach\(\)"),
        {"weight": W.clone().requires_grad_()},
    ),
    "bias shape": (
        (ValueError, r"head_bias: expected shape \(9,\) to match head_weight, got \(4,\)"),
        {"head_bias": W},
    ),
    "reduction": ((ValueError, "reduction: expected one of 'sum', 'mean', 'none', got 'avg'"), {"reduction": "avg"}),
    "softcap": (
        (ValueError, "softcap: expected a finite number of at least 1.1.*e-38 and of at most 3.4.*, got 0"),
        {"softcap": 0},
    ),
    "smoothing": ((ValueError, "label_smoothing: expected a number below 1, got 1"), {"label_smoothing": 1}),
    "smoothing below": ((ValueError, "label_smoothing: expected a finite .*, got -0.5"), {"label_smoothing": -0.5}),
    "smoothing nan": ((ValueError, "label_smoothing: .*, got nan"), {"label_smoothing": float("nan")}),
    "z_loss inf": ((ValueError, "z_loss: .*, got inf"), {"z_loss": float("inf")}),
    "z_loss": ((ValueError, "z_loss: expected a finite number of at least 0 .*, got -0.1"), {"z_loss": -0.1}),
    "forbid": ((ValueError, r"forbid: expected ids in \[0, 9\), got 9"), {"forbid": (3, 9)}),
    "forbid all": ((ValueError, "forbid: expected at least one of the 9 ids"), {"forbid": range(9)}),
    "max_masked": ((ValueError, "max_masked: expected an int of at least 0, got -1"), {"max_masked": -1}),
    "budget": ((ValueError, "memory_budget: expected an int of at least 1, got 0"), {"memory_budget": 0}),
    "backend": ((ValueError, "backend: expected one of .*reference for masked_loss, got 'gpu'"), {"backend": "gpu"}),
    "target": (
        (ValueError, r"targets: expected ids in \[0, 9\) at masked rows, got 9 at row 2 of 4"),
        {"targets": torch.tensor([0, 8, 9, 0])},
    ),
    "target with capacity": ((ValueError, r"got -1 at row 0 of 4"), {"targets": T - 1, "max_masked": 4}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_and_say_which(name: str) -> None:
    (error, message), changed = BAD[name]
    arguments = {"hidden": H, "head_weight": C, "targets": T, "masked": M, "weight": W} | changed
    with pytest.raises(error, match=message):
        masked_loss(**arguments)
    shared = {
        "targets",
        "masked",
        "weight",
        "reduction",
        "softcap",
        "label_smoothing",
        "z_loss",
        "forbid",
        "max_masked",
    }
    if changed.keys() <= shared:
        with pytest.raises(error, match=message.replace("hidden", "logits")):
            masked_loss_from_logits(torch.zeros(4, 9), **({"targets": T, "masked": M, "weight": W} | changed))


@needs_extension
def test_float64_runs_on_the_reference_only() -> None:
    hidden, weight, targets, masked, _ = inputs()
    assert masked_loss(hidden, weight, targets, masked).dtype == torch.float64
    with pytest.raises(RuntimeError, match="cpu: float64 runs on the reference only"):
        masked_loss(hidden, weight, targets, masked, backend="cpu")


def test_cuda_backend_is_never_chosen_and_says_why_when_asked_for() -> None:
    with pytest.raises(RuntimeError, match="cuda: runs on cuda, the tensors are on cpu"):
        masked_loss_from_logits(torch.zeros(2, 3), T[:2], M[:2], backend="cuda")


# ---- torch's own checks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "budget, reduction, max_masked", [(None, "sum", None), (64 * 1024, "mean", 9), (TINY, "none", None)]
)
def test_operators_pass_opcheck(backend: str, budget: int | None, reduction: str, max_masked: int | None) -> None:
    hidden, weight, targets, masked, w = inputs(40, 6, 300, dtype=torch.float32)
    masked[:] = True  # what is kept of rows that are not there is never written, and opcheck would compare it
    if max_masked is not None:
        masked[max_masked:] = False
    options = (reduction, 3.0, 0.1, 0.01, [1], max_masked)
    targets[targets == 1] = 0
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    args = (*leaves, targets, masked, w, torch.randn(300), *options, budget, [True, True, False], "", 0, 0, backend)
    torch.library.opcheck(OPERATOR.op, args)
    logits = (hidden @ weight.T).detach().requires_grad_()
    args = (logits, None, targets, masked, w, None, *options, None, [True, False, False], "", 0, 0, backend)
    torch.library.opcheck(OPERATOR.op, args)


@needs_extension
@pytest.mark.parametrize("max_masked", [None, 12])
def test_compiles_without_a_graph_break_and_gives_the_same(max_masked: int | None) -> None:
    hidden, weight, targets, masked, w = inputs(dtype=torch.float32)

    def train(h: Tensor, c: Tensor) -> Tensor:
        loss = masked_loss(h * 2, c, targets, masked, w, reduction="none", max_masked=max_masked)
        return loss.sum() + masked_loss_from_logits(h @ c.T, targets, masked, w, max_masked=max_masked)

    eager = gradients(train, (hidden, weight))
    compiled = gradients(torch.compile(train, fullgraph=True, backend="aot_eager"), (hidden, weight))
    for got, want in zip(compiled, eager):
        torch.testing.assert_close(got, want)


ISA_CHECK = """
import torch
from illada_kernels import masked_loss_from_logits
from tests.helpers import masked_loss_reference as reference
from illada_kernels.testing import tolerance
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = (torch.randn(40, 1003) * 20).to(dtype)
    t, m, w = torch.randint(1003, (40,)), torch.rand(40) < 0.7, torch.rand(40)
    t[t == 9] = 8
    options = dict(softcap=30.0, label_smoothing=0.1, z_loss=0.01, forbid=(9,))
    def gradient(f, x, w):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x, t, m, w, **options), x)[0]
    exact = gradient(reference.masked_loss_from_logits, x.double(), w.double())
    peer = gradient(reference.masked_loss_from_logits, x, w)
    ours = gradient(lambda *a, **k: masked_loss_from_logits(*a, backend="cpu", **k), x, w)
    assert (ours.double() - exact).abs().max() <= tolerance(peer, exact), dtype
"""


@needs_extension
def test_every_instruction_set_meets_the_bar(python: Any) -> None:
    run_under_each(python, ISA_CHECK)


def test_reference_agrees_with_itself_under_a_capacity() -> None:
    args = inputs()
    for reduction in ("sum", "mean", "none"):
        free = reference.masked_loss(*args[:4], args[4].double(), reduction=reduction)
        bound = reference.masked_loss(*args[:4], args[4].double(), reduction=reduction, max_masked=9)
        torch.testing.assert_close(free, bound, rtol=1e-14, atol=0)
