"""unmask where the ranks of a process group share the vocab: what the reference exchanges, ten numbers a row.

Each rank reduces the logits of its own ids, with the noise of their global ids; the winners and the sums of all ranks
make up a row. What follows, the selection, is the same on every rank. The C++ backend exchanges its partials instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._ranks import gathered_pieces
from .problem import Problem


class Row(NamedTuple):
    """(N, 1) float64 each, of one rank's ids or of all; z = (logit - top) * scale."""

    top: Tensor  # the largest logit
    best: Tensor  # its lowest id
    second: Tensor  # the next largest logit
    score: Tensor  # the largest logit with noise
    proposal: Tensor  # its lowest id
    proposed: Tensor  # the logit there
    total: Tensor  # sum of exp(z)
    moment: Tensor  # sum of z exp(z)
    held: Tensor  # the logit of the token that the candidate holds, -inf where it is not here
    bad: Tensor  # 1 for a NaN


def reduced(step: Problem, logits: Tensor, noised: Tensor, held: Tensor, scale: Tensor) -> Row:
    """Returns the rows over all ids, from the logits (N, ids) of this rank's, and with noise."""
    best, proposal = logits.argmax(1, keepdim=True), noised.argmax(1, keepdim=True)
    top, column = logits.gather(1, best), held - step.vocab_start
    z = ((logits - top) * scale).double().where(logits > -torch.inf, -torch.inf)
    e = z.exp()
    here = (column >= 0) & (column < logits.shape[1])
    parts = (
        top,
        best + step.vocab_start,
        logits.scatter(1, best, -torch.inf).amax(1, keepdim=True),
        noised.gather(1, proposal),
        proposal + step.vocab_start,
        logits.gather(1, proposal),
        e.sum(1, keepdim=True),
        torch.where(e > 0, z * e, 0.0).sum(1, keepdim=True),
        torch.where(here, logits.gather(1, torch.where(here, column, 0)), -torch.inf),
        logits.isnan().any(1, keepdim=True),
    )
    mine = torch.cat([part.double() for part in parts], 1)
    each = gathered_pieces(step.group, mine, step.vocab_start, logits.shape[1], step.vocab_size)
    return _merged(Row(*each.unbind(-1)), scale.double())  # (ranks, N) each


def _merged(each: Row, scale: Tensor) -> Row:
    winner, proposer = each.top.argmax(0, keepdim=True), each.score.argmax(0, keepdim=True)  # ties to the lowest ids
    top = each.top.gather(0, winner)  # (1, N)
    shift = torch.where(each.total > 0, (each.top - top) * scale.T, -torch.inf)
    weight = shift.exp()
    moment = torch.where(weight > 0, weight * (each.moment + shift * each.total), 0.0)
    row = Row(
        top,
        each.best.gather(0, winner),
        torch.cat([each.top.scatter(0, winner, -torch.inf), each.second]).amax(0, keepdim=True),
        each.score.gather(0, proposer),
        each.proposal.gather(0, proposer),
        each.proposed.gather(0, proposer),
        torch.where(weight > 0, weight * each.total, 0.0).sum(0, keepdim=True),
        moment.sum(0, keepdim=True),
        each.held.amax(0, keepdim=True),
        each.bad.amax(0, keepdim=True),
    )
    return Row(*(field.T for field in row))
