"""generate and fill against a plain loop written here, in float64; batches, caches, stops, and what they cost."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from illada.decoding.config import GenerationConfig
from illada.decoding.decoder import Decoder
from illada.decoding.fill import fill
from illada.decoding.generate import generate
from illada.errors import PromptError
from illada.model import Model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import illada_kernels
from illada_kernels import Edit, EntropyBound, Factor, Remask, Threshold, TopK
from tests.helpers.models import make, model_of, plain_forward, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9]]
MODELS = ["demo", "Dream-7B", "SDAR-8B", "Qwen2.5-7B"]
RULES = {
    "schedule": {"steps_per_block": 3},
    "top2": {"rule": TopK(2)},
    "threshold": {"rule": Threshold(0.3)},
    "factor": {"rule": Factor(1.4)},
    "entropy": {"rule": EntropyBound(2.5)},
    "entropy_inclusive": {"rule": EntropyBound(5.0, inclusive=True)},
}


def settings(model: Model, **changes) -> GenerationConfig:
    block = model.config.causal_block or 4
    return GenerationConfig(**{"max_new_tokens": 8, "block_length": block, "stop_ids": (), **changes})


# ---- the plain loop ----------------------------------------------------------------------------------------------


def plain_logits(model: Model, tokens: Tensor) -> Tensor:
    c, n = model.config, tokens.shape[0]
    block = torch.arange(n) // c.causal_block if c.causal_block else torch.zeros(n)
    hidden = plain_forward(model, tokens[None], torch.arange(n)[None], (block[:, None] >= block)[None, None])[0]
    if c.shifted_logits:
        hidden = hidden[[0, *range(n - 1)]]
    logits = hidden @ model.head_weight.T
    logits[:, c.mask_id] = -math.inf
    return logits


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities.clamp(min=1e-300).log() * probabilities).sum(1)


def plain_choice(config: GenerationConfig, probabilities: Tensor, step: int, masked: int) -> int:
    """How many of the candidates, most confident first, are committed."""
    rule, n = config.rule, probabilities.shape[0]
    best = probabilities.amax(1)
    if rule is None:
        passes = min(config.steps_per_block, masked)
        return masked // passes + (step < masked % passes)
    if isinstance(rule, TopK):
        return min(rule.k, n)
    if isinstance(rule, Threshold):
        return max(1, int((best >= rule.tau).sum()))
    if isinstance(rule, Factor):
        passing = [r for r, c in enumerate(best.sort(descending=True).values.tolist(), 1) if c >= 1 - rule.f / (r + 1)]
        return max(1, next((r for r in range(n + 1) if r + 1 not in passing), n))
    entropies = entropy(probabilities).sort().values
    sums = entropies.cumsum(0) if rule.inclusive else entropies.cumsum(0) - entropies
    return max(1, int((sums <= rule.gamma).sum()))


def plain_generate(model: Model, prompt: list[int], config: GenerationConfig) -> tuple[list[int], int]:
    """(tokens, passes): one sequence, no padding, no cache, all logits at every pass."""
    mask, length, whole = model.config.mask_id, config.block_length, model.config.causal_block or 1
    end = len(prompt) + config.max_new_tokens
    tokens, passes = torch.tensor(prompt + [mask] * config.max_new_tokens), 0
    for begin in range(len(prompt) // whole * whole, end, length):
        stop = begin + length
        seen = stop if config.variable_length or model.config.causal_block else end
        padded = torch.cat([tokens, torch.full((max(0, seen - end),), mask)])
        masked = int((padded[begin : min(stop, end)] == mask).sum())
        for step in range(masked):
            if not (padded[begin : min(stop, end)] == mask).any():
                break
            where = [i for i in range(begin, min(stop, end)) if padded[i] == mask]
            probabilities = plain_logits(model, padded[:seen])[where].softmax(-1)
            passes += 1
            by_entropy = isinstance(config.rule, EntropyBound)
            key = entropy(probabilities) if by_entropy else -probabilities.amax(1)
            count = plain_choice(config, probabilities, step, masked)
            for i in key.argsort(stable=True)[:count].tolist():
                padded[where[i]] = probabilities[i].argmax()
        tokens = padded[:end]
    return tokens[len(prompt) :].tolist(), passes


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variable_length", [True, False])
def test_a_ragged_batch_equals_the_plain_loop_on_each_sequence(preset, rule, variable_length):
    model = model_of(preset)
    config = settings(model, variable_length=variable_length, **RULES[rule])
    if rule == "schedule" and preset == "Qwen2.5-7B":
        pytest.skip("a block of one token has no schedule")
    result = generate(model, PROMPTS, config)
    plain = [plain_generate(model, prompt, config) for prompt in PROMPTS]
    assert result.tokens == [tokens for tokens, _ in plain]
    assert result.passes == [passes for _, passes in plain]
    assert result.filled == [8, 8, 8] and result.stopped == [False] * 3
    assert result.tokens_per_pass == 24 / sum(result.passes)


def test_rules_differ_in_passes_and_none_takes_more_than_one_token_a_pass_would():
    """The rules' parameters above are such that the plain loop tells them apart."""
    model = model_of("demo")
    passes = {name: generate(model, PROMPTS, settings(model, **rule)).passes for name, rule in RULES.items()}
    assert len({tuple(p) for p in passes.values()}) >= 4
    assert all(2 <= p <= 8 for ps in passes.values() for p in ps)


APPROXIMATE = ["prefix", "dual", "vicinity", "interval"]
CACHED = [("demo", cache) for cache in ("none", *APPROXIMATE)] + [("Dream-7B", "dual"), ("Dream-7B", "interval")]
CACHED += [("SDAR-8B", "none"), ("SDAR-8B", "block_causal"), ("Qwen2.5-7B", "block_causal")]


@pytest.mark.parametrize("preset, cache", CACHED)
@pytest.mark.parametrize("how", ["threshold", "sampled", "random", "edit", "remask", "guided", "whole", "refreshed"])
def test_a_batch_gives_what_each_sequence_gives_alone(preset, cache, how):
    model = model_of(preset)
    changes = {
        "threshold": {"rule": Threshold(0.2)},
        "sampled": {"rule": Factor(1.0), "temperature": 1.0, "seed": 7},
        "random": {"rule": TopK(2), "temperature": 0.7, "confidence": "random", "seed": [9, 4, 4]},
        "edit": {"rule": Threshold(0.1), "revise": Edit(0.1), "revise_steps": 3},
        "remask": {"rule": TopK(3), "revise": Remask(1), "revise_steps": 2},
        "guided": {"rule": Threshold(0.2), "guidance": 0.5},
        "whole": {"rule": Threshold(0.2), "variable_length": False},
        "refreshed": {"rule": Threshold(0.3), "refresh_every": 3, "max_new_tokens": 16},
    }[how]
    if how == "refreshed" and cache not in APPROXIMATE:
        pytest.skip("it has nothing to refresh")
    config = settings(model, cache=cache, **changes)
    together = generate(model, PROMPTS, config)
    for b, prompt in enumerate(PROMPTS):
        seed = [config.seed[b]] if isinstance(config.seed, list) else config.seed + b
        alone = generate(model, [prompt], settings(model, cache=cache, **{**changes, "seed": seed}))
        assert (together.tokens[b], together.passes[b]) == (alone.tokens[0], alone.passes[0])


# ---- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["demo", "Dream-7B"])
@pytest.mark.parametrize("cache", APPROXIMATE)
@pytest.mark.parametrize("variable_length", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cache_refreshed_at_every_pass_is_no_approximation(preset, cache, variable_length, dtype):
    """Bit for bit, in every hidden row of every pass (with TopK all sequences need all passes)."""
    model = model_of(preset).to(dtype)
    for rule in (TopK(1), Threshold(0.3)):
        common = {"rule": rule, "variable_length": variable_length, "max_new_tokens": 12}
        exact, rows = hidden_rows(model, settings(model, cache="none", **common))
        again, others = hidden_rows(model, settings(model, cache=cache, refresh_every=1, **common))
        assert again == exact
        if isinstance(rule, TopK):
            assert len(rows) == len(others) and all(map(torch.equal, rows, others))


def hidden_rows(model: Model, config: GenerationConfig):
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(out))
    done = generate(model, PROMPTS, config)
    handle.remove()
    return done, seen


@pytest.mark.parametrize("preset", ["demo", "Dream-7B"])
@pytest.mark.parametrize("variable_length", [True, False])
def test_caches_meet_at_their_limits(preset, variable_length):
    """vicinity of none is dual, of all is no cache; interval over one block is dual with the same interval."""
    model = model_of(preset)
    common = {"rule": Threshold(0.3), "variable_length": variable_length, "max_new_tokens": 12}
    found = {
        name: generate(model, PROMPTS, settings(model, **{**common, **how}))
        for name, how in {
            "none": {"cache": "none"},
            "all": {"cache": "vicinity", "vicinity": 64},
            "dual": {"cache": "dual"},
            "no neighbours": {"cache": "vicinity", "vicinity": 0},
            "dual, one block": {"cache": "dual", "refresh_every": 3, "block_length": 12},
            "interval, one block": {"cache": "interval", "refresh_every": 3, "block_length": 12},
        }.items()
    }
    assert found["all"] == found["none"] and found["no neighbours"] == found["dual"]
    assert found["interval, one block"] == found["dual, one block"]
    assert found["dual"].tokens != found["none"].tokens


@pytest.mark.parametrize("every, expected", [(0, []), (3, [3, 6, 9]), (5, [5, 10]), (8, [8])])
def test_an_interval_counts_passes_over_all_blocks(every, expected):
    """Three blocks of four passes; each first pass covers the block before, too, as its last tokens were just set."""
    model = model_of("demo")
    common = {"rule": TopK(1), "cache": "interval", "max_new_tokens": 12, "variable_length": False}
    seen = widths(model, settings(model, refresh_every=every, **common), [[1, 2, 3]])
    plain = [15, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]
    assert seen == [15 if i in expected else width for i, width in enumerate(plain)]


def widths(model: Model, config: GenerationConfig, prompts=PROMPTS) -> list[int]:
    """Columns computed by each forward pass."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    generate(model, prompts, config)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    "preset, cache, variable_length, expected",
    [  # prompts end in column 7; two blocks of 4, two passes each
        ("demo", "none", True, [11, 11, 15, 15]),
        ("demo", "none", False, [15, 15, 15, 15]),
        ("demo", "prefix", True, [11, 4, 15, 4]),
        ("demo", "prefix", False, [15, 8, 15, 4]),
        ("demo", "dual", False, [15, 4, 15, 4]),
        ("demo", "interval", True, [11, 4, 8, 4]),
        ("Dream-7B", "interval", True, [11, 5, 9, 5]),
        ("demo", "vicinity", True, [11, 11, 15, 15]),  # 16 columns on each side are all
        ("Dream-7B", "dual", False, [15, 5, 15, 5]),
        # blocks from the sequence's start: the longest prompt ends within the second one
        ("SDAR-8B", "block_causal", True, [8, 4, 8, 4, 8, 4]),
        ("SDAR-8B", "none", True, [8, 8, 12, 12, 16, 16]),
        ("Qwen2.5-7B", "block_causal", True, [7] + [1] * 7),
    ],
)
def test_each_pass_computes_its_window_only(preset, cache, variable_length, expected):
    model = model_of(preset)
    assert widths(model, settings(model, rule=TopK(2), cache=cache, variable_length=variable_length)) == expected


def test_an_interval_does_not_depend_on_how_many_passes_a_rule_takes():
    """Blocks count as four passes each, so every second one begins with all columns, however few passes there were."""
    model = model_of("demo")
    for tau in (0.05, 0.3, 1.0):
        config = settings(model, rule=Threshold(tau), cache="interval", refresh_every=8, max_new_tokens=16)
        first: dict[int, int] = {}
        seen: list[int] = []
        handle = model.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[1]))
        generate(model, PROMPTS, config, lambda step, seen=seen, first=first: first.setdefault(step.block, seen[-1]))
        handle.remove()
        assert first == {0: 11, 1: 8, 2: 19, 3: 8}
        assert len(seen) < 16 or tau == 1.0


def test_stale_keys_are_an_approximation_and_the_first_pass_of_a_block_is_exact():
    model = model_of("demo")
    hidden = {}
    for cache in ("none", "dual"):
        seen: list[Tensor] = []
        handle = model.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[:, -4:]))
        generate(model, PROMPTS[:1], settings(model, rule=TopK(1), cache=cache, max_new_tokens=4))
        handle.remove()
        hidden[cache] = seen
    assert torch.equal(hidden["none"][0], hidden["dual"][0])
    assert (hidden["none"][1] - hidden["dual"][1]).abs().max() > 1e-3


# ---- where it ends -----------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_sequence_and_all_of_them_end_the_loop():
    model = model_of("demo")
    eos = model.config.eos_id
    config = settings(model, stop_ids=None, logit_bias=([eos], [1e4]), max_new_tokens=16)
    result = generate(model, PROMPTS, config)
    assert result.tokens == [[], [], []] and result.stopped == [True] * 3
    assert result.forward_passes == 4 and result.filled == [4, 4, 4]  # one block of four, one token a pass
    unstopped = generate(model, PROMPTS, settings(model, logit_bias=([eos], [1e4]), max_new_tokens=16))
    assert unstopped.forward_passes == 16 and unstopped.tokens == [[eos] * 16] * 3


@pytest.mark.parametrize("prompts", [PROMPTS, [[1]], [[], [3]]])
def test_an_autoregressive_model_needs_no_cache(prompts):
    model = model_of("Qwen2.5-7B")
    cached = generate(model, prompts, settings(model))
    assert generate(model, prompts, settings(model, cache="none")) == cached


@pytest.mark.parametrize("cache", ["none", "block_causal"])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"rule": Threshold(0.3)}, {"forbid": [3]}])
def test_an_autoregressive_model_needs_no_mask_token(cache, how):
    """Every id may be proposed, the one that was the mask too; prompts may hold it."""
    model = model_of("Qwen2.5-7B")
    with_mask = settings(model, cache=cache, **{**how, "forbid": [*how.get("forbid", ()), 49]})
    right = generate(model, PROMPTS, with_mask).tokens
    model.config = dataclasses.replace(model.config, mask_id=-1)
    assert generate(model, PROMPTS, with_mask).tokens == right
    config, prompts = settings(model, cache=cache, **how), [*PROMPTS, [49, 2]]
    found = generate(model, prompts, config)
    decoder = Decoder(model, config, slots=2)
    for prompt in prompts:
        decoder.submit(prompt)
    while decoder.step():
        pass
    assert [done.tokens for done in sorted(decoder.collect(), key=lambda done: done.ticket)] == found.tokens
    if not how:
        for prompt, text in zip(prompts, found.tokens):
            row = list(prompt)
            for token in text:
                with torch.no_grad():
                    last = model(torch.tensor([row]), shift=False)[0, -1]
                assert token == int((model.head_weight @ last).argmax())
                row.append(token)


def test_without_a_mask_token_what_needs_one_is_named():
    model = model_of("Qwen2.5-7B")
    model.config = dataclasses.replace(model.config, mask_id=-1)
    with pytest.raises(PromptError, match="prompt 1: expected a token at least, because the model has no mask"):
        generate(model, [[1], []], settings(model))
    with pytest.raises(PromptError, match=r"guidance needs a mask token, .* load\(folder, mask_id=...\)"):
        generate(model, [[1]], settings(model, guidance=1.0))
    for sampler in ("self-speculation", "draft", "canvas"):
        with pytest.raises(PromptError, match=f"sampler '{sampler}' needs a mask token"):
            generate(model, [[1]], GenerationConfig(max_new_tokens=4, sampler=sampler))
    for preset in ("demo", "SDAR-8B", "Dream-7B"):
        model = model_of(preset)
        model.config = dataclasses.replace(model.config, mask_id=-1)
        with pytest.raises(PromptError, match="decoding needs a mask token"):
            generate(model, [[1]], settings(model))
    with pytest.raises(PromptError, match="fill needs a mask token"):
        fill(model, [[1]], GenerationConfig())


@pytest.mark.parametrize("preset", ["demo", "SDAR-8B", "Qwen2.5-7B"])
@pytest.mark.parametrize("variable_length", [True, False])
def test_stop_when_ends_a_sequence_at_the_block_in_which_it_holds(preset, variable_length):
    """Each sequence's tokens are those without it, up to the end of the block that meets its condition."""
    model = model_of(preset)
    common = {"variable_length": variable_length or preset != "demo", "max_new_tokens": 16}
    free = generate(model, PROMPTS, settings(model, **common))
    wanted = [row[i] for row, i in zip(free.tokens, (0, 5, 15))]
    asked: list[list[int]] = []

    def found(ids: list[int]) -> bool:
        asked.append(ids)
        return any(row[: len(ids)] == ids and token in ids for row, token in zip(free.tokens, wanted))

    result = generate(model, PROMPTS, settings(model, stop_when=found, **common))
    for text, row, token in zip(result.tokens, free.tokens, wanted):
        assert token in text and text == row[: len(text)]
    assert result.stopped == [True] * 3 and len(result.tokens[0]) < 16 and result.forward_passes <= free.forward_passes
    assert all(0 < len(ids) <= 16 and model.config.mask_id not in ids for ids in asked)
    never = generate(model, PROMPTS, settings(model, stop_when=lambda ids: False, **common))
    assert never == free


def test_stop_when_that_is_no_function_is_named():
    with pytest.raises(PromptError, match="stop_when: expected a function of a list of ids"):
        generate(model_of("demo"), PROMPTS, settings(model_of("demo"), stop_when="\n"))


def test_a_logit_bias_beyond_the_vocabulary_is_named():
    model = model_of("demo")
    with pytest.raises(PromptError, match=r"logit_bias: expected ids in \[0, \d+\), got 100000"):
        generate(model, PROMPTS, settings(model, logit_bias=([3, 100000], [1.0, 1.0])))


@pytest.mark.parametrize("variable_length", [True, False])
def test_sequences_stop_on_their_own(variable_length):
    """The stop token is one that the text of some prompts holds early, of others late or never."""
    model, prompts = model_of("demo"), [[i, 2 * i, 7] for i in range(12)]
    common = {"variable_length": variable_length, "max_new_tokens": 16}
    free = generate(model, prompts, settings(model, **common)).tokens
    first = {t: [row.index(t) if t in row else None for row in free] for t in range(48)}
    stop = max(first, key=lambda t: len({None if i is None else i // 4 for i in first[t]}))
    result = generate(model, prompts, settings(model, stop_ids=(stop,), **common))
    assert result.tokens == [row[:at] for row, at in zip(free, first[stop])]
    assert result.stopped == [at is not None for at in first[stop]]
    assert result.filled == [16 if at is None else (at // 4 + 1) * 4 for at in first[stop]]
    assert len(set(result.filled)) >= 3


def test_an_empty_prompt_generates_without_condition_and_no_prompts_give_nothing():
    for preset in MODELS:
        model = model_of(preset)
        # Among nothing but masks all rows are alike, and a rounding says which is first: take the whole block.
        config = settings(model, rule=TopK(4))
        together = generate(model, [[], *PROMPTS], config)
        assert together.tokens[0] == plain_generate(model, [], config)[0] == generate(model, [[]], config).tokens[0]
        assert together.tokens[1:] == generate(model, PROMPTS, config).tokens
        assert generate(model, [], config).tokens == []


def test_prompts_may_be_tensors():
    model = model_of("demo")
    lists = generate(model, PROMPTS, settings(model)).tokens
    assert generate(model, [torch.tensor(p) for p in PROMPTS], settings(model)).tokens == lists
    square = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert generate(model, square, settings(model)) == generate(model, square.tolist(), settings(model))


# ---- sampling ----------------------------------------------------------------------------------------------------


def test_a_seed_fixes_the_text_and_another_changes_it():
    model = model_of("demo")
    texts = [generate(model, PROMPTS, settings(model, temperature=1.0, seed=s)).tokens for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_each_pass_and_block_draws_new_noise():
    """Under equal logits everywhere the noise alone decides, so every pass must count as a step of its own."""
    model = model_of("demo")
    with torch.no_grad():
        model.norm.weight.zero_()
    steps: list[int] = []
    original = illada_kernels.unmask

    def recording(*args, **kwargs):
        steps.append(int(kwargs["step"]))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(illada_kernels, "unmask", recording)
        result = generate(model, [[1]], settings(model, temperature=1.0, revise_steps=0))
    assert steps == list(range(8))
    assert len(set(result.tokens[0])) > 4


@pytest.mark.parametrize("preset", ["demo", "SDAR-8B"])
def test_guidance_extrapolates_from_masked_prompts(preset):
    """Two plain models' logits, u + (w + 1) (c - u), decide each token; w = 0 is no guidance."""
    model, weight = model_of(preset), 1.5
    prompt, mask = [7, 2, 40, 33], model.config.mask_id
    tokens = torch.tensor(prompt + [mask] * 4)
    while (tokens == mask).any():
        hidden_prompt = torch.cat([torch.full((4,), mask), tokens[4:]])
        with_prompt, without = plain_logits(model, tokens), plain_logits(model, hidden_prompt)
        logits = without + (weight + 1) * (with_prompt - without)
        logits[:, mask] = -math.inf
        best = logits.softmax(-1).amax(-1).masked_fill(tokens != mask, -1)
        tokens[best.argmax()] = logits[best.argmax()].argmax()
    config = settings(model, max_new_tokens=4, rule=TopK(1))
    guided = generate(model, [prompt], GenerationConfig(**{**vars(config), "guidance": weight}))
    assert guided.tokens[0] == tokens[4:].tolist() != generate(model, [prompt], config).tokens[0]


def test_an_edit_replaces_a_token_that_the_model_no_longer_proposes():
    """With everything committed in one pass, edits go on until no other token has a probability of tau."""
    model, prompts = model_of("demo"), [[i, 2 * i, 7] for i in range(12)]
    config = settings(model, rule=TopK(4), revise=Edit(0.3), revise_steps=16, max_new_tokens=4)
    plain = generate(model, prompts, settings(model, rule=TopK(4), max_new_tokens=4))
    edited = generate(model, prompts, config)
    settled = 0
    for prompt, text, before, passes in zip(prompts, edited.tokens, plain.tokens, edited.passes):
        if passes == 1 + 16:  # it goes round in circles: nothing to assert
            continue
        p = plain_logits(model, torch.tensor(prompt + text))[-4:].softmax(-1)
        assert all(best == token or q < 0.3 for q, best, token in zip(*(x.tolist() for x in p.max(-1)), text))
        settled += text != before
    assert settled >= 4


@pytest.mark.parametrize("rule, until_full", [(TopK(1), 4), (TopK(2), 2), (TopK(4), 1)])
def test_the_budget_of_edits_counts_from_when_the_block_is_full(rule, until_full):
    """tau 0 edits whatever differs: of many prompts some go on to the limit, none beyond."""
    model, prompts = model_of("demo"), [[i, 2 * i, 7] for i in range(12)]
    changes = {"rule": rule, "revise": Edit(0.0), "max_new_tokens": 4}
    for budget in (0, 1, 3):
        passes = generate(model, prompts, settings(model, revise_steps=budget, **changes)).passes
        assert max(passes) == until_full + budget


def test_edits_of_a_sequence_end_at_its_own_limit_while_others_go_on():
    """Prompts that fill the first block to different degrees have different limits; tau 0 edits at every chance."""
    model, prompts = model_of("SDAR-8B"), [[i] * (i % 4 + 1) for i in range(12)]
    changes = {"rule": TopK(4), "revise": Edit(0.0), "revise_steps": 2, "max_new_tokens": 4}
    together = generate(model, prompts, settings(model, **changes))
    alone = [generate(model, [prompt], settings(model, **changes)) for prompt in prompts]
    assert together.tokens == [result.tokens[0] for result in alone]
    assert len(set(together.passes)) > 2


def test_remasking_takes_tokens_back_and_then_fills_up():
    model = model_of("demo")
    masks: list[int] = []
    config = settings(model, rule=TopK(2), revise=Remask(1), revise_steps=3, max_new_tokens=4)
    result = generate(model, [[1, 2]], config, lambda s: masks.append(int((s.tokens[:, 2:] == 49).sum())))
    # the first pass has nothing to take back; two more gain one token each and lose one of those held; then all stays
    assert masks == [2, 1, 1, 0] and result.passes == [4]
    assert len(result.tokens[0]) == 4


# ---- filling holes -----------------------------------------------------------------------------------------------


def test_holes_are_filled_from_both_sides_and_nothing_else_changes():
    for preset in ("demo", "Dream-7B"):
        model = model_of(preset)
        mask = model.config.mask_id
        texts = [[3, mask, 4, mask, mask, 9, 2], [mask, 6], [1, 2, 3], [8, *[mask] * 5]]
        result = fill(model, texts)
        for text, filled in zip(texts, result.tokens):
            tokens = torch.tensor(text)
            while (tokens == mask).any():
                p = plain_logits(model, tokens).softmax(-1)
                at = p.amax(-1).masked_fill(tokens != mask, -1).argmax()
                tokens[at] = p[at].argmax()
            assert filled == tokens.tolist()
        assert result.filled == [3, 1, 0, 5] and result.passes == [3, 1, 0, 5]
        changed = fill(model, [[3, mask, 4, mask, mask, 9, t] for t in range(40)]).tokens
        assert len({row[1] for row in changed}) > 1  # what stands to the right matters


@pytest.mark.parametrize("how", [{"rule": Threshold(0.2)}, {"temperature": 1.0}, {"steps_per_block": 2}])
def test_filling_a_batch_equals_filling_each_alone(how):
    model = model_of("demo")
    mask = model.config.mask_id
    texts = [[3, mask, 4, mask, mask, 9, 2, mask], [mask, 6], [1, 2], []]
    config = settings(model, block_length=2, **how)
    together = fill(model, texts, config)
    for b, text in enumerate(texts):
        alone = fill(model, [text], GenerationConfig(**{**vars(config), "seed": b}))
        assert (together.tokens[b], together.passes[b]) == (alone.tokens[0], alone.passes[0])
    assert fill(model, [], config).tokens == []


# ---- what it costs -----------------------------------------------------------------------------------------------


def test_only_candidate_rows_reach_the_head(monkeypatch):
    rows: list[tuple[int, ...]] = []
    original = illada_kernels.unmask

    def recording(hidden, *args, **kwargs):
        rows.append(tuple(hidden.shape))
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(illada_kernels, "unmask", recording)
    model = model_of("demo")
    generate(model, PROMPTS, settings(model, rule=TopK(2)))
    assert rows == [(3, 4, 24)] * 4
    rows.clear()
    fill(model, [[1, 49, 2, 49, 3], [4, 49]])
    assert rows == [(2, 2, 24)] * 2


class Synchronisations(TorchDispatchMode):
    """Counts the operators that read a tensor's value on the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        self.count += func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "how, expected",
    [
        ({"rule": TopK(1)}, 0),
        ({"steps_per_block": 2}, 0),
        ({"rule": TopK(1), "cache": "dual"}, 0),
        ({"rule": Threshold(1.0)}, 0),
        ({"rule": Threshold(0.3), "revise": Edit(0.3)}, 0),
        ({"rule": EntropyBound(2.5), "revise": Remask(1)}, 0),
    ],
)
def test_no_pass_synchronises_with_the_host(how, expected):
    model = model_of("demo")
    with Synchronisations() as seen:
        generate(model, PROMPTS, settings(model, **how))
    assert seen.count == expected


def test_callbacks_see_every_pass_and_the_text_grow():
    model = model_of("demo")
    masks, blocks, committed = [], [], 0

    def look(step):
        nonlocal committed
        masks.append(int((step.tokens == model.config.mask_id).sum()))
        blocks.append((step.block, step.step))
        committed += int(step.committed.sum())
        assert (step.tokens.gather(1, step.positions.clamp(min=0)) != model.config.mask_id)[step.committed].all()
        assert step.starts == [0, 6, 2] and step.forward_passes == len(masks)

    result = generate(model, PROMPTS, settings(model, rule=TopK(2)), look)
    assert masks == [18, 12, 6, 0] and blocks == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert committed == sum(result.filled) == 24


@pytest.mark.parametrize("cache", ["none", "interval", "block_causal"])
def test_sequences_that_have_ended_leave_the_batch_and_callbacks_still_see_them(cache):
    """Rows that a pass computes, and what it shows of each sequence: what that one alone shows."""
    model = model_of("SDAR-8B" if cache == "block_causal" else "demo")
    prompts = [[i, 2 * i, 7] for i in range(6)]
    free = generate(model, prompts, settings(model, cache=cache, max_new_tokens=16)).tokens
    stop = max(range(48), key=lambda t: len({row.index(t) // 4 for row in free if t in row}))
    config = settings(model, cache=cache, max_new_tokens=16, stop_ids=(stop,))

    def watched(some):
        steps, rows = [], []
        handle = model.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
        done = generate(model, some, config, lambda s: steps.append((s.tokens, s.tokens.tolist(), s)))
        handle.remove()
        assert len({id(tokens) for tokens, *_ in steps}) == 1 and rows == sorted(rows, reverse=True)
        return done, steps, rows

    together, steps, rows = watched(prompts)
    by_hand = dataclasses.replace(config, rule=lambda now: TopK(1))  # it may know each row by its place: all stay
    assert generate(model, prompts, by_hand).tokens == together.tokens
    config, kept = by_hand, config
    assert set(watched(prompts)[2]) == {6}
    config = kept
    assert len(set(rows)) >= 3 and min(rows) < 6  # every block has as many rows as are left
    for b, prompt in enumerate(prompts):
        alone, own, _ = watched([prompt])
        assert (together.tokens[b], together.passes[b]) == (alone.tokens[0], alone.passes[0])
        for (_, table, step), (_, own_table, own_step) in zip(steps, own):
            assert table[b][step.starts[b] :] == own_table[0][own_step.starts[0] :]
            assert step.committed[b].tolist() == own_step.committed[0].tolist()
        after = [step for *_, step in steps[len(own) :]]
        assert not any(step.committed[b].any() or (step.positions[b] >= 0).any() for step in after)


def test_numbers_of_each_sequence_stay_with_it_where_others_end():
    model, prompts = model_of("demo"), [[i, 2 * i, 7] for i in range(6)]
    taus = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.9, 0.4])
    common = {"max_new_tokens": 16, "stop_ids": tuple(range(20))}
    together = generate(model, prompts, settings(model, rule=Threshold(taus), **common))
    assert len(set(map(len, together.tokens))) > 2
    for b, prompt in enumerate(prompts):
        alone = generate(model, [prompt], settings(model, rule=Threshold(float(taus[b])), **common))
        assert (together.tokens[b], together.passes[b]) == (alone.tokens[0], alone.passes[0])


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, changes, message",
    [
        ("hello", {}, "prompts: expected a list of token lists, got str; encode text first"),
        (["hello"], {}, "prompt 0: expected token ids, got str"),
        ([[1], [50]], {}, r"prompt 1: expected ids in \[0, 50\), got 50"),
        ([[1, 49]], {}, r"prompt 0: expected no mask_id \(49\); fill"),
        ([[1] * 57], {}, "prompt 0: 57 tokens and max_new_tokens = 8 exceed max_seq_len = 64; shorten the prompt"),
        ([torch.zeros(2, 2)], {}, "prompt 0: expected integers"),
        ([[1]], {"temperature": -1.0}, "temperature: expected a number of at least 0, got -1.0"),
        ([[1]], {"confidence_temperature": -1}, "confidence_temperature: expected a number of at least 0, got -1"),
        ([[1]], {"confidence": "sure"}, "confidence: expected one of probability, margin, .* got 'sure'"),
        ([[1]], {"order": None}, "order: expected one of confidence, left, got None"),
        ([[1]], {"end_early": "no"}, "end_early: expected True or False, got 'no'"),
        ([[1]], {"variable_length": "no"}, "variable_length: expected True or False, got 'no'"),
        ([[1]], {"rule": torch.tensor([-1, 5])}, "rule: expected counts of at least 0, got -1"),
        (
            [[1], [2]],
            {"rule": torch.tensor([[1, 2, 3]])},
            r"rule: expected counts for each of 2 sequences, got \(1, 3\)",
        ),
        ([[1]], {"revise": lambda now: Edit(0.5)}, "revise: expected a callable that returns a Remask, got Edit"),
        ([[1]], {"steps": 3}, "steps: expected a multiple of the 2 blocks of 4 tokens, got 3"),
        ([[1]], {"steps": 4, "rule": TopK(1)}, "steps: expected None with a rule"),
        ([[1]], {"steps": 4, "steps_per_block": 2}, "steps: expected None with steps_per_block"),
        ([[1]], {"rule": torch.ones(2)}, r"rule: expected integers \(passes,\) or \(passes, B\), got torch.float32"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ([[1]], {"rule": TopK(0)}, "rule: expected TopK of at least 1"),
        ([[1]], {"rule": TopK(1), "steps_per_block": 2}, "steps_per_block: expected None with a rule"),
        ([[1]], {"steps_per_block": 0}, "steps_per_block: expected at least 1"),
        ([[1]], {"cache": "block_causal"}, "cache: expected one of none, prefix, dual, vicinity, interval, delayed"),
        ([[1]], {"cache": "dual", "vicinity": 3}, "vicinity: expected none with cache 'dual'"),
        ([[1]], {"cache": "vicinity", "vicinity": -1}, "vicinity: expected at least 0, got -1"),
        ([[1]], {"refresh_every": 2}, "refresh_every: expected 0 with cache 'none'"),
        ([[1]], {"seed": [1, 2]}, "seed: expected an int or one for each of 1 sequences, got 2"),
        ([[1]], {"guidance": float("nan")}, "guidance: expected a finite number"),
    ],
)
def test_what_cannot_be_generated_is_refused_with_the_reason(prompts, changes, message):
    model = model_of("demo")
    with pytest.raises(PromptError, match=message):
        generate(model, prompts, settings(model, **changes))


def test_models_that_cannot_are_refused():
    with pytest.raises(PromptError, match="mask_id is -1"):
        generate(make(tiny("demo", mask_id=-1)), [[1]])
    sdar = model_of("SDAR-8B")
    with pytest.raises(PromptError, match="block_length: expected 4, the model's own blocks, got 8"):
        generate(sdar, [[1]], GenerationConfig(max_new_tokens=8, block_length=8))
    with pytest.raises(PromptError, match="cache: expected one of none, block_causal for a block-causal model, got"):
        generate(sdar, [[1]], settings(sdar, cache="dual"))
    with pytest.raises(PromptError, match="fill: expected a model that sees both sides"):
        fill(sdar, [[1, 49]])
    with pytest.raises(PromptError, match="cache: expected none for fill"):
        fill(model_of("demo"), [[1, 49]], GenerationConfig(cache="dual"))
    with pytest.raises(PromptError, match="sequence 0: 65 tokens exceed max_seq_len = 64"):
        fill(model_of("demo"), [[49] * 65])


def test_a_model_of_nan_is_an_error_and_no_text():
    model = model_of("demo")
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    for rule in (TopK(1), Threshold(0.5)):
        with pytest.raises(RuntimeError, match="sequence 0: 8 positions stayed masked; the model's hidden rows"):
            generate(model, PROMPTS, settings(model, rule=rule))


# ---- truncation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", MODELS)
def test_drawing_from_the_best_alone_is_greedy_and_from_more_is_not(preset):
    model = model_of(preset)
    greedy = generate(model, PROMPTS, settings(model)).tokens
    free = generate(model, PROMPTS, settings(model, temperature=3.0, seed=2)).tokens
    for name, best, more in (("top_k", 1, 9), ("top_p", 0.0, 0.7), ("min_p", 1.0, 0.3)):
        drawn = generate(model, PROMPTS, settings(model, temperature=3.0, seed=2, **{name: best})).tokens
        some = generate(model, PROMPTS, settings(model, temperature=3.0, seed=2, **{name: more})).tokens
        assert drawn == greedy != free and some not in (greedy, free)
    assert decoded(model, temperature=3.0, top_p=0.0, seed=2) == decoded(model)


def decoded(model: Model, **changes) -> list[list[int]]:
    decoder, done = Decoder(model, settings(model, **changes), slots=2), {}
    tickets = [decoder.submit(prompt) for prompt in PROMPTS]
    while decoder.step():
        done |= {d.ticket: d.tokens for d in decoder.collect()}
    done |= {d.ticket: d.tokens for d in decoder.collect()}
    return [done[ticket] for ticket in tickets]
