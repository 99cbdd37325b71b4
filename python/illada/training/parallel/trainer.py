"""ParallelTrainer: the trainer of a model whose weights lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..config import TrainConfig
from ..logs import Log
from ..objectives import Example
from ..optim import checkpointed
from ..state import FolderLock
from ..trainer import Progress, Source, Trainer
from .layout import Layout, any_rank, on_first, same
from .model import ShardedModel
from .optim import clip, optimizers
from .share import Share
from .state import ShardedState, tensors_of
from .watch import WAIT


def _check(config: TrainConfig, layout: Layout) -> None:
    """Raises ValueError for settings that ranks do not have, with the reason."""
    if config.compile and (layout.tensor, layout.context) != (1, 1):
        raise ValueError(
            "compile: expected layers that lie whole on a rank while they compute, got tensor_parallel "
            f"{layout.tensor} and context_parallel {layout.context}, whose collectives break a layer's graph; leave "
            "out --compile, or share the batch alone"
        )


class ParallelTrainer(Trainer):
    """Trains on all ranks of a layout: every one of them makes the same calls.

    Each rank draws the whole batch's masks, which are a function of (seed, step), and computes its part, so that a step
    is that of one process: weights and denominators are the whole batch's. Everything that may differ between ranks,
    time and signals, is agreed on.

    Parameters
    ----------
    model : ShardedModel
        Filled, unless the folder holds a state.
    source, config, folder, identity, held_out, tensorboard : as `Trainer`
        The folder is one that all ranks see. The state in it may be that of another layout.
    lock : FolderLock, optional
        On the first rank as `Trainer`; None on the others.
    moved : callable
        Called with the step and a word when the rank gets on.
    tensorboard : bool
        As `Trainer`, on the first rank.
    workers : int
        As `Trainer`, of each rank.
    """

    def __init__(
        self,
        model: ShardedModel,
        source: Source,
        config: TrainConfig,
        folder: Path | None = None,
        identity: str = "",
        lock: FolderLock | None = None,
        moved: Callable[[int, str], object] = lambda step, word: None,
        held_out: Source | None = None,
        tensorboard: bool = False,
        workers: int = 0,
    ) -> None:
        _check(config, model.ranks.layout)
        self.sharded, self.ranks, self.moved = model, model.ranks, moved
        self.own_lock: FolderLock | None = None
        if folder is not None:
            on_first(lambda: self._take_lock(folder) if lock is None else None)
        super().__init__(model.model, source, config, folder, identity, lock, held_out, workers, tensorboard)

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        c = self.config
        return optimizers(self.sharded, c.optimizer, c.lr, c.adamw_lr, c.weight_decay)

    def _make_state(self, folder: Path, settings: dict[str, Any], identity: str) -> ShardedState:
        return ShardedState(folder, settings, identity)

    def _make_lock(self, folder: Path) -> FolderLock | None:
        return self.own_lock

    def _take_lock(self, folder: Path) -> None:
        self.own_lock = FolderLock(folder).__enter__()

    def _resume(self) -> None:
        state = self.state
        assert isinstance(state, ShardedState)
        saved = state.find()
        if saved is not None:
            state.read(saved, tensors_of(self.sharded.trained(), self.optimizers))
            self.step, self.seconds = saved["step"], saved["seconds"]
        logs: list[Log] = []
        on_first(lambda: logs.append(Log(state.log, self.step, self.tensorboard)))
        self.log = logs[0] if logs else None
        self.losses = np.array(on_first(lambda: [entry["loss"] for entry in logs[0].entries]))

    def save(self) -> None:
        """Replaces the state in the folder, as `Trainer.save`; a rank that dies meanwhile leaves the previous one."""
        self._check_weights()
        if not isinstance(self.state, ShardedState):
            return
        self.moved(self.step, "save")
        if self.log is not None:
            self.log.flush()
        tensors = tensors_of(self.sharded.trained(), self.optimizers)
        self.state.write(tensors, step=self.step, seconds=self.seconds)
        self.version = self.state.version()

    def _not_finite(self) -> str | None:
        weights = self.sharded.weights()
        bad = next((name for name, w in weights.items() if not bool(w.to_local().isfinite().all())), None)
        if not any_rank(bad is not None):
            return None
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, bad)
        return next(name for name in names if name is not None)

    def run(
        self,
        callback: Callable[[Progress], object] | None = None,
        save_every: int | None = None,
        save_seconds: float = 60.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains as `Trainer.run`. The callback is the first rank's; a stop on any rank stops all after the step."""
        return super().run(callback if dist.get_rank() == 0 else None, save_every, save_seconds, should_stop)

    def _is_over(self, should_stop: Callable[[], bool]) -> bool:
        return any_rank(self.done >= 1 or should_stop())

    def _agreed(self, value: float) -> float:
        return same(value)

    def _clip(self) -> None:
        adamw = self.optimizers[-1]
        clip([p for group in adamw.param_groups for p in group["params"]], self.config.clip, self.ranks)

    def _example(self) -> Example:
        self.moved(self.step, "batch")
        return super()._example()

    def _loss(self, example: Example, each: Callable[[Tensor], object] = lambda part: None) -> float:
        c, ranks = self.config, self.ranks
        total = torch.zeros((), dtype=torch.float32, device=ranks.device)
        parts = example.split(ranks.layout.data * c.accumulate)
        with checkpointed(self.model, c.checkpoint_activations):
            for part in parts[ranks.data * c.accumulate : (ranks.data + 1) * c.accumulate]:
                share = Share.of(part, self.model.config, ranks.layout.context, ranks.context)
                loss = self.sharded(share.to(ranks.device))
                each(loss)
                total += loss.detach()
        self.moved(self.step, WAIT)
        loss = ranks.total(total).item()
        self.moved(self.step, "update")
        return loss
