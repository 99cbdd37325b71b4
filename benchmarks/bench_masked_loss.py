"""masked_loss, forward and backward with all gradients, against plain PyTorch on all rows and on the masked ones.

The limit of a case is what its three products alone take, at the inputs' dtype on a GPU and in float32 on a CPU, into
memory that is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from illada_kernels import masked_loss
from illada_kernels.ops.masked_loss import cases as shapes

from .measure import Case, Job, Work


def cases(device: str) -> Iterable[Case]:
    kinds = {"cpu": (shapes.CPU_CASES, ("float32",)), "cuda": (shapes.GPU_CASES, ("bfloat16",))}
    named, dtypes = kinds[device]
    for dtype in dtypes:
        for case in named:
            yield Case("masked_loss", case.name, dtype, lambda c=case, d=dtype: build(c, getattr(torch, d), device))


def build(case: shapes.Case, dtype: torch.dtype, device: str) -> Work:
    hidden, head, targets, masked, weight = case.inputs(dtype, device)
    leaves = hidden.requires_grad_(), head.requires_grad_()

    def training(loss: Callable[[], Tensor]) -> Job:
        return lambda: torch.autograd.grad(loss(), leaves)

    def weighted(losses: Tensor) -> Tensor:
        return (losses * weight[masked]).sum()

    def ours() -> Tensor:
        return masked_loss(hidden, head, targets, masked, weight, memory_budget=case.memory_budget)

    def all_rows() -> Tensor:
        losses = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
        return (losses * (weight * masked)).sum()

    peers: dict[str, Job] = {
        "F.cross_entropy, all rows": training(all_rows),
        "F.cross_entropy, masked rows": training(lambda: shapes.plain(hidden, head, targets, masked, weight)),
    }
    fused: Any = getattr(F, "linear_cross_entropy", None)
    if fused is not None:
        peers["F.linear_cross_entropy, masked rows"] = training(
            lambda: weighted(fused(hidden[masked], head, targets[masked], reduction="none"))
        )
    from illada_kernels.ops.masked_loss.op import _chosen

    name = _chosen(hidden, "")
    work = Work({name: training(ours)}, peers, shapes.flops(case), shapes.bytes(case, dtype))
    work.limit["three products"] = three_products(case, dtype, device)
    return work


def three_products(case: shapes.Case, dtype: torch.dtype, device: str) -> Job:
    dtype = torch.float32 if device == "cpu" else dtype
    x, w = (torch.randn(n, case.dim, device=device).to(dtype) for n in (case.masked, case.vocab))
    logits = torch.empty(case.masked, case.vocab, device=device, dtype=dtype)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def job() -> None:
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.T, x, out=dw)

    return job
