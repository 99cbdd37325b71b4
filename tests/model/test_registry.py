"""Every objective in the registry: its mean is the exact one, no weight depends on micro-batches, and what it trains
generates what it was trained on. A new objective fails here until it has a case in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from illada import cli
from illada.checkpoint import read_config
from illada.decoding.config import GenerationConfig
from illada.decoding.generate import generate
from illada.training import registry, runs
from illada.training.config import TrainConfig
from illada.training.objectives import Example, blocks, documents, sequence, trajectories
from illada.training.registry import OBJECTIVES, OPTIONS, Batch, checked
from illada.training.trajectories import States, Trajectory
from torch import Tensor

from tests.helpers import enumerated as e

ROOT = Path(__file__).parents[2]
PROMPT = 2  # tokens of the prompt, where data are pairs
ORDER = torch.tensor([2, 1, 4, 3, 6, 5, 7, 8, 9, 10, 12, 11])  # of a trajectory, block after block of two or four


def made_of(
    name: str,
    tokens: Tensor,
    options: dict[str, Any],
    *,
    prompt: int = 0,
    seed: int = 0,
    vocab: int = e.VOCAB,
    order: Tensor = ORDER,
) -> Example:
    """The objective's example of clean tokens at the end of a run."""
    learn = (torch.arange(tokens.shape[1]) >= prompt).expand(tokens.shape) if prompt else None
    states = None
    if OBJECTIVES[name].answers == "recorded":
        order = order[..., : tokens.shape[1]].where(torch.arange(tokens.shape[1]) >= prompt, 0).expand(tokens.shape)
        batch_size = len(tokens)
        states = States(order.numpy(), np.full(batch_size, tokens.shape[1]), None, np.full(batch_size, 1))
    batch = Batch(tokens, learn, e.MASK, vocab, e.generator(seed), done=1.0, states=states)
    return OBJECTIVES[name].make(batch, **checked(name, options))


# ---- the exact mean --------------------------------------------------------------------------------------------------


def packed_mean(model: Any) -> float:
    """A window is whole with probability 0.7, else cut at 1, 2 or 3 alike."""
    text, levels = e.TEXT[:4].tolist(), e.above(0.05)
    cut = [e.whole_bound(model, part, levels) for at in (1, 2, 3) for part in (text[:at], text[at:])]
    return (0.7 * e.whole_bound(model, text, levels) + 0.3 * sum(cut) / 3) / 4


def joint_mean(model: Any) -> float:
    text, levels = e.TEXT[:4].tolist(), e.above(1e-3)
    masked = e.blocks_bound(model, text, 2, levels, 1 / levels, "both") / 4
    return masked + 0.2 * e.next_token_mean(model, text)


def token_to_token_mean(model: Any) -> float:
    """With rate 0, the masks alone; test_objectives.py has the replaced tokens."""
    levels = e.above(1e-3)
    return e.blocks_bound(model, e.TEXT[:4].tolist(), 2, levels, 1 / levels) / 4


def path_mean(model: Any, block: int | None) -> float:
    """-log p of the trajectory, a token; the model sees all, or blocks."""
    text, order, total = e.TEXT[:4].tolist(), ORDER[:4].tolist(), 0.0
    for i, k in enumerate(order):
        shown = [x if o < k else e.MASK for x, o in zip(text, order)]
        if block is None:
            total += float(e.ce(model, shown, text)[i])
        else:
            start = i // block * block
            own = slice(start, start + block)
            total += float(e.block_ce(model, text[:start], shown[own], text[own], block)[i - start])
    return total / 4


# name: the text's length, options, tokens of the prompt, the exact mean of a model
I_DLM = {"block": 2, "causal": "both", "diffusion": 1.0, "autoregressive": 0.2}
EXACT: dict[str, tuple[int, dict[str, Any], int, Any]] = {
    "full": (4, {}, 0, lambda m: e.whole_bound(m, e.TEXT[:4].tolist(), e.above(1e-3)) / 4),
    "packed": (4, {"eps": 0.05}, 0, packed_mean),
    "sft": (5, {}, PROMPT, lambda m: e.whole_bound(m, e.TEXT[:5].tolist(), e.above(1e-3), prompt=PROMPT) / 3),
    "block": (4, {"block": 2}, 0, lambda m: e.blocks_bound(m, e.TEXT[:4].tolist(), 2, e.LEVELS, 1 / e.LEVELS) / 4),
    "joint": (4, I_DLM, 0, joint_mean),
    "anchor_blocks": (6, {"block": 3, "anchors": 2, "gamma": 2.0}, 0, lambda m: e.anchors_mean(m, e.TEXT.tolist())),
    "seed_diffusion": (
        3,
        {"edited": 2 / 3},
        0,
        lambda m: e.whole_bound(m, e.TEXT[:3].tolist(), e.above(1e-3)) / 3 + e.edits_mean(m, e.TEXT[:3].tolist()),
    ),
    "token_to_token": (4, {"block": 2, "rate": 0.0}, 0, token_to_token_mean),
    "uniform_canvas": (4, {"block": 2}, 0, lambda m: e.canvases_mean(m, e.TEXT[:4].tolist(), "clean")),
    "trajectory": (4, {"scored": "next"}, 0, lambda m: path_mean(m, block=None)),
    "block_trajectory": (4, {"block": 2, "scored": "next"}, 0, lambda m: path_mean(m, block=2)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mean_of_many_draws_is_the_sum_over_all_corruptions(name):
    length, options, prompt, exact = EXACT[name]
    model = e.tiny()
    e.check(made_of(name, e.repeated(length), options, prompt=prompt), model, exact(model))


# ---- micro-batches and ranks -----------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {"full": {"complementary": True}, "anchor_blocks": {"block": 2, "anchors": 3}}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_do_not_depend_on_how_a_batch_is_split(name):
    """Micro-batches, and the shares of ranks, have the whole batch's weights, and their losses sum to its loss."""
    tokens = torch.randint(0, e.MASK, (6, 8), generator=e.generator(9))
    options = SMALL.get(name, {"block": 4} if "block" in OBJECTIVES[name].options else {})
    made, model = made_of(name, tokens, options, prompt=PROMPT if OBJECTIVES[name].answers == "must" else 0), e.tiny()
    loss = made.loss(model)
    for parts in (2, 5):
        split = made.split(parts)
        for attribute in ("tokens", "targets", "masked", "weight"):
            assert torch.equal(torch.cat([getattr(part, attribute) for part in split]), getattr(made, attribute))
        assert sum(part.loss(model).item() for part in split) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_capacity_of_the_scored_tokens_which_a_gpu_needs_not_to_wait_changes_nothing(name):
    tokens = torch.randint(0, e.MASK, (4, 8), generator=e.generator(9))
    prompt = PROMPT if OBJECTIVES[name].answers == "must" else 0
    made = made_of(name, tokens, {"block": 4} if "block" in OBJECTIVES[name].options else {}, prompt=prompt)
    scored, model = int(made.masked.sum()), e.tiny()
    assert made.loss(model, max_masked=scored).item() == pytest.approx(made.loss(model).item(), rel=1e-6)
    assert made.loss(model, max_masked=scored - 1).isnan()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mask_is_forbidden_as_the_family_does_unless_said_otherwise(name):
    """With the mask's logit at 0 beside five others, every cross-entropy is larger."""
    tokens = torch.randint(0, e.MASK, (2, 8), generator=e.generator(9))
    prompt = PROMPT if OBJECTIVES[name].answers == "must" else 0
    options = {"block": 4} if "block" in OBJECTIVES[name].options else {}
    losses = {}
    for said in (None, True, False):
        made = made_of(name, tokens, {**options, "forbid_mask": said}, prompt=prompt)
        for family in (False, True):
            losses[said, family] = made.loss(e.tiny(forbid_mask=family)).item()
    assert losses[None, True] == losses[True, True] == losses[True, False]
    assert losses[None, False] == losses[False, True] == losses[False, False] > losses[True, True]


# ---- learning --------------------------------------------------------------------------------------------------------

STORY = torch.tensor([0, 7, 3, 11, 9, 1, 12, 6, 2, 8, 10, 13])
BLOCKS = {"block": 4}
# objective, options, shifted logits, how many tokens it writes behind the first four, a draft's length
STORIES: list[tuple[str, dict[str, Any], bool, int, int]] = [
    ("full", {}, False, 8, 8),
    ("full", {"weighting": "cart", "complementary": True}, True, 8, 8),
    ("sft", {}, False, 8, 8),
    ("packed", {"split_fraction": 0.0}, True, 8, 8),
    ("block", {**BLOCKS, "noise": "document", "levels": (0.2, 1)}, False, 8, 4),
    ("block", BLOCKS, True, 8, 4),
    ("block", {"block": 1}, True, 8, 1),
    ("joint", BLOCKS, False, 8, 3),
    ("joint", {**BLOCKS, "causal": "both", "diffusion": 1.0, "autoregressive": 0.2}, True, 8, 3),
    ("anchor_blocks", BLOCKS, True, 6, 3),  # the last anchor is the ninth token
    ("seed_diffusion", {}, False, 8, 8),
    ("token_to_token", {**BLOCKS, "levels": (0.2, 1)}, False, 8, 4),
    ("uniform_canvas", BLOCKS, False, 8, 4),
    ("trajectory", {}, False, 8, 8),
    ("trajectory", {"scored": "next"}, True, 8, 8),
    ("block_trajectory", BLOCKS, False, 8, 4),
]


def test_every_objective_has_a_story():
    assert {name for name, *_ in STORIES} == set(OBJECTIVES) == set(EXACT)


@pytest.mark.parametrize("name, options, shifted, count, draft", STORIES)
def test_a_trained_model_writes_what_it_was_trained_on(name, options, shifted, count, draft):
    """After 150 steps or fewer."""
    entry = OBJECTIVES[name]
    shape = {"vocab_size": 14, "dim": 32, "n_layers": 2, "head_dim": 16, "ffn_dim": 64, "init_std": 0.1}
    model = e.tiny(shifted, causal_block=entry.causal_block(options.get("block")), **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    config = GenerationConfig(max_new_tokens=count, block_length=draft, stop_ids=(), sampler=entry.sampler)
    for step in range(150):
        optimizer.zero_grad()
        prompt = 4 if entry.answers in ("must", "recorded") else 0
        column = torch.arange(len(STORY))
        turn = (
            column // 4 if entry.sees == "blocks" else column >= 4
        )  # random orders, block after block or behind a prompt
        order = (torch.rand(8, len(STORY), generator=e.generator(step)) + turn).argsort(1).argsort(1) - 3
        how: dict[str, Any] = {"prompt": prompt, "seed": step, "vocab": 14, "order": order}
        made_of(name, STORY.repeat(8, 1), options, **how).loss(model).backward()
        optimizer.step()
        if step % 25 == 24:
            written = generate(model, STORY[None, :4], config).tokens[0]
            if written == STORY[4 : 4 + count].tolist():
                return
    raise AssertionError(f"wrote {written}")


# ---- the command line, the settings, the guide -----------------------------------------------------------------------


def test_every_option_is_known_and_used_and_its_defaults_are_among_what_it_may_be():
    used = {option for entry in OBJECTIVES.values() for option in entry.options}
    assert used == set(OPTIONS) and not used & set(TrainConfig.__dataclass_fields__)
    for name, entry in OBJECTIVES.items():
        wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in entry.options.items()}
        assert checked(name, {}) == wanted
    choices = {"weighting": sequence.WEIGHTINGS, "noise": blocks.NOISE, "per": documents.PER}  # the functions' own
    choices["scored"] = trajectories.SCORED
    assert {option: OPTIONS[option].choices for option in choices} == choices


@pytest.mark.parametrize("name", OBJECTIVES)
def test_illada_train_runs_every_objective_with_its_options_and_resumes_it(name, tmp_path, capsys, monkeypatch):
    """Every option of the registry is said, so that the command line, run.json and the state know each."""
    monkeypatch.setattr(runs, "plot_losses", lambda *_: None)  # half of the time
    entry, data, out = OBJECTIVES[name], tmp_path / "data", tmp_path / "run"
    lines = [json.dumps({"prompt": f"{i} + {i} = ", "response": str(2 * i)}) for i in range(20)]
    if entry.answers == "recorded":
        lines = [Trajectory([i, 43], [61, i], [2, 1], -1.0).line() for i in range(20)]
    data.write_text("\n".join(lines))
    said: list[str] = []
    values = {**entry.options, "block": 2, "forbid_mask": True}
    for option in entry.options:
        value, flag = values[option], "--" + option.replace("_", "-")
        if OPTIONS[option].kind is bool:
            said.append(flag if value else "--no-" + flag[2:])
        else:
            said += [flag, *map(str, value if OPTIONS[option].pair else [value])]
    command = ["train", "--out", str(out), "--data", str(data), "--objective", name, "--steps", "2", "--quiet", *said]
    assert cli.main([*command, "--length", "32", "--batch-size", "2", "--accumulate", "2", "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    assert (f"--sampler {entry.sampler}" in shown) == (entry.sampler is not None)
    saved = json.loads((out / "run.json").read_text())["train"]
    wanted = {option: values[option] for option in entry.options}
    assert saved["objective"] == name and saved["options"] == json.loads(json.dumps(wanted))
    assert read_config(out).causal_block == entry.causal_block(2)
    assert cli.main(["train", "--out", str(out), "--resume", "--quiet", *said]) == 0
    other = next(option for option in OPTIONS if option not in entry.options and OPTIONS[option].kind is float)
    flag = "--" + other.replace("_", "-")
    fresh = [*command[:2], str(tmp_path / "new"), *command[3:]]
    assert cli.main([*fresh, flag, *["0.5"] * (2 if OPTIONS[other].pair else 1)]) == 2
    assert f"leave out {flag}" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("nothing", {}, "objective: expected one of full, packed, sft, block, joint"),
        ("full", {"nothing": 1}, "options: expected some of weighting, complementary"),
        ("full", {"eps": 0.0}, "eps: expected a number from 1e-06 to 1, got 0.0"),
        ("full", {"weighting": 3}, "weighting: expected one of llada, mdlm, cart, got 3"),
        ("full", {"complementary": 1}, "complementary: expected one of True, False, got 1"),
        ("joint", {"block": 2.0}, "block: expected an integer from 1 on, got 2.0"),
        ("joint", {"levels": [0.1]}, r"levels: expected two numbers, got \[0\.1\]"),
        ("block", {"levels": [0.9, 0.1]}, r"levels: expected the least before the largest, .* got \[0\.9, 0\.1\]"),
        ("block", {"levels": [0, 0]}, r"levels: expected .* above 0, got \[0, 0\]"),
        ("joint", {"diffusion": float("nan")}, "diffusion: expected a number from 0 on, got nan"),
        ("seed_diffusion", {}, "seconds: expected steps for seed_diffusion"),
    ],
)
def test_options_that_cannot_be_are_named_before_training(name, options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(objective=name, options=options, seconds=1.0)


def test_the_guide_holds_the_registry_s_table():
    guide = (ROOT / "docs" / "guides" / "train.md").read_text()
    assert registry.table() in guide, "put what illada.training.registry.table() returns into docs/guides/train.md"
