"""unmask where the ranks of a process group share the vocab: what the reference exchanges, ten numbers a row.

Each rank reduces the logits of its own ids, with the noise of their global ids; the winners and the sums of all ranks
make up a row. What follows, the selection, is the same on every rank. The C++ backend exchanges its partials instead.
With top_k or top_p the ranks first search the least logit that is kept, by the weights of 16 bins a row at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._ranks import gathered, gathered_pieces
from .problem import BY_MIN_P, BY_TOP_K, BY_TOP_P, Problem


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


def lower_bound(
    step: Problem, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor
) -> Tensor:
    """Returns reference.lower_bound's (N, 1) where these are the logits (N, ids) of one rank; the same on every rank.

    log_min_p: float32, -inf where nothing is truncated.

    Memory: a few times the logits'. Crosses ranks: a number a row, and 256 bytes for each 4 bits of a logit with top_k,
    as many with top_p.
    """
    logits = logits + 0.0  # zeros of both signs are one logit
    top = gathered(step.group, logits.amax(1, keepdim=True)).amax(0)
    nothing = torch.full_like(top, -torch.inf)
    bound = nothing
    if step.truncate & BY_TOP_K:
        kth = _reaching(step.group, logits, torch.ones_like(logits, dtype=torch.float64), top_k.double())
        bound = torch.where((top_k > 0) & (top_k < step.vocab), kth, nothing)
    if step.truncate & BY_TOP_P:
        e = torch.where(logits >= bound, ((logits - top) / temperature).exp(), 0.0).double()
        total = gathered(step.group, e.sum(1, keepdim=True)).sum(0)
        last = _reaching(step.group, logits.where(logits >= bound, -torch.inf), e, top_p.double() * total)
        bound = torch.maximum(bound, torch.where(top_p < 1, last, nothing))  # a NaN counts as 1
    if step.truncate & BY_MIN_P:
        bound = torch.maximum(bound, top + temperature * log_min_p)
    return torch.where(temperature > 0, bound, nothing)


def log_of(min_p: Tensor) -> Tensor:
    """Returns log min_p in float32, -inf where nothing is truncated: at 0 and below, and for a NaN."""
    return torch.where(min_p > 0, min_p, 0.0).double().log().clamp(max=0.0).float()


def _reaching(group: str, logits: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Returns the largest logit l of each row (N, 1) at which the weight of the ids with logits >= l reaches `target`.

    Where rounding lets none reach it, the least logit. Searches the logit's bits, four at a time.
    """
    keys, bits = _keys(logits)
    inside, above = torch.ones_like(keys, dtype=torch.bool), torch.zeros_like(target)
    found = torch.zeros_like(keys[:, :1])
    for shift in range(bits - 4, -1, -4):
        digit = (keys >> shift) & 15
        mine = weight.new_zeros(2, len(keys), 16)  # weights, then numbers of ids
        mine[0].scatter_add_(1, digit, weight.where(inside, 0.0))
        mine[1].scatter_add_(1, digit, inside.double())
        of, count = gathered(group, mine).sum(0)
        reached = above + of.flip(1).cumsum(1).flip(1) >= target  # (N, 16), True up to some digit
        some = count > 0
        at = torch.arange(16, device=keys.device)
        highest = torch.where(some & reached, at, -1).amax(1, keepdim=True)
        lowest = torch.where(some, at, 15).amin(1, keepdim=True)
        chosen = torch.where(highest >= 0, highest, lowest)
        above = above + torch.where(at > chosen, of, 0.0).sum(1, keepdim=True)
        inside, found = inside & (digit == chosen), (found << 4) | chosen
    return _of_keys(found, logits.dtype)


def _keys(logits: Tensor) -> tuple[Tensor, int]:
    """Returns int64 keys whose bits, as unsigned numbers, rise with the floats, and how many bits count."""
    if logits.dtype == torch.float64:
        bits = logits.view(torch.int64)
        return bits ^ ((bits >> 63) | -(2**63)), 64
    bits = logits.view(torch.int32).long()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 2**31, 32


def _of_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return (keys ^ (~(keys >> 63) | -(2**63))).view(torch.float64)
    bits = keys - 2**31
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).int().view(torch.float32)


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
