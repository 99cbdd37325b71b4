"""attention under torch.func, forward-mode AD and batched gradients: what SDPA gives, or the reference's autograd."""

from __future__ import annotations

import pytest
import torch

from illada_kernels import KeyRanges, attention
from illada_kernels.ops.attention import jvp as room
from illada_kernels.ops.attention.problem import Problem
from illada_kernels.ops.attention.reference import grouped, masks, probabilities, scores
from tests.helpers.attention_oracle import NAMES

RANGES = {
    "full": None,
    "causal": KeyRanges.causal(6),
    "lengths": KeyRanges.padding(torch.tensor([2, 0]), 6),
    "a row without keys": KeyRanges(torch.tensor([[[0, 0, 0, 0]] + [[0, 2, 4, 6]] * 5], dtype=torch.int32), 6),
}
backends = pytest.mark.parametrize("backend", NAMES)
masked = pytest.mark.parametrize("name", RANGES)


def draw(*lead):
    torch.manual_seed(0)
    return tuple(torch.randn(*lead, 2, 6, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))


def plain(q, k, v, ranges, scale=8**-0.5):
    """out and lse in operations that torch differentiates by itself, in any mode."""
    problem = Problem(q, k, v, None if ranges is None else ranges.bounds)
    allowed, rows, keys = masks(problem)
    s = scores(grouped(q, rows, 1), grouped(k, keys, 2), allowed, scale)
    s = s if rows is None else torch.where(rows[:, None, :, None], s, 0.0)  # softmax of a row of -inf is NaN
    lse = s.logsumexp(-1)
    out = probabilities(s, lse) @ grouped(v, keys, 2)
    if rows is not None:
        out, lse = torch.where(rows[:, None, :, None], out, 0.0), torch.where(rows[:, None], lse, -torch.inf)
    return out.transpose(1, 2), lse


def assert_near(got, want):
    """float32 on the one side, float64 on the other."""
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def single(xs):
    return tuple(x.float() for x in xs)


@backends
@masked
@pytest.mark.parametrize("of", [(0, 1, 2), (0,), (1,), (2,), (0, 2)])
def test_forward_mode_gives_the_tangents_of_out_and_lse(backend, name, of):
    ranges, inputs = RANGES[name], draw()
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def along(f, inputs, tangents):
        def g(*some):
            full = list(inputs)
            for i, x in zip(of, some):
                full[i] = x
            return f(*full)

        return torch.func.jvp(g, tuple(inputs[i] for i in of), tuple(tangents[i] for i in of))[1]

    want = along(lambda *x: plain(*x, ranges), inputs, tangents)
    got = along(lambda *x: attention(*x, ranges, return_lse=True, backend=backend), single(inputs), single(tangents))
    empty = want[1].isnan()  # the tangent of a constant -inf
    assert_near((got[0], got[1].masked_fill(empty, 0)), (want[0], want[1].masked_fill(empty, 0)))
    assert got[0].isfinite().all() and got[1].isfinite().all()


def test_the_tangent_is_computed_in_slices_of_queries(monkeypatch):
    inputs = draw()
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def tangent():
        return torch.func.jvp(lambda *x: attention(*x, RANGES["causal"], return_lse=True), inputs, tangents)[1]

    whole = tangent()
    monkeypatch.setattr(room, "SLICE_BYTES", 2 * 2 * 4 * 6 * 8)  # two queries
    for a, b in zip(tangent(), whole):
        torch.testing.assert_close(a, b)


@backends
@masked
def test_dual_numbers_of_plain_autograd(backend, name):
    import torch.autograd.forward_ad as fwd

    inputs, tangent = single(draw()), torch.randn(2, 6, 4, 8)
    with fwd.dual_level():
        q = fwd.make_dual(inputs[0], tangent)
        got = fwd.unpack_dual(attention(q, *inputs[1:], RANGES[name], backend=backend)).tangent
    wanted = torch.func.jvp(
        lambda q: plain(q, *(x.double() for x in inputs[1:]), RANGES[name])[0],
        (inputs[0].double(),),
        (tangent.double(),),
    )
    assert_near((got,), wanted[1:])


@backends
@masked
def test_per_sample_gradients(backend, name):
    """vmap over a batch of calls, of everything or of the queries alone: each sample's gradient."""
    inputs, ranges = draw(3), RANGES[name]

    def loss(f, **options):
        def of(*x):
            out, lse = f(*x, ranges, **options)
            return out.square().sum() + torch.where(lse == -torch.inf, 0, lse).sin().sum()

        return of

    ours = loss(lambda *x, **o: attention(*x, return_lse=True, **o), backend=backend)
    for dims in ((0, 0, 0), (0, None, None), (None, 1, 1)):
        x = [x[0] if d is None else x.movedim(0, d) for x, d in zip(inputs, dims)]
        got = torch.vmap(torch.func.grad(ours, (0, 1, 2)), in_dims=dims)(*single(x))
        want = torch.vmap(torch.func.grad(loss(plain), (0, 1, 2)), in_dims=dims)(*x)
        assert_near(got, want)


@backends
def test_vmap_over_the_bounds(backend):
    q, k, v = single(draw())
    lengths = torch.tensor([[1, 6], [3, 0], [2, 2]])
    bounds = torch.stack([KeyRanges.padding(n, 6).bounds for n in lengths])
    got = torch.vmap(lambda b: attention(q, k, v, KeyRanges(b, 6), backend=backend))(bounds)
    for one, b in zip(got, bounds):
        torch.testing.assert_close(one, attention(q, k, v, KeyRanges(b, 6), backend=backend))


@backends
@masked
def test_jacobians_and_batched_gradients(backend, name):
    q, k, v = draw()
    q, k, v = q[:, :, :, :2], k[..., :2], v[..., :2]
    ours = lambda q: attention(q, k.float(), v.float(), RANGES[name], scale=0.3, backend=backend)  # noqa: E731
    want = torch.func.jacrev(lambda q: plain(q, k, v, RANGES[name], 0.3)[0])(q)
    assert_near((torch.func.jacrev(ours)(q.float()),), (want,))
    assert_near((torch.func.jacfwd(ours)(q.float()),), (want,))
    leaf = q.float().requires_grad_()
    out = ours(leaf)
    directions = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, leaf, directions, is_grads_batched=True)
    each = [torch.autograd.grad(ours(leaf), leaf, d)[0] for d in directions]
    torch.testing.assert_close(batched, torch.stack(each))


@backends
def test_hessians_are_refused_in_words(backend):
    x = draw()[0].float()[..., :2, :]
    with pytest.raises(RuntimeError, match="attention: is differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: attention(y, y, y, backend=backend).sum())(x).sum())(x)


@backends
def test_a_storage_freed_before_the_backward_is_an_error(backend):
    q, k, v = (x.float().requires_grad_() for x in draw())
    key = k * 1
    out = attention(q, key, v, backend=backend)
    key.detach().untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        out.sum().backward()


@pytest.mark.skipif("cpu" not in NAMES, reason="the compiled extension is missing")
def test_transforms_inside_of_torch_compile_are_left_to_eager_mode_or_refused():
    q, _, _ = single(draw())
    loss = lambda x: attention(x, x, x).square().sum()  # noqa: E731
    tangent = lambda x: torch.func.jvp(loss, (x,), (x,))[1]  # noqa: E731
    for transform, given in (
        (torch.func.grad(loss), q),
        (torch.func.jacrev(loss), q),
        (tangent, q),
        (torch.func.jacfwd(loss), q[:1, :2, :1, :2]),
        (torch.vmap(torch.func.grad(loss)), torch.stack([q, -q])),
        (torch.vmap(lambda x: attention(x, x, x)), torch.stack([q, -q])),
    ):
        want = transform(given)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(transform, backend="aot_eager")(given), want, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        try:
            got = torch.compile(transform, fullgraph=True, backend="aot_eager")(given)
        except torch._dynamo.exc.Unsupported as error:
            assert "grad and jvp cannot be traced through a custom operator" in str(error)
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
