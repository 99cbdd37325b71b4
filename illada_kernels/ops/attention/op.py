"""attention and attention_bwd as torch operators, and the order in which their backends are tried."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from ..._gpu import UNRUN
from ..._torch_ops import TorchOp


class Request(NamedTuple):
    """What a backend's supports(request) is asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    bounds: Tensor | None
    deterministic: bool
    backward: bool


_MODULES = {"cuda": "cuda", "triton": "triton", "cpu": "native", "reference": "reference"}


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[backend]}", __package__)


def _lazy(backend: str, devices: tuple[str, ...], opt_in: str | None = None) -> Backend:
    """A backend whose module is imported when it is first asked."""
    return Backend(
        backend,
        devices,
        available=lambda: _module(backend).available(),
        supports=lambda request: _module(backend).supports(request),
        opt_in=opt_in,
    )


BACKENDS = (
    _lazy("cuda", ("cuda",), opt_in=UNRUN),
    _lazy("triton", ("cuda",), opt_in=UNRUN),
    _lazy("cpu", ("cpu",)),
    Backend("reference", None, available=lambda: None, supports=lambda request: None),
)


def _chosen(request: Request, backend: str) -> ModuleType:
    return _module(choose("attention", BACKENDS, request.q.device.type, request, backend or None))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, deterministic: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if q.is_meta:
        return _forward_fake(q, k, v, bounds, scale, deterministic, backend)
    return _chosen(Request(q, k, v, bounds, deterministic, False), backend).forward(q, k, v, bounds, scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, deterministic: bool, backend: str
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[3])
    return out, q.new_empty(batch, heads, rows, dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    scale: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_meta:
        return _empty_grads(q, k, v)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    module = _chosen(Request(q, k, v, bounds, deterministic, True), backend)
    return module.backward(dout, dlse, q, k, v, out, lse, bounds, scale, deterministic)


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    scale: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grads(q, k, v)


def _empty_grads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.scale, ctx.deterministic, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.set_materialize_grads(False)  # an unused lse then costs nothing


def _autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, bounds = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 7
    dout = torch.zeros_like(out) if dout is None else dout
    grads = backward_op(dout, dlse, q, k, v, out, lse, bounds, ctx.scale, ctx.deterministic, ctx.backend)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)), None, None, None, None


backward_op = TorchOp("attention_bwd", _backward, _backward_fake)
forward_op = TorchOp("attention", _forward, _forward_fake, _setup_context, _autograd)
