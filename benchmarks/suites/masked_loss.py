"""masked_loss, forward and backward with all gradients, against whoever else computes it, on all or on masked rows.

The limit of a case is what its three products alone take (one product without gradients), at the inputs' dtype on a GPU
and in float32 on a CPU, into memory that is there already. On a GPU: 8192 tokens, D = 4096, bfloat16, and the peers of
peers/masked_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from illada_kernels import masked_loss
from illada_kernels.ops.masked_loss import cases as shapes
from illada_kernels.ops.masked_loss.op import BACKENDS

from ..measure import Case, Job, Work
from ..peers import masked_loss as masked_loss_peers
from ..peers import ours_on
from ..peers.masked_loss import IGNORED, Rows

TOKENS, DIM = 8192, 4096


@dataclass(frozen=True)
class GpuCase(shapes.Case):
    gradients: bool = True
    capacity: bool = False  # with max_masked: no host synchronisation
    minimum: bool = False  # a budget of a tenth of the logits of all rows

    @property
    def memory_budget(self) -> int | None:
        return 2 * self.rows * self.vocab // 10 if self.minimum else None

    @property
    def products(self) -> int:
        return 3 if self.gradients else 1


def gpu_cases() -> list[GpuCase]:
    found = []
    for vocab in (155136, 126464):
        for share, ratio in (("half", 0.5), ("tenth", 0.1), ("most", 0.9)):
            name, *rest = (f"{share}_v{vocab // 1000}k", TOKENS, round(ratio * TOKENS), DIM, vocab)
            found.append(GpuCase(name, *rest))
            if ratio == 0.5:
                found.append(GpuCase(f"{name}_no_grad", *rest, gradients=False))
                found.append(GpuCase(f"{name}_max_masked", *rest, capacity=True))
                found.append(GpuCase(f"{name}_minimum", *rest, minimum=True))
    return found


def cases(device: str, quick: bool = False) -> Iterable[Case]:
    if device == "cuda":
        for case in gpu_cases():
            facts = {"ratio": case.masked / case.rows, "masked": case.masked, "vocab": case.vocab}
            facts |= {"products": case.products, "minimum": case.minimum, "capacity": case.capacity}
            facts |= {"headline": case.masked == case.rows // 2 and not case.capacity}
            facts |= {"flops": case.products / 3 * shapes.flops(case), "bytes": moved(case, torch.bfloat16)}
            yield Case(
                "masked_loss", case.name, "bfloat16", lambda c=case: build_on_gpu(c, torch.bfloat16, quick=quick), facts
            )
        return
    for case in shapes.CPU_CASES:
        yield Case("masked_loss", case.name, "float32", lambda c=case: build(c, torch.float32, device))


def moved(case: GpuCase, dtype: torch.dtype) -> float:
    return shapes.bytes(case, dtype) if case.gradients else shapes.bytes(case, dtype) / 2


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
    names, absent = ours_on(BACKENDS, device)
    work = Work({(names or ["reference"])[0]: training(ours)}, peers, shapes.flops(case), shapes.bytes(case, dtype))
    work.limit["three products"] = products(case, dtype, device)
    work.absent = absent
    return work


# ---- a GPU ----------------------------------------------------------------------------------------------------------
def build_on_gpu(case: GpuCase, dtype: torch.dtype, device: str = "cuda", quick: bool = False) -> Work:
    hidden, head, targets, masked, weight = case.inputs(dtype, device)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    options: dict[str, Any] = {"memory_budget": case.memory_budget}
    options |= {"max_masked": case.masked} if case.capacity else {}

    def ours(backend: str) -> Job:
        def loss() -> Tensor:
            return masked_loss(hidden, head, targets, masked, weight, backend=backend, **options)

        if case.gradients:
            return lambda: torch.autograd.grad(loss(), leaves)
        return torch.no_grad()(loss)

    with torch.no_grad():
        rows = hidden[masked]
    compacted = Rows(rows.requires_grad_(), head, targets[masked], weight[masked])
    everything = Rows(hidden, head, torch.where(masked, targets, IGNORED), weight * masked)
    # a case that is special to us has the peers that come near; the plain one has all
    near = ("F.cross_entropy", "F.linear_cross_entropy, chunked", "Liger", "cut-cross-entropy")
    only = near if case.capacity or case.minimum else tuple(masked_loss_peers.MAKERS)
    only = masked_loss_peers.QUICK if quick else only
    peers, missing = masked_loss_peers.find(compacted, None if quick else everything, case.gradients, only)
    names, absent = ours_on(BACKENDS, device)
    share = case.products / 3
    work = Work({name: ours(name) for name in names}, peers, share * shapes.flops(case), moved(case, dtype))
    work.limit["three products" if case.gradients else "one product"] = products(case, dtype, device, case.gradients)
    work.absent = absent | missing
    work.check = lambda name: error_of(ours(name)(), compacted, masked, case.gradients)
    return work


def error_of(result: Any, rows: Rows, masked: Tensor, gradients: bool) -> float:
    """Returns the error against float32 of the same inputs: with gradients ||ours - exact|| / ||exact|| of d(hidden) in
    the first and the last 32 masked rows, infinite if an unmasked row has one; else the relative error of the loss."""
    head = rows.head.detach().float()
    if not gradients:
        parts = (part.split(512) for part in (rows.hidden.detach(), rows.targets, rows.weight))
        exact = sum((F.cross_entropy(x.float() @ head.T, t, reduction="none") * w).sum() for x, t, w in zip(*parts))
        return float(((result - exact) / exact).abs())
    d_hidden = result[0].float()
    if d_hidden[~masked].any():
        return float("inf")
    ends = torch.cat([torch.arange(32), torch.arange(-32, 0)]).to(masked.device) % len(rows.targets)
    p = (rows.hidden.detach()[ends].float() @ head.T).softmax(-1)
    p[torch.arange(len(ends)), rows.targets[ends]] -= 1
    exact = (rows.weight[ends, None] * p) @ head
    return float((d_hidden[masked][ends] - exact).norm() / exact.norm())


def products(case: shapes.Case, dtype: torch.dtype, device: str, gradients: bool = True) -> Job:
    dtype = torch.float32 if device == "cpu" else dtype
    x, w = (torch.randn(n, case.dim, device=device).to(dtype) for n in (case.masked, case.vocab))
    logits = torch.empty(case.masked, case.vocab, device=device, dtype=dtype)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    def job() -> None:
        torch.mm(x, w.T, out=logits)
        if gradients:
            torch.mm(logits, w, out=dx)
            torch.mm(logits.T, x, out=dw)

    return job
