"""generate and Decoder on a GPU: passes as CUDA graphs give the tokens of passes without, and are captured once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from illada import Decoder, GenerationConfig, Model, generate
from illada.decoding import replay

from illada_kernels import Edit, Factor, Threshold, TopK
from illada_kernels.layer import kernels_for
from tests.helpers.models import make, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9], [2, 7]]
RULES = {
    "one": {"rule": TopK(1)},
    "threshold": {"rule": Threshold(0.3)},
    "sampled": {"rule": Factor(1.0), "temperature": 1.0},
    "edit": {"rule": Threshold(0.1), "revise": Edit(0.1), "revise_steps": 3},
    "guided": {"rule": TopK(1), "guidance": 0.5},
}
CACHES = [("demo", cache) for cache in ("none", "prefix", "dual", "vicinity", "interval")]
CACHES += [("Dream-7B", "dual"), ("SDAR-8B", "block_causal"), ("Qwen2.5-7B", "block_causal")]


def model_of(preset: str) -> Model:
    return make(tiny(preset), dtype=torch.float32).cuda()


def settings(model: Model, **changes) -> GenerationConfig:
    block = model.config.causal_block or 4
    return GenerationConfig(**{"max_new_tokens": 20, "block_length": block, "stop_ids": (), "seed": 5, **changes})


@pytest.fixture
def captures(monkeypatch) -> list[object]:
    """Grows by one whenever a graph is captured."""
    made: list[object] = []
    original = torch.cuda.graph

    def counted(graph, **options):
        made.append(graph)
        return original(graph, **options)

    monkeypatch.setattr(torch.cuda, "graph", counted)
    return made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("preset, cache", CACHES)
@pytest.mark.parametrize("whole", [False, True])
def test_graphs_give_the_tokens_that_passes_without_them_give(preset, cache, rule, whole, captures, monkeypatch):
    model = model_of(preset)
    config = settings(model, cache=cache, variable_length=not whole, **RULES[rule])
    with_graphs = generate(model, PROMPTS, config)
    captured = len(captures)
    monkeypatch.setattr(replay, "has_graphs", lambda device: False)
    assert generate(model, PROMPTS, config) == with_graphs
    assert len(captures) == captured and (captured > 0 or cache == "none")


@pytest.mark.parametrize(
    "preset, cache", [("demo", "dual"), ("SDAR-8B", "block_causal"), ("Qwen2.5-7B", "block_causal")]
)
def test_graphs_of_triton_s_rows_give_the_tokens_that_passes_without_them_give(preset, cache, captures, monkeypatch):
    pytest.importorskip("triton", reason="no triton")
    monkeypatch.setattr("illada.model.kernels_for", partial(kernels_for, backend="triton"))
    model = model_of(preset)
    config = settings(model, cache=cache, rule=Threshold(0.3))
    with_graphs = generate(model, PROMPTS, config)
    assert captures
    monkeypatch.setattr(replay, "has_graphs", lambda device: False)
    assert generate(model, PROMPTS, config) == with_graphs


def test_a_delayed_cache_gives_the_same_tokens_from_graphs(captures, monkeypatch):
    model, options = model_of("demo"), {"length": 3, "entropy": 2.5, "delay": 1}
    config = GenerationConfig(20, sampler="d3llm", sampler_options=options, cache="delayed", stop_ids=())
    with_graphs = generate(model, PROMPTS, config)
    assert captures
    monkeypatch.setattr(replay, "has_graphs", lambda device: False)
    assert generate(model, PROMPTS, config) == with_graphs


def test_a_shape_is_captured_once_for_all_blocks(captures):
    model = model_of("demo")
    for length in (12, 20, 40):
        captures.clear()
        generate(model, PROMPTS, settings(model, cache="dual", rule=Threshold(0.3), max_new_tokens=length))
        assert len(captures) == 1


def test_no_pass_waits_for_the_gpu():
    """torch raises at every operation that synchronises; the flag's event is waited for on purpose."""
    model = model_of("demo")
    decoder = Decoder(
        model, settings(model, cache="interval", refresh_every=2, block_length=16), slots=2, max_length=40
    )
    decoder.submit([1, 2, 3])
    decoder.submit([4])
    for _ in range(4):
        decoder.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            assert decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
