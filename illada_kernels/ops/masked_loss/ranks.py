"""masked_loss where the ranks of a process group share the vocab: what they exchange.

Forward: the state of each masked row, four numbers, once. Backward: the gradient of the masked rows of hidden in
float32, once, because each rank's rows of the head add to it. Logits never cross, nor does a gradient of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._ranks import add_over_ranks, gathered_pieces
from .problem import Problem


def merge(problem: Problem, state: Tensor) -> None:
    """Replaces the state (N, 4) of this rank's ids by that of all ids, with the same bits on every rank.

    A state is (max of z, sum of exp(z - max), z at the target or -inf, sum of allowed z). Without a group it stays.
    """
    if not problem.group:
        return
    each = gathered_pieces(problem.group, state, problem.vocab_start, problem.width, problem.vocab_size)  # (R, N, 4)
    high, sums, at_target, total = each.unbind(-1)
    most = high.amax(0)
    scale = torch.where(high == -torch.inf, 0.0, (high - most).exp())  # otherwise -inf - -inf is NaN
    merged = (most, (sums * scale).sum(0), at_target.amax(0), total.sum(0))
    state.copy_(torch.stack(merged, 1))


def add_gradients(problem: Problem, of_rows: Tensor) -> None:
    """Adds up d(loss) / d(hidden) of the masked rows (N, D), float32, over the ranks. Without a group it stays."""
    if problem.group:
        add_over_ranks(problem.group, of_rows)
