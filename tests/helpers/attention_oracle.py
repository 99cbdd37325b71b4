"""What the attention tests share: a run of one backend, the exact answer, and the comparison of the two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illada_kernels import KeyRanges, attention
from illada_kernels.ops.attention import cases
from illada_kernels.ops.attention.op import BACKENDS
from illada_kernels.testing import attention_lse_tolerance, attention_sums, one_precision_up, tolerance

# every backend that can run on a CPU here; each property is asserted of each
NAMES = [b.name for b in BACKENDS if (b.devices is None or "cpu" in b.devices) and b.available() is None]
FASTER = " deterministic=False"
HALF = (torch.bfloat16, torch.float16)


@dataclass
class Result:
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return vars(self)


def draw(batch, queries, keys, heads, kv_heads, dim, value_dim=None, dtype=torch.float32, seed=0):
    """Random q, k, v, dout and dlse."""
    g = torch.Generator().manual_seed(seed)
    value_dim = value_dim or dim
    shapes = [(queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim), (queries, heads, value_dim)]
    tensors = [torch.randn(batch, *shape, generator=g).to(dtype) for shape in shapes]
    return *tensors, torch.randn(batch, heads, queries, generator=g)


def run(backend, q, k, v, dout, dlse, ranges: KeyRanges | None = None, scale: float | None = None) -> Result:
    """Forward and backward; dlse None leaves lse out of the loss. "<name> deterministic=False" is that backend's."""
    name = backend and backend.removesuffix(FASTER)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, ranges, scale=scale, deterministic=name == backend, return_lse=True, backend=name)
    outputs, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), grads)
    return Result(out.detach(), lse.detach(), dq, dk, dv)


def run_plain(dtype, q, k, v, dout, dlse, ranges: KeyRanges | None = None, scale: float | None = None) -> Result:
    """The same by PyTorch's own operations in `dtype`, gradients by autograd. -inf in lse takes no gradient."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = cases.plain(q, k, v, ranges, q.shape[3] ** -0.5 if scale is None else scale)
    loss = (out * dout.to(dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * torch.where(lse.isfinite(), dlse, 0).to(dtype)).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return Result(out.detach(), lse.detach(), dq, dk, dv)


def assert_close(ours: Result, q, k, v, dout, dlse, ranges=None, scale=None) -> None:
    """The numerics bar for out and every gradient, a derived bound for lse, exact zeros in rows without keys."""
    inputs, dtype = (q, k, v, dout, dlse, ranges, scale), q.dtype
    up = one_precision_up(dtype)
    exact, same = run_plain(up, *inputs), run_plain(dtype, *inputs)
    number = q.shape[3] ** -0.5 if scale is None else scale
    floors = attention_sums(*(x.to(up) for x in (q, k, v, dout)), ranges, number, dtype)
    for name, floor in floors.items():
        value, right = getattr(ours, name), getattr(exact, name)
        assert value.dtype == dtype and value.shape == right.shape, name
        error = (value.to(up) - right).abs().max().item() if right.numel() else 0.0
        limit = tolerance(getattr(same, name), right) + floor
        assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"
    empty = exact.lse == -torch.inf
    assert torch.equal(ours.lse == -torch.inf, empty)
    finite = torch.where(empty, 0, ours.lse.to(up)) - torch.where(empty, 0, exact.lse)
    limit = attention_lse_tolerance(q, k, number, exact.lse)
    assert finite.numel() == 0 or finite.abs().max().item() <= limit, (
        f"lse: {finite.abs().max():.3g}, limit {limit:.3g}"
    )
    for name, x in (("out", ours.out), ("dq", ours.dq)):
        assert not x.transpose(1, 2)[empty].any(), f"{name} of a row without keys"


def poisoned(inputs: tuple[Tensor, ...], ranges: KeyRanges, poison: float) -> tuple[Tensor, ...]:
    """Keys that no row of their batch entry may attend to, and rows without keys, hold `poison`."""
    q, k, v, dout, dlse = (x.clone() for x in inputs)
    allowed = ranges.dense().expand(q.shape[0], q.shape[1], -1)
    keys, rows = ~allowed.any(1), ~allowed.any(2)
    k[keys], v[keys], q[rows], dout[rows] = poison, poison, poison, poison
    dlse.transpose(1, 2)[rows] = poison
    return q, k, v, dout, dlse
