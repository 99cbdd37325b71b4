"""Who else computes a masked loss on a GPU: plain PyTorch, F.linear_cross_entropy, Liger, cut-cross-entropy, quack.

"compacted rows" are leaves: gathering them, and spreading their gradients, is outside the timing, which flatters the
peers. "all rows" compute every row, the unmasked ones with a target that is ignored. Where a peer has no weight per
row it sums plain losses, which is less work: its name says "unweighted".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measure import Job, why

IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """Holds what a peer is given: `hidden` and `head` ask for gradients; ignored rows have target -100 and weight 0."""

    hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    targets: Tensor  # (N,) int64
    weight: Tensor  # (N,) float32

    def padded(self, multiple: int) -> Rows:
        """Adds rows that are ignored, up to a multiple, because some kernels need that."""
        extra = -self.hidden.shape[0] % multiple
        hidden = F.pad(self.hidden.detach(), (0, 0, 0, extra)).requires_grad_()
        return Rows(hidden, self.head, F.pad(self.targets, (0, extra), value=IGNORED), F.pad(self.weight, (0, extra)))


Loss = Callable[[Rows], Tensor]


def plain(rows: Rows) -> Tensor:
    logits = (rows.hidden @ rows.head.T).float()
    return (F.cross_entropy(logits, rows.targets, reduction="none") * rows.weight).sum()


def in_their_dtype(rows: Rows) -> Tensor:
    logits = rows.hidden @ rows.head.T
    return (F.cross_entropy(logits, rows.targets, reduction="none").float() * rows.weight).sum()


def linear_cross_entropy(**options: Any) -> Loss:
    fused: Any = F.linear_cross_entropy  # from torch 2.12

    def loss(rows: Rows) -> Tensor:
        losses = fused(rows.hidden, rows.head, rows.targets, reduction="none", **options)
        return (losses * rows.weight).sum()

    return loss


def liger(reduction: str) -> Loss:
    fused = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def loss(rows: Rows) -> Tensor:
        losses = fused(rows.hidden, rows.head, rows.targets, reduction=reduction)
        return (losses * rows.weight).sum() if reduction == "none" else losses

    return loss


def liger_scaled() -> Loss:
    """Losses of each row in float32; on Hopper by a kernel of its own."""
    function = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    fused = function.LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda rows: (fused(rows.hidden, rows.head, rows.targets) * rows.weight).sum()


def cut(**options: Any) -> Loss:
    fused = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(rows: Rows) -> Tensor:
        return (fused(rows.hidden, rows.head, rows.targets, reduction="none", **options) * rows.weight).sum()

    return loss


def quack_chunked() -> Loss:
    fused = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda rows: fused(rows.hidden, rows.head, rows.targets, chunk_size=4096, reduction="sum")


def quack_rows() -> Loss:
    """Runs cuBLAS for the logits, then quack's row kernel, with weights."""
    fused = importlib.import_module("quack.linear_cross_entropy").linear_cross_entropy_func

    def loss(rows: Rows) -> Tensor:
        losses = fused(rows.hidden, rows.head, None, rows.targets, reduction="none", inplace_backward=True)
        return (losses * rows.weight).sum()

    return loss


def compiled() -> Loss:
    loss: Loss = torch.compile(plain_tensors, dynamic=False)
    return lambda rows: loss(rows.hidden, rows.head, rows.targets, rows.weight)  # type: ignore[call-arg,arg-type]


def plain_tensors(hidden: Tensor, head: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return plain(Rows(hidden, head, targets, weight))


MAKERS: dict[str, Callable[[], Loss]] = {
    "F.cross_entropy": lambda: plain,
    "F.cross_entropy of half-precision logits": lambda: in_their_dtype,
    "F.cross_entropy, compiled": compiled,
    "F.linear_cross_entropy": linear_cross_entropy,
    "F.linear_cross_entropy, chunked": lambda: linear_cross_entropy(options=torch.nn.LinearCrossEntropyOptions()),
    "Liger, scaled": liger_scaled,
    "Liger": lambda: liger("none"),
    "Liger, unweighted": lambda: liger("sum"),
    "cut-cross-entropy": cut,
    "cut-cross-entropy, no filter": lambda: cut(filter_eps=None),
    "quack, unweighted": quack_chunked,
    "quack's row kernel": quack_rows,
}
QUICK = ("F.cross_entropy", "F.cross_entropy of half-precision logits", "Liger, scaled")  # compile little, and are fast
ALL_ROWS = (
    "F.cross_entropy",
    "F.linear_cross_entropy",
    "Liger",
    "Liger, unweighted",
    "cut-cross-entropy",
    "quack, unweighted",
)


def find(
    compacted: Rows, everything: Rows | None, gradients: bool, only: tuple[str, ...] = tuple(MAKERS)
) -> tuple[dict[str, Job], dict[str, str]]:
    """Returns ({name: job}, {name: why it is absent}) of the peers named in `only`, without `everything` on compacted
    rows alone."""
    torch._dynamo.reset()
    jobs: dict[str, Job] = {}
    absent: dict[str, str] = {}
    for name, make in MAKERS.items():
        if name not in only:
            continue
        try:
            loss = make()
        except Exception as error:  # a package built for another torch may raise anything at import
            absent[name] = why(error)
            continue
        few = compacted.padded(128) if "quack" in name else compacted
        jobs[f"{name}, compacted rows"] = job_of(loss, few, gradients)
        if name in ALL_ROWS and everything is not None:
            jobs[f"{name}, all rows"] = job_of(loss, everything, gradients)
    return jobs, absent


def job_of(loss: Loss, rows: Rows, gradients: bool) -> Job:
    if gradients:
        return lambda: torch.autograd.grad(loss(rows), (rows.hidden, rows.head))

    def without() -> Tensor:
        with torch.no_grad():
            return loss(rows)

    return without
