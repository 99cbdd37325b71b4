"""`torchrun -m illada train`, from the first step to a checkpoint, and on another number of ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import illada
import pytest
from illada.cli import main

from tests.helpers.checkout import ROOT

Python = Callable[..., subprocess.CompletedProcess[str]]
RUN = ("--data", "README.md", "--steps", "3", "--length", "32", "--batch-size", "4", "--optimizer", "adamw", "--quiet")


def train(python: Python, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return python(*launcher, "-m", "illada", "train", *arguments, cwd=ROOT, OMP_NUM_THREADS="1")


def test_two_ranks_train_and_one_goes_on(python: Python, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    done = train(python, 2, "--out", str(folder), *RUN, "--tensor-parallel", "2", "--workers", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 data * 1 context * 2 tensor ranks" in done.stderr
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and illada.load(folder).config.dim == 128
    assert main(["train", "--out", str(folder), "--resume"]) == 2
    assert "holds a state in shards: go on with torchrun, on any number of ranks" in capsys.readouterr().err
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    on = python("-m", "illada", "train", "--out", str(folder), "--resume", "--quiet", **alone)
    assert on.returncode == 0 and "resumed at step 3" in on.stderr, on.stderr[-3000:]


def test_a_world_that_does_not_divide_is_refused_and_leaves_nothing(python: Python, tmp_path: Path) -> None:
    done = train(python, 2, "--out", str(tmp_path / "run"), *RUN, "--context-parallel", "3")
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert done.stderr.count("illada: world size: expected a multiple of tensor_parallel * context_parallel = 3") == 1
