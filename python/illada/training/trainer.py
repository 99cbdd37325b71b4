"""The trainer. It survives a kill: a resumed run repeats the undisturbed one bit by bit.

Everything random in step i is drawn from (seed, i), and the learning rate is a function of how much of the run is done.
So the state is the weights, the optimizers' moments, the step and the seconds spent.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model import Model, named_weights
from .config import TrainConfig
from .loader import Loader, Source, check_ids
from .logs import ADVICE, Divergence, Log
from .objectives import Example
from .optim import checkpointed, compile_layers, optimizers
from .state import FolderLock, RunState


@dataclass
class Progress:
    """Where a run is after a step, for a progress bar."""

    step: int
    done: float
    loss: float
    seconds: float
    tokens: int
    held_out: float | None = None  # the loss there, in steps that measure it


class Trainer:
    """Trains a model: `Trainer(model, source, config, folder).run()`.

    Parameters
    ----------
    model : Model
    source : Source
        Clean batches by step, such as `data.Windows`.
    config : TrainConfig
    folder : Path, optional
        The state goes to folder/state.pt and one JSON line per step, {"step", "loss", "lr"}, to folder/log.jsonl, with
        "held_out" every `config.eval_every` steps. A state found there is where the run goes on.
    identity : str
        Names the data; a state of other data is refused.
    lock : FolderLock, optional
        The folder's lock, if the caller holds it. None: held from here to the end of `run`.
    held_out : Source, optional
        Batches that are not trained on, for `config.eval_every`.
    workers : int
        Processes that make batches ahead of the training; they change no number.
    tensorboard : bool
        Write the log to folder/tensorboard too.

    Raises
    ------
    ValueError
        For data or a model that the settings do not fit: the first batch is made here.
    CheckpointError
        For a folder in use, or a state in it that is damaged or of another run.
    CheckpointIOError
        For a folder that cannot be made, or has no room for a save.
    DataError
        For `tensorboard` where the package is missing.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        config: TrainConfig,
        folder: Path | None = None,
        identity: str = "",
        lock: FolderLock | None = None,
        held_out: Source | None = None,
        workers: int = 0,
        tensorboard: bool = False,
    ):
        self.model, self.source, self.config = model, source, config
        if (config.eval_every is None) != (held_out is None):
            raise ValueError("eval_every: expected it together with held_out, got one of them")
        self.loader = Loader(config, model.config, source, workers)
        self.held_out = None if held_out is None else Loader(config, model.config, held_out)
        for where, data in (("the data", source), ("the held-out data", held_out)):
            if hasattr(data, "ids"):
                check_ids(data.ids(), model.config, where)  # type: ignore[union-attr]
        for loader in (self.loader, self.held_out):
            if loader is not None:
                loader.check()
        if config.compile:
            compile_layers(model)
        self.optimizers = self._make_optimizers()
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step, self.seconds, self.losses = 0, 0.0, np.zeros(0)
        self.log: Log | None = None
        self.tensorboard = tensorboard
        self.state = self._make_state(folder, config.flat(), identity) if folder else None
        begins = self.state is None or not self.state.file.exists()
        if begins and self.state is not None:
            self.state.expect_room(self._state_bytes())
        if begins and (bad := self._not_finite()) is not None:
            raise ValueError(f"model: expected finite weights, but {bad} holds NaN or inf; begin with other weights")
        self.lock = self._make_lock(folder) if folder and lock is None else None
        if self.state is not None:
            self.state.sweep()
            self._resume()
            if not begins and self.done < 1:
                self.state.expect_room(self._state_bytes())
            self.version = self.state.version()
        self.divergence = Divergence(model.config.vocab_size, self.losses)

    def _state_bytes(self) -> int:
        """Returns the least size of a state: weights, and moments like them, two of AdamW and one of Muon."""
        trained = [
            (3 if isinstance(optimizer, torch.optim.AdamW) else 2, parameter)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        return sum(copies * parameter.numel() * parameter.element_size() for copies, parameter in trained)

    # parallel.trainer has others of these

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        return optimizers(self.model, c.optimizer, c.lr, c.adamw_lr, c.weight_decay)

    def _make_state(self, folder: Path, settings: dict[str, Any], identity: str) -> RunState:
        return RunState(folder, settings, identity)

    def _make_lock(self, folder: Path) -> FolderLock | None:
        return FolderLock(folder).__enter__()

    def _is_over(self, should_stop: Callable[[], bool]) -> bool:
        return self.done >= 1 or should_stop()

    def _agreed(self, value: float) -> float:
        return value

    def _example(self) -> Example:
        return self.loader.example(self.step)

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.optimizers[-1].param_groups[0]["params"], self.config.clip)

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Returns what is saved: all weights, of a model with adapters those alone."""
        weights = named_weights(self.model)
        return {n: w for n, w in weights.items() if w.requires_grad} if self.config.lora else weights

    def _resume(self) -> None:
        assert self.state is not None
        saved = self.state.load(self.model.device)
        if saved is not None:
            self.state.check_shapes(saved["model"], self.weights)
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(saved["model"][name])
            for optimizer, part in zip(self.optimizers, saved["optimizers"]):
                optimizer.load_state_dict(part)
            self.step, self.seconds = saved["step"], saved["seconds"]
        self.log = Log(self.state.log, self.step, self.tensorboard)
        self.losses = np.array([entry["loss"] for entry in self.log.entries])

    def save(self) -> None:
        """Replaces folder/state.pt.

        Raises ArithmeticError for weights that are not finite or whose loss is not, CheckpointIOError if it cannot be
        written. The previous state then stays.
        """
        self._check_weights()
        if self.state is None:
            return
        assert self.log is not None
        self.log.flush()
        self.state.save(
            {
                "model": {name: weight.detach() for name, weight in self.weights.items()},
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
            }
        )
        self.version = self.state.version()

    def _not_finite(self) -> str | None:
        """Returns the name of a weight that holds NaN or inf."""
        return next((name for name, p in self.model.named_parameters() if not bool(p.isfinite().all())), None)

    def _check_weights(self) -> None:
        if (bad := self._not_finite()) is not None:
            raise ArithmeticError(f"step {self.step}: {bad} has become NaN or inf, and was not saved; {ADVICE}")
        with torch.no_grad():
            loss = self._loss(self._example())
        if not math.isfinite(loss):
            raise ArithmeticError(f"step {self.step}: the loss is {loss}, and the weights were not saved; {ADVICE}")

    @property
    def done(self) -> float:
        """Returns the share of the run that is over, 0 .. 1 or slightly more."""
        length = self.config.steps if self.config.steps is not None else self.config.seconds
        assert length is not None
        return (self.step if self.config.steps is not None else self.seconds) / length

    def run(
        self,
        callback: Callable[[Progress], object] | None = None,
        save_every: int | None = None,
        save_seconds: float = 60.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains to the end, or until `should_stop()` says so between two steps, and saves.

        Parameters
        ----------
        callback : callable, optional
            Called with `Progress` after each step.
        save_every : int, optional
            Steps between saves. None: every `save_seconds`. Saving changes no number.
        save_seconds : float
        should_stop : callable

        Returns
        -------
        bool
            Whether the run is complete.

        Raises
        ------
        ArithmeticError
            When the loss or a weight is not finite; the last good state stays on disk.
        """
        if save_every is not None and save_every < 1:
            raise ValueError(f"save_every: expected at least 1 step, got {save_every}; leave it out to save by time")
        with self._locked(), self.loader:
            return self._run(callback, save_every, save_seconds, should_stop)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock, if it is this trainer's, and lets it go in the end."""
        if self.lock is None:
            yield
            return
        assert self.state is not None
        if self.lock.descriptor < 0:
            self.lock.__enter__()
        try:
            if self.state.version() != self.version:
                raise CheckpointError(f"{self.state.file} was replaced meanwhile; make a new Trainer to go on from it")
            yield
        finally:
            self.lock.release()

    def _run(
        self,
        callback: Callable[[Progress], object] | None,
        save_every: int | None,
        save_seconds: float,
        should_stop: Callable[[], bool],
    ) -> bool:
        self.model.train()
        last_save = time.monotonic()
        begun = time.monotonic() - self.seconds
        losses: list[float] = self.losses.tolist()
        while not self._is_over(should_stop):
            loss = self.one_step()
            self.divergence.check(loss, self.step)
            losses.append(loss)
            held_out = self._held_out_loss()
            self._write_log(loss, held_out)
            self.step += 1
            self.seconds = self._agreed(time.monotonic() - begun)
            if callback is not None:
                tokens = self.config.batch_size * self.config.length
                callback(Progress(self.step, min(1.0, self.done), loss, self.seconds, self.step * tokens, held_out))
            due = (
                self.step % save_every == 0 if save_every else self._agreed(time.monotonic() - last_save) > save_seconds
            )
            if due and self.done < 1:
                self.save()
                last_save = time.monotonic()
        self.losses = np.array(losses)
        self.save()
        return self.done >= 1

    def one_step(self) -> float:
        """Makes one update; returns the loss, nats per token."""
        factor = self.config.rate((self.step + 0.5) / self.config.steps if self.config.steps else self.done)
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        loss = self._loss(self._example(), lambda part: part.backward())
        self._clip()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    @torch.no_grad()
    def _held_out_loss(self) -> float | None:
        """Returns the mean loss of the same few held-out batches, where the step that is being done measures it."""
        c = self.config
        if self.held_out is None or c.eval_every is None or (self.step + 1) % c.eval_every:
            return None
        return sum(self._loss(self.held_out.example(batch)) for batch in range(c.eval_batches)) / c.eval_batches

    def _loss(self, example: Example, each: Callable[[Tensor], object] = lambda part: None) -> float:
        """Returns an example's loss; calls `each` with each micro-batch's share of it."""
        c, device = self.config, self.model.device
        total = torch.zeros((), dtype=torch.float32, device=device)
        with checkpointed(self.model, c.checkpoint_activations):
            for part in example.split(c.accumulate):
                with torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16"):
                    scored = int(part.masked.sum()) if device.type == "cuda" else None  # known before it is there
                    loss = part.to(device).loss(self.model, max_masked=scored)
                each(loss)
                total += loss.detach()
        return total.item()

    def _write_log(self, loss: float, held_out: float | None) -> None:
        if self.log is None:
            return
        extra = {} if held_out is None else {"held_out": held_out}
        self.log.write(self.step, loss=loss, lr=self.optimizers[0].param_groups[0]["lr"], **extra)
