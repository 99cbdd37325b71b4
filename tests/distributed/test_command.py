"""`torchrun -m illada train`, from the first step to a checkpoint, and on another number of ranks."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import illada
import pytest
import torch
from illada.cli import main
from safetensors.torch import load_file

from tests.helpers import forks
from tests.helpers.checkout import ROOT

Python = Callable[..., subprocess.CompletedProcess[str]]
RUN = ("--data", "README.md", "--steps", "3", "--length", "32", "--batch-size", "4", "--optimizer", "adamw", "--quiet")


PEFT = ROOT / "build" / "peft"


def train(python: Python, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    return python(*launcher, "-m", "illada", "train", *arguments, cwd=ROOT, OMP_NUM_THREADS="1")


def ranks_of(world: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank on one machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    alike = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **alike} for rank in range(world)]


def losses_of(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_ranks_train_and_one_goes_on_and_a_world_that_does_not_divide_is_refused(
    python: Python, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    done = train(python, 2, "--out", str(folder), *RUN, "--tensor-parallel", "2", "--workers", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 data * 1 context * 2 tensor ranks" in done.stderr
    assert len(losses_of(folder)) == 3 and illada.load(folder).config.dim == 128
    assert main(["train", "--out", str(folder), "--resume"]) == 2
    assert "holds a state in shards: go on with torchrun, on any number of ranks" in capsys.readouterr().err
    refused = ["train", "--out", str(tmp_path / "refused"), *RUN, "--context-parallel", "3"]
    groups = [
        [forks.Command(["train", "--out", str(folder), "--resume", "--quiet"], env=ranks_of(1)[0])],
        [forks.Command(refused, env=env) for env in ranks_of(2)],
    ]
    imports, more = ("torch._dynamo", "illada.training.parallel.command"), {"cwd": ROOT, "OMP_NUM_THREADS": "1"}
    ((code, said),), both = forks.run(python, tmp_path / "forks", groups, imports, **more)
    assert code == 0 and "resumed at step 3" in said, said
    assert all(code for code, _ in both) and not (tmp_path / "refused").exists()
    why = "illada: world size: expected a multiple of tensor_parallel * context_parallel = 3"
    assert sum(said.count(why) for _, said in both) == 1, both


@pytest.mark.skipif(not PEFT.exists(), reason="make build/peft installs it, where the package index has it")
def test_adapters_of_two_ranks_are_those_of_one_process(python: Python, tmp_path: Path) -> None:
    """Folders hold float32 adapters by the checkpoint's names, and it with them merged, in --dtype.

    In bfloat16 losses are compared alone: AdamW's first steps have a gradient's sign, which a rounding may turn.
    """
    config = illada.ModelConfig.preset("demo", n_layers=2, dim=32, ffn_dim=50, n_heads=2, head_dim=16, n_kv_heads=1)
    illada.save(illada.Model(config), tmp_path / "base")
    (tmp_path / "base" / "illada_tokenizer.json").write_text('{"kind": "bytes", "merges": []}')
    common = (*RUN, "--from", str(tmp_path / "base"), "--lora", "2", "--lr", "0.02", "--dtype")
    alone = forks.Command(["train", "--out", str(tmp_path / "alone"), *common, "float32"])
    together = [
        [forks.Command(["train", "--out", str(tmp_path / name), *common, name], env=env) for env in ranks_of(2)]
        for name in ("float32", "bfloat16")
    ]
    imports = ("torch._dynamo", "peft", "illada.training.parallel.command")
    more = {"path": (ROOT, ROOT / "python", PEFT), "cwd": ROOT, "OMP_NUM_THREADS": "1"}
    done = forks.run(python, tmp_path / "forks", [[alone], *together], imports, **more)
    assert all(code == 0 for group in done for code, _ in group), done
    right = losses_of(tmp_path / "alone")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        mine, exact = losses_of(tmp_path / name), dtype == torch.float32
        assert len(mine) == 3 and mine == pytest.approx(right, rel=1e-5 if exact else 2**-7)
        for file, kept in (("model.safetensors", dtype), ("adapter/adapter_model.safetensors", torch.float32)):
            one, two = (load_file(tmp_path / run / file) for run in ("alone", name))
            assert one.keys() == two.keys()
            for key, weight in one.items():
                assert two[key].dtype == kept and two[key].shape == weight.shape, (file, key)
                assert not exact or (two[key] - weight).abs().max() <= 1e-4 * weight.abs().max(), (file, key)
