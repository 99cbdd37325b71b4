"""`illada train` under torchrun."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ... import checkpoint
from ...model import Model
from ..runs import Run, StopSignals, plot_losses
from ..state import FolderLock
from .launch import local_device, session
from .layout import Layout, Ranks, on_first
from .model import ShardedModel
from .state import FILE
from .trainer import ParallelTrainer
from .watch import Watch


def train(options: argparse.Namespace, begin: Any, documents: Any) -> int:
    """Runs the command on this rank.

    begin(resume) -> (Run, FolderLock) makes or opens the run, on the first rank; documents(run) -> its training data.
    """
    device = local_device(options.device)
    with session(device, options.rank_timeout) as watch:
        locks: list[FolderLock] = []
        on_first(lambda: locks.append(begin()))
        run = Run.open(Path(options.out))
        try:
            trainer = _trainer(run, documents(run), options, device, watch, locks[0] if locks else None)
        except BaseException:
            if not options.resume and dist.get_rank() == 0:
                run.forget()
            raise
        return _run(run, trainer, options)


def _trainer(
    run: Run, data: Any, options: argparse.Namespace, device: torch.device, watch: Watch, lock: FolderLock | None
) -> ParallelTrainer:
    config, folder = run.train_config, run.folder
    tensor, context = options.tensor_parallel, options.context_parallel
    layout = Layout.of(dist.get_world_size(), tensor, context, run.model_config, config)
    on_first(lambda: checkpoint.check_target(folder, run.model_config))
    source, identity = run.source(data)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = ShardedModel(run.model_config, Ranks.connect(layout, device), dtype)
    watch.moved(0, "weights")
    if run.start_from is not None and not (folder / FILE).exists():
        stored = checkpoint.Stored(Path(run.start_from), checkpoint.read_config(run.start_from))
        model.fill(stored)
    else:
        model.draw(config.seed)
    trainer = ParallelTrainer(model, source, config, folder, identity, lock, watch.moved)
    if dist.get_rank() == 0:
        print(
            f"{layout.data} data * {layout.context} context * {layout.tensor} tensor ranks on {device.type}"
            + (f"; resumed at step {trainer.step}" if trainer.step else ""),
            file=sys.stderr,
        )
    return trainer


def _run(run: Run, trainer: ParallelTrainer, options: argparse.Namespace) -> int:
    from ...live import ProgressBar

    first, bar = dist.get_rank() == 0, ProgressBar()
    with StopSignals() as stop:
        complete = trainer.run(None if options.quiet else bar, options.save_every, should_stop=lambda: stop.number != 0)
    export(run, trainer.sharded)
    if first and len(trainer.losses):
        plot_losses(trainer.losses, run.folder / "loss.png", f"{run.folder.name}: {run.train_config.objective}")
    if not complete:
        bar.close()
        number = max(stop.number, 0)
        if first:
            name, world = shlex.quote(str(run.folder)), dist.get_world_size()
            print(
                f"illada: interrupted at step {trainer.step}, saved; go on with: torchrun --nproc-per-node {world} -m "
                f"illada train --resume --out {name}",
                file=sys.stderr,
            )
        return 128 + number if number else 0
    if first:
        print(f"saved to {run.folder} after {trainer.step} steps")
    return 0


def export(run: Run, sharded: ShardedModel) -> None:
    """Writes the weights into the run's folder as a Hugging Face checkpoint; the first rank holds them all."""
    model = Model(run.model_config, device="meta")
    if dist.get_rank() == 0:
        model.to_empty(device="cpu")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in sharded.gathered():
            if dist.get_rank() == 0:
                weights[name].copy_(tensor)
    on_first(lambda: run.export(model))
