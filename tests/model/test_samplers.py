"""Samplers by name against plain writings of the published algorithms: the same tokens after every pass."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from illada import Decoder, GenerationConfig, Model, PromptError, generate, record
from illada.decoding.cache import Cache
from illada.decoding.samplers import ALONE, SAMPLERS
from illada.decoding.schedules import Choose
from torch import Tensor

from illada_kernels import Edit, KeyRanges, Threshold, TopK, unmask_from_logits
from illada_kernels.ops.unmask.noise import philox, philox_unit
from tests.helpers import models

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 30, 11], [5, 3, 5, 8, 9, 17]]
NEW = 10  # tokens, no multiple of the blocks of 4


def model_of(preset: str) -> Model:
    return models.model_of(preset, seed=3, dtype=torch.float32)


def logits_of(model: Model, x: list[int], seen: int) -> Tensor:
    """(seen, V): all logits of one sequence, of which the model sees the first `seen` tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([x[:seen]]))[0] @ model.head_weight.T
    logits[:, model.config.mask_id] = -math.inf
    return logits


def ours(model: Model, prompt: list[int], **settings) -> list[list[int]]:
    """The new tokens after each pass."""
    states: list[list[int]] = []
    end = len(prompt) + settings.get("max_new_tokens", NEW)
    settings = {"max_new_tokens": NEW, "stop_ids": (), **settings}

    def look(step):
        states.append(step.tokens[0, step.starts[0] + len(prompt) : step.starts[0] + end].tolist())

    done = generate(model, [prompt], GenerationConfig(**settings), look)
    assert done.tokens[0] == states[-1] and done.passes == [len(states)]
    return states


def even(total: int, passes: int) -> list[int]:
    return [total // passes + (s < total % passes) for s in range(passes)]


def masks_in(x: list[int], mask: int, begin: int, end: int) -> list[int]:
    return [i for i in range(begin, end) if x[i] == mask]


def neg_entropy(p: Tensor) -> Tensor:
    return (p * p.clamp(min=1e-30).log()).sum(-1)


def top(where: list[int], confidence: Tensor, k: int) -> list[int]:
    """The k of most confidence, ties to the left."""
    return sorted(where, key=lambda i: (-float(confidence[i]), i))[:k]


# ---- LLaDA and iLLaDA ----------------------------------------------------------------------------------------------


def plain_llada(model: Model, prompt: list[int], steps: int, block: int, whole_canvas: bool, bias=None):
    mask, end, states = model.config.mask_id, len(prompt) + NEW, []
    x = prompt + [mask] * NEW
    for begin in range(len(prompt), end, block):
        stop = min(begin + block, end)
        for k in even(stop - begin, min(steps, stop - begin)):
            logits = logits_of(model, x, end if whole_canvas else stop)
            for token, rate in (bias or {}).items():
                logits[:, token] += rate * (begin - len(prompt))
            confidence, best = logits.softmax(-1).max(-1)
            for i in top(masks_in(x, mask, begin, stop), confidence, k):
                x[i] = int(best[i])
            states.append(x[len(prompt) :])
    return states


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("block, steps", [(4, 6), (NEW, 5), (NEW, None)])
def test_llada_spreads_steps_over_blocks_that_see_all_masks(prompt, block, steps):
    model = model_of("demo")
    per_block = steps // -(-NEW // block) if steps else block
    wanted = plain_llada(model, prompt, per_block, block, whole_canvas=True)
    assert ours(model, prompt, sampler="llada", steps=steps, block_length=block) == wanted


@pytest.mark.parametrize("prompt", PROMPTS)
def test_illada_appends_blocks_and_its_bias_grows_with_the_text(prompt):
    model = model_of("demo")
    common = {"sampler": "illada", "block_length": 4, "steps_per_block": 3}
    free = plain_llada(model, prompt, 3, 4, whole_canvas=False)
    assert ours(model, prompt, **common) == free
    bias = {7: 0.9, 8: -0.5}
    biased = plain_llada(model, prompt, 3, 4, whole_canvas=False, bias=bias)
    assert ours(model, prompt, growing_bias=bias, **common) == biased
    assert biased[:3] == free[:3] and biased != free  # the first block has no bias yet


def test_illada_stops_at_any_of_several_ids():
    model = model_of("demo")
    config = {"sampler": "illada", "block_length": 4, "max_new_tokens": NEW}
    free = generate(model, PROMPTS, GenerationConfig(stop_ids=(), **config)).tokens
    stops = (free[0][5], free[1][2])
    done = generate(model, PROMPTS, GenerationConfig(stop_ids=stops, **config))
    first = [next((i for i, token in enumerate(row) if token in stops), None) for row in free]
    assert done.tokens == [row[:at] for row, at in zip(free, first)]
    assert done.stopped == [at is not None for at in first]


# ---- Dream ---------------------------------------------------------------------------------------------------------


def uniform(seed: int, positions: list[int], step: int) -> dict[int, float]:
    """The documented draw: counter (0, position, step, 1)."""
    at = torch.tensor(positions)
    words = philox(torch.full_like(at, seed), torch.zeros_like(at), at, torch.full_like(at, step), 1)[:2]
    return dict(zip(positions, philox_unit(words).tolist()))


def plain_dream(model: Model, prompt: list[int], steps: int, algorithm: str, seed: int = 0):
    mask, n, states = model.config.mask_id, len(prompt), []
    x, t = prompt + [mask] * NEW, torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        where = masks_in(x, mask, n, n + NEW)
        if not where:
            break
        p = logits_of(model, x, n + NEW).softmax(-1)
        best = p.argmax(-1)
        share = 1 - t[i + 1] / t[i]
        if algorithm == "origin":
            u = uniform(seed, where, i)
            chosen = [j for j in where if i == steps - 1 or u[j] >= float(1 - share)]
        else:
            two = p.topk(2, -1).values
            kinds = {"maskgit_plus": two[:, 0], "topk_margin": two[:, 0] - two[:, 1], "entropy": neg_entropy(p)}
            k = int(torch.tensor(len(where)) * share) if i < steps - 1 else len(where)
            chosen = top(where, kinds[algorithm], k)
        for j in chosen:
            x[j] = int(best[j])
        states.append(x[n:])
    return states


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("steps", [4, 7, 25])
@pytest.mark.parametrize("algorithm", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_dream_commits_by_its_own_clock(prompt, steps, algorithm):
    model = model_of("Dream-7B")
    wanted = plain_dream(model, prompt, steps, algorithm, seed=5)
    assert ours(model, prompt, sampler=f"dream-{algorithm}", steps=steps, seed=5) == wanted


def test_dream_s_confidence_is_of_the_distribution_that_is_drawn_from():
    model = model_of("Dream-7B")
    config = GenerationConfig(sampler="dream-entropy", steps=5, max_new_tokens=6, temperature=0.7, stop_ids=())
    by_hand = {"temperature": 0.7, "confidence_temperature": 0.7, "confidence": "neg_entropy", "block_length": 6}
    counts, left = [], 6
    t = torch.linspace(1, 1e-3, 6)
    for i in range(5):
        counts.append(int(torch.tensor(left) * (1 - t[i + 1] / t[i])) if i < 4 else left)
        left -= counts[-1]
    tensor = GenerationConfig(
        rule=torch.tensor(counts), max_new_tokens=6, stop_ids=(), variable_length=False, **by_hand
    )
    assert generate(model, PROMPTS, config).tokens == generate(model, PROMPTS, tensor).tokens


# ---- SDAR ----------------------------------------------------------------------------------------------------------


def plain_sdar(model: Model, prompt: list[int], steps: int, algorithm: str):
    """Blocks count from the sequence's start; what the prompt fills of its last block stays."""
    mask, n, block, states = model.config.mask_id, len(prompt), model.config.causal_block, []
    end, counts = n + NEW, even(block, steps)
    x = prompt + [mask] * (-(-end // block) * block - n)
    for begin in range(n // block * block, end, block):
        stop = min(begin + block, end)
        for step in range(block):
            where = masks_in(x, mask, begin, stop)
            if not where:
                break
            p = logits_of(model, x, begin + block).softmax(-1)
            confidence, best = p.max(-1)
            k = counts[step] if step < steps - 1 else len(where)
            if algorithm == "sequential":
                chosen = where[:k]
            elif algorithm == "static":
                chosen = top(where, confidence, k)
            elif algorithm == "dynamic":
                sure = [i for i in where if confidence[i] > 0.4]
                chosen = sure if len(sure) >= k else top(where, confidence, k)
            else:
                entropies = sorted((-float(neg_entropy(p[i])), i) for i in where)
                sums = torch.tensor([h for h, _ in entropies]).cumsum(0)
                chosen = [i for _, i in entropies[: max(1, int((sums <= 3.0).sum()))]]
            for i in chosen:
                x[i] = int(best[i])
            states.append(x[n:end])
    return states


@pytest.mark.parametrize("prompt", [*PROMPTS, [1, 2, 3, 4]])
@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ["sequential", "static", "dynamic"])
def test_sdar_counts_by_the_block_and_leaves_the_prompt_alone(prompt, steps, algorithm):
    model = model_of("SDAR-8B")
    options = {"sampler_options": {"tau": 0.4}} if algorithm == "dynamic" else {}
    states = ours(model, prompt, sampler=f"sdar-{algorithm}", steps_per_block=steps, **options)
    assert states == plain_sdar(model, prompt, steps, algorithm)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_sdar_bounds_the_sum_of_entropies(prompt):
    model = model_of("SDAR-8B")
    states = ours(model, prompt, sampler="sdar-entropy_bounded", sampler_options={"bound": 3.0})
    assert states == plain_sdar(model, prompt, 4, "entropy_bounded")


# ---- Fast-dLLM, LLaDA2.1, ReMDM, d3LLM -----------------------------------------------------------------------------


def plain_fast_dllm(model: Model, prompt: list[int], block: int, tau=None, factor=None):
    mask, n, states = model.config.mask_id, len(prompt), []
    x = prompt + [mask] * NEW
    for begin in range(n, n + NEW, block):
        stop = min(begin + block, n + NEW)
        while where := masks_in(x, mask, begin, stop):
            confidence, best = logits_of(model, x, n + NEW).softmax(-1).max(-1)
            ranked = top(where, confidence, len(where))
            chosen = ranked[:1]
            for r, i in enumerate(ranked[1:], 2):
                if confidence[i] < (tau if tau is not None else 1 - factor / (r + 1)):
                    break
                chosen.append(i)
            for i in chosen:
                x[i] = int(best[i])
            states.append(x[n:])
    return states


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("block", [4, NEW])
def test_fast_dllm_commits_what_is_sure_and_always_one(prompt, block):
    model = model_of("demo")
    how = {"sampler": "fast-dllm-threshold", "sampler_options": {"tau": 0.3}, "block_length": block}
    assert ours(model, prompt, **how) == plain_fast_dllm(model, prompt, block, tau=0.3)
    how = {"sampler": "fast-dllm-factor", "sampler_options": {"factor": 1.6}, "block_length": block}
    assert ours(model, prompt, **how) == plain_fast_dllm(model, prompt, block, factor=1.6)


def plain_llada21(model: Model, prompt: list[int], block: int, tau: float, edit: float):
    mask, n, states = model.config.mask_id, len(prompt), []
    x = prompt + [mask] * NEW
    for begin in range(n, n + NEW, block):
        stop, after = min(begin + block, n + NEW), 0
        while True:
            p, best = logits_of(model, x, stop).softmax(-1).max(-1)
            where = masks_in(x, mask, begin, stop)
            full = not where
            gamma = [i for i in where if p[i] > tau] or top(where, p, 1)
            delta = [i for i in range(begin, stop) if x[i] != mask and x[i] != best[i] and p[i] > edit]
            for i in gamma + delta:
                x[i] = int(best[i])
            states.append(x[n:])
            after += full
            if not masks_in(x, mask, begin, stop) and (not gamma + delta or after == 16):
                break
    return states


@pytest.mark.parametrize("prompt", PROMPTS)
def test_llada21_edits_until_nothing_changes_or_16_passes_after_the_block_is_full(prompt):
    model = model_of("demo")
    for edit in (0.2, 0.4):
        how = {"sampler": "llada2.1", "sampler_options": {"tau": 0.3, "edit": edit}, "block_length": 4}
        assert ours(model, prompt, **how) == plain_llada21(model, prompt, 4, 0.3, edit)


def plain_remdm(model: Model, prompt: list[int], steps: int, eta: float, seed: int, form: str):
    mask, n, states = model.config.mask_id, len(prompt), []
    x = prompt + [mask] * NEW

    def share(t: float) -> float:
        if form != "loop" or t >= 0.55:
            return (1 - t) * (0.9 / 0.45 if form == "loop" else 1)
        return 0.9 if t > 0.05 else 1 - 0.1 * t / 0.05

    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        a_t, a_s = share(t), share(s)
        most = (1 - a_s) / a_t if a_t else float("inf")
        sigma = eta * min(1, most) if form == "rescale" else min(eta, most)
        if form == "loop" and not (s >= 0.05 and t <= 0.55):
            sigma = 0.0
        fall = (a_s - (1 - sigma) * a_t) / (1 - a_t)
        best = logits_of(model, x, n + NEW).argmax(-1)
        held = list(range(n, n + NEW))
        down, up = uniform(seed, held, i), uniform(seed, held, i + 2**31)
        before = list(x)
        for j in held:
            if before[j] == mask and (down[j] >= 1 - fall or i == steps - 1):
                x[j] = int(best[j])
            elif before[j] != mask and i < steps - 1 and up[j] < sigma:
                x[j] = mask
        states.append(x[n:])
    return states


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("form", ["cap", "rescale", "loop"])
@pytest.mark.parametrize("steps, eta", [(8, 0.3), (12, 0.1), (1, 0.5)])
def test_remdm_takes_tokens_back_with_its_probabilities(prompt, steps, eta, form):
    model, name = model_of("demo"), "remdm" if form == "cap" else f"remdm-{form}"
    states = ours(model, prompt, sampler=name, steps=steps, sampler_options={"eta": eta}, seed=4)
    assert states == plain_remdm(model, prompt, steps, eta, 4, form)
    back = sum(a != 49 == b for before, after in itertools.pairwise(states) for a, b in zip(before, after))
    assert back > 0 or steps == 1 or eta == 0.1 or form == "loop"


def plain_remdm_conf(model: Model, prompt: list[int], steps: int, seed: int):
    mask, n, states = model.config.mask_id, len(prompt), []
    x, sure = prompt + [mask] * NEW, {}
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        most, fall = min(1, (1 - (1 - s)) / (1 - t)) if i else 1, (t - s) / t
        p, best = logits_of(model, x, n + NEW).softmax(-1).max(-1)
        held, before = list(range(n, n + NEW)), list(x)
        there = [j for j in held if before[j] != mask]
        eta = dict(zip(there, torch.tensor([-sure[j] for j in there]).softmax(0).tolist()))
        down, up = uniform(seed, held, i), uniform(seed, held, i + 2**31)
        for j in held:
            if before[j] == mask and (down[j] >= 1 - fall or i == steps - 1):
                x[j], sure[j] = int(best[j]), float(p[j])
            elif before[j] != mask and i < steps - 1 and up[j] < eta[j] * most:
                x[j] = mask
        states.append(x[n:])
    return states


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("steps", [1, 8, 20])
def test_remdm_conf_takes_back_what_was_least_sure_when_it_was_committed(prompt, steps):
    model = model_of("demo")
    states = ours(model, prompt, sampler="remdm-conf", steps=steps, seed=4)
    assert states == plain_remdm_conf(model, prompt, steps, 4)
    back = sum(a != 49 == b for before, after in itertools.pairwise(states) for a, b in zip(before, after))
    assert back > 0 or steps < 20


def plain_d3llm(model: Model, prompt: list[int], block: int, bound: float, stop: int | None = None):
    mask, n, states = model.config.mask_id, len(prompt), []
    x = prompt + [mask] * NEW
    blocks = [range(b, min(b + block, n + NEW)) for b in range(n, n + NEW, block)]
    while mask in x:
        p = logits_of(model, x, n + NEW).softmax(-1)
        entropies, best = -neg_entropy(p), p.argmax(-1)
        decoded = [sum(x[i] != mask for i in b) / len(b) for b in blocks]
        last = 0
        while last + 1 < len(blocks) and decoded[last] >= 0.1:
            last += 1
        first = next(j for j, share in enumerate(decoded) if share < 1)
        masks = [i for b in blocks[: last + 1] for i in b if x[i] == mask]
        chosen = {i for i in masks if entropies[i] <= bound}
        chosen.add(min((float(entropies[i]), i) for i in masks)[1])
        if not chosen.intersection(blocks[first]):
            chosen.add(min((float(entropies[i]), i) for i in blocks[first] if x[i] == mask)[1])
        for i in chosen:
            x[i] = int(best[i])
        if stop in x[n:]:
            at = x.index(stop, n)
            x[at:] = [stop] * (n + NEW - at)
        states.append(x[n:])
    return states


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("block, bound", [(4, 1.5), (3, 2.2), (4, 0.4)])
def test_d3llm_opens_blocks_before_those_ahead_are_full(prompt, block, bound):
    model = model_of("demo")
    options = {"length": block, "entropy": bound}
    assert ours(model, prompt, sampler="d3llm", sampler_options=options) == plain_d3llm(model, prompt, block, bound)


class Part:
    """A block of d3LLM's delayed cache; the prompt is the first."""

    def __init__(self, begin: int, end: int, full_at: int | None = None) -> None:
        self.begin, self.end, self.full_at, self.cached = begin, end, full_at, False

    def masks(self, x: list[int]) -> int:
        return x[self.begin : self.end].count(49)


def plain_delayed(model: Model, prompt: list[int], block: int, bound: float, delay: int, every: int):
    """(states, first column of each pass), after generate_multi_block_kv_cache of hao-ai-lab/d3LLM.

    Keys before the first column are those of the last pass that covered them. With shifted logits the row before it is
    computed from the cache as it stands, where the published code reads a row of another position.
    """
    n, end, shifted = len(prompt), len(prompt) + NEW, model.config.shifted_logits
    x, states, begins = prompt + [49] * NEW, [], []
    parts = [Part(0, n, full_at=0), Part(n, min(n + block, end))]
    cache, kept, has_cache, number = Cache(model.config, 1, end), 0, False, 0
    while x.count(49):
        number += 1
        last = parts[-1]
        if last.end < end and (last.end - last.begin - last.masks(x)) / (last.end - last.begin) >= 0.1:
            parts.append(Part(last.end, min(last.end + block, end)))
        fresh = kept
        for part in parts:
            if part.end <= kept or part.cached:
                continue
            if part.masks(x):
                break
            part.full_at = number if part.full_at is None else part.full_at
            if number - part.full_at < delay:
                break
            part.cached, fresh = True, part.end
        waiting = any(not part.masks(x) and part.full_at is not None and not part.cached for part in parts)
        whole = not has_cache or (fresh == kept and (waiting or (every and number % every == 0)))
        begin = 0 if whole else kept
        early = begin - (shifted and begin > 0)
        places = torch.arange(early, end)[None]
        with torch.no_grad():
            window = cache.at(early, end, places >= begin)
            rows = model(torch.tensor([x[early:]]), KeyRanges.full(end), places, window)[0, begin - early :]
            logits = rows @ model.head_weight.T
        logits[:, 49] = -math.inf
        if fresh > kept:
            kept, has_cache = fresh, True
        begins.append(begin)
        entropy = dict(zip(range(begin, end), (-neg_entropy(logits.softmax(-1))).tolist()))
        best = dict(zip(range(begin, end), logits.argmax(-1).tolist()))
        masks = [i for i in range(n, parts[-1].end) if x[i] == 49]
        chosen = {i for i in masks if entropy[i] <= bound} | {min(masks, key=lambda i: (entropy[i], i))}
        first = next(part for part in parts if part.masks(x))
        inside = [i for i in masks if first.begin <= i < first.end]
        if not chosen.intersection(inside):
            chosen.add(min(inside, key=lambda i: (entropy[i], i)))
        for i in chosen:
            x[i] = best[i]
        states.append(x[n:])
    return states, begins


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("preset, block, bound", [("demo", 3, 2.2), ("demo", 2, 0.4), ("Dream-7B", 2, 2.5)])
@pytest.mark.parametrize("delay, every", [(0, 0), (1, 0), (2, 0), (2, 3), (1, 1), (100, 0)])
def test_d3llm_caches_a_block_some_passes_after_it_is_full(monkeypatch, prompt, preset, block, bound, delay, every):
    model, begins = model_of(preset), []
    forward = Model.forward

    def watched(self, tokens, key_ranges=None, positions=None, *others, **options):
        begins.append(len(prompt) + NEW - tokens.shape[1])
        return forward(self, tokens, key_ranges, positions, *others, **options)

    wanted = plain_delayed(model, prompt, block, bound, delay, every)
    monkeypatch.setattr(Model, "forward", watched)
    options = {"length": block, "entropy": bound, "delay": delay}
    states = ours(model, prompt, sampler="d3llm", sampler_options=options, cache="delayed", refresh_every=every)
    shift = model.config.shifted_logits
    assert (states, begins) == (wanted[0], [max(begin - shift, 0) for begin in wanted[1]])
    kept = [begin for begin in begins if begin]
    assert kept or delay > 2 or every == 1
    if delay == 100:
        assert states == ours(model, prompt, sampler="d3llm", sampler_options=options)


def test_a_delayed_cache_refuses_what_it_cannot_serve():
    model = model_of("demo")
    for changes, message in (
        ({"cache": "delayed"}, "cache: expected another than 'delayed'"),
        ({"cache": "delayed", "sampler": "fast-dllm-threshold"}, "cache: expected another than 'delayed'"),
        ({"cache": "delayed", "sampler": "d3llm", "revise": Edit(0.9)}, "revise: expected None with cache 'delayed'"),
        ({"sampler": "d3llm", "sampler_options": {"delay": 0.5}}, "sampler_options: expected a whole number of passes"),
    ):
        with pytest.raises(PromptError, match=message):
            generate(model, PROMPTS, GenerationConfig(max_new_tokens=8, **changes))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("block, bound", [(4, 1.5), (3, 2.2)])
def test_d3llm_ends_early_behind_a_stop_token(prompt, block, bound):
    """The stop is the token of the last pass but two, where masks before and behind it are left."""
    model, options = model_of("demo"), {"length": block, "entropy": bound}
    free = plain_d3llm(model, prompt, block, bound)
    stop = next(
        (
            t
            for before, after in itertools.pairwise(free)
            for b, t in zip(before, after)
            if b == 49 != t and 49 in after
        ),
        free[-1][3],
    )
    states: list[list[int]] = []
    config = {"sampler": "d3llm", "max_new_tokens": NEW, "stop_ids": stop}
    done = generate(
        model,
        [prompt],
        GenerationConfig(sampler_options=options, **config),
        lambda step: states.append(step.tokens[0, len(prompt) :].tolist()),
    )
    wanted = plain_d3llm(model, prompt, block, bound, stop)
    assert states == wanted and len(wanted) < len(free)
    assert done.tokens == [wanted[-1][: wanted[-1].index(stop)]] and done.stopped == [True]
    late = generate(model, [prompt], GenerationConfig(sampler_options={**options, "early": 0}, **config))
    assert late.passes == [len(free)]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_an_early_end_saves_passes_and_is_each_sequence_s_own(cache):
    model = model_of("demo")
    config = {"max_new_tokens": 12, "block_length": 6, "cache": cache, "stop_ids": tuple(range(40)), "end_early": True}
    together = generate(model, PROMPTS, GenerationConfig(**config))
    alone = [generate(model, [prompt], GenerationConfig(**config)) for prompt in PROMPTS]
    assert together.tokens == [one.tokens[0] for one in alone]
    assert together.passes == [one.passes[0] for one in alone]
    late = generate(model, PROMPTS, GenerationConfig(**{**config, "end_early": False}))
    assert sum(together.passes) < sum(late.passes)


# ---- self-speculation ----------------------------------------------------------------------------------------------


def plain_speculation(model: Model, prompt: list[int], k: int, bias: dict[int, float]) -> tuple[list[int], int]:
    """(tokens, passes), without a cache: known tokens are causal, the draft sees all."""
    x, n, end, passes, shifted = list(prompt), len(prompt), len(prompt) + NEW, 0, model.config.shifted_logits

    def best(tokens: list[int], high: list[int]) -> list[int]:
        """The argmax of each row, which sees the keys before its `high`."""
        bounds = torch.tensor([[[0, h, h, h] for h in high]], dtype=torch.int32)
        with torch.no_grad():
            rows = model(torch.tensor([tokens]), KeyRanges(bounds, len(tokens)), shift=False)[0]
        logits = rows @ model.head_weight.T
        logits[:, 49] = -math.inf
        for token, value in bias.items():
            logits[:, token] += value
        return logits.argmax(-1).tolist()

    while n < end:
        high = [*range(1, n), *[n + k] * (k + 1)]
        rows = best(x + [49] * k, high)
        draft = rows[n - 1 : n + k - 1] if shifted else rows[n:]
        after = best(x + draft, list(range(1, n + k + 1)))[n - 1 :]
        accepted = next((i for i in range(k) if draft[i] != after[i]), k)
        x = (x + after[: accepted + 1])[:end]
        n, passes = len(x), passes + 2
    return x[len(prompt) :], passes


@pytest.mark.parametrize("preset", ["demo", "Qwen2.5-7B"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_self_speculation_accepts_what_the_causal_mode_would_have_said(preset, k):
    model, bias = model_of(preset), {5: 8.0, 11: 8.0}
    config = {"sampler": "self-speculation", "max_new_tokens": NEW, "block_length": k, "logit_bias": bias}
    done = generate(model, PROMPTS, GenerationConfig(stop_ids=(), **config))
    for b, prompt in enumerate(PROMPTS):
        assert (done.tokens[b], done.passes[b]) == plain_speculation(model, prompt, k, bias)
    if preset == "Qwen2.5-7B":  # and that is greedy decoding
        greedy = generate(model, PROMPTS, GenerationConfig(max_new_tokens=NEW, stop_ids=(), logit_bias=bias))
        assert done.tokens == greedy.tokens
    stopped = generate(model, PROMPTS, GenerationConfig(stop_ids=(11,), **config))
    assert stopped.tokens == [row[: row.index(11)] if 11 in row else row for row in done.tokens]


@pytest.mark.parametrize("preset", ["demo", "Qwen2.5-7B"])
def test_a_draft_that_nothing_verifies_is_what_the_masks_say(preset):
    model, k = model_of(preset), 3
    settings = {"max_new_tokens": NEW, "block_length": k, "stop_ids": ()}
    done = generate(model, PROMPTS, GenerationConfig(sampler="draft", **settings))
    for b, prompt in enumerate(PROMPTS):
        text = list(prompt)
        while len(text) < len(prompt) + NEW:
            n = len(text)
            high = [*range(1, n), *[n + k] * (k + 1)]
            bounds = torch.tensor([[[0, h, h, h] for h in high]], dtype=torch.int32)
            with torch.no_grad():
                rows = model(torch.tensor([text + [49] * k]), KeyRanges(bounds, n + k), shift=False)[0]
            logits = rows @ model.head_weight.T
            logits[:, 49] = -math.inf
            best = logits.argmax(-1).tolist()
            text += best[n - 1 : -1] if model.config.shifted_logits else best[n:]
        assert done.tokens[b] == text[len(prompt) : len(prompt) + NEW]


@pytest.mark.parametrize("sampler", ["self-speculation", "draft", "canvas"])
def test_stop_when_ends_a_loop_of_its_own_as_others_between_two_drafts(sampler):
    model, steps = model_of("demo"), {"steps_per_block": 4} if sampler == "canvas" else {}
    common = {"sampler": sampler, "max_new_tokens": 11, "block_length": 3, "stop_ids": (), **steps}
    free = generate(model, PROMPTS, GenerationConfig(**common))
    asked: list[list[int]] = []

    def found(ids: list[int]) -> bool:
        asked.append(ids)
        return any(row[: len(ids)] == ids and len(ids) > place for row, place in zip(free.tokens, (0, 4, 10)))

    done = generate(model, PROMPTS, GenerationConfig(**common, stop_when=found))
    for text, row, place, passes, most in zip(done.tokens, free.tokens, (0, 4, 10), done.passes, free.passes):
        assert len(text) in range(place + 1, place + 5) and text == row[: len(text)]
        assert passes < most or place == 10
    assert done.stopped == [True] * 3 and [len(text) for text in done.tokens] == done.filled
    assert all(0 < len(ids) <= 11 and model.config.mask_id not in ids for ids in asked)
    short = generate(model, PROMPTS[:2], GenerationConfig(**common, stop_when=found))
    assert short.tokens == done.tokens[:2] and short.forward_passes < free.forward_passes
    assert generate(model, PROMPTS, GenerationConfig(**common, stop_when=lambda ids: False)) == free


# ---- the canvas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["demo", "Qwen2.5-7B"])
def test_a_canvas_is_denoised_as_diffusion_gemma_s_without_a_cache(preset):
    """Proposals and entropies come from unmask_from_logits; ranges, redrawing and the end are written out."""
    model, k, steps = model_of(preset), 4, 6
    config = {"sampler": "canvas", "block_length": k, "steps_per_block": steps, "seed": [5, 9, 11][: len(PROMPTS)]}
    config |= {"sampler_options": {"bound": 3.0, "calm": 2.5}}
    done = generate(model, PROMPTS, GenerationConfig(max_new_tokens=2 * k, stop_ids=(), **config))
    for b, prompt in enumerate(PROMPTS):
        text, passes = list(prompt), 0
        for canvas in range(2):
            seed = config["seed"][b]
            noise = torch.Generator().manual_seed(seed * 1_000_003 + canvas)
            shown = torch.randint(model.config.vocab_size - 1, (k,), generator=noise)
            shown, best, n = shown + (shown >= 49), None, len(text)
            high = [*range(1, n + 1), *[n + k] * k]
            ranges = KeyRanges(torch.tensor([[[0, h, h, h] for h in high]], dtype=torch.int32), n + k)
            for step in range(steps):
                with torch.no_grad():
                    rows = model(torch.tensor([text + shown.tolist()]), ranges, shift=False)[0]
                rows = rows[n - 1 : -1] if model.config.shifted_logits else rows[n:]
                logits = rows @ model.head_weight.T
                heat = 0.4 + 0.4 * (steps - step) / steps
                free = logits.clone()
                free[:, 49] = -math.inf
                p = (free / heat).softmax(-1)
                entropy = -(p * (p + 1e-30).log()).sum(-1)
                drawn = torch.full((1, k), 49)
                out = unmask_from_logits(
                    logits[None],
                    drawn,
                    torch.arange(k)[None],
                    TopK(k),
                    mask_id=49,
                    temperature=heat,
                    seed=torch.tensor([config["seed"][b]]),
                    step=canvas * steps + step,
                )
                order = entropy.argsort()
                kept = torch.zeros(k, dtype=torch.bool)
                kept[order] = entropy[order].cumsum(0) - entropy[order] <= 3.0
                before, best, passes = best, free.argmax(-1), passes + 1
                at = [torch.tensor(x) for x in (seed, 0, range(k), canvas * steps + step)]
                w0, w1 = (w.tolist() for w in philox(*at, 3)[:2])
                noise = torch.tensor([(a << 32 | b) * model.config.vocab_size >> 64 for a, b in zip(w0, w1)])
                shown = torch.where(kept, out.proposal[0], noise)
                if before is not None and torch.equal(before, best) and entropy.mean() < 2.5:
                    break
            text += best.tolist()
        assert (done.tokens[b], done.passes[b]) == (text[len(prompt) :], passes)
    alone = generate(model, PROMPTS[1:2], GenerationConfig(max_new_tokens=2 * k, **{**config, "seed": 9}))
    assert alone.tokens[0] == done.tokens[1]


def test_a_canvas_refuses_what_it_has_no_use_for():
    model = model_of("demo")
    for changes, message in (
        ({"temperature": 1.0}, "temperature: expected 0 with sampler 'canvas'"),
        ({"cache": "none"}, "cache: expected none with sampler 'canvas'"),
        ({"logit_bias": {3: 1.0}}, "logit_bias: expected none with sampler 'canvas'"),
        ({"defer": [3]}, "defer: expected none with sampler 'canvas'"),
        ({"sampler_options": {"warm": 1.0}}, "sampler_options: expected numbers of at least 0 for some of cold, hot"),
    ):
        with pytest.raises(PromptError, match=message):
            generate(model, PROMPTS, GenerationConfig(sampler="canvas", **changes))
    with pytest.raises(PromptError, match="prompt 1: expected a token at least"):
        generate(model, [[1], []], GenerationConfig(sampler="canvas", max_new_tokens=4))
    assert generate(model, [], GenerationConfig(sampler="canvas")).tokens == []


def test_self_speculation_refuses_what_is_not_greedy():
    model = model_of("demo")
    for changes, message in (
        ({"temperature": 1.0}, "temperature: expected 0 with sampler 'self-speculation'"),
        ({"rule": TopK(1)}, "rule: expected none with sampler 'self-speculation'"),
        ({"end_early": True}, "end_early: expected none with sampler 'self-speculation'"),
        ({"order": "left"}, "order: expected none with sampler 'self-speculation'"),
    ):
        with pytest.raises(PromptError, match=message):
            generate(model, PROMPTS, GenerationConfig(sampler="self-speculation", **changes))
    with pytest.raises(PromptError, match="prompt 1: expected a token at least"):
        generate(model, [[1], []], GenerationConfig(sampler="self-speculation", max_new_tokens=4))
    with pytest.raises(PromptError, match=r"runs in generate\(\) alone"):
        Decoder(model, GenerationConfig(sampler="self-speculation"))


def test_models_whose_clean_rows_predict_are_decoded_by_self_speculation():
    model = model_of("demo")
    model.config = dataclasses.replace(model.config, causal_block=1, next_token=True)
    named = generate(model, PROMPTS, GenerationConfig(sampler="self-speculation", max_new_tokens=NEW))
    assert generate(model, PROMPTS, GenerationConfig(max_new_tokens=NEW)).tokens == named.tokens
    by_masks = GenerationConfig(sampler="sdar-static", max_new_tokens=NEW)
    assert generate(model, PROMPTS, by_masks).tokens != named.tokens
    message = r"which is greedy; models with next_token have it by default: name another$"
    with pytest.raises(PromptError, match=message):
        generate(model, PROMPTS, GenerationConfig(temperature=1.0))
    with pytest.raises(
        PromptError, match=r"alone, .*; it is what models with next_token have by default, name another$"
    ):
        Decoder(model)
    with pytest.raises(PromptError, match="got 'self-speculation', the default of a model with next_token"):
        record(model, PROMPTS, GenerationConfig(max_new_tokens=NEW))
    assert len(list(record(model, PROMPTS, by_masks))) == len(PROMPTS)


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_gives_a_batch_what_it_gives_each_alone(name):
    model = model_of("SDAR-8B" if name.startswith("sdar") else "Dream-7B" if name.startswith("dream") else "demo")
    steps = {"steps": 6} if name.startswith(("dream", "remdm")) else {}
    config = {"sampler": name, "max_new_tokens": 6, "stop_ids": (), **steps}
    together = generate(model, PROMPTS, GenerationConfig(**config))
    for b, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], GenerationConfig(seed=b, **config))
        assert (together.tokens[b], together.passes[b]) == (alone.tokens[0], alone.passes[0])


BESIDE = [(name, cache) for name in SAMPLERS if name not in ALONE for cache in ("vicinity", "interval")]


@pytest.mark.parametrize("name, cache", [*BESIDE, ("d3llm", "delayed")])
def test_a_sampler_beside_a_cache_gives_a_decoder_what_it_gives_each_alone(name, cache):
    model = model_of("demo")
    steps = {"steps": 6} if name.startswith(("dream", "remdm")) else {}
    steps |= {"vicinity": 2} if cache == "vicinity" else {"refresh_every": 3}
    config = {"sampler": name, "max_new_tokens": 6, "stop_ids": tuple(range(8)), "cache": cache, **steps}
    decoder = Decoder(model, GenerationConfig(**config), slots=2, max_length=24)
    for prompt in PROMPTS:
        decoder.submit(prompt)
    while decoder.step():
        pass
    for done in decoder.collect():
        alone = generate(model, [PROMPTS[done.ticket]], GenerationConfig(seed=done.ticket, **config))
        assert (done.tokens, done.passes) == (alone.tokens[0], alone.passes[0])


def test_a_rule_may_be_a_callable_a_choice_or_counts_of_each_pass():
    model = model_of("demo")
    config = {"max_new_tokens": 6, "block_length": 6}
    by_count = ours(model, PROMPTS[0], rule=torch.tensor([1, 3, 2]), **config)
    assert [row.count(49) for row in by_count] == [5, 2, 0]
    assert ours(model, PROMPTS[0], rule=torch.tensor([1, 3]), **config)[-1].count(49) == 0  # the last pass takes all
    schedule = ours(model, PROMPTS[0], rule=lambda now: TopK(now.step + 1), **config)
    assert [row.count(49) for row in schedule] == [5, 3, 0]
    falling = lambda now: Threshold((0.9 - 0.2 * now.step).float())  # noqa: E731
    assert ours(model, PROMPTS[0], rule=falling, **config)
    every_second = Choose(lambda proposal, confidence: torch.arange(6) % 2 == 0)
    with pytest.raises(RuntimeError, match="3 positions stayed masked"):
        generate(model, PROMPTS[:1], GenerationConfig(rule=every_second, stop_ids=(), **config))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sampler": "dream"}, "sampler: expected one of llada, illada, dream-origin"),
        (
            {"sampler": "dream-entropy", "confidence": "margin"},
            "confidence: expected none with sampler 'dream-entropy'",
        ),
        ({"sampler": "llada", "rule": TopK(1), "steps": 4}, "steps: expected None with a rule"),
        ({"sampler": "fast-dllm-factor", "rule": TopK(1)}, "rule: expected none with sampler 'fast-dllm-factor'"),
        ({"sampler": "llada", "sampler_options": {"tau": 1}}, "sampler_options: expected none for llada, got 'tau'"),
        ({"sampler": "remdm", "sampler_options": {"t": 1}}, "sampler_options: expected among eta for remdm, got 't'"),
        ({"sampler": "remdm", "sampler_options": {"eta": "x"}}, "sampler_options: expected a number of at least 0"),
        ({"sampler": "remdm-loop", "sampler_options": {"end": 0.6}}, "sampler_options: expected 0 <= end < begin <= 1"),
        ({"sampler_options": {"eta": 1}}, "sampler_options: expected none without a sampler"),
        ({"sampler": "sdar-static", "steps": 4}, "steps: expected None with a rule"),
    ],
)
def test_settings_that_contradict_a_sampler_are_named(settings, message):
    with pytest.raises(PromptError, match=message):
        generate(model_of("demo"), [[1]], GenerationConfig(max_new_tokens=8, **settings))
