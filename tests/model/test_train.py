"""Training: a killed run repeats the undisturbed one, and a failed save leaves the last one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from illada.errors import CheckpointError, CheckpointIOError
from illada.training.config import TrainConfig
from illada.training.optim import optimizers
from illada.training.state import RunState, replace_file
from illada.training.trainer import Trainer

from tests.helpers import forks
from tests.helpers.training import trainer

ROOT = Path(__file__).parents[2]


def train_command(folder: Path, *more: str) -> list[str]:
    settings = ["--data", str(folder.parent / "text"), "--steps", "48", "--length", "32", "--batch-size", "2"]
    command = [sys.executable, "-m", "illada", "train", "--out", str(folder), "--save-every", "7", "--quiet"]
    return [*command, *([] if "--resume" in more else [*settings, "--objective", "block"]), *more]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ["PYTHONPATH"]])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def wait_for(condition, process: subprocess.Popen, tries: int = 60_000) -> None:
    """Tries, not seconds: a machine that stops both processes for a while has not made the condition false."""
    for _ in range(tries):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError("it never came")


# ---- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_and_resumed_has_the_very_same_log(tmp_path, python):
    """SIGKILL after the first save, while steps that no state knows are in the log; the log's bytes are compared."""
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n" * 60)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(train_command(killed), env=environment(), stderr=subprocess.PIPE, text=True)
    log = killed / "log.jsonl"
    wait_for(lambda: log.exists() and len(log.read_bytes().splitlines()) > 16, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(log.read_bytes().splitlines()) < 48
    groups = [[forks.Command(train_command(*which)[3:])] for which in ((killed, "--resume"), (whole,))]
    ((code, said),), ((other, error),) = forks.run(python, tmp_path / "forks", groups, ("torch",), OMP_NUM_THREADS="1")
    assert code == 0 and other == 0, said + error
    at = int(said.split("resumed at step ")[1].split()[0])
    assert at > 0 and at % 7 == 0
    assert log.read_bytes() == (whole / "log.jsonl").read_bytes()
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert len(losses) == 48 and len(set(losses)) > 40
    for name in ("model.safetensors", "config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tmp_path):
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n" * 60)
    folder = tmp_path / "run"
    command = [part if part != "48" else "100000" for part in train_command(folder)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted at step" in error and "--resume" in error and "Traceback" not in error
    step = torch.load(folder / "state.pt", weights_only=True)["step"]
    assert step == len((folder / "log.jsonl").read_text().splitlines()) > 0


@pytest.mark.parametrize("objective", ["full", "block"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopping_and_going_on_repeats_the_losses_bit_by_bit(tmp_path, objective, optimizer):
    def make(folder: Path) -> Trainer:
        return trainer(folder, objective=objective, optimizer=optimizer)

    whole = make(tmp_path / "whole")
    assert whole.run()
    first = make(tmp_path / "parts")
    assert not first.run(should_stop=lambda: first.step >= 5)
    second = make(tmp_path / "parts")
    assert second.step == 5 and second.run()
    assert second.losses.tolist() == whole.losses.tolist()
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


# ---- saves ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_while_saving_leaves_the_previous_state(tmp_path):
    run = trainer(tmp_path)
    run.run(should_stop=lambda: run.step >= 3)
    run.one_step()
    run.step += 1
    before = (tmp_path / "state.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(before) // 2, limits[1])
    )  # as on a full disk, writing stops half-way
    try:
        with pytest.raises(CheckpointIOError, match=r"state.pt: not saved.*previous one is still there; free space"):
            run.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]
    run.log.write(json.dumps({"step": 3, "loss": 0.0, "lr": 0.0}) + "\n")  # a line that the state does not know
    run.log.flush()
    assert trainer(tmp_path).step == 3


def test_a_first_save_that_fails_speaks_of_no_previous_one(tmp_path):
    with pytest.raises(CheckpointIOError, match=r"f: not saved \(No such file or directory\); free space"):
        replace_file(tmp_path / "gone" / "f", b"")


def test_a_disk_without_room_for_a_save_is_found_before_the_first_step(tmp_path, monkeypatch):
    def disk(free: int, total: int = 10**12):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(total, total - free, free))

    for optimizer in ("adamw", "muon"):
        folder = tmp_path / optimizer
        disk(0)
        with pytest.raises(CheckpointIOError, match=r"a save takes 0\.\d MB, but 0\.0 MB are free; free space or save"):
            trainer(folder, steps=1, optimizer=optimizer, lr=1e-3)
        assert not list(folder.iterdir())
        disk(0, total=0)  # a file system that does not say
        run = trainer(folder, steps=1, optimizer=optimizer, lr=1e-3)
        run.run()
        size, needed = (folder / "state.pt").stat().st_size, run._state_bytes()
        assert needed <= size <= 1.5 * needed  # what is there beside tensors weighs that much in a tiny model
        disk(0)
        assert trainer(folder, steps=1, optimizer=optimizer, lr=1e-3).step == 1  # is over, and saves no more

    disk(10**11)
    run = trainer(tmp_path / "stopped", steps=2)
    run.run(should_stop=lambda: run.step >= 1)
    disk(0)
    with pytest.raises(CheckpointIOError, match="free space or save"):
        trainer(tmp_path / "stopped", steps=2)
    disk(10**11)
    assert trainer(tmp_path / "stopped", steps=2).step == 1


def test_replacing_a_file_is_a_rename_of_what_is_on_disk(tmp_path, monkeypatch):
    """At the moment of the rename the new bytes are written and flushed, and the old file is whole."""
    file, calls = tmp_path / "f", []
    file.write_bytes(b"old")
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))

    def replace(source, target):
        assert (Path(source).read_bytes(), Path(target).read_bytes()) == (b"new", b"old")
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    replace_file(file, b"new")
    assert file.read_bytes() == b"new" and calls == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickle", "foreign"])
def test_a_damaged_or_foreign_state_is_refused_with_what_to_do(tmp_path, damage):
    run = trainer(tmp_path)
    run.run(should_stop=lambda: run.step >= 2)
    state = tmp_path / "state.pt"
    content = state.read_bytes()
    if damage == "foreign":
        torch.save({"weights": torch.zeros(2)}, state)
    else:
        other = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello", "pickle": b"cos\nsystem\n"}
        state.write_bytes(other[damage])
    with pytest.raises(CheckpointError, match=r"state.pt is (damaged|not a training state).*delete it") as said:
        trainer(tmp_path)
    assert "weights_only" not in str(said.value)  # torch's advice to load it all the same


def test_a_state_of_another_run_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.run(should_stop=lambda: run.step >= 2)
    with pytest.raises(CheckpointError, match=r"other settings: seed 0 instead of 5"):
        trainer(tmp_path, seed=5)
    with pytest.raises(CheckpointError, match="other data or another model"):
        trainer(tmp_path, identity="other")


def test_a_log_shorter_than_the_state_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.run(should_stop=lambda: run.step >= 4)
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 1.0, "lr": 1.0}\n')
    with pytest.raises(CheckpointError, match="holds 1 of the 4 steps"):
        trainer(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointIOError, match="choose another folder"):
        RunState(tmp_path / "file" / "run", {}, "")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path):
    run = trainer(tmp_path)
    run.run(should_stop=lambda: run.step >= 2)
    before = (tmp_path / "state.pt").read_bytes()
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.embed.weight.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="step 2: the loss is nan"):
        run.run()
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weights_that_give_no_finite_loss_never_replace_a_good_state(tmp_path, optimizer):
    """The last update ruins the weights: they are finite or not, but the run is not complete with them."""
    run = trainer(tmp_path, optimizer=optimizer, steps=4)
    run.run(should_stop=lambda: run.step >= 2)
    before = (tmp_path / "state.pt").read_bytes()
    run = trainer(tmp_path, optimizer=optimizer, steps=4, lr=1e30)  # a rate may change when a run is resumed
    with pytest.raises(ArithmeticError, match=r"step [34]: .*resume with a lower --lr"):
        run.run()
    assert (tmp_path / "state.pt").read_bytes() == before
    assert trainer(tmp_path, optimizer=optimizer, steps=4, lr=0.001).run()
    ruined = trainer(None, optimizer=optimizer, steps=1)
    one_step = ruined.one_step

    def last_step():
        loss = one_step()
        ruined.model.norm.weight.data[0] = float("nan")
        return loss

    ruined.one_step = last_step
    with pytest.raises(ArithmeticError, match=r"step 1: norm\.weight has become NaN or inf"):
        ruined.run()


def test_a_second_trainer_is_refused_while_the_first_one_runs(tmp_path):
    refused = []

    def someone_else(progress):
        try:
            trainer(tmp_path)
        except CheckpointError as error:
            refused.append(str(error))

    run = trainer(tmp_path)
    run.run(someone_else, save_every=2)
    assert len(refused) == 12 and "is in use by another training run; wait until it ends" in refused[0]
    assert trainer(tmp_path).run()


def test_a_trainer_does_not_go_on_from_a_state_that_another_replaced(tmp_path):
    first = trainer(tmp_path)
    first.run(should_stop=lambda: first.step >= 2)
    second = trainer(tmp_path)
    second.run(should_stop=lambda: second.step >= 4)
    with pytest.raises(CheckpointError, match=r"state\.pt was replaced meanwhile; make a new Trainer"):
        first.run()
    assert second.run()


def test_what_killed_saves_left_is_swept_when_a_run_goes_on(tmp_path):
    run = trainer(tmp_path)
    run.run(should_stop=lambda: run.step >= 2)
    for name in (".state.pt.0123abcd", ".run.json.0123abcd", ".keep.0123abcd"):
        (tmp_path / name).write_text("half")
    trainer(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keep.0123abcd", "log.jsonl", "state.pt"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"warmup": 1.0}, "warmup: expected a number from 0 to below 1, got 1.0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number of at least 0, got nan"),
        ({"steps": 0}, r"steps: expected a positive number up to 3\.4e38, got 0"),
        ({"steps": 2.5}, "steps: expected an integer, got 2.5"),
        ({"length": 16.0}, "length: expected an integer, got 16.0"),
        ({"batch_size": "8"}, "batch_size: expected an integer, got '8'"),
        ({"options": {"weighting": "x"}}, "weighting: expected one of llada, mdlm, cart, got 'x'"),
        ({"accumulate": 9}, "accumulate: expected at most batch_size = 8, got 9"),
        ({"accumulate": 0}, r"accumulate: expected a positive number up to 3\.4e38, got 0"),
        ({"options": {"short_fraction": 2}}, "short_fraction: expected a number from 0 to 1, got 2"),
        ({"lr": 1e39}, r"lr: expected a positive number up to 3\.4e38, got 1e\+39"),
    ],
)
def test_settings_that_cannot_be_are_named_before_training(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 2, **wrong})


@pytest.mark.parametrize("bad", [-1, 259, 256])
def test_data_that_the_model_cannot_have_is_named(bad):
    run = trainer(objective="full")
    run.source.stream = np.full(len(run.source.stream), bad)
    message = rf"expected ids in \[0, 259\) other than mask_id = 256, got {bad} in the batch"
    with pytest.raises(ValueError, match=message):
        run.run()


@pytest.mark.parametrize("objective", ["full", "block"])
def test_torch_s_default_device_and_dtype_change_nothing(objective):
    options = {"hole_fraction": 0.5} if objective == "block" else {}
    wanted = trainer(objective=objective, steps=3, options=options)
    wanted.run()
    for dtype in (torch.bfloat16, torch.float64):
        run = trainer(objective=objective, steps=3, options=options)
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                run.run()
        finally:
            torch.set_default_dtype(torch.float32)
        assert run.losses.tolist() == wanted.losses.tolist()


def test_a_compiled_model_is_trained_by_the_same_optimizers():
    model = trainer().model
    kinds = [
        [p.shape for group in o.param_groups for p in group["params"]] for o in optimizers(model, "muon", 1.0, 1.0)
    ]
    compiled = optimizers(torch.compile(model, backend="eager"), "muon", 1.0, 1.0)
    assert [[p.shape for group in o.param_groups for p in group["params"]] for o in compiled] == kinds
