"""RMSNorm and RoPE for training on a CPU, each with a backward of its own.

torch has no fused backward of them there: its own norm writes the rows twice as often, and its RoPE runs over half a
head at a time. The forward is model.py's to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def wanted(x: Tensor, *others: Tensor) -> bool:
    """Returns whether the functions here compute the gradients: of plain tensors on a CPU, where nothing traces."""
    return (
        x.device.type == "cpu"
        and all(type(tensor) in (Tensor, Parameter) for tensor in (x, *others))
        and x.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (x, *others))
        and all(tensor.dtype == x.dtype for tensor in others)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Returns whether `Rope` rotates x: it has no gradient of the angles, and works in place on what has x's shape."""
    return (
        wanted(x, cos, sin)
        and not (cos.requires_grad or sin.requires_grad)
        and cos.dim() <= x.dim()  # torch.broadcast_shapes would import sympy, which takes half a second
        and all(angles in (1, rows) for angles, rows in zip(cos.shape[-2::-1], x.shape[-2::-1]))
    )


class RMSNorm(torch.autograd.Function):
    """n * weight with n = x * r, r = 1 / sqrt(mean(x^2) + eps); and an empty tensor.

    dx = r * (dy * weight - n * mean(dy * n * weight)), dweight = sum of dy * n over all rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        n = x * r
        source = n.new_empty(0)  # an output leads autograd to x and weight
        ctx.save_for_backward(n, r, weight, source)
        return n * weight, source

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Any:
        n, r, weight, source = ctx.saved_tensors
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # which would round mv's rows
            gradients = RMSNorm.gradients(n, r, weight, dy, ctx.needs_input_grad)
        if torch.is_grad_enabled():  # create_graph
            gradients = tuple(g if g is None else _Once.apply(g, dy, source) for g in gradients)
        return *gradients, None

    @staticmethod
    def gradients(n: Tensor, r: Tensor, weight: Tensor, dy: Tensor, wanted: Any) -> tuple[Tensor | None, ...]:
        product = dy * n
        rows = product.reshape(-1, len(weight))  # a view, unless x is transposed
        dx = None
        if wanted[0]:
            mean = torch.mv(rows, weight).div_(-len(weight))
            dx = (dy * weight).addcmul_(n, mean.view(r.shape)).mul_(r)
        return dx, rows.sum(0) if wanted[1] else None


class _Once(torch.autograd.Function):
    """Returns a gradient whose own derivative raises, whichever of the gradient's sources is asked for."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("RMSNorm on a CPU: expected one backward, got a second derivative; use torch.func for it")


class Rope(torch.autograd.Function):
    """x * [cos, cos] + [x2, x1] * [-sin, sin] for x = [x1, x2]; the backward turns dy the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return (x * torch.cat([cos, cos], dim=-1)).add_(swapped.mul_(torch.cat([-sin, sin], dim=-1)))
