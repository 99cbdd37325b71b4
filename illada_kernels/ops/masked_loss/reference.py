"""masked_loss and masked_loss_from_logits in plain PyTorch: the specification of all other backends.

    z      = softcap tanh((hidden @ head_weight.T + head_bias) / softcap), -inf at forbidden ids;  lse = log sum exp z
    loss   = lse - (1 - e) z_target - e mean(z) + z_loss lse^2, times the row's weight
    dlogit = weight ((1 + 2 z_loss lse) exp(z - lse) - e / allowed - [target] (1 - e)) dz/dlogit

e is the label smoothing; means and `allowed` are over the ids that are not forbidden. Computes in float32, in float64
for float64 inputs, and stores the logits of all masked rows. `forward` is differentiable by autograd; `backward` is its
gradient written out, because autograd does not run inside an operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Problem, Results, bad_target
from .ranks import add_gradients, merge


def available() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    return None


def kept(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the three tensors that `forward` keeps: nothing."""
    new = problem.hidden.new_empty
    return new(0, dtype=torch.float32), new(0, dtype=torch.float32), new(0, dtype=torch.float32)


def forward(problem: Problem) -> Results:
    """Returns the loss, float32 or float64, and `kept`.

    Raises ValueError if the target of a masked row is not an id; on a GPU with max_masked its loss is NaN instead.
    """
    masked = problem.masked
    with torch.autocast(masked.device.type, enabled=False):
        rows, live = masked_rows(masked, problem.max_masked)
        if masked.device.type == "cpu" or problem.max_masked is None:
            _check_targets(problem)
        losses = row_losses(logits(problem, rows, live), problem, rows, live)  # (rows,)
        weighted = losses.double() * row_scale(problem, rows, live)
        if problem.reduction == "none":
            loss = weighted.new_zeros(masked.numel()).index_copy(0, rows, weighted).view(masked.shape)
        else:
            loss = weighted.sum()
        return (loss * overflow_poison(problem)).to(losses.dtype), *kept(problem)


def backward(
    problem: Problem, grad_loss: Tensor, *kept: Tensor, needs: Sequence[bool] = (True, True, True)
) -> Sequence[Tensor | None]:
    """Returns the gradients of hidden, head_weight and head_bias in their dtypes, None where not needed. Reads nothing
    of what was kept."""
    hidden, head_weight, masked = problem.hidden, problem.head_weight, problem.masked
    with torch.autocast(masked.device.type, enabled=False):
        rows, live = masked_rows(masked, problem.max_masked)
        z = logits(problem, rows, live)
        upstream = grad_loss.reshape(-1)[rows] if problem.reduction == "none" else grad_loss
        scale = torch.where(live, row_scale(problem, rows, live) * upstream.double(), 0).to(z.dtype)
        d = scale[:, None] * row_gradients(z, problem, rows, live)  # (rows, V)
        poison = overflow_poison(problem).to(z.dtype)
        of_rows = d if head_weight is None else d @ head_weight.to(z.dtype)
        if needs[0]:
            add_gradients(problem, of_rows)
        flat = of_rows.new_zeros(masked.numel(), hidden.shape[-1]).index_copy(0, rows, of_rows)
        d_hidden = (flat.view(hidden.shape) * poison).to(hidden.dtype)
        if head_weight is None:
            return d_hidden, None, None
        d_weight = (d.T @ gather(problem, rows, live) * poison).to(head_weight.dtype) if needs[1] else None
        bias = problem.head_bias if needs[2] else None
        return d_hidden, d_weight, None if bias is None else (d.sum(0) * poison).to(bias.dtype)


def masked_rows(masked: Tensor, max_masked: int | None) -> tuple[Tensor, Tensor]:
    """Returns the indices of the masked rows in order, and which entries are meant: with a capacity the rest are
    fillers."""
    flat = masked.reshape(-1)
    if max_masked is None:
        rows = flat.nonzero().squeeze(1)
    else:
        rows = torch.argsort(~flat, stable=True)[: min(max_masked, flat.numel())]
    return rows, flat[rows]


def overflow_poison(problem: Problem) -> Tensor:
    """Returns 1, or NaN where more rows are masked than the capacity allows; float64."""
    one = torch.ones((), dtype=torch.float64, device=problem.masked.device)
    if problem.max_masked is None:
        return one
    return torch.where(problem.masked.sum() > problem.max_masked, torch.nan, one)


def _check_targets(problem: Problem) -> None:
    targets = problem.targets
    bad = (problem.masked & ((targets < 0) | (targets >= problem.vocab))).reshape(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise bad_target(int(targets.reshape(-1)[row]), row, problem)


def gather(problem: Problem, rows: Tensor, live: Tensor) -> Tensor:
    """Returns the rows of hidden (rows, D) in the working precision, zeros for fillers."""
    hidden = problem.hidden
    x = hidden.reshape(problem.masked.numel(), hidden.shape[-1])[rows]
    return torch.where(live[:, None], x, 0).to(torch.promote_types(hidden.dtype, torch.float32))


def logits(problem: Problem, rows: Tensor, live: Tensor) -> Tensor:
    """Returns the logits (rows, V), not yet capped."""
    x = gather(problem, rows, live)
    if problem.head_weight is None:
        return x
    z = x @ problem.head_weight.to(x.dtype).T
    return z if problem.head_bias is None else z + problem.head_bias.to(x.dtype)


def row_scale(problem: Problem, rows: Tensor, live: Tensor) -> Tensor:
    """Returns d(loss) / d(unweighted loss of a row), float64; 0 for fillers."""
    weight = problem.weight
    w = live.double() if weight is None else torch.where(live, weight.reshape(-1)[rows].double(), 0)
    if problem.reduction != "mean":
        return w
    return w / torch.where(live.any(), w.sum(), 1)


def row_losses(logits: Tensor, problem: Problem, rows: Tensor, live: Tensor) -> Tensor:
    """Returns cross-entropy, smoothing and z-loss of each row of logits (rows, V), unweighted; 0 for fillers, NaN where
    a target is not an id."""
    at_target, here, bad = _targets(problem, rows, live)
    z, allowed = _capped(logits, problem)
    z, smoothing = z.masked_fill(~allowed, -torch.inf), problem.label_smoothing
    if problem.group:
        high, sums, z_target, total = _merged_state(z, allowed, at_target, here, problem).unbind(1)
        lse = high + sums.log()
        losses = (1 - smoothing) * (lse - z_target) + smoothing * (lse - total / problem.allowed)
    else:
        log_p, lse = z.log_softmax(-1), z.logsumexp(-1)
        losses = -(1 - smoothing) * log_p.gather(1, at_target[:, None]).squeeze(1)
        if smoothing:
            losses = losses - smoothing * log_p.masked_fill(~allowed, 0).sum(-1) / problem.allowed
    if problem.z_loss:
        losses = losses + problem.z_loss * lse**2
    return torch.where(live, losses, 0) * torch.ones_like(losses).masked_fill(bad, torch.nan)


def row_gradients(logits: Tensor, problem: Problem, rows: Tensor, live: Tensor) -> Tensor:
    """Returns d(row_losses) / d(logits), (rows, V)."""
    at_target, here, bad = _targets(problem, rows, live)
    capped, allowed = _capped(logits, problem)
    z, smoothing = capped.masked_fill(~allowed, -torch.inf), problem.label_smoothing
    if problem.group:
        high, sums, _, _ = _merged_state(z, allowed, at_target, here, problem).unbind(1)
        lse = (high + sums.log())[:, None]
        p = (z - lse).exp()
    else:
        p, lse = z.softmax(-1), z.logsumexp(-1, keepdim=True)
    d = p * (1 + 2 * problem.z_loss * lse) - smoothing / problem.allowed
    d = d.scatter_add(1, at_target[:, None], (here.to(d.dtype) * (smoothing - 1))[:, None])
    if problem.softcap is not None:
        d = d * (1 - (capped / problem.softcap) ** 2)
    return d.masked_fill(~allowed, 0).masked_fill(bad[:, None], torch.nan)


def _targets(problem: Problem, rows: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the targets of the rows as columns of the logits, 0 where they have none, which of them have one, and
    which were not ids."""
    targets = problem.targets.reshape(-1)[rows]
    column = targets - problem.vocab_start
    here = (column >= 0) & (column < problem.width)
    return torch.where(here, column, 0), here, live & ((targets < 0) | (targets >= problem.vocab))


def _capped(logits: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Returns softcap tanh(logits / softcap), and which of their ids are allowed."""
    allowed = torch.ones(problem.vocab, dtype=torch.bool, device=logits.device)
    allowed[list(problem.forbid)] = False
    allowed = allowed[problem.vocab_start : problem.vocab_start + problem.width]
    cap = problem.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap), allowed


def _merged_state(z: Tensor, allowed: Tensor, at_target: Tensor, here: Tensor, problem: Problem) -> Tensor:
    """Returns the state of rows (ranks.py) over the ids of all ranks, of z (rows, ids) that is -inf where forbidden."""
    high = z.amax(1)
    sums = torch.where(high[:, None] == -torch.inf, 0.0, (z - high[:, None]).exp()).sum(1)
    z_target = torch.where(here, z.gather(1, at_target[:, None]).squeeze(1), -torch.inf)
    state = torch.stack((high, sums, z_target, z.masked_fill(~allowed, 0).sum(1)), 1)
    merge(problem, state)
    return state
