"""Begins a run of `illada train`, in one process or over ranks: settings, documents, the folder's lock."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DataError
from .config import TrainConfig
from .registry import OBJECTIVES, OPTIONS

FIELDS = {f.name for f in dataclasses.fields(TrainConfig)} - {"options"}


@contextlib.contextmanager
def begun(options: argparse.Namespace, said: dict[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Yields the run, which it makes or opens, (training, held out) documents and its folder's lock, which it holds."""
    from .runs import Run
    from .state import FolderLock

    folder = Path(options.out)
    if options.resume:
        Run.open(folder)  # before the lock, which would make the folder
        with FolderLock(folder) as lock:
            run = _resumed(Run.open(folder), said)
            yield run, documents_of(run.data, run.eval_data, run.train_config, folder), lock
        return
    if (folder / "run.json").exists():
        raise CheckpointError(f"{folder} holds a run already: go on with it by --resume, or choose another --out")
    config = config_of(said)
    documents = documents_of(said.get("data"), said.get("eval_data"), config, folder)
    with FolderLock(folder) as lock:
        names = (said.get("tokenizer", "bytes"), said.get("preset", "demo"))
        run = Run.create(
            folder,
            said.get("data"),
            *names,
            config,
            documents[0],
            _learning(options.quiet),
            start_from=said.get("from"),
            eval_data=said.get("eval_data"),
        )
        yield run, documents, lock


def config_of(said: dict[str, Any]) -> TrainConfig:
    """Returns the settings that were said with the command's defaults; raises ValueError for what does not fit."""
    values = {k: v for k, v in said.items() if k in FIELDS}
    values["options"] = {k: v for k, v in said.items() if k in OPTIONS}
    if "steps" not in values and "seconds" not in values:
        values["steps"] = 1000
    if values.get("objective") == "block" and not values.get("pairs"):
        values["options"].setdefault("hole_fraction", 0.2)
    for name in ("tokenizer", "preset"):
        if "from" in said and name in said:
            raise ValueError(f"{name}: it is the one in --from {said['from']}; leave out --{name}")
    if "lora" in said and "from" not in said:
        raise ValueError("lora: expected --from, a checkpoint that the adapters change; leave out --lora")
    if "eval_data" in said and "eval_every" not in said:
        raise ValueError("eval_data: it is for --eval-every only; leave out --eval-data")
    if "from" in said:
        values.setdefault("optimizer", "adamw")
    if values.get("optimizer") == "adamw":
        values.setdefault("lr", 2e-5 if "from" in said else 0.002)
    return TrainConfig(**values)


def _resumed(run: Any, said: dict[str, Any]) -> Any:
    """Returns the run with the learning rate that was said.

    Raises ValueError for other settings that differ from the run's; tokenizer and preset cannot be given again at all.
    """
    before = {**run.train_config.flat(), "data": run.data, "from": run.start_from, "eval_data": run.eval_data}
    wrong = [k for k, v in said.items() if k != "lr" and (k not in before or before[k] != v)]
    if wrong:
        changed = ", ".join(f"--{k.replace('_', '-')} {said[k]}" for k in wrong)
        raise ValueError(
            f"--resume goes on with the settings in {run.folder / 'run.json'}, of which --lr alone may change: "
            f"leave out {changed}"
        )
    if "lr" in said:
        run.train_config = dataclasses.replace(run.train_config, lr=said["lr"])
    return run


def documents_of(
    data: str | None, eval_data: str | None, config: TrainConfig, folder: Path
) -> tuple[list[Any], list[Any]]:
    """Returns (training, held out) documents, without the run's own folder."""
    from . import runs
    from .data import read_corpus

    held_out = None if eval_data is None else read_corpus(eval_data, folder)
    recorded = OBJECTIVES[config.objective].answers == "recorded"
    if config.pairs or recorded:
        if data is None:
            form = "what illada record wrote" if recorded else 'JSON lines {"prompt": "...", "response": "..."}'
            raise DataError(f"{config.objective}: expected --data, a file of {form}")
        if config.eval_every is not None and held_out is None:
            raise ValueError("eval_every: expected --eval-data too, a file like --data that is not trained on")
        return read_corpus(data, folder), held_out or []
    if data is not None and folder.exists() and Path(data).exists() and os.path.samefile(data, folder):
        raise ValueError(f"out: expected a folder other than --data, got {folder} for both")
    if held_out is not None:
        return read_corpus(data, folder), held_out
    return runs.documents(data, folder)


def _learning(quiet: bool) -> Callable[[float], object]:
    """Returns a line that says how much of a tokenizer is learned, on a terminal alone."""

    def show(done: float) -> None:
        percent = int(done * 100)
        if percent > shown[0]:
            shown[0] = percent
            print(
                f"\r\x1b[2Klearning the tokenizer: {percent}%",
                end="\n" if done >= 1 else "",
                file=sys.stderr,
                flush=True,
            )

    shown = [0]
    return (lambda done: None) if quiet or not sys.stderr.isatty() else show
