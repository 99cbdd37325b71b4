"""The ops over the ranks of a torch.distributed process group, which share the vocab.

Every rank holds consecutive rows of the LM head (`torch.chunk`'s pieces or any others) and the same hidden rows; small
statistics cross ranks, logits never do. All ranks make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ._checks import cast_for_autocast, expect_integer
from .ops.masked_loss import api as loss_api
from .ops.masked_loss.op import OPERATOR
from .ops.masked_loss.problem import Problem

__all__ = ["masked_loss"]


def masked_loss(
    hidden: Tensor,
    local_head: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    *,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    reduction: str = "sum",
    local_bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: Sequence[int] = (),
    max_masked: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes `illada_kernels.masked_loss` with an LM head whose rows lie on the ranks of a process group.

    Parameters
    ----------
    hidden
        (..., D), the same on every rank, as are targets, masked, weight and every option.
    local_head
        (n, D), this rank's rows of the head: those of the ids vocab_start .. vocab_start + n, at least one.
    vocab_start, vocab_size
        Where this rank's ids begin, and how many all ranks have. The pieces follow each other in order of ranks.
    group
        The ranks that share the head. None: all.
    local_bias
        (n,), this rank's part of the head's bias.
    targets, masked, weight, reduction, softcap, label_smoothing, z_loss, forbid, max_masked, memory_budget, backend
        As in `illada_kernels.masked_loss`; targets and forbid are ids of the whole vocab, memory_budget is a rank's.

    Returns
    -------
    Tensor
        The loss, float32, with the same bits on every rank. hidden gets its whole gradient on every rank, local_head
        and local_bias the gradient of their rows.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `illada_kernels.masked_loss`; for a call before torch.distributed is initialised; on a CPU for pieces that
        leave out or repeat an id, which on a GPU make the loss NaN.

    Notes
    -----
    Forward: one all-gather of four numbers a masked row: maximum, sum of exponentials, logit at the target, sum of
    logits. Backward: if hidden needs a gradient, one all-reduce of the masked rows' gradient in float32, before its
    one rounding, because every rank's ids add to it; do not sum it over the group again. Gradients of the head stay
    where they are. Equals the result of one device up to the rounding of float32 sums over the vocab.
    No forward-mode derivative. Synchronises as `illada_kernels.masked_loss`. With a group of one rank it is the same.
    Source: the vocabulary-parallel loss of Megatron-LM (arXiv 1909.08053, section 3).

    Examples
    --------
    Two ranks with 50 ids each, started by torchrun:

        group = torch.distributed.group.WORLD
        loss = distributed.masked_loss(
            hidden, head[50 * rank : 50 * rank + 50], targets, masked, vocab_start=50 * rank, vocab_size=100, group=group
        )
    """
    if isinstance(hidden, Tensor):
        hidden, local_head, local_bias = cast_for_autocast(hidden.device, hidden, local_head, local_bias)
    loss_api.check_rows("hidden", hidden, "D", targets, masked, weight)
    loss_api.check_head(hidden, local_head, local_bias)
    _check_piece(local_head.shape[0], vocab_start, vocab_size)
    loss_api.check_options(reduction, softcap, label_smoothing, z_loss, max_masked, memory_budget, vocab_size)
    problem = Problem(
        hidden,
        local_head,
        targets,
        masked,
        weight,
        local_bias,
        reduction,
        None if softcap is None else float(softcap),
        float(label_smoothing),
        float(z_loss),
        loss_api.ids(forbid, vocab_size),
        max_masked,
        memory_budget,
        loss_api.needs(hidden, local_head, local_bias),
        _name(group),
        vocab_start,
        vocab_size,
        backend or "",
    )
    loss: Tensor = OPERATOR(problem)[0]
    return loss


def _check_piece(rows: int, vocab_start: int, vocab_size: int) -> None:
    expect_integer("vocab_size", vocab_size, 1, 2**24)  # they cross ranks as float32
    expect_integer("vocab_start", vocab_start, 0, vocab_size - 1)
    if not 1 <= rows <= vocab_size - vocab_start:
        raise ValueError(
            f"local_head: expected 1 to {vocab_size - vocab_start} rows, as vocab_start = {vocab_start} of vocab_size "
            f"= {vocab_size} leaves, got {rows}"
        )


def _name(group: dist.ProcessGroup | None) -> str:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected torch.distributed to be initialised, it is not; start with torchrun and call "
            "torch.distributed.init_process_group()"
        )
    members = dist.group.WORLD if group is None else group
    if not isinstance(members, dist.ProcessGroup):  # also for a rank that is not in the group
        raise ValueError(f"group: expected a ProcessGroup that this rank is in, got {members!r}")
    return str(members.group_name)
