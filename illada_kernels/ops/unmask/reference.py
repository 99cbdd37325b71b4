"""unmask in plain PyTorch: the specification that every other backend is tested against.

Runs on any device, never synchronises with the host, looks at no data to decide what to compute. Logits, exponentials
and noise are float32 (float64 where the logits are); sums over the vocab are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import rules
from . import ranks as ranks_of
from .noise import gumbel, gumbel_of, philox, philox_unit, scaled
from .problem import (
    BY_MIN_P,
    BY_TOP_K,
    BY_TOP_P,
    FLOAT32_MAX,
    HIGHEST_CONFIDENCE_TEMPERATURE,
    HIGHEST_TEMPERATURE,
    LEAST_SHIFTED,
    Outputs,
    Problem,
)

LOGITS_AT_ONCE = 1 << 22  # rows go through in chunks of this many logits, so that real vocabs fit a small machine


def available() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    return None


def forward(problem: Problem) -> Outputs:
    """Returns (proposal, confidence, committed, remaining); writes into problem.tokens."""
    with torch.autocast(problem.tokens.device.type, enabled=False):  # whose matmul would round the logits
        return without_autocast(problem)


def without_autocast(step: Problem) -> Outputs:
    if step.is_empty():
        return step.nothing()
    length = step.tokens.shape[1]
    valid = (step.positions >= 0) & (step.positions < length)
    at = torch.where(valid, step.positions, 0)
    held = step.tokens.gather(1, at)
    candidate = valid if step.frozen is None else valid & ~step.frozen.gather(1, at)
    masked = candidate & ((held == step.mask_id) | (step.rule == rules.RENOISE))
    fixed = candidate & ~masked

    rows = all_rows(step, masked, held)
    kinds = (
        rows.probability,
        rows.margin,
        0.0 - rows.entropy,
        rows.random,
        rows.sampled,
    )  # in rules.CONFIDENCES' order
    takes_part = (masked | fixed if step.revise == rules.EDIT else masked) & ~rows.bad
    proposal = torch.where(takes_part, rows.proposal, -1)
    confidence = torch.where(takes_part, kinds[step.confidence], -torch.inf)
    committed = masked & takes_part & chosen_by_rule(step, masked & takes_part, confidence, rows)
    written = torch.where(committed, proposal, held)

    if step.rule == rules.RENOISE:
        written = torch.where(takes_part & ~committed, rows.redrawn, written)
        proposal = torch.where(takes_part, rows.best, -1)
    elif step.revise == rules.EDIT:
        tau = per_sequence(step, step.tau_tensor, step.tau, torch.float32)
        edited = fixed & takes_part & (proposal != held) & (rows.probability >= tau)
        committed, written = committed | edited, torch.where(edited, proposal, written)
    elif step.revise != rules.NO_REVISION:
        score = torch.where(rows.bad, torch.nan, rows.held_probability)
        score = score if step.scores is None else step.scores
        eligible = fixed & ~score.isnan()
        proposal, confidence = torch.where(eligible, held, proposal), torch.where(eligible, score, confidence)
        n = per_sequence(step, step.remasked_tensor, step.remasked, torch.int64)
        written = torch.where(eligible & (ranks(eligible, score, step.positions) < n), step.mask_id, written)

    # whoever writes nothing writes to one column more
    wide = torch.cat([step.tokens, step.tokens[:, :1]], dim=1)
    wide.scatter_(1, torch.where(written != held, at, length), written)
    step.tokens.copy_(wide[:, :length])
    left = ~committed if step.rule == rules.RENOISE else step.tokens.gather(1, at) == step.mask_id
    remaining = (candidate & left).sum(1, dtype=torch.int32)
    return proposal, confidence, committed, remaining


# ---- parameters ------------------------------------------------------------------------------------------------------
def per_sequence(step: Problem, tensor: Tensor | None, number: float, dtype: torch.dtype) -> Tensor:
    """Returns the parameter as a (1, 1) or (B, 1) tensor, rounded as the kernels round it."""
    if tensor is not None:
        return tensor.to(dtype).reshape(-1, 1)
    return torch.full((1, 1), number, dtype=dtype, device=step.tokens.device)


def seeds(step: Problem) -> Tensor:
    """Returns (B, 1) int64: a single seed s means s + b for sequence b."""
    if step.seed_tensor is not None and step.seed_tensor.ndim == 1:
        return step.seed_tensor.to(torch.int64).reshape(-1, 1)
    first = step.seed if step.seed_tensor is None else step.seed_tensor.to(torch.int64)
    return torch.arange(step.tokens.shape[0], device=step.tokens.device).reshape(-1, 1) + first


# ---- one row: proposal and confidences -------------------------------------------------------------------------------
class Rows(NamedTuple):
    proposal: Tensor  # int64: argmax of l + temperature * Gumbel; without noise where the candidate holds a token
    best: Tensor  # int64: argmax of l
    redrawn: Tensor  # int64: uniform in [0, V)
    probability: Tensor  # of the proposal, of the best under Renoise; float32, as the following
    margin: Tensor
    entropy: Tensor
    random: Tensor
    sampled: Tensor
    rank_noise: Tensor  # Gumbel
    held_probability: Tensor  # of the token the candidate holds
    bad: Tensor  # bool: a NaN or +inf logit, or no allowed id


def all_rows(step: Problem, masked: Tensor, held: Tensor) -> Rows:
    batch, count = step.positions.shape
    noise_positions = step.positions if step.noise_positions is None else step.noise_positions
    temperature = per_sequence(step, step.temperature_tensor, step.temperature, torch.float32)
    tc = per_sequence(step, step.confidence_temperature_tensor, step.confidence_temperature, torch.float32)
    seed, at_step = seeds(step), per_sequence(step, step.step_tensor, step.step, torch.int64)
    top_k = per_sequence(step, step.top_k_tensor, step.top_k, torch.int64)
    top_p = per_sequence(step, step.top_p_tensor, step.top_p, torch.float32)
    min_p = per_sequence(step, step.min_p_tensor, step.min_p, torch.float32)
    per_row = [masked, held, noise_positions, seed, at_step, torch.where(masked, temperature, 0.0), tc]
    per_row += [top_k, top_p, min_p]
    flat = [t.expand(batch, count).reshape(-1, 1) for t in per_row]
    chunk = max(1, LOGITS_AT_ONCE // max(1, step.vocab))
    parts = []
    for start in range(0, batch * count, chunk):
        parts.append(some_rows(step, start, [t[start : start + chunk] for t in flat]))
    return Rows(*(torch.cat(column).reshape(batch, count) for column in zip(*parts)))


def some_rows(step: Problem, start: int, per_row: list[Tensor]) -> Rows:
    """Returns rows start, start + 1, ...; per_row: all_rows' list, each (N, 1)."""
    masked, held, position, seed, at_step, temperature, tc, *truncation = per_row
    logits = row_logits(step, start, masked.shape[0])  # (N, V)
    random, rank_noise, redrawn = row_numbers(step, seed, position, at_step)
    if logits.shape[1] == 0:
        zero = torch.zeros_like(random)
        return Rows(held, held, held, zero, zero, zero, random, zero, zero, zero, torch.ones_like(masked))
    noised = logits
    temperature = torch.where(temperature > 0, temperature, 0.0).clamp(max=HIGHEST_TEMPERATURE)  # a NaN counts as 0
    if step.noisy:
        noise = temperature * gumbel(seed, position, at_step, step.vocab)[:, step.vocab_start :][:, : logits.shape[1]]
        noised = torch.where(temperature > 0, (logits + noise).clamp(-FLOAT32_MAX, FLOAT32_MAX), logits)
        noised = torch.where(logits == -torch.inf, logits, noised)
    if step.truncation:
        top_k, top_p, log_min_p = *truncation[:2], ranks_of.log_of(truncation[2])
        least = (ranks_of.lower_bound if step.group else lower_bound)(
            step, logits, temperature, top_k, top_p, log_min_p
        )
        noised = torch.where(logits >= least, noised, -torch.inf)
    if step.group:
        return _shared_rows(step, logits, noised, held, temperature, tc, (random, rank_noise, redrawn))
    proposal = noised.argmax(1, keepdim=True)  # ties to the lowest id

    top, best = logits.amax(1, keepdim=True), logits.argmax(1, keepdim=True)
    bad = logits.isnan().any(1, keepdim=True) | (top.abs() == torch.inf)
    second = logits.scatter(1, best, -torch.inf).amax(1, keepdim=True)
    tc = torch.where(tc > 0, tc, 1.0).clamp(max=HIGHEST_CONFIDENCE_TEMPERATURE)
    scale = (1 / tc).clamp(max=FLOAT32_MAX)
    shifted = (logits - top) * scale
    e = shifted.exp()
    total = e.sum(1, keepdim=True, dtype=torch.float64)
    # a row with nothing above LEAST_SHIFTED but its maximum is certain: its entropy is 0 on every backend
    mean_shifted = (
        torch.where(shifted < LEAST_SHIFTED, 0.0, e * shifted).sum(1, keepdim=True, dtype=torch.float64) / total
    )
    entropy = (total.log() - mean_shifted).clamp(min=0.0)
    margin = (1 - ((second - top) * scale).exp().double()) / total
    known = (held >= 0) & (held < logits.shape[1])
    held_probability = torch.where(known, e.gather(1, torch.where(known, held, 0)) / total, 0.0)
    rated = best if step.rule == rules.RENOISE else proposal
    probability = e.gather(1, rated) / total
    likeness = torch.where(temperature > 0, (logits.gather(1, rated) - top) / temperature, 0.0).exp()
    sampled = torch.minimum((1 / total).float(), likeness.float())
    confidences = (probability.float(), margin.float(), entropy.float(), random, sampled, rank_noise)
    return Rows(proposal, best, redrawn, *confidences, held_probability.float(), bad)


def row_numbers(step: Problem, seed: Tensor, position: Tensor, at_step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the random confidence, the Gumbel noise of ranks and Renoise's id of each row, (N, 1) each; zeros where
    none of them is used."""
    if not (step.confidence == rules.RANDOM or step.rule == rules.RENOISE or step.is_reranked):
        zeros = torch.zeros_like(position, dtype=torch.float32)
        return zeros, zeros, torch.zeros_like(position)
    uses = torch.arange(1, 4, device=seed.device)  # of Philox: one call, because small tensors cost their operators
    drawn = (word.split(1, 1) for word in philox(seed, torch.zeros_like(position), position, at_step, uses))
    of_random, of_ranks, of_renoise = zip(*drawn)
    return philox_unit(of_random[:2]), gumbel_of(of_ranks[:2]), scaled(of_renoise, step.vocab)


def _shared_rows(
    step: Problem,
    logits: Tensor,
    noised: Tensor,
    held: Tensor,
    temperature: Tensor,
    tc: Tensor,
    drawn: tuple[Tensor, Tensor, Tensor],
) -> Rows:
    """Returns some_rows' results where these are the logits of one rank's ids."""
    tc = torch.where(tc > 0, tc, 1.0).clamp(max=HIGHEST_CONFIDENCE_TEMPERATURE)
    scale = (1 / tc).clamp(max=FLOAT32_MAX)
    row = ranks_of.reduced(step, logits, noised, held, scale)
    random, rank_noise, redrawn = drawn
    entropy = (row.total.log() - row.moment / row.total).clamp(min=0.0)
    margin = (1 - ((row.second - row.top) * scale).exp()) / row.total
    rated = row.top if step.rule == rules.RENOISE else row.proposed
    likeness = torch.where(temperature > 0, (rated - row.top) / temperature, 0.0).exp()
    confidences = (
        ((rated - row.top) * scale).exp() / row.total,
        margin,
        entropy,
        random,
        torch.minimum(1 / row.total, likeness),
        rank_noise,
        ((row.held - row.top) * scale).exp() / row.total,
    )
    bad = (row.bad > 0) | (row.top.abs() == torch.inf)
    fields: list[Tensor] = [row.proposal.long(), row.best.long(), redrawn, *(x.float() for x in confidences), bad]
    return Rows(*fields)


def lower_bound(
    step: Problem, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor
) -> Tensor:
    """Returns the least logit that is kept in each row (N, 1): -inf where nothing is truncated.

    An id is kept by top_p if the ids of larger logits, of those that top_k keeps, have less than top_p of its mass.
    """
    falling, vocab = logits.sort(1, descending=True).values, logits.shape[1]
    top, nothing = falling[:, :1], torch.full_like(falling[:, :1], -torch.inf)
    bound = nothing
    if step.truncate & BY_TOP_K:
        kth = falling.gather(1, (top_k - 1).clamp(0, vocab - 1))
        bound = torch.where((top_k > 0) & (top_k < vocab), kth, nothing)
    if step.truncate & BY_TOP_P:
        e = torch.where(falling >= bound, ((falling - top) / temperature).exp(), 0.0).double()
        mass = e.cumsum(1)
        kept = (mass - e < top_p.double() * mass[:, -1:]).sum(1, keepdim=True)
        last = falling.gather(1, (kept - 1).clamp(min=0))
        bound = torch.maximum(bound, torch.where(top_p < 1, last, nothing))  # a NaN counts as 1
    if step.truncate & BY_MIN_P:
        bound = torch.maximum(bound, top + temperature * log_min_p)
    return torch.where(temperature > 0, bound, nothing)


def row_logits(step: Problem, start: int, rows: int) -> Tensor:
    """Returns l, the logits of the N rows from `start` on, with bias, and -inf at what is forbidden."""
    source = step.source.flatten(0, 1)[start : start + rows]
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    logits = source.to(dtype)
    if step.head_weight is not None:
        logits = logits @ step.head_weight.to(dtype).T
        if step.head_bias is not None:
            logits = logits + step.head_bias.to(dtype)
    vocab, ids = step.vocab, slice(step.vocab_start, step.vocab_start + logits.shape[1])
    bias = torch.zeros(vocab, dtype=torch.float32, device=logits.device)
    if step.bias_ids is not None and step.bias_values is not None and vocab > 0:
        known = (step.bias_ids >= 0) & (step.bias_ids < vocab)
        values = torch.where(known, step.bias_values, 0.0)
        bias.index_add_(0, torch.where(known, step.bias_ids, 0), values)
    for i in step.forbid:
        if 0 <= i < vocab:
            bias[i] = -torch.inf
    bias = bias[ids]
    return torch.where(bias == -torch.inf, -torch.inf, logits + bias)


# ---- selection -------------------------------------------------------------------------------------------------------
def ranks(eligible: Tensor, key: Tensor, positions: Tensor, deferred: Tensor | None = None) -> Tensor:
    """Returns the rank 0, 1, ... of each candidate by rising key, ties to the lowest position. Deferred candidates come
    after the others, those that are not eligible last."""
    order = positions.argsort(dim=1, stable=True)
    for first in (key, deferred, ~eligible):
        if first is not None:
            order = order.gather(1, first.gather(1, order).to(key.dtype).argsort(dim=1, stable=True))
    return torch.empty_like(order).scatter_(1, order, torch.arange(key.shape[1], device=key.device).expand_as(order))


def ranked(step: Problem, eligible: Tensor, confidence: Tensor, rows: Rows) -> Tensor:
    """Returns the ranks that the rule counts."""
    score = 0.0 - rows.entropy if step.by_entropy else confidence
    temperature = per_sequence(step, step.rank_temperature_tensor, step.rank_temperature, torch.float32)
    temperature = temperature.clamp(max=HIGHEST_TEMPERATURE)
    perturbed = (score + temperature * rows.rank_noise).clamp(-FLOAT32_MAX, FLOAT32_MAX)
    score = torch.where(temperature > 0, perturbed, score)
    if step.order == rules.FROM_LEFT:
        score = torch.zeros_like(score)
    deferred = torch.zeros_like(eligible)
    for i in step.defer:
        deferred = deferred | (rows.proposal == i)
    return ranks(eligible, -score, step.positions, deferred)


def chosen_by_rule(step: Problem, eligible: Tensor, confidence: Tensor, rows: Rows) -> Tensor:
    """Returns the first `least` ranks, and the longest prefix of the others that passes."""
    rank = ranked(step, eligible, confidence, rows)
    least = per_sequence(step, step.least_tensor, step.least, torch.int64)
    number = per_sequence(step, step.number_tensor, step.number, torch.float32)
    order = rank.argsort(dim=1)
    at = torch.arange(rank.shape[1], device=rank.device)  # the ranks, from 0
    if step.rule == rules.TOP_K:
        passes = torch.zeros_like(eligible)
    elif step.rule == rules.THRESHOLD:
        passes = confidence.gather(1, order) >= number
    elif step.rule == rules.FACTOR:
        passes = confidence.gather(1, order) >= 1 - number / (at + 2).float()  # ranks from 1: f / (r + 1)
    else:
        own = torch.where(eligible, rows.entropy, 0.0).gather(1, order).double()
        total = own.cumsum(1)
        passes = (total if step.rule == rules.ENTROPY_BOUND_INCLUSIVE else total - own) <= number.double()
    return ((at < least) | passes).cumprod(1).bool().gather(1, rank)
