"""Recorded trajectories: masks nest, states are those that decoding went through, the best by the bound are kept, and
the means are exact."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from illada.cli import main
from illada.decoding.config import GenerationConfig
from illada.decoding.generate import generate
from illada.errors import DataError, PromptError
from illada.training.data import Document
from illada.training.objectives import block_trajectory, trajectory
from illada.training.record import record
from illada.training.trajectories import Trajectories, Trajectory, best, parse

from illada_kernels import Edit, Threshold, TopK
from tests.helpers import enumerated as e

PROMPTS = [[0, 3], [5, 1, 2], [2]]


def decoding(**more: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 6, "stop_ids": (), **more})


def recorded(model=None, prompts=PROMPTS, how=None, **more) -> list[Trajectory]:
    model = e.tiny(variable_length=False) if model is None else model
    return [t for kept in record(model, prompts, decoding(**(how or {})), **more) for t in kept]


def lines(*trajectories: Trajectory) -> list[Document]:
    return [Document("d", "\n".join(t.line() for t in trajectories).encode())]


# ---- what is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"rule": TopK(2)}, {"rule": Threshold(0.25), "temperature": 1.0, "seed": 3}])
def test_a_trajectory_is_what_generate_writes_and_when(how):
    model, steps = e.tiny(variable_length=False), []
    done = generate(model, PROMPTS, decoding(**how), lambda step: steps.append(step.committed.clone()))
    made = recorded(model, how=how)
    assert [t.response for t in made] == done.tokens and [t.prompt for t in made] == PROMPTS
    for b, t in enumerate(made):
        committed = [step[b].sum().item() for step in steps if step[b].any()]
        assert [t.order.count(k) for k in range(1, max(t.order) + 1)] == committed


def test_the_bound_is_the_log_probability_of_what_each_pass_committed():
    model = e.tiny(variable_length=False)
    for t in recorded(model, how={"rule": Threshold(0.3), "temperature": 1.0}):
        exact = 0.0
        for k in range(1, max(t.order) + 1):
            shown = t.prompt + [x if o < k else e.MASK for x, o in zip(t.response, t.order)]
            with torch.no_grad():
                logits = model(torch.tensor([shown]))[0] @ model.head_weight.T
            logits[:, e.MASK] = -torch.inf
            log_p = logits.double().log_softmax(-1)[len(t.prompt) :]
            exact += sum(float(log_p[i, t.response[i]]) for i, o in enumerate(t.order) if o == k)
        assert t.bound == pytest.approx(exact, abs=1e-5) and t.mean_bound == pytest.approx(exact / 6, abs=1e-5)


def test_the_best_by_the_bound_are_kept_prompt_by_prompt_whatever_the_batch():
    how = {"temperature": 1.0, "rank_temperature": 0.3, "seed": 5}
    every = recorded(how=how, draws=4)
    groups = [every[4 * i : 4 * i + 4] for i in range(len(PROMPTS))]
    assert all(len({tuple(t.response) for t in group}) > 1 for group in groups)
    for batch_size in (1, 3, 100):
        kept = recorded(how=how, draws=4, keep=2, batch_size=batch_size)
        for i, group in enumerate(groups):
            right = sorted(group, key=lambda t: -t.bound)[:2]
            assert [(t.response, t.order) for t in kept[2 * i : 2 * i + 2]] == [(t.response, t.order) for t in right]


def test_best_compares_a_token_and_drops_what_is_not_finite():
    short, long = Trajectory([0], [1], [1], -1.0), Trajectory([0], [1, 1], [1, 2], -1.5)
    assert best([short, long, Trajectory([0], [1], [1], -math.inf), Trajectory([0], [1], [1], math.nan)], 3) == [
        long,
        short,
    ]


def test_a_teacher_takes_over_from_a_state_of_the_student():
    student, teacher = e.tiny(variable_length=False), e.tiny(seed=8, variable_length=False)
    how = {"rule": TopK(2), "temperature": 1.0}
    own = recorded(student, PROMPTS * 6, how)
    taken = recorded(student, PROMPTS * 6, how, teacher=teacher)
    assert {t.first for t in taken} == {1, 2, 3}
    for mine, t in zip(own, taken):
        before = [k < t.first for k in t.order]
        assert [k < t.first for k in mine.order] == before
        assert all(x == y for x, y, b in zip(mine.response, t.response, before) if b)
        left = before.count(False)
        assert sorted(k for k in t.order if k >= t.first) == list(range(t.first, t.first + left))  # one a pass
        shown = torch.tensor([t.prompt + [x if b else e.MASK for x, b in zip(t.response, before)]])
        at = len(t.prompt) + t.order.index(t.first)
        with torch.no_grad():
            logits = teacher(shown)[0, at] @ teacher.head_weight.T
        logits[e.MASK] = -torch.inf
        assert t.response[t.order.index(t.first)] == int(logits.argmax())


@pytest.mark.parametrize(
    ("how", "more", "message"),
    [
        ({"revise": Edit(0.9)}, {}, "revise: expected None, because the tokens of a trajectory stay"),
        ({"end_early": True}, {}, "end_early: expected False, because it writes tokens that no pass"),
        ({"confidence": "margin"}, {}, "confidence: expected 'probability' at confidence_temperature 1"),
        ({"sampler": "canvas"}, {}, "sampler: expected one that fills masks pass by pass, got 'canvas'"),
        ({}, {"draws": 2, "keep": 3}, "keep: expected at most draws = 2, got 3"),
        ({}, {"draws": 0}, "draws: expected at least 1, got 0"),
        ({}, {"teacher": e.tiny(causal_block=2)}, "teacher: expected a model that sees everything"),
        ({}, {"teacher": e.tiny(vocab_size=9)}, "teacher: expected vocab_size 6 and mask_id 4 like the model's, got 9"),
    ],
)
def test_what_cannot_be_recorded_is_named(how, more, message):
    with pytest.raises((PromptError, ValueError), match=message):
        recorded(how=how, **more)


# ---- the states that training shows ----------------------------------------------------------------------------------


def seen_while_decoding(model, how) -> dict[tuple[int, ...], set[int]]:
    """Every state that the model was shown: its tokens -> the columns that it saw, and what was committed then."""
    shown: list[Any] = []
    forward = model.forward
    model.forward = lambda tokens, *rest, **more: shown.append((tokens.clone(), rest)) or forward(tokens, *rest, **more)
    generate(model, [PROMPTS[0]], decoding(cache="none", **how))
    return {tuple(row) for tokens, _ in shown for row in tokens.tolist()}


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("how", [{"block_length": 6}, {"block_length": 2}, {"block_length": 4, "rule": TopK(3)}])
def test_states_are_those_that_decoding_went_through_and_their_masks_nest(variable, how):
    """With variable_length later blocks are not there yet."""
    model = e.tiny(variable_length=variable)
    [t] = recorded(model, [PROMPTS[0]], how)
    size = len(t.prompt) + len(t.response)
    source = Trajectories(lines(t), size + 2, 64, seed=0, eos_id=5)
    tokens, states = source.batch(0)
    made = trajectory(torch.from_numpy(tokens), mask_id=e.MASK, generator=e.generator(), **states.tensors())
    ends = (
        torch.full((64,), size) if made.key_ranges is None else made.key_ranges.bounds[:, 0, 1]
    )  # padding is never seen
    drawn = {tuple(row[:end]) for row, end in zip(made.tokens.tolist(), ends.tolist())}
    assert drawn == seen_while_decoding(model, how)
    masks = sorted({tuple((row == e.MASK).tolist()) for row in made.tokens[:, :size]}, key=sum)
    assert len(masks) == max(t.order)
    assert all(not x or y for less, more in itertools.pairwise(masks) for x, y in zip(less, more))


def test_a_block_s_states_are_those_of_its_passes_and_blocks_before_are_clean():
    model = e.tiny(causal_block=2)
    [t] = recorded(model, [[0, 3, 1]], {"max_new_tokens": 4})
    assert t.order[3:] == [4, -1] or t.order[-1] == -1  # the last block shows a mask behind what was asked for
    source = Trajectories(lines(t), 10, 32, seed=0, eos_id=5, block=2)
    tokens, states = source.batch(0)
    made = block_trajectory(torch.from_numpy(tokens), states.tensors()["order"], e.MASK, e.generator(), block=2)
    order = torch.tensor([0] * 3 + t.order + [-1] * 2)
    for noisy, scored in zip(made.tokens[:, :10], made.masked):
        for start in range(0, 10, 2):
            part, mine = order[start : start + 2], slice(start, start + 2)
            hidden = noisy[mine] == e.MASK
            assert any(torch.equal(hidden, (part >= k) | (part == -1)) for k in {1, *part.clamp(min=1).tolist()})
            assert torch.equal(scored[mine], hidden & (part > 0))
    assert (made.tokens[:, 10:] == torch.from_numpy(tokens)).all()


# ---- exact means -----------------------------------------------------------------------------------------------------


def test_with_next_the_mean_is_minus_log_p_of_the_trajectory():
    """From `first` on, for any number of tokens a pass; `passes` choose a part of it."""
    model, text, order = e.tiny(), e.TEXT[:5].tolist(), [0, 3, 1, 3, 2]

    def of_pass(k: int) -> float:
        shown = [x if o < k else e.MASK for x, o in zip(text, order)]
        return float(sum(c for c, o in zip(e.ce(model, shown, text), order) if o == k))

    def made(first=None, **more):
        tokens = e.repeated(5)
        orders, start = torch.tensor(order).expand(len(tokens), -1), None
        if first is not None:
            start = torch.full((len(tokens),), first)
        return trajectory(tokens, orders, e.MASK, e.generator(), first=start, scored="next", **more)

    e.check(made(), model, sum(map(of_pass, (1, 2, 3))) / 4)
    e.check(made(first=2), model, sum(map(of_pass, (2, 3))) / 3)
    e.check(made(passes=(0.0, 0.0)), model, of_pass(1) * 3 / 4)


def test_with_all_and_random_orders_of_one_token_a_pass_the_mean_is_the_bound():
    model, tokens = e.tiny(), e.repeated(4)
    order = torch.rand(tokens.shape, generator=e.generator(1)).argsort(1).argsort(1) + 1
    made = trajectory(tokens, order, e.MASK, e.generator())
    e.check(made, model, e.whole_bound(model, e.TEXT[:4].tolist(), e.LEVELS) / 4)
    blocks = e.tiny(causal_block=2)
    order = order.unflatten(1, (2, 2)).argsort(-1).flatten(1) + torch.tensor([1, 1, 3, 3])  # block after block
    made = block_trajectory(tokens, order, e.MASK, e.generator(), block=2)
    e.check(made, blocks, e.blocks_bound(blocks, e.TEXT[:4].tolist(), 2, e.LEVELS, 1 / e.LEVELS) / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.ones(2, 3, dtype=torch.int64)}, r"order: expected \(2, 4\) like tokens, got \(2, 3\)"),
        ({"order": torch.tensor([[1, 1, 1, 1], [0, 0, -1, 0]])}, "expected a pass from 1 on in every row, found none"),
        ({"lengths": torch.tensor([4, 3])}, "order: expected no pass behind the length of a row, got one in row 1"),
        ({"scored": "some"}, "scored: expected one of all, next, got 'some'"),
        ({"passes": (0.5, 0.2)}, r"passes: expected 0 <= low <= high <= 1, got \(0.5, 0.2\)"),
    ],
)
def test_states_that_cannot_be_are_named(change, message):
    arguments = {"order": torch.ones(2, 4, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        trajectory(torch.zeros(2, 4, dtype=torch.int64), mask_id=e.MASK, generator=e.generator(), **arguments)


# ---- the file --------------------------------------------------------------------------------------------------------

GOOD = {"prompt": [1], "response": [2, 3], "order": [2, 1], "bound": -1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", 'd, line 1: expected {"prompt"'),
        ("[1]", 'd, line 1: expected {"prompt"'),
        ({"text": "x"}, 'd, line 1: expected {"prompt"'),
        ({"response": "ab"}, "d, line 1: response: expected a list of integers, got ab"),
        ({"order": [1.0, 2]}, "order: expected a list of integers"),
        ({"order": [1]}, "order: expected a pass for each of 2 response tokens, got 1"),
        ({"order": [0, 0]}, "order: expected passes from 1, 0 or -1, the largest at least first = 1, got 0 to 0"),
        ({"order": [1, -2]}, "order: expected passes from 1, 0 or -1"),
        ({"first": 3}, "the largest at least first = 3, got 1 to 2"),
        ({"block": -1}, "expected block >= 0 and first >= 1"),
    ],
)
def test_a_line_that_is_no_trajectory_is_named(change, message):
    line = change if isinstance(change, str) else json.dumps({**GOOD, **change})
    with pytest.raises(DataError) as caught:
        parse("d, line 1", line)
    assert message in str(caught.value)


def test_a_row_that_is_too_long_is_refused_or_cut():
    t = Trajectory([1, 2], [3, 0, 1], [2, 3, 1], -1.0)
    with pytest.raises(
        DataError, match=r"5 tokens, more than --length 4, as have 1 of 1 lines; give --length 5, or --cut"
    ):
        Trajectories(lines(t), 4, 1, 0, 5)
    cut = Trajectories(lines(t), 4, 1, 0, 5, cut=True)
    assert cut.shortened == 1 and cut.batch(0)[0].tolist() == [[1, 2, 3, 0]]
    with pytest.raises(DataError, match="expected a token that a pass from 1 on committed within --length 2"):
        Trajectories(lines(t), 2, 1, 0, 5, cut=True)
    with pytest.raises(DataError, match="found none; write them with illada record"):
        Trajectories([Document("d", b"\n")], 4, 1, 0, 5)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["trajectory", "block_trajectory"])
def test_a_run_s_model_is_recorded_and_trained_on_from_the_command_line(objective, tmp_path, capsys, monkeypatch):
    from illada.training import runs

    monkeypatch.setattr(runs, "plot_losses", lambda *_: None)
    text, prompts, out = tmp_path / "text", tmp_path / "prompts", tmp_path / "recorded"
    text.write_text("a b c d e f g h i j k l\n" * 20)
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in ("a b", "c", "d e f")))
    first = ["--objective", "block", "--block", "4"] if objective == "block_trajectory" else []
    train = ["train", "--quiet", "--steps", "2", "--length", "32", "--batch-size", "2"]
    assert main([*train, "--out", str(tmp_path / "base"), "--data", str(text), *first]) == 0
    record_command = ["record", "--model", str(tmp_path / "base"), "--prompts", str(prompts), "--out", str(out)]
    how = ["--max-new-tokens", "8", "--temperature", "1", "--draws", "3", "--keep", "2", "--stop-ids"]
    assert main([*record_command, *how]) == 0
    assert "6 trajectories, 1.00 tokens a pass" in capsys.readouterr().err
    written = out.read_text()
    kept = [parse("line", line) for line in written.splitlines()]
    assert len(kept) == 6 and all(kept[i].mean_bound >= kept[i + 1].mean_bound for i in (0, 2, 4))
    (tmp_path / "none").write_text("\n")
    measured = ["--eval-every", "1", "--eval-data", str(out), "--workers", "1"]
    for more, message in (
        (["--keep", "9"], "keep: expected at most draws = 3, got 9"),
        (["--edit", "0.9"], "revise: expected None"),
        (["--max-new-tokens", "5000"], "exceed max_seq_len"),
        (["--prompts", str(tmp_path / "none")], "found none"),
        (["--prompts", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main([*record_command, *how, *more]) == 2
        assert message in capsys.readouterr().err and out.read_text() == written
    tuned = [*train, "--from", str(tmp_path / "base"), "--data", str(out), "--objective", objective]
    assert main([*tuned, "--out", str(tmp_path / "tuned"), "--scored", "next", "--passes", "0", "0.5", *measured]) == 0
    assert main(["train", "--out", str(tmp_path / "tuned"), "--resume", "--quiet"]) == 0
    capsys.readouterr()
    for more, message in (
        (["--pairs"], "reads trajectories, which hold prompts; leave out --pairs"),
        (["--eval-every", "1"], "eval_every: expected --eval-data too"),
        (["--passes", "0.5", "0.2"], "passes: expected the least before the largest"),
        (["--data", str(text)], 'text, line 1: expected {"prompt"'),
    ):
        assert main([*tuned, "--out", str(tmp_path / "no"), *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main([*train, "--out", str(tmp_path / "no"), "--objective", objective]) == 2
    assert "expected --data, a file of what illada record wrote" in capsys.readouterr().err
