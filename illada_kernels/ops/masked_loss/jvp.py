"""The forward-mode derivative of masked_loss, in plain PyTorch on every device.

    dloss_i = scale_i sum_v d(loss_i) / dz_v * dz_iv,   dz = dhidden @ head.T + hidden @ dhead.T + dbias

with d(loss) / dz of reference.py. Works on chunks of rows, so that at most about 64 MiB of logits are held at once, and
on the head in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem
from .reference import gather, logits, masked_rows, overflow_poison, row_gradients, row_scale

CHUNK_BYTES = 64 << 20


def jvp(problem: Problem, kept: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor]:
    """Returns the tangent of the loss, in its dtype. Raises NotImplementedError where ranks share the vocab."""
    if problem.group:
        raise NotImplementedError("distributed.masked_loss: has no forward-mode derivative; use the backward")
    masked = problem.masked
    with torch.autocast(masked.device.type, enabled=False):
        rows, live = masked_rows(masked, masked.numel() if _is_batched(masked) else problem.max_masked)
        scale = row_scale(problem, rows, live)
        size = max(1, CHUNK_BYTES // (8 * problem.vocab))
        parts = [
            _of_rows(problem, rows[at : at + size], live[at : at + size], tangents) for at in range(0, len(rows), size)
        ]
        of_rows = (torch.cat(parts).double() if parts else scale) * scale  # (rows,)
        if problem.reduction == "none":
            loss = of_rows.new_zeros(masked.numel()).index_copy(0, rows, of_rows).view(masked.shape)
        else:
            loss = of_rows.sum()
        return ((loss * overflow_poison(problem)).to(torch.promote_types(problem.hidden.dtype, torch.float32)),)


def _is_batched(x: Tensor) -> bool:
    """Returns whether vmap holds several masks in x, whose numbers of rows may differ."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def _of_rows(problem: Problem, rows: Tensor, live: Tensor, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """Returns the tangents of the unweighted losses of a chunk of rows."""
    d_hidden, d_weight, d_bias = tangents
    x, z = gather(problem, rows, live), logits(problem, rows, live)
    dz = torch.zeros_like(z)
    if d_hidden is not None:
        dz = dz + logits(problem._replace(hidden=d_hidden, head_bias=None), rows, live)
    if d_weight is not None:
        dz = dz + x @ d_weight.to(x.dtype).T
    if d_bias is not None:
        dz = dz + d_bias.to(x.dtype)
    return torch.where(live, (row_gradients(z, problem, rows, live) * dz).sum(-1), 0)
