"""What a run may be told: micro-batches, a checkpoint, processes, held-out data, logs; what ends it or keeps it off."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from illada import cli
from illada.errors import CheckpointError, DataError
from illada.model import Model
from illada.training.config import TrainConfig
from illada.training.data import Windows
from illada.training.logs import Divergence
from illada.training.optim import compile_layers
from illada.training.trainer import Trainer

from tests.helpers.training import STREAM, trainer

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "build" / "tensorboard"


# ---- micro-batches, checkpointing, a checkpoint to begin with -----------------------------------------------------


@pytest.mark.parametrize("objective", ["full", "block"])
def test_micro_batches_change_a_run_by_rounding_alone(objective):
    whole = trainer(objective=objective, batch_size=6, steps=4, optimizer="adamw", lr=1e-3)
    parts = trainer(objective=objective, batch_size=6, steps=4, optimizer="adamw", lr=1e-3, accumulate=4)
    whole.run()
    parts.run()
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)  # four steps of float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_layers_save_less_and_change_no_bit(dtype):
    saved = {}
    runs = {enabled: trainer(steps=3, dtype=dtype, checkpoint_activations=enabled) for enabled in (False, True)}
    for enabled, run in runs.items():
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            run.one_step()
        saved[enabled] = sum(sizes)
        run.run()
        assert "forward" not in vars(run.model.layers[0])
    assert saved[True] < saved[False] / 2
    assert runs[True].losses.tolist() == runs[False].losses.tolist()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_train_as_others_and_keep_their_names(monkeypatch, checkpointed):
    """Dynamo's graphs run by eager kernels, because inductor's take a minute to compile."""
    compiled = []

    def compile_eagerly(function, compile=torch.compile):
        compiled.append(function)
        return compile(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain = trainer(steps=3)
    run = trainer(steps=3, compile=True, checkpoint_activations=checkpointed)
    assert len(compiled) == len(run.model.layers) and list(run.weights) == list(plain.weights)
    plain.run()
    run.run()
    np.testing.assert_allclose(run.losses, plain.losses, rtol=1e-6)


def test_one_graph_serves_all_compiled_layers(monkeypatch):
    """Torch compiles a function at most eight times and leaves it eager after that."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, compile=torch.compile: compile(f, backend=count, fullgraph=True))
    model = Model(dataclasses.replace(trainer().model.config, n_layers=9))
    compile_layers(model)
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert len(graphs) == 1


@pytest.mark.parametrize("more", [[], ["--objective", "block"]], ids=["full", "block"])
def test_a_run_begins_with_a_checkpoint_s_weights_and_tokenizer(tmp_path, more):
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n" * 60)
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    data = ["--data", str(tmp_path / "text"), "--length", "32", "--batch-size", "2", "--quiet"]
    assert cli.main(["train", "--out", str(first), "--steps", "2", "--tokenizer", "bpe:300", *data, *more]) == 0
    begun = ["train", "--from", str(first), *data, *more]
    assert cli.main([*begun, "--out", str(second), "--steps", "1", "--lr", "1e-30"]) == 0
    for name in ("model.safetensors", "illada_tokenizer.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert cli.main([*begun, "--out", str(third), "--steps", "3"]) == 0
    assert (third / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()
    assert json.loads((third / "run.json").read_text())["train"]["lr"] == 2e-5
    assert cli.main(["train", "--resume", "--out", str(third), "--quiet"]) == 0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--preset", "demo"], "preset: it is the one in --from"),
        (["--tokenizer", "bytes"], "tokenizer: it is the one in --from"),
        ([], "nothing"),
    ],
)
def test_what_cannot_begin_is_one_line_and_leaves_nothing(tmp_path, capsys, more, message):
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n" * 60)
    out = tmp_path / "run"
    command = ["train", "--out", str(out), "--data", str(tmp_path / "text"), "--from", str(tmp_path / "nothing")]
    assert cli.main([*command, "--steps", "1", *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


# ---- loader processes, held-out data, logs -------------------------------------------------------------------------


def test_loader_processes_change_no_bit_and_resume_exactly(tmp_path):
    whole = trainer(tmp_path / "whole", steps=8)
    whole.run()
    first = trainer(tmp_path / "parts", steps=8, workers=2)
    assert not first.run(should_stop=lambda: first.step >= 3, save_every=2)
    second = trainer(tmp_path / "parts", steps=8, workers=1)
    assert second.step == 3 and second.run(save_every=2)
    assert second.losses.tolist() == whole.losses.tolist()
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert not [c for c in multiprocessing.active_children() if c.is_alive()]


def test_what_a_loader_process_finds_wrong_is_raised_here():
    run = trainer(objective="full", workers=1)
    run.source.stream = np.full(len(run.source.stream), -1)
    with pytest.raises(ValueError, match=r"got -1 in the batch of step 1"):  # that of step 0 was there before
        run.run()


class Counting(Windows):
    def __init__(self) -> None:
        super().__init__(STREAM, 16, 2, 0)
        self.asked: list[int] = []

    def batch(self, step: int) -> np.ndarray:
        self.asked.append(step)
        return super().batch(step)


def test_each_batch_is_made_once_the_first_before_a_folder_is_written():
    """The last one is the batch on which the trained weights are tried before they are saved."""
    source = Counting()
    run = Trainer(trainer().model, source, TrainConfig(objective="block", steps=3, length=16, batch_size=2))
    assert source.asked == [0]
    run.run()
    assert source.asked == [0, 1, 2, 3]


def test_a_loader_process_that_is_killed_is_said_in_words():
    """Torch raises this one wherever the main process is when it hears of it, so it is thrown here by hand."""
    run = trainer(workers=1)
    with pytest.raises(ChildProcessError, match=r"workers: a loader process ended .*; go on with --resume"):
        with run.loader:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="anything else"):
        with run.loader:
            raise RuntimeError("anything else")


def test_the_loss_on_held_out_data_is_measured_and_changes_no_step(tmp_path):
    held_out = Windows(STREAM[::-1].copy(), 16, 2, 3)
    plain, run = trainer(steps=6), trainer(tmp_path, steps=6, eval_every=3, eval_batches=2, held_out=held_out)
    seen: list[float | None] = []
    run.run(lambda progress: seen.append(progress.held_out))
    plain.run()
    assert run.losses.tolist() == plain.losses.tolist()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("held_out") for line in lines] == seen and [s is None for s in seen] == [True, True, False] * 2
    with torch.no_grad():
        by_hand = [run.held_out.example(batch).loss(run.model).item() for batch in range(2)]
    assert seen[5] == pytest.approx(sum(by_hand) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="eval_every: expected it together with held_out"):
        trainer(eval_every=3)


def test_the_command_measures_files_that_are_held_out(tmp_path, capsys):
    for name in "abcdefgh":
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / f"{name}.py").write_text(f"def {name}(x):\n    return x + 1\n" * 60)
    command = ["train", "--data", str(tmp_path / "text"), "--steps", "4", "--length", "32", "--batch-size", "2"]
    assert cli.main([*command, "--out", str(tmp_path / "run"), "--eval-every", "2"]) == 0
    assert "held out" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["held_out" in line for line in lines] == [False, True, False, True]


def test_tensorboard_is_refused_in_words_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DataError, match="tensorboard: the package is missing; pip install tensorboard"):
        trainer(tmp_path, tensorboard=True)


@pytest.mark.skipif(not BOARD.exists(), reason="make build/tensorboard installs it, where the package index has it")
def test_tensorboard_shows_the_log(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BOARD))
    run = trainer(tmp_path, steps=3, tensorboard=True)
    run.run()
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (tmp_path / "tensorboard").iterdir()
    values = [
        (e.step, v.tag, v.tensor.float_val[0]) for e in EventFileLoader(str(file)).Load() for v in e.summary.value
    ]
    assert [value for _, tag, value in values if tag == "loss"] == pytest.approx(run.losses.tolist(), rel=1e-6)
    assert {tag for _, tag, _ in values} == {"loss", "lr"} and [s for s, tag, _ in values if tag == "lr"] == [0, 1, 2]


# ---- what must end a run, or not begin it --------------------------------------------------------------------------


def test_a_run_that_diverges_ends_while_its_numbers_are_finite_and_keeps_the_last_good_state(tmp_path):
    run = trainer(tmp_path, steps=400, objective="full", optimizer="adamw", lr=1e-3)
    run.run(should_stop=lambda: run.step >= 25)
    before = (tmp_path / "state.pt").read_bytes()
    run = trainer(tmp_path, steps=400, objective="full", optimizer="adamw", lr=30.0)
    with pytest.raises(ArithmeticError, match=r"the run diverges, for its last 20 losses .*; resume with a lower --lr"):
        run.run()
    assert 25 < run.step < 80 and (tmp_path / "state.pt").read_bytes() == before
    again = trainer(tmp_path, steps=400, objective="full", optimizer="adamw", lr=1e-3)
    assert again.step == 25 and not again.run(should_stop=lambda: again.step >= 60)


def test_a_run_that_diverges_within_its_first_losses_ends():
    run = trainer(steps=60, objective="full", optimizer="adamw", lr=50.0)
    with pytest.raises(ArithmeticError, match=r"step 19: the run diverges, for its last 20 losses are"):
        run.run()


def test_a_high_first_loss_of_a_checkpoint_is_no_divergence():
    """50 as it is; the first one by chance a tenth of that."""
    watch = Divergence(50000, np.zeros(0))
    for step in range(60):
        watch.check(5.0 if step == 0 else 50.0, step)


def test_noise_of_single_losses_is_no_divergence():
    watch = Divergence(256, np.full(20, 0.5))
    for step in range(200):
        watch.check(60.0 if step % 20 == 0 else 0.5, step)  # ten times log(256), now and then
    with pytest.raises(ArithmeticError, match="step 7: the loss is nan"):
        watch.check(float("nan"), 7)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_at_an_absurd_rate_that_stays_finite_is_said_to_have_learned_nothing(optimizer):
    run = trainer(steps=60, objective="full", optimizer=optimizer, lr=1e9)
    run.run()
    said = run.divergence.complaint()
    assert said is not None and "a token that is guessed costs log(vocab) = 5.5" in said and "lower --lr" in said


def test_a_run_that_learns_or_was_only_begun_has_nothing_to_hear():
    run = trainer(steps=60, objective="full", optimizer="muon")
    run.run()
    assert run.divergence.complaint() is None and np.mean(run.losses[-20:]) < 0.9 * np.log(256)
    high, good = Divergence(256, np.full(19, 9.0)), Divergence(256, np.full(60, 1.0))  # a checkpoint's, which stay
    assert high.complaint() is None and good.complaint() is None
    both = Divergence(256, np.linspace(11, 7, 60))  # two losses in one sum
    assert both.complaint() is None
    for steps in (20, 25, 39):  # too few for 20 losses at either end
        falling, level = (Divergence(256, np.linspace(5.7, last, steps)) for last in (4.2, 5.5))
        assert falling.complaint() is None and f"the last {steps // 2} losses" in str(level.complaint())


def test_a_state_of_another_shape_is_named_before_the_first_step(tmp_path):
    run = trainer(tmp_path)
    run.run(should_stop=lambda: run.step >= 1)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    saved["model"]["embed.weight"] = saved["model"]["embed.weight"][:100]
    torch.save(saved, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"embed\.weight is \(100, 16\) there and \(259, 16\) here, 1 tensors"):
        trainer(tmp_path)


@pytest.mark.parametrize("bad", [-1, 259, 256])
def test_ids_that_the_model_does_not_have_are_found_before_the_first_step(bad):
    shape = trainer().model.config
    with pytest.raises(ValueError, match=rf"other than mask_id = 256, got {bad} in the data"):
        Trainer(Model(shape), Windows(np.append(STREAM, bad), 16, 2, 0), TrainConfig("block", steps=1, length=16))


@pytest.mark.parametrize(
    "objective, options, block",
    [("full", {}, 4), ("block", {"block": 2}, 4), ("block", {}, 0), ("joint", {"block": 4}, 4)],
)
def test_a_model_that_sees_otherwise_than_the_objective_trains_is_refused(objective, options, block):
    shape = dataclasses.replace(trainer().model.config, causal_block=block)
    config = TrainConfig(objective=objective, options=options, steps=1, length=16)
    with pytest.raises(
        ValueError, match=rf"model: expected causal_block = \d for objective '{objective}', got {block}"
    ):
        Trainer(Model(shape), Windows(STREAM, 16, 2, 0), config)
