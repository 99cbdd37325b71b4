"""A decoding step as a plain loop in Python floats, and how the tests of unmask call it."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

import illada_kernels as ik
from illada_kernels.ops.unmask import BACKENDS

INF = float("inf")
MASK = 36


def available() -> list[str]:
    return [b.name for b in BACKENDS if b.devices in (None, ("cpu",)) and b.module().available() is None]


def step(logits, tokens, positions=None, rule=None, backend=None, mask_id=MASK, **options):
    """unmask_from_logits on a copy of the tokens: (result, tokens after)."""
    tokens = torch.as_tensor(tokens).clone()
    if positions is None:
        positions = torch.arange(logits.shape[1]).expand(logits.shape[:2])
    rule = ik.TopK(10**9) if rule is None else rule
    result = ik.unmask_from_logits(logits, tokens, positions, rule, mask_id=mask_id, backend=backend, **options)
    return result, tokens


def plain(logits, tokens, positions, rule, confidence, revise, frozen, forbid, order="confidence", defer=()):
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
            margin = p[0] - (p[1] if len(p) > 1 else 0)
            c = {"probability": p[0], "sampled": p[0], "margin": margin, "neg_entropy": -entropy}[confidence]
            proposals[b][k] = best
            (masked if held[at] == MASK else fixed).append((round(c, 5), round(entropy, 5), at, k, best, p[0]))
        by_entropy = isinstance(rule, ik.EntropyBound)
        rank = [lambda m: -m[0], lambda m: m[1], lambda m: 0][2 if order == "left" else by_entropy]
        masked.sort(key=lambda m: (m[4] in defer, rank(m), m[2]))
        total, least = 0.0, getattr(rule, "at_least", 1)
        for r, (c, entropy, at, k, best, _) in enumerate(masked):
            number = {ik.TopK: "k", ik.Threshold: "tau", ik.Factor: "f", ik.EntropyBound: "gamma"}[type(rule)]
            number = getattr(rule, number)
            if isinstance(rule, ik.TopK):
                go = r < number
            elif isinstance(rule, ik.Threshold):
                go = r < least or c >= number
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


RULES = [
    ik.TopK(0),
    ik.TopK(2),
    ik.TopK(99),
    ik.Threshold(0.302),
    ik.Threshold(0.302, at_least=3),
    ik.Factor(0.9),
    ik.Factor(2.5),
    ik.EntropyBound(0.0),
    ik.EntropyBound(2.9),
    ik.EntropyBound(2.9, inclusive=True),
]


def rows_with_top(probabilities: list[float], vocabulary: int = 9) -> torch.Tensor:
    """(1, K, V) logits: row k gives id k + 1 the probability probabilities[k], the other ids share the rest equally."""
    rows = []
    for k, p in enumerate(probabilities):
        row = torch.full((vocabulary,), math.log((1 - p) / (vocabulary - 1)))
        row[k + 1] = math.log(p)
        rows.append(row)
    return torch.stack(rows)[None]


def truncated_set(row, temperature, top_k=None, top_p=None, min_p=None, forbid=()):
    """The ids that may be drawn, in Python floats: temperature, then top_k, top_p, min_p, equal logits together."""
    kept = {v: float(x) / temperature for v, x in enumerate(row) if v not in forbid and x > -INF}
    top = max(kept.values())
    if top_k is not None and top_k < len(kept):
        kth = sorted(kept.values(), reverse=True)[top_k - 1]
        kept = {v: s for v, s in kept.items() if s >= kth}
    if top_p is not None and top_p < 1:
        total = sum(math.exp(s - top) for s in kept.values())
        before = {s: sum(math.exp(t - top) for t in kept.values() if t > s) for s in set(kept.values())}
        kept = {v: s for v, s in kept.items() if s == top or before[s] < top_p * total}
    if min_p is not None:
        kept = {v: s for v, s in kept.items() if math.exp(s - top) >= min_p}
    return set(kept)


def draw_truncation(draw, batch: int, generator: torch.Generator):
    """Options top_k, top_p, min_p of a drawn call."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    return {
        "top_k": pick(None, 1, 3, 40, 10**6, (rand(batch) * 60).long() - 2, torch.tensor(5)),
        "top_p": pick(None, 0.0, 0.3, 0.9, 1.0, rand(batch) * 1.5 - 0.2, torch.tensor(0.5)),
        "min_p": pick(None, 0.0, 0.02, 0.3, 1.0, rand(batch) - 0.2, torch.tensor(0.1)),
    }


def draw_call(draw, truncated: bool = False):
    """A call with every option at random; `truncated`: with top_k, top_p, min_p and `Renoise` among them."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    vocabulary = pick(1, 2, 7, 50, 511, 513, 2047, 2048, 2049, 5000)
    batch, count = pick(1, 2, 3), pick(1, 2, 5, 17) if vocabulary < 2000 else pick(1, 2)  # many rows or many ids
    length = count + pick(0, 3)
    logits = torch.randn(batch, count, vocabulary, generator=generator) * pick(1.0, 5.0, 1e20, 1e38)
    if pick(True, False):
        logits = torch.randint(0, 3, logits.shape, generator=generator).float()
    logits = logits.to(pick(torch.float32, torch.bfloat16, torch.float16))
    bad = pick(None, None, float("nan"), -INF, INF)
    if bad is not None:
        logits[0, 0, : vocabulary if bad == -INF else 1] = bad
    mask = vocabulary - 1
    held = (rand(batch, length) * (vocabulary + 2)).long() - 1
    tokens = held.where(rand(batch, length) < pick(0.0, 0.5, 1.0), mask)
    positions = torch.stack([torch.randperm(length, generator=generator)[:count] for _ in range(batch)])
    positions = positions.where(rand(batch, count) > pick(0.0, 0.3), pick(-1, length, 2**40))
    confidence = pick("probability", "margin", "neg_entropy", "random", "sampled")
    sign = -3 if confidence == "neg_entropy" else 1
    rule = pick(
        ik.TopK(draw(st.integers(0, 4))),
        ik.TopK((rand(batch) * 5).long() - 1),
        ik.Threshold(sign * rand(batch)),
        ik.Threshold(sign * rand(batch), at_least=pick(0, 3, (rand(batch) * 5).long() - 1)),
        ik.Factor(draw(st.floats(0, 4))),
        ik.EntropyBound(rand(()) * 9, inclusive=pick(True, False)),
    )
    if truncated:
        rule = pick(rule, ik.Renoise(draw(st.floats(0, 9))), ik.Renoise(rand(batch) * 9))
    scores = (rand(batch, count) * 3).round()
    revise = pick(None, None, ik.Edit(rand(batch)), ik.Remask(2), ik.Remask((rand(batch) * 4).long(), scores))
    revise = None if isinstance(rule, ik.Renoise) else revise
    bias = ((rand(4) * (vocabulary + 4)).long() - 2, torch.randn(4, generator=generator))
    options = {
        "mask_id": mask,
        "confidence": confidence,
        "order": pick("confidence", "confidence", "left"),
        "rank_temperature": pick(0.0, 0.0, 0.5, rand(batch) - 0.3),
        "defer": pick((), tuple(range(0, vocabulary, 3))),
        "temperature": pick(0.0, 0.3, 1.0, 5.0, rand(()), rand(batch), 3e38),
        "confidence_temperature": pick(1.0, 0.5, rand(batch) + 0.1, 1e-3, 3e38),
        "seed": pick(0, -9, 2**63 - 5, torch.tensor(9), (rand(batch) * 2**60).long()),
        "step": pick(0, 2**32 - 1, torch.arange(batch)),
        "forbid": pick(None, (), (0,), tuple(range(0, vocabulary, 2))),
        "logit_bias": pick(None, bias, ([0, 0], [1.5, -0.25]), ([mask], [-INF])),
        "revise": revise,
        "frozen": pick(None, rand(batch, length) < 0.3),
        "noise_positions": pick(None, (rand(batch, count) * 2**31).long()),
    }
    if truncated:
        options |= draw_truncation(draw, batch, generator)
    return logits, tokens, positions, rule, options
