"""A decoding step as a plain loop in Python floats, and how the tests of unmask call it."""

from __future__ import annotations

import math

import torch

import illada_kernels as ik
from illada_kernels.ops.unmask import BACKENDS

INF = float("inf")
MASK = 36


def available() -> list[str]:
    return [b.name for b in BACKENDS if b.devices in (None, ("cpu",)) and b.available() is None]


def step(logits, tokens, positions=None, rule=None, backend=None, mask_id=MASK, **options):
    """unmask_from_logits on a copy of the tokens: (result, tokens after)."""
    tokens = torch.as_tensor(tokens).clone()
    if positions is None:
        positions = torch.arange(logits.shape[1]).expand(logits.shape[:2])
    rule = ik.TopK(10**9) if rule is None else rule
    result = ik.unmask_from_logits(logits, tokens, positions, rule, mask_id=mask_id, backend=backend, **options)
    return result, tokens


def plain(logits, tokens, positions, rule, confidence, revise, frozen, forbid):
    """Temperature 0, one candidate at a time, in Python floats."""
    tokens = [list(map(int, row)) for row in tokens]
    committed = [[False] * positions.shape[1] for _ in tokens]
    proposals = [[-1] * positions.shape[1] for _ in tokens]
    for b, held in enumerate([list(row) for row in tokens]):
        masked, fixed = [], []
        for k, at in enumerate(positions[b].tolist()):
            if not 0 <= at < len(held) or frozen[b][at] or (held[at] != MASK and revise is None):
                continue
            allowed = {v: float(x) for v, x in enumerate(logits[b, k]) if v not in forbid and x > -INF}
            if any(math.isnan(x) for x in logits[b, k]) or not allowed:
                continue
            best = min(allowed, key=lambda v: (-allowed[v], v))
            weights = {v: math.exp(x - allowed[best]) for v, x in allowed.items()}
            p = sorted((w / sum(weights.values()) for w in weights.values()), reverse=True)
            entropy = -sum(q * math.log(q) for q in p if q > 0)
            c = {"probability": p[0], "margin": p[0] - (p[1] if len(p) > 1 else 0), "neg_entropy": -entropy}[confidence]
            proposals[b][k] = best
            (masked if held[at] == MASK else fixed).append((round(c, 5), round(entropy, 5), at, k, best, p[0]))
        by_entropy = isinstance(rule, ik.EntropyBound)
        masked.sort(key=lambda m: (m[1], m[2]) if by_entropy else (-m[0], m[2]))
        total = 0.0
        for r, (c, entropy, at, k, best, _) in enumerate(masked):
            number = {ik.TopK: "k", ik.Threshold: "tau", ik.Factor: "f", ik.EntropyBound: "gamma"}[type(rule)]
            number = getattr(rule, number)
            if isinstance(rule, ik.TopK):
                go = r < number
            elif isinstance(rule, ik.Threshold):
                go = r == 0 or c >= number
            elif isinstance(rule, ik.Factor):
                go = r == 0 or c >= 1 - number / (r + 2)
            else:
                go = r == 0 or total + (entropy if rule.inclusive else 0) <= number
            total += entropy
            if not go:
                break
            tokens[b][at], committed[b][k] = best, True
        for *_, at, k, best, probability in fixed:
            if best != held[at] and probability >= revise.tau:
                tokens[b][at], committed[b][k] = best, True
    return torch.tensor(proposals), torch.tensor(committed), torch.tensor(tokens)
