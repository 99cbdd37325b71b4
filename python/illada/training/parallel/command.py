"""`illada train` on a rank that torchrun started."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ... import checkpoint
from ...live import ProgressBar
from ...model import Model, allocate
from .. import lora
from ..begin import begun, documents_of
from ..runs import Run, StopSignals, plot_losses
from ..state import FolderLock
from .launch import local_device, session
from .layout import Layout, Ranks, on_first
from .model import ShardedModel
from .state import FILE
from .trainer import ParallelTrainer
from .watch import Watch


def train(options: argparse.Namespace, said: dict[str, Any]) -> int:
    """Runs the command; returns its exit code. The first rank makes the run's folder, and alone writes text there."""
    device = local_device(options.device)
    with session(device, options.rank_timeout) as watch, contextlib.ExitStack() as held:
        locks: list[FolderLock] = []
        on_first(lambda: locks.append(_begin(options, said, held)))
        run = Run.open(Path(options.out))
        dist.barrier()  # otherwise an error below could remove the files that another rank has still to read
        try:
            trainer = _trainer(run, options, device, watch, locks[0] if locks else None)
        except BaseException:
            if not options.resume and dist.get_rank() == 0:
                run.forget()
            raise
        return _run(run, trainer, options)


def _begin(options: argparse.Namespace, said: dict[str, Any], held: contextlib.ExitStack) -> FolderLock:
    """Makes or changes the run's folder; the stack holds its lock."""
    run, _, lock = held.enter_context(begun(options, said))
    if options.resume:
        run.write()  # with the rate of this time
    found: FolderLock = lock
    return found


def _trainer(
    run: Run, options: argparse.Namespace, device: torch.device, watch: Watch, lock: FolderLock | None
) -> ParallelTrainer:
    config, folder = run.train_config, run.folder
    tensor, context = options.tensor_parallel, options.context_parallel
    layout = Layout.of(dist.get_world_size(), tensor, context, run.model_config, config)
    on_first(lambda: checkpoint.check_target(folder, run.model_config))
    documents, held_out = documents_of(run.data, run.eval_data, config, folder)
    source, identity = run.source(documents)
    watch.moved(0, "weights")
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    model = ShardedModel(run.model_config, Ranks.connect(layout, device), dtype, config.lora)
    model.moved = lambda: watch.moved(watch.step, "weights")
    _fill(model, run)
    measured = run.source(held_out)[0] if config.eval_every is not None else None
    more = (watch.moved, measured, options.tensorboard, options.workers)
    trainer = ParallelTrainer(model, source, config, folder, identity, lock, *more)
    if dist.get_rank() == 0:
        shape = f"{layout.data} data * {layout.context} context * {layout.tensor} tensor ranks, {device.type}"
        print(shape + (f"; resumed at step {trainer.step}" if trainer.step else ""), file=sys.stderr)
    return trainer


def _fill(model: ShardedModel, run: Run) -> None:
    """Gives the model the weights that its first step begins with; of a state, those that it does not hold."""
    config, begins = run.train_config, not (run.folder / FILE).exists()
    if run.start_from is not None and (config.lora or begins):
        model.load(Path(run.start_from))
    elif begins:
        model.draw(config.seed)
    if config.lora and begins:
        model.draw_adapters(config.seed)


def _run(run: Run, trainer: ParallelTrainer, options: argparse.Namespace) -> int:
    first, bar = dist.get_rank() == 0, ProgressBar()
    with StopSignals() as stop:
        complete = trainer.run(None if options.quiet else bar, options.save_every, should_stop=lambda: stop.number != 0)
    export(run, trainer.sharded)
    if first and len(trainer.losses):
        plot_losses(trainer.losses, run.folder / "loss.png", f"{run.folder.name}: {run.train_config.objective}")
    if first and not complete:
        bar.close()
    if first:
        name = shlex.quote(str(run.folder))
        again = f"torchrun --nproc-per-node {dist.get_world_size()} -m illada train --resume --out {name}"
        stopped = f"illada: interrupted at step {trainer.step}, saved; go on with: {again}"
        done = f"saved to {run.folder} after {trainer.step} steps; try: illada generate --model {name} --prompt 'def '"
        if complete and (complaint := trainer.divergence.complaint()):
            print(f"illada: {complaint}", file=sys.stderr)
        print(done if complete else stopped, file=sys.stdout if complete else sys.stderr)
    return 0 if complete else 128 + stop.number


def export(run: Run, sharded: ShardedModel) -> None:
    """Writes the weights into the run's folder as a Hugging Face checkpoint; the first rank holds them all.

    With adapters they are in the dtype in which one process would hold the checkpoint, and `Run.export` merges them.
    """
    model = Model(run.model_config, device="meta", dtype=sharded.dtype if sharded.adapters else torch.float32)
    first = dist.get_rank() == 0
    if first:
        allocate(model, "cpu")
    _take(dict(model.named_parameters()), sharded.gathered())
    if sharded.adapters:
        if first:
            lora.add(model, sharded.adapters)
        _take(dict(model.named_parameters()), sharded.gathered_adapters())
    on_first(lambda: run.export(model))


@torch.no_grad()
def _take(weights: dict[str, torch.nn.Parameter], gathered: Iterator[tuple[str, torch.Tensor]]) -> None:
    for name, tensor in gathered:
        if dist.get_rank() == 0:
            weights[name].copy_(tensor)
