"""The plan of a cluster: its page is what the arithmetic gives, and the arithmetic is that of the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from illada import Model, ModelConfig

from benchmarks.report import cluster
from benchmarks.report.cluster import Plan

PLAN = Plan(ModelConfig.preset("iLLaDA-8B"), 64)


def test_the_page_is_what_the_arithmetic_gives():
    text = cluster.PAGE.read_text()
    assert cluster.updated(text) == text, "run: python -m benchmarks.report.cluster"


def test_flops_of_a_token_are_those_that_torch_counts():
    """A small model's forward: 2 a weight of the layers, and attention's 4 a pair and channel."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = ModelConfig.preset("demo", dim=32, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, qk_norm=False)
    plan, model = Plan(shape, 1, window=64, split=0.0, again=False), Model(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.int64))
    norms = 2 * shape.dim * shape.n_layers  # weights that no matmul has
    forward, backward = plan.attention_flops()
    assert counter.get_total_flops() == 64 * (2 * (plan.body - norms) + forward) and backward == 2.5 * forward


def test_split_windows_see_two_thirds_of_theirs():
    cut = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = float((cut**2 + (1 - cut) ** 2).mean())  # standard deviation 0.15 / 316 of the mean
    assert dataclasses.replace(PLAN, split=1.0).seen() == pytest.approx(8192 * seen, rel=0.005)


def test_more_gpus_need_less_memory_and_keep_the_pace_of_computing():
    plans = [dataclasses.replace(PLAN, gpus=gpus) for gpus in (8, 64, 1024)]
    memory, pace = [p.memory() for p in plans], [p.tokens_per_second() / p.gpus for p in plans]
    assert memory == sorted(memory, reverse=True) and memory[0] < 141e9  # an H200's
    assert pace == sorted(pace, reverse=True) and pace[0] < 1 / PLAN.seconds_per_token(floor=True)
    assert plans[0].state_bytes() == 2 * PLAN.model.num_parameters  # 16 bytes a weight, an eighth of it


@pytest.mark.parametrize("factor, hidden", [(0.9, False), (1.1, True)])
def test_communication_hides_exactly_from_the_number_of_tokens_that_is_named(factor, hidden):
    windows = factor * PLAN.hides_from() / PLAN.window
    plan = dataclasses.replace(PLAN, windows=windows)
    assert (plan.communication() < plan.compute()) == hidden
    assert Plan(PLAN.model, 1).exposed() == 0
