"""attention over ranks that share the sequence: keys and values travel in a ring.

    out = sum_r exp(lse_r - lse) out_r,   lse = log sum_r exp(lse_r)        r: the ranks whose keys a row may see

A rank sends its keys and values to the next one while it computes with them. The backward makes the same round: with
the whole out and lse the op's own backward gives each part's exact share of dq, dk and dv, so that no part's result is
kept; the gradients of keys and values travel with them, and come home after a full round.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import cast_for_autocast, expect_number
from ..key_ranges import KeyRanges
from ..ops.attention.api import check_ranges, check_tensors
from ..ops.attention.op import OPERATOR
from ..ops.attention.problem import Problem
from ._group import members_of


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes `illada_kernels.attention` of a sequence whose rows lie on the ranks of a process group.

    Parameters
    ----------
    q : (B, Sq, Hq, D)
        This rank's queries.
    k, v : (B, S, Hkv, D) and (B, S, Hkv, Dv)
        This rank's keys and values, equally many on every rank: on rank r those of the keys r * S .. (r + 1) * S.
    key_ranges : KeyRanges, optional
        What this rank's queries see of all ranks' keys: num_keys is S times the number of ranks. None: all.
    group : ProcessGroup, optional
        The ranks that share the sequence. None: all.
    scale, backend
        As in `illada_kernels.attention`.

    Returns
    -------
    Tensor (B, Sq, Hq, Dv), q's dtype
        0 for a row with no allowed key. Every rank's q, k and v get their whole gradients.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `illada_kernels.attention`; for num_keys of another length; for a call before torch.distributed is
        initialised.

    Notes
    -----
    Each of N ranks sends its keys and values N - 1 times, in the backward with their gradients in float32. Memory: two
    buffers of a rank's keys and values, and out in float32. Partial results are rounded to q's dtype and merged in
    float32. Every rank goes all the way round, so that rows which see few keys cost less only where kernels skip
    tiles: under a causal mask the last rank computes most.
    Differentiable once, in reverse mode. Not for torch.compile without a graph break.
    Source: ring attention (arXiv 2310.01889).

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from illada_kernels import distributed
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's need no arguments
    >>> q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    >>> distributed.attention(q, k, v).shape
    torch.Size([2, 6, 4, 8])
    >>> dist.destroy_process_group()
    """
    check_tensors(q, k, v)
    members = members_of(group)
    if key_ranges is not None:
        check_ranges(key_ranges, q, k.shape[1] * members.size(), "the keys of all ranks together")
    if scale is not None:
        expect_number("scale", scale)
    q, k, v = cast_for_autocast(q.device, q, k, v)
    bounds = None if key_ranges is None else key_ranges.bounds
    out: Tensor = _Ring.apply(q, k, v, bounds, q.shape[3] ** -0.5 if scale is None else scale, backend or "", members)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Tensor | None,
        scale: float,
        backend: str,
        group: dist.ProcessGroup,
    ) -> Tensor:
        out, lse = q.new_zeros(0), q.new_zeros(0)
        for owner, (k_part, v_part) in _round(group, [k, v]):
            part = OPERATOR(Problem(q, k_part, v_part, _part(bounds, owner, k.shape[1]), scale, True, backend))
            out, lse = part if owner == group.rank() else _merged(out, lse, *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bounds, out, lse)
        ctx.rest = scale, backend, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, bounds, out, lse = ctx.saved_tensors
        scale, backend, group = ctx.rest
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide)
        of_keys = [torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)]
        for owner, (k_part, v_part) in _round(group, [k, v], of_keys):
            problem = Problem(q, k_part, v_part, _part(bounds, owner, k.shape[1]), scale, True, backend)
            chosen = OPERATOR.choose(problem)
            some_keys = {"some_keys": True} if chosen.name == "reference" else {}
            of_q, of_k, of_v = chosen.module().backward(problem, dout, None, out, lse, **some_keys)
            dq += of_q
            of_keys[0] += of_k
            of_keys[1] += of_v
        dk, dv = of_keys
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _part(bounds: Tensor | None, owner: int, keys: int) -> Tensor | None:
    """Returns the bounds that count from the owner's first key; the kernels clamp what lies outside."""
    return None if bounds is None else (bounds - owner * keys).clamp(0, keys)


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns out (B, S, H, D) in float32 or wider and lse (B, H, S) over both sets of keys."""
    both = torch.logaddexp(lse, more_lse)

    def share(part: Tensor) -> Tensor:
        weight = torch.where(both == -torch.inf, 0.0, (part - both).exp())  # otherwise -inf - -inf is NaN
        return weight.transpose(1, 2)[..., None]

    return out * share(lse) + more * share(more_lse), both


def _round(
    group: dist.ProcessGroup, tensors: list[Tensor], with_them: list[Tensor] | None = None
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields (owner, its tensors) of every rank, this one's first, while they travel on.

    `with_them` travels too, behind the computation, because that changes it; the list then holds what came. In the end
    it is home again.
    """
    size, rank = group.size(), group.rank()
    held = [x.contiguous() for x in tensors]
    for step in range(size):
        arriving = _pass_on(group, held) if step + 1 < size else None
        yield (rank - step) % size, held
        if with_them is not None and size > 1:
            with_them[:] = _arrived(*_pass_on(group, with_them))
        if arriving is not None:
            held = _arrived(*arriving)


def _pass_on(group: dist.ProcessGroup, tensors: list[Tensor]) -> tuple[list[Tensor], list[dist.Work]]:
    """Sends tensors to the next rank; returns those of the one before, which are still to arrive."""
    size, rank = group.size(), group.rank()
    to, source = (dist.get_global_rank(group, r % size) for r in (rank + 1, rank - 1))
    arriving = [torch.empty_like(x) for x in tensors]
    sends = [dist.P2POp(dist.isend, x, to, group) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, source, group) for x in arriving]
    return arriving, dist.batch_isend_irecv(sends + receives)


def _arrived(tensors: list[Tensor], work: list[dist.Work]) -> list[Tensor]:
    for one in work:
        one.wait()
    return tensors
