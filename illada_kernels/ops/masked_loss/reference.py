"""The specification of masked_loss in plain PyTorch; the oracle of the tests.

masked_loss and masked_loss_from_logits are differentiable by autograd; the two functions ending in _backward are their
gradients written out, which the operator needs (autograd does not run inside one). Half-precision inputs are taken as
they are and everything is computed in float32; float64 inputs are computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "sum",
    head_bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: Sequence[int] = (),
    max_masked: int | None = None,
) -> Tensor:
    """The loss of `masked_loss`, by computing the logits of the masked rows."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    poison = overflow_poison(masked, max_masked, compute)
    hidden, head_weight = hidden.to(compute), head_weight.to(compute)
    if max_masked is not None:  # a factor of NaN reaches every element of every gradient
        hidden, head_weight = hidden * poison, head_weight * poison
    rows, live = masked_rows(masked, max_masked)
    x = hidden.reshape(masked.numel(), hidden.shape[-1])[rows]  # (rows, D)
    x = torch.where(live[:, None], x, 0)
    logits = x @ head_weight.T  # (rows, V)
    if head_bias is not None:
        logits = logits + head_bias.to(compute) * poison
    losses = row_losses(logits, targets.reshape(-1)[rows], live, softcap, label_smoothing, z_loss, forbid)
    return reduce(losses * poison, rows, live, masked, weight, reduction) * poison


def masked_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "sum",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: Sequence[int] = (),
    max_masked: int | None = None,
) -> Tensor:
    """The loss of `masked_loss_from_logits`."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    poison = overflow_poison(masked, max_masked, compute)
    logits = logits.to(compute)
    if max_masked is not None:
        logits = logits * poison
    rows, live = masked_rows(masked, max_masked)
    z = torch.where(live[:, None], logits.reshape(masked.numel(), logits.shape[-1])[rows], 0)  # (rows, V)
    losses = row_losses(z, targets.reshape(-1)[rows], live, softcap, label_smoothing, z_loss, forbid)
    return reduce(losses * poison, rows, live, masked, weight, reduction) * poison


def masked_loss_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "sum",
    head_bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: Sequence[int] = (),
    max_masked: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, head_weight and head_bias (the last one also without a bias), float32 or float64."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    poison = overflow_poison(masked, max_masked, compute)
    rows, live = masked_rows(masked, max_masked)
    flat, w = hidden.reshape(masked.numel(), hidden.shape[-1]), head_weight.to(compute)
    x = torch.where(live[:, None], flat[rows].to(compute), 0)  # (rows, D)
    logits = x @ w.T if head_bias is None else x @ w.T + head_bias.to(compute)
    scale = row_scale(grad_loss, rows, live, masked, weight, reduction).to(compute)
    d = scale[:, None] * row_gradients(
        logits, targets.reshape(-1)[rows], live, softcap, label_smoothing, z_loss, forbid
    )
    d_hidden = torch.zeros(flat.shape, dtype=compute, device=x.device).index_copy(0, rows, d @ w).view(hidden.shape)
    return d_hidden * poison, d.T @ x * poison, d.sum(0) * poison


def masked_loss_from_logits_backward(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "sum",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: Sequence[int] = (),
    max_masked: int | None = None,
) -> Tensor:
    """Gradient of the logits, float32 or float64."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows, live = masked_rows(masked, max_masked)
    flat = logits.reshape(masked.numel(), logits.shape[-1])
    z = torch.where(live[:, None], flat[rows].to(compute), 0)
    scale = row_scale(grad_loss, rows, live, masked, weight, reduction).to(compute)
    d = scale[:, None] * row_gradients(z, targets.reshape(-1)[rows], live, softcap, label_smoothing, z_loss, forbid)
    d_logits = torch.zeros(flat.shape, dtype=compute, device=z.device).index_copy(0, rows, d).view(logits.shape)
    return d_logits * overflow_poison(masked, max_masked, compute)


def masked_rows(masked: Tensor, max_masked: int | None) -> tuple[Tensor, Tensor]:
    """Indices of the masked rows in order, and which of the entries are meant: with a capacity the rest are fillers."""
    flat = masked.reshape(-1)
    if max_masked is None:
        rows = flat.nonzero().squeeze(1)
    else:
        rows = torch.argsort(~flat, stable=True)[: min(max_masked, flat.numel())]
    return rows, flat[rows]


def overflow_poison(masked: Tensor, max_masked: int | None, dtype: torch.dtype) -> Tensor:
    """1, or NaN where more rows are masked than the capacity allows."""
    one = torch.ones((), dtype=dtype, device=masked.device)
    return one if max_masked is None else torch.where(masked.sum() > max_masked, torch.nan, one)


def row_losses(
    logits: Tensor,
    targets: Tensor,
    live: Tensor,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid: Sequence[int],
) -> Tensor:
    """Cross-entropy, smoothing and z-loss of each row of logits (rows, V), unweighted; NaN where a target is no id."""
    vocab = logits.shape[-1]
    bad = live & ((targets < 0) | (targets >= vocab))
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    allowed = torch.ones(vocab, dtype=torch.bool, device=z.device)
    if forbid:
        allowed[list(forbid)] = False
        z = z.masked_fill(~allowed, -torch.inf)
    log_p = z.log_softmax(-1)
    at_target = log_p.gather(1, targets.clamp(0, vocab - 1)[:, None]).squeeze(1)
    losses = -(1 - label_smoothing) * at_target
    if label_smoothing:
        losses = losses - label_smoothing * log_p.masked_fill(~allowed, 0).sum(-1) / (vocab - len(set(forbid)))
    if z_loss:
        losses = losses + z_loss * z.logsumexp(-1) ** 2
    return losses * torch.ones_like(losses).masked_fill(bad, torch.nan)


def reduce(losses: Tensor, rows: Tensor, live: Tensor, masked: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weighs the rows and brings them to the output of the reduction, float32 (float64 for float64 losses)."""
    w = torch.ones_like(losses) if weight is None else weight.reshape(-1)[rows].to(losses.dtype)
    weighted = torch.where(live, losses * w, 0)
    if reduction == "none":
        return weighted.new_zeros(masked.numel()).index_copy(0, rows, weighted).view(masked.shape)
    total = weighted.sum()
    if reduction == "sum":
        return total
    denominator = torch.where(live, w, 0).sum()
    return torch.where(live.any(), total / torch.where(live.any(), denominator, 1), total)


def row_scale(
    grad_loss: Tensor, rows: Tensor, live: Tensor, masked: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """d(loss) / d(unweighted loss of a row), times the upstream gradient; 0 for fillers."""
    one = torch.ones(rows.shape, dtype=grad_loss.dtype, device=rows.device)
    w = torch.where(live, one if weight is None else weight.reshape(-1)[rows].to(one.dtype), 0)
    if reduction == "none":
        return torch.where(live, w * grad_loss.reshape(-1)[rows], 0)
    if reduction == "mean":
        grad_loss = grad_loss / torch.where(live.any(), w.sum(), 1)
    return torch.where(live, w * grad_loss, 0)


def row_gradients(
    logits: Tensor,
    targets: Tensor,
    live: Tensor,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid: Sequence[int],
) -> Tensor:
    """d(row_losses) / d(logits), (rows, V)."""
    vocab = logits.shape[-1]
    bad = live & ((targets < 0) | (targets >= vocab))
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    allowed = torch.ones(vocab, dtype=torch.bool, device=logits.device)
    if forbid:
        allowed[list(forbid)] = False
    z = capped.masked_fill(~allowed, -torch.inf)
    d = z.softmax(-1) * (1 + 2 * z_loss * z.logsumexp(-1, keepdim=True))
    d = d - label_smoothing / (vocab - len(set(forbid)))
    at_target = targets.clamp(0, vocab - 1)[:, None]
    d = d.scatter_add(1, at_target, torch.full_like(at_target, -(1 - label_smoothing), dtype=d.dtype))
    if softcap is not None:
        d = d * (1 - (capped / softcap) ** 2)
    return d.masked_fill(~allowed, 0).masked_fill(bad[:, None], torch.nan)
