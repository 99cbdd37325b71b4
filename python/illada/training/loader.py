"""Examples of steps: each is a function of (settings, step), so that a resumed run and loader processes change none."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..config import ModelConfig
from .config import TrainConfig
from .objectives import Example
from .registry import OBJECTIVES, Batch
from .trajectories import States


class Source(Protocol):
    """Clean batches by step."""

    def batch(self, step: int) -> Any:
        """Returns int64 (B, S), or that and the prompts' lengths (B,) or the `States`; the same however often asked."""


def options_for(config: TrainConfig, model: ModelConfig) -> dict[str, Any]:
    """Returns the objective's options with the block length; raises ValueError where model and settings differ."""
    entry, options = OBJECTIVES[config.objective], dict(config.options)
    if "block" in options:
        options["block"] = options["block"] or (model.causal_block if entry.sees == "blocks" else 4)
    wanted = entry.causal_block(options.get("block"))
    if model.causal_block != wanted or (entry.sees == "blocks" and not options["block"]):
        raise ValueError(
            f"model: expected causal_block = {wanted} for objective {config.objective!r}, got {model.causal_block}"
        )
    if entry.sees == "blocks" and config.length % wanted:
        raise ValueError(
            f"length: expected a multiple of the model's causal_block = {wanted}, above 0, got {config.length}"
        )
    return options


def example(config: TrainConfig, options: dict[str, Any], model: ModelConfig, batch: Any, step: int) -> Example:
    """Returns the corrupted batch of a step, from a generator of its own.

    Raises ValueError for a batch with ids that the model does not have, or with its mask, which is not text.
    """
    tokens, prompts = batch if isinstance(batch, tuple) else (batch, None)
    states = prompts if isinstance(prompts, States) else None
    check_ids(tokens, model, f"the batch of step {step}")
    learn = None
    if prompts is not None and states is None:
        learn = torch.arange(tokens.shape[1], device="cpu") >= torch.from_numpy(prompts)[:, None]
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**63)
    done = step / config.steps if config.steps else 0.0
    made = Batch(torch.from_numpy(tokens), learn, model.mask_id, model.vocab_size, generator, done, states)
    return OBJECTIVES[config.objective].make(made, **options)


def check_ids(tokens: np.ndarray, model: ModelConfig, where: str) -> None:
    """Raises ValueError for ids that the model does not have, and for its mask."""
    wrong = tokens[(tokens < 0) | (tokens >= model.vocab_size) | (tokens == model.mask_id)]
    if len(wrong):
        raise ValueError(
            f"source: expected ids in [0, {model.vocab_size}) other than mask_id = {model.mask_id}, "
            f"got {wrong[0]} in {where}"
        )


class Loader:
    """Makes the examples of steps in order, in `workers` processes ahead of the training, or when asked (0)."""

    def __init__(self, config: TrainConfig, model: ModelConfig, source: Source, workers: int = 0) -> None:
        if workers < 0:
            raise ValueError(f"workers: expected at least 0, got {workers}")
        self.steps = _Steps(config, options_for(config, model), model, source)
        self.workers, self.end = workers, config.steps or 2**62
        self.last: tuple[int, Example] | None = None
        self.ahead: Iterator[Any] | None = None

    def check(self) -> None:
        """Makes the first example here and keeps it; raises what it raises, before a folder is written to."""
        self.last = (0, self._checked(self.steps[0]))

    def example(self, step: int) -> Example:
        """Returns the example of a step, the one before last included."""
        if self.last is None or self.last[0] != step:
            ahead = self.workers and step < self.end
            self.last = (step, self._checked(self._next(step) if ahead else self.steps[step]))
        return self.last[1]

    @staticmethod
    def _checked(made: Any) -> Example:
        if isinstance(made, Exception):
            raise made
        example: Example = made
        return example

    def _next(self, step: int) -> Any:
        if self.ahead is None or self.last is None or self.last[0] + 1 != step:
            self.ahead = iter(
                DataLoader(
                    self.steps,
                    batch_size=None,
                    sampler=range(step, self.end),
                    num_workers=self.workers,
                    collate_fn=_as_it_is,
                    worker_init_fn=_leave_signals,
                    generator=torch.Generator(),  # torch's own is the user's
                )
            )
        return next(self.ahead)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Ends the processes. That one was killed is raised by torch wherever the training is, as a RuntimeError."""
        self.ahead = self.last = None
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise ChildProcessError(
                f"workers: a loader process ended ({error}); go on with --resume, with fewer of them if memory ran out"
            ) from None


class _Steps(Dataset[Any]):
    def __init__(self, config: TrainConfig, options: dict[str, Any], model: ModelConfig, source: Source) -> None:
        self.config, self.options, self.model, self.source = config, options, model, source

    def __getitem__(self, step: int) -> Any:
        """Returns the example, or the exception, which DataLoader would bury in text."""
        try:
            return example(self.config, self.options, self.model, self.source.batch(step), step)
        except Exception as error:
            return error


def _as_it_is(made: Any) -> Any:
    return made


def _leave_signals(worker: int) -> None:
    """Ignores Ctrl-C, which a terminal sends to all processes, because the run ends after its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
