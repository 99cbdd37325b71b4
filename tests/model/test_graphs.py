"""Passes as graphs, on a stand-in that records operators: one capture a shape, whatever the block; the same tokens."""

from __future__ import annotations

import pytest
from illada import Decoder, GenerationConfig, fill, generate

from illada_kernels import Edit, Factor, Remask, Threshold, TopK
from tests.helpers.models import model_of
from tests.helpers.stand_in_graphs import stand_in

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9], [2, 7]]


def settings(model, **changes) -> GenerationConfig:
    block = model.config.causal_block or 4
    return GenerationConfig(**{"max_new_tokens": 20, "block_length": block, "stop_ids": (), "seed": 5, **changes})


HOW = {
    "one": {"rule": TopK(1)},
    "threshold": {"rule": Threshold(0.3)},
    "sampled": {"rule": Factor(1.0), "temperature": 1.0},
    "edit": {"rule": Threshold(0.1), "revise": Edit(0.1), "revise_steps": 3},
    "remask": {"rule": TopK(3), "revise": Remask(1), "revise_steps": 2},
    "guided": {"rule": TopK(1), "guidance": 0.5},
    "growing": {"rule": TopK(1), "growing_bias": {3: 0.5}},
    "stop": {"rule": TopK(2), "stop_ids": tuple(range(12))},
}
CACHES = [("demo", cache) for cache in ("none", "prefix", "dual", "vicinity", "interval")]
CACHES += [("Dream-7B", "dual"), ("SDAR-8B", "none"), ("SDAR-8B", "block_causal"), ("Qwen2.5-7B", "block_causal")]


# each cache with one way, and each way with some caches
PAIRS = [(*pair, "threshold") for pair in CACHES]
PAIRS += [(*pair, how) for pair in (CACHES[4], CACHES[7]) for how in HOW if how != "threshold"]


@pytest.mark.parametrize("preset, cache, how", PAIRS)
@pytest.mark.parametrize("whole", [False, True])
def test_graphs_give_the_tokens_that_passes_without_them_give(preset, cache, how, whole, monkeypatch):
    model = model_of(preset)
    config = settings(model, cache=cache, variable_length=not whole, **HOW[how])
    plain = generate(model, PROMPTS, config)
    log = stand_in(monkeypatch)
    assert generate(model, PROMPTS, config) == plain
    assert "replay" in log or cache == "none" or how == "stop"


def test_a_delayed_cache_gives_the_same_tokens_from_graphs(monkeypatch):
    model, options = model_of("demo"), {"length": 3, "entropy": 2.5, "delay": 1}
    config = GenerationConfig(20, sampler="d3llm", sampler_options=options, cache="delayed", stop_ids=())
    plain = generate(model, PROMPTS, config)
    log = stand_in(monkeypatch)
    assert generate(model, PROMPTS, config) == plain and "replay" in log


def captures(log: list[str]) -> int:
    return log.count("capture")


@pytest.mark.parametrize(
    "preset, cache, whole, expected",
    [  # of five blocks of four passes: the first pass of a block, and the others
        ("demo", "dual", True, 2),
        ("demo", "dual", False, 1),  # the first passes see ever more columns
        ("demo", "vicinity", True, 3),  # a block at the right end has fewer neighbours
        ("demo", "interval", True, 2),
        ("demo", "interval", False, 2),
        ("demo", "none", True, 1),
        ("SDAR-8B", "block_causal", True, 2),
        ("Qwen2.5-7B", "block_causal", True, 1),
    ],
)
def test_a_shape_is_captured_once_for_all_blocks(preset, cache, whole, expected, monkeypatch):
    model = model_of(preset)
    log = stand_in(monkeypatch)
    common = {"rule": TopK(1), "variable_length": not whole, "cache": cache}
    more = {"vicinity": 3} if cache == "vicinity" else {}
    done = generate(model, PROMPTS, settings(model, **common, **more))
    assert captures(log) == expected
    assert done.forward_passes - log.count("replay") <= 6 + 3 * (not whole)  # what ran without a graph


def test_a_longer_text_takes_no_more_captures(monkeypatch):
    model, counts = model_of("demo"), []
    for length in (12, 20, 40):
        log = stand_in(monkeypatch)
        generate(model, PROMPTS, settings(model, cache="dual", rule=Threshold(0.3), max_new_tokens=length))
        counts.append(captures(log))
    assert counts[0] == counts[1] == counts[2] == 1


@pytest.mark.parametrize("preset, cache, how", PAIRS)
def test_a_decoder_s_rows_come_in_few_sizes(preset, cache, how, monkeypatch):
    """Seven sequences in five seats: 5, 4, 2 and 1 rows. The tokens are those of a batch without graphs."""
    model = model_of(preset)
    prompts = [*PROMPTS, [11], [40, 30, 20], [9, 9]]
    config = settings(model, cache=cache, variable_length=True, max_new_tokens=9, **HOW[how])
    together = generate(model, prompts, config).tokens
    log = stand_in(monkeypatch)
    decoder, sizes = Decoder(model, config, slots=5, max_length=24), []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    for prompt in prompts:
        decoder.submit(prompt)
    while decoder.step():
        pass
    handle.remove()
    assert {done.ticket: done.tokens for done in decoder.collect()} == dict(enumerate(together))
    assert set(sizes) <= ({2, 4, 8, 10, 1} if how == "guided" else {1, 2, 4, 5})
    assert captures(log) <= 12


def test_fill_is_captured_once_for_all_its_parts(monkeypatch):
    model, mask = model_of("demo"), 49
    texts = [[3, mask, 4, mask, mask, 9, 2, mask, mask, mask], [mask, 6, mask, mask, 1]]
    config = GenerationConfig(block_length=2, steps_per_block=2)
    plain = fill(model, texts, config)
    log = stand_in(monkeypatch)
    assert fill(model, texts, config) == plain and captures(log) == 1 and "replay" in log
