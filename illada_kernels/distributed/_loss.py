"""masked_loss over ranks that share the vocab."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .._checks import cast_for_autocast
from ..ops.masked_loss import api
from ..ops.masked_loss.op import OPERATOR
from ..ops.masked_loss.problem import Problem
from ._group import check_piece, group_name


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
    >>> import torch
    >>> import torch.distributed as dist
    >>> from illada_kernels import distributed
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's need no arguments
    >>> hidden, head, targets = torch.zeros(3, 8), torch.randn(100, 8), torch.tensor([5, 6, 7])
    >>> per_rank = 100 // dist.get_world_size()
    >>> start = per_rank * dist.get_rank()
    >>> local_head, masked = head[start : start + per_rank], torch.tensor([True, True, False])
    >>> distributed.masked_loss(hidden, local_head, targets, masked, vocab_start=start, vocab_size=100)  # 2 log(100)
    tensor(9.2103)
    >>> dist.destroy_process_group()
    """
    if isinstance(hidden, Tensor):
        hidden, local_head, local_bias = cast_for_autocast(hidden.device, hidden, local_head, local_bias)
    api.check_rows("hidden", hidden, "D", targets, masked, weight)
    api.check_head(hidden, local_head, local_bias, "local_head", "local_bias")
    check_piece(local_head.shape[0], vocab_start, vocab_size)
    api.check_options(reduction, softcap, label_smoothing, z_loss, max_masked, memory_budget, vocab_size)
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
        api.forbidden_ids(forbid, vocab_size),
        max_masked,
        memory_budget,
        api.needs(hidden, local_head, local_bias),
        group_name(group),
        vocab_start,
        vocab_size,
        backend or "",
    )
    loss: Tensor = OPERATOR(problem)[0]
    return loss
