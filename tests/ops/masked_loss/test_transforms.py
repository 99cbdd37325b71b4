"""masked_loss under torch.func, forward-mode AD, batched gradients, compilers, counters: what F.cross_entropy gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from illada_kernels import masked_loss, masked_loss_from_logits
from illada_kernels.ops.masked_loss import jvp as room
from illada_kernels.ops.masked_loss.op import OPERATOR
from tests.helpers.masked_loss_calls import BACKENDS, needs_extension

REDUCTIONS = ("sum", "mean", "none")
backends = pytest.mark.parametrize("backend", BACKENDS)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def draw(rows: int = 7, dim: int = 4, vocab: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, dim, generator=g),
        torch.randn(vocab, dim, generator=g),
        torch.randn(vocab, generator=g),
    )


TARGETS, MASKED = torch.tensor([3, 0, 8, 5, 5, 2, 7]), torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
WEIGHT = torch.tensor([0.5, 9.0, 2.0, 1.0, 9.0, 0.25, 3.0])
OPTIONS: dict[str, Any] = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.02, "forbid": (1, 4)}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(reduction: str, backend: str, **options: Any) -> Loss:
    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        options_ = OPTIONS | {"reduction": reduction, "backend": backend} | options
        return masked_loss(h, w, TARGETS, MASKED, WEIGHT, head_bias=b, **options_)

    return loss


def plain(reduction: str) -> Loss:
    """The formula in operations that torch differentiates by itself, in any mode."""
    allowed = torch.tensor([i not in OPTIONS["forbid"] for i in range(9)])

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = 3.0 * torch.tanh((h @ w.T + b) / 3.0)
        log_p = torch.where(allowed, z, -torch.inf).log_softmax(-1)
        rows = F.cross_entropy(torch.where(allowed, z, -torch.inf), TARGETS, reduction="none") * 0.9
        rows = rows - 0.1 * torch.where(allowed, log_p, 0.0).sum(-1) / 7
        rows = rows + 0.02 * torch.where(allowed, z, -torch.inf).logsumexp(-1) ** 2
        rows = torch.where(MASKED, rows * WEIGHT, 0.0)
        return rows if reduction == "none" else rows.sum() / (WEIGHT[MASKED].sum() if reduction == "mean" else 1)

    return loss


def near(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def along(f: Loss, of: tuple[int, ...]) -> Tensor:
    """The tangent of f in some of its arguments."""
    inputs, tangents = draw(), draw(seed=1)

    def g(*some: Tensor) -> Tensor:
        full = list(inputs)
        for i, x in zip(of, some):
            full[i] = x
        return f(*full)

    return jvp(g, tuple(inputs[i] for i in of), tuple(tangents[i] for i in of))[1]


# ---- forward mode ----------------------------------------------------------------------------------------------------


@backends
@reductions
@pytest.mark.parametrize("of", [(0, 1, 2), (0,), (1,), (2,), (0, 1)])
def test_forward_mode_gives_the_tangent_of_the_loss(of: tuple[int, ...], reduction: str, backend: str) -> None:
    near(along(ours(reduction, backend), of), along(plain(reduction), of))
    near(along(ours(reduction, backend, max_masked=6), of), along(plain(reduction), of))
    assert along(ours(reduction, backend, max_masked=4), of).isnan().all()


def test_the_tangent_is_computed_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    want = along(ours("none", "reference"), (0, 1))
    monkeypatch.setattr(room, "CHUNK_BYTES", 2 * 8 * 9)
    sizes = []
    original = room.row_gradients
    monkeypatch.setattr(room, "row_gradients", lambda z, *rest: sizes.append(len(z)) or original(z, *rest))
    near(along(ours("none", "reference"), (0, 1)), want)
    assert sizes == [2, 2, 1]


@backends
def test_dual_numbers_and_logits(backend: str) -> None:
    import torch.autograd.forward_ad as fwd

    logits, tangent = torch.randn(2, 7, 9)
    want = jvp(lambda x: (F.cross_entropy(x, TARGETS, reduction="none") * MASKED).sum(), (logits,), (tangent,))[1]
    with fwd.dual_level():
        loss = masked_loss_from_logits(fwd.make_dual(logits, tangent), TARGETS, MASKED, backend=backend)
        near(fwd.unpack_dual(loss).tangent, want)


@backends
def test_second_derivatives_are_refused_in_words(backend: str) -> None:
    loss, (h, w, b) = ours("sum", backend), draw()
    of_hidden = lambda x: loss(x, w, b)  # noqa: E731
    once = lambda x: jvp(of_hidden, (x,), (h,))[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="masked_loss: has no second derivative in forward mode"):
        jvp(once, (h,), (h,))
    with pytest.raises(RuntimeError, match="masked_loss: is differentiable once"):
        jacfwd(grad(of_hidden))(h)
    with pytest.raises(RuntimeError, match="masked_loss: is differentiable once"):
        grad(lambda x: grad(of_hidden)(x).sum())(h)
    near(grad(once)(h), grad(lambda x: jvp(lambda y: plain("sum")(y, w, b), (x,), (h,))[1])(h))


# ---- torch.func ------------------------------------------------------------------------------------------------------


@backends
@reductions
@pytest.mark.parametrize("budget", [None, 1])
def test_jacobians(reduction: str, budget: int | None, backend: str) -> None:
    inputs = draw()
    for jacobian in (jacrev, jacfwd):
        for i in range(3):
            got = jacobian(ours(reduction, backend, memory_budget=budget), argnums=i)(*inputs)
            near(got, jacobian(plain(reduction), argnums=i)(*inputs))


@backends
def test_per_sample_gradients_of_samples_with_their_own_masks(backend: str) -> None:
    h, w, _ = draw()
    several = torch.stack([h, h.flip(0), -h])
    targets = torch.stack([TARGETS, TARGETS.flip(0), TARGETS])
    masked = torch.rand(3, 7) < torch.tensor([[0.1], [0.5], [1]])

    def one(h: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return masked_loss(h, w, t, m, backend=backend)

    def simple(h: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return (F.cross_entropy(h @ w.T, t, reduction="none") * m).sum()

    def tangent(f: Any) -> Any:
        return vmap(lambda h, t, m: jvp(lambda x: f(x, t, m), (h,), (h + 1,))[1])

    def outside(f: Any) -> Any:
        return grad(lambda h, t, m: vmap(f)(h, t, m).sum())

    for transform in (vmap, lambda f: vmap(grad(f)), tangent, outside):
        near(transform(one)(several, targets, masked), transform(simple)(several, targets, masked))


@needs_extension
@pytest.mark.parametrize("budget", [None, 120_000, 1])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_batched_gradients_in_every_mode(budget: int | None, reduction: str) -> None:
    hidden, head, _ = draw(300, 8, 64)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    targets, masked = torch.arange(300) % 64, torch.arange(300) % 3 > 0
    loss = masked_loss(*leaves, targets, masked, reduction=reduction, memory_budget=budget, backend="cpu")
    upstream = torch.randn(3, *loss.shape)
    got = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        for batch, want in zip(got, torch.autograd.grad(loss, leaves, one, retain_graph=True)):
            near(batch[i], want)


@needs_extension
def test_transforms_inside_of_torch_compile_are_left_to_eager_mode_or_refused() -> None:
    h, w, _ = draw()
    loss = lambda x: masked_loss(x, w, TARGETS, MASKED)  # noqa: E731
    tangent = lambda x: jvp(loss, (x,), (x,))[1]  # noqa: E731
    for transform, given in ((grad(loss), h), (tangent, h), (vmap(grad(loss)), torch.stack([h, -h]))):
        torch._dynamo.reset()
        near(torch.compile(transform, backend="aot_eager")(given), transform(given))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="grad and jvp cannot be traced through"):
            torch.compile(transform, fullgraph=True, backend="aot_eager")(given)


# ---- lifetimes -------------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("budget", [None, 120_000, 1])
def test_gradients_that_were_handed_out_may_be_changed_in_place(budget: int | None) -> None:
    hidden, head, bias = draw(300, 8, 64)
    leaves = hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_()
    targets, masked = torch.arange(300) % 64, torch.ones(300, dtype=torch.bool)
    loss = masked_loss(*leaves[:2], targets, masked, head_bias=bias, memory_budget=budget, backend="cpu")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:
        g.mul_(0.5).add_(3)  # as clipping does
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(second, want))
    for g in second:
        g.data_ptr()  # what a kernel writes through
        g.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), want))


@backends
def test_data_made_in_inference_mode_can_be_trained_on(backend: str) -> None:
    h, w, _ = draw()
    with torch.inference_mode():
        targets, masked, weight = TARGETS.clone(), MASKED.clone(), WEIGHT.clone()
        masked_loss(h.clone(), w.clone(), targets, masked, weight, backend=backend)
    got = torch.autograd.grad(masked_loss(h.requires_grad_(), w, targets, masked, weight, backend=backend), h)
    near(got, torch.autograd.grad(masked_loss(h, w, TARGETS, MASKED, WEIGHT, backend=backend), h))


@backends
def test_a_head_that_lost_its_storage_is_an_error(backend: str) -> None:
    h, w, _ = draw()
    gathered = w * 1
    loss = masked_loss(h.requires_grad_(), gathered, TARGETS, MASKED, backend=backend)
    gathered.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(9, 4\) has lost its storage"):
        loss.backward()
    with pytest.raises(RuntimeError, match="lost its storage"):
        masked_loss(h, gathered, TARGETS, MASKED, backend=backend)


# ---- numbers ---------------------------------------------------------------------------------------------------------

MOST = torch.finfo(torch.float32).max
EXTREME: dict[str, dict[str, Any]] = {
    "softcap of float32's maximum": {"softcap": MOST},
    "the smallest softcap": {"softcap": torch.finfo(torch.float32).tiny},
    "z_loss of 1e30": {"z_loss": 1e30},
    "all but no target": {"label_smoothing": 1 - 2**-53},
    "the largest weights": {"weight": torch.full((7,), MOST), "reduction": "mean"},
    "the smallest weights": {"weight": torch.full((7,), 2.0**-149), "reduction": "mean"},
}


@needs_extension
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_numbers_agree_with_float64(name: str, flush: bool) -> None:
    h, w, _ = draw()
    options = dict(EXTREME[name])
    weight = options.pop("weight", WEIGHT)

    def run(h: Tensor, w: Tensor, weight: Tensor, **extra: Any) -> tuple[Tensor, ...]:
        leaves = h.requires_grad_(), w.requires_grad_()
        loss = masked_loss(*leaves, TARGETS, MASKED, weight, **options, **extra)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    exact = run(h.double(), w.double(), weight.double())
    if flush and "smallest" in name:
        pytest.skip("flushing makes the number itself zero")
    try:
        torch.set_flush_denormal(flush)
        for budget in (None, 1):
            for got, want in zip(run(h.clone(), w.clone(), weight, backend="cpu", memory_budget=budget), exact):
                # p and 1 are rounded to float32 before they are subtracted, then come weights up to 9 and the head
                bar = 2**-21 * want.abs().max() + 2**-24 * 40
                assert (got.double() - want).abs().max() <= bar, name
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_vary_compile_into_a_bounded_number_of_graphs(dynamic: bool | None) -> None:
    """Sizes and ids that vary: as many graphs as there are memory modes, and one for the first call. A float that
    varies: one graph a value, as for torch's own operators."""
    h, w, _ = draw()

    def graphs(calls: list[Any], loss: Callable[..., Tensor]) -> int:
        torch._dynamo.reset()
        seen: list[int] = []

        def counter(module: Any, _: Any) -> Any:
            seen.append(1)
            return module

        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
        for call in calls:
            near(compiled(*call), loss(*call))
        return len(seen)

    def of(name: str) -> Callable[..., Tensor]:
        return lambda value: masked_loss(h, w, TARGETS, MASKED, **{name: value})

    assert graphs([(n,) for n in range(5, 15)], of("max_masked")) <= 3
    assert graphs([(10**n,) for n in range(10)], of("memory_budget")) <= 4
    assert graphs([((n,),) for n in (1, 4, 6)], of("forbid")) <= 2
    for name in ("softcap", "label_smoothing", "z_loss"):
        assert graphs([(n / 8,) for n in range(1, 4)], of(name)) <= 3  # at the third Dynamo knows that it varies
    rows = [(torch.cat([h] * n),) for n in (1, 2, 3, 7, 20)]

    def sized(h: Tensor) -> Tensor:
        count = h.shape[0]
        targets, masked = TARGETS.repeat(count // 7), MASKED.repeat(count // 7)
        return masked_loss(h, w, targets, masked, max_masked=count, memory_budget=1000 * count, forbid=(count % 2 + 1,))

    assert graphs(rows, sized) <= 3


def test_exports_with_sizes_that_vary() -> None:
    _, w, _ = draw()

    class Module(torch.nn.Module):
        def forward(self, h: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
            count = h.shape[0]
            return masked_loss(h, w, targets, masked, max_masked=count, memory_budget=1000 * count)

    def call(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return draw(rows)[0], torch.arange(rows) % 9, torch.arange(rows) % 2 == 0

    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(Module(), call(12), dynamic_shapes=({0: rows},) * 3).module()
    for count in (2, 50):
        near(exported(*call(count)), Module()(*call(count)))


def test_numpy_numbers_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    h, w, _ = draw()
    given = {"softcap": np.float32(3), "z_loss": np.float64(0.5), "max_masked": np.int32(6), "forbid": np.array([1, 4])}
    want = masked_loss(h, w, TARGETS, MASKED, softcap=3.0, z_loss=0.5, max_masked=6, forbid=(1, 4))
    assert torch.equal(masked_loss(h, w, TARGETS, MASKED, **given), want)


def test_the_flop_counter_counts_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    h, w, _ = draw()
    product = 2 * 7 * 4 * 9
    for leaves, products in (((h,), 1), ((w,), 1), ((h, w), 2)):
        for x in leaves:
            x.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            masked_loss(h, w, TARGETS, MASKED).backward()
        assert counter.get_total_flops() == (1 + products) * product
        for x in leaves:
            x.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        masked_loss(h, w, TARGETS, MASKED, max_masked=5)
        masked_loss_from_logits(h @ w.T, TARGETS, MASKED)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.illada_kernels.masked_loss] == product * 5 // 7
    assert OPERATOR.flops is not None
