"""RMSNorm and RoPE of training on a CPU: the same numbers as torch's own operations, from fewer of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from illada import Model, ModelConfig
from illada.model import RMSNorm, apply_rope
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

EPS = 1e-5
NORM = RMSNorm(16, EPS)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of 16 that lie between others, as q lies between k and v."""
    x = torch.randn(3, 5, 4, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return NORM.normalized(x[:, :, 1:3], weight)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x[:, :, 1:3], (16,), None, EPS) * weight


def rope(x: Tensor, angle: Tensor) -> Tensor:
    return apply_rope(x[:, :, 1:3], angle.cos(), angle.sin())


def plain_rope(x: Tensor, angle: Tensor) -> Tensor:
    (first, second), cos, sin = x[:, :, 1:3].chunk(2, -1), angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def arguments(
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    g = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(16, dtype=dtype, generator=g))
    angle = torch.randn(1, 5, 1, 8, dtype=dtype, generator=g)
    return {"norm": (norm, plain_norm, [rows(dtype), weight]), "rope": (rope, plain_rope, [rows(dtype), angle])}


@pytest.mark.parametrize("what", ["norm", "rope"])
def test_a_training_forward_is_that_of_inference_to_the_bit(what):
    function, plain, inputs = arguments()[what]
    out = function(*inputs)
    assert type(out.grad_fn).__name__ in ("RMSNormBackward", "RopeBackward")
    with torch.no_grad():
        assert torch.equal(out, function(*inputs)) and torch.equal(out, plain(*inputs))


@pytest.mark.parametrize("what", ["norm", "rope"])
def test_gradients_are_those_of_torch(what):
    """In float64 by finite differences; in float32 each is no further from float64's than twice torch's own is."""
    function, plain, inputs = arguments(torch.float64)[what]
    assert torch.autograd.gradcheck(function, inputs)

    def gradients(f: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
        out = f(*given)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return list(torch.autograd.grad(out, [x for x in given if x.requires_grad], upstream.to(dtype)))

    exact = gradients(plain, torch.float64)
    mine, theirs = gradients(function, torch.float32), gradients(plain, torch.float32)
    for right, ours, torchs in zip(exact, mine, theirs):
        rounding = torch.finfo(torch.float32).eps * right.abs().max()
        assert (ours - right).abs().max() <= 2 * (torchs - right).abs().max() + rounding


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, weight = (v.detach() for v in arguments()["norm"][2])
    (weight if frozen == "x" else x).requires_grad_()
    norm(x, weight).sum().backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_a_norm_takes_rows_in_any_order():
    x, weight = arguments(torch.float64)["norm"][2]
    for turned in (lambda x: x.transpose(0, 1), lambda x: x.permute(2, 0, 1, 3), lambda x: x[:0]):
        f = lambda x, weight, turned=turned: NORM.normalized(turned(x), weight).square().sum()  # noqa: E731
        assert torch.autograd.gradcheck(f, (x, weight))


def test_angles_that_are_learned_or_of_more_rows_than_x_are_torchs_own():
    x, angle = rows(torch.float64)[:1], torch.randn(3, 5, 1, 8, dtype=torch.float64)
    for learned in (False, True):
        angle.requires_grad_(learned)
        assert rope(x, angle).shape == (3, 5, 2, 16)
        assert torch.autograd.gradcheck(rope, (x.detach().requires_grad_(), angle))
        assert torch.autograd.gradcheck(rope, (x.detach().requires_grad_(), angle[:1]))


def test_second_derivatives_are_right_or_refused():
    """Not left out: with allow_unused=True torch takes what is not in the graph for a zero."""
    function, _, inputs = arguments(torch.float64)["rope"]
    assert torch.autograd.gradgradcheck(function, inputs)
    function, _, inputs = arguments(torch.float64)["norm"]
    for of, upstream in itertools.product((0, 1), (lambda y: y, torch.square)):
        first = torch.autograd.grad(upstream(function(*inputs)).sum(), inputs, create_graph=True)[of]
        for x in inputs:
            with pytest.raises(RuntimeError, match="RMSNorm on a CPU: expected one backward"):
                torch.autograd.grad(first.sum(), x, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("what", ["norm", "rope"])
def test_many_backwards_at_once_and_under_autocast_are_each_backward(what):
    function, _, inputs = arguments()[what]
    out, wanted = function(*inputs), [x for x in inputs if x.requires_grad]
    upstream = torch.randn(3, *out.shape)
    each = [torch.autograd.grad(out, wanted, one, retain_graph=True) for one in upstream]
    together = torch.autograd.grad(out, wanted, upstream, is_grads_batched=True, retain_graph=True)
    for i, right in enumerate(each):
        torch.testing.assert_close([x[i] for x in together], list(right))
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(out, wanted, upstream[0])
    assert all(map(torch.equal, cast, each[0]))


class Count(TorchDispatchMode):
    """Counts the operations that write as many numbers as the rows have."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.calls = numbers, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls += not function.is_view and isinstance(out, Tensor) and out.numel() == self.numbers
        return out


def test_a_norm_writes_its_rows_about_half_as_often():
    function, plain, inputs = arguments()["norm"]
    out = function(*inputs)
    counts = []
    for f in (function, plain):
        with Count(out.numel()) as count:
            torch.autograd.grad(f(*inputs), inputs, torch.ones_like(out))
        counts.append(count.calls - 1)  # without the ones
    assert counts[0] <= 0.6 * counts[1], counts


@pytest.mark.parametrize("what", ["norm", "rope"])
def test_transforms_and_the_compiler_see_torchs_own_operations(what):
    function, plain, (x, other) = arguments()[what]
    tangent = torch.ones_like(x)
    _, mine = torch.func.jvp(lambda x: function(x, other), (x.detach(),), (tangent,))
    _, right = torch.func.jvp(lambda x: plain(x, other), (x.detach(),), (tangent,))
    torch.testing.assert_close(mine, right)
    mine = torch.func.grad(lambda x: function(x, other).square().sum())(x.detach())
    torch.testing.assert_close(mine, torch.func.grad(lambda x: plain(x, other).square().sum())(x.detach()))
    compiled = torch.compile(lambda x: function(x, other), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x, other))


def test_a_model_learns_with_them_whatever_is_frozen():
    config = ModelConfig.preset("demo", n_layers=1)
    model = Model(config)
    model.layers.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.embed.weight.grad is not None and model.norm.weight.grad is not None
