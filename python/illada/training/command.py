"""`illada train`: its options, from `TrainConfig` and the objectives' registry, and what it does.

Importing this file does not import torch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .begin import FIELDS, begun
from .registry import OBJECTIVES, OPTIONS

_RUN = ("data", "eval_data", "tokenizer", "preset", "from")  # settings of the run that are not TrainConfig's


def add_options(p: argparse.ArgumentParser, data: str, device: str) -> None:
    """Adds train's options. Those of the run have no default, otherwise `--resume` could not tell what was said."""
    p.add_argument("--out", required=True, help="the run's folder: state, log, loss curve, model")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument(
        "--save-every", type=int, default=None, metavar="STEPS", help="default: every minute, and at the end"
    )
    p.add_argument("--device", help=device)
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.add_argument("--workers", type=int, default=0, help="processes that make batches ahead (default 0)")
    p.add_argument("--tensorboard", action="store_true", help="write the log to the folder tensorboard in --out too")
    ranks = p.add_argument_group("several ranks, started by torchrun; those that these leave share the batch")
    ranks.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="share each matmul (default 1)")
    ranks.add_argument("--context-parallel", type=int, default=1, metavar="N", help="share each sequence (default 1)")
    ranks.add_argument(
        "--rank-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="end the job when a rank hangs this long; longer than a step or a save takes (default 600)",
    )
    said = p.add_argument_group("the run").add_argument
    says: dict[str, Any] = {"default": argparse.SUPPRESS}
    said("--data", help=data + '; for sft and --pairs JSON lines {"prompt", "response"}', **says)
    said("--pairs", action="store_true", help="the data are prompts with responses, which alone are learned", **says)
    said("--cut", action="store_true", help="cut responses that are too long, instead of refusing them", **says)
    said("--tokenizer", help="bytes (default), bpe:N learned from the text, or a tokenizers JSON file", **says)
    said("--preset", help="shape of the model (default demo)", **says)
    said(
        "--from",
        metavar="FOLDER",
        help="train the model in a checkpoint's folder on, with its tokenizer (default optimizer adamw at 2e-5)",
        **says,
    )
    objectives = "; ".join(f"{name}: {entry.what}" for name, entry in OBJECTIVES.items())
    said("--objective", choices=tuple(OBJECTIVES), help=f"{objectives} (default full)", **says)
    said("--steps", type=int, help="length of the run (default 1000)", **says)
    said("--seconds", type=float, help="length of the run in seconds, instead of --steps", **says)
    said("--length", type=int, help="tokens in a window (default 128)", **says)
    said("--batch-size", type=int, help="default 8", **says)
    said("--accumulate", type=int, help="micro-batches a step, to save memory (default 1)", **says)
    said("--checkpoint-activations", action="store_true", help="compute layers again in the backward", **says)
    said(
        "--compile",
        action="store_true",
        help="compile the layers by torch.compile, which takes about a minute",
        **says,
    )
    said("--lora", type=int, metavar="RANK", help="train adapters of this rank alone, through peft", **says)
    said("--eval-every", type=int, metavar="STEPS", help="measure the loss on held-out text (default never)", **says)
    said("--eval-data", metavar="FILE", help="what is held out (default: some of --data; needed with --pairs)", **says)
    said("--optimizer", choices=("muon", "adamw"), help="default muon", **says)
    said("--lr", type=float, help="default 0.02 for muon, 0.002 for adamw", **says)
    said("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic; weights are float32 (default)", **says)
    said("--seed", type=int, help="default 0", **says)
    _add_objectives_options(p.add_argument_group("the objective"))
    p.set_defaults(run=train)


def _add_objectives_options(group: Any) -> None:
    for name, option in OPTIONS.items():
        homes: dict[Any, list[str]] = {}
        for objective, entry in OBJECTIVES.items():
            if name in entry.options:
                homes.setdefault(entry.options[name], []).append(objective)
        every = len(OBJECTIVES) == sum(map(len, homes.values()))
        defaults = [
            (f"of {', '.join(of)}" if not every else "") + (f", default {value}" if value is not None else "")
            for value, of in homes.items()
        ]
        words: dict[str, Any] = {"help": "; ".join([option.help, *(d for d in defaults if d)])}
        words["help"] = words["help"].replace("%", "%%")
        if option.kind is bool:
            words["action"] = argparse.BooleanOptionalAction
        elif option.choices:
            words["choices"] = option.choices
        elif option.pair:
            words.update(type=option.kind, nargs=2, metavar=("LOW", "HIGH"))
        else:
            words["type"] = option.kind
        group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **words)


def train(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from .parallel.launch import is_launched

    said = {k: v for k, v in vars(options).items() if k in _RUN or k in FIELDS or k in OPTIONS}
    for name in ("data", "eval_data", "from"):
        if said.get(name) is not None:
            said[name] = os.path.abspath(said[name])  # so that a run can be resumed from anywhere
    if is_launched():
        from .parallel.command import train as train_ranks

        return train_ranks(options, said)
    if (options.tensor_parallel, options.context_parallel) != (1, 1):
        raise ValueError("tensor_parallel, context_parallel: expected ranks that torchrun started, found one process")
    if (Path(options.out) / "state.json").exists():
        raise CheckpointError(f"{options.out} holds a state in shards: go on with torchrun, on any number of ranks")
    with begun(options, said) as (run, documents, lock):
        return _run_training(run, documents, options, lock)


def _run_training(run: Any, documents: tuple[Any, Any], options: argparse.Namespace, lock: Any) -> int:
    from ..live import ProgressBar
    from . import runs

    try:
        more = {"held_out": documents[1], "workers": options.workers, "tensorboard": options.tensorboard}
        trainer = run.trainer(documents[0], options.device, lock, **more)
    except BaseException:
        if not options.resume:
            run.forget()
        raise
    if options.resume:
        run.write()  # with the rate of this time
    if shortened := getattr(trainer.source, "shortened", 0):
        print(f"cut {shortened} of {len(trainer.source.rows)} responses at --length", file=sys.stderr)
    if trainer.step:
        print(f"resumed at step {trainer.step}", file=sys.stderr)
    bar = ProgressBar()
    with runs.StopSignals() as stop:
        complete = trainer.run(None if options.quiet else bar, options.save_every, should_stop=lambda: stop.number != 0)
    run.export(trainer.model)
    if len(trainer.losses):
        runs.plot_losses(trainer.losses, run.folder / "loss.png", f"{run.folder.name}: {run.train_config.objective}")
    name = shlex.quote(str(run.folder))
    if not complete:
        bar.close()
        print(
            f"illada: interrupted at step {trainer.step}, saved; go on with: illada train --resume --out {name}",
            file=sys.stderr,
        )
        return 128 + stop.number
    if complaint := trainer.divergence.complaint():
        print(f"illada: {complaint}", file=sys.stderr)
    sampler = OBJECTIVES[run.train_config.objective].sampler
    how = f" --sampler {sampler}" if sampler else ""
    print(f"saved to {run.folder} after {trainer.step} steps; try: illada generate --model {name} --prompt 'def '{how}")
    return 0
