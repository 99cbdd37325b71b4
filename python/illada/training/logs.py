"""Writes what a run says while it trains: a JSON line a step, TensorBoard's events where wanted; sees divergence."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .state import append_line, cut_log

ADVICE = "resume with a lower --lr, or check the data"


class Log:
    """Writes log.jsonl, a line {"step", "loss", "lr"} a step, with "held_out" in steps that measure it.

    Parameters
    ----------
    file : Path
    step : int
        Steps that the saved state knows; later lines are cut off.
    tensorboard : bool
        Write the same to a folder `tensorboard` beside the file.

    Raises
    ------
    CheckpointError
        For a file that holds less than the state.
    DataError
        For `tensorboard` where the package is missing.
    """

    def __init__(self, file: Path, step: int, tensorboard: bool = False) -> None:
        self.board = _writer(file.with_name("tensorboard"), step) if tensorboard else None
        self.entries = cut_log(file, step)
        self.file = open(file, "a", encoding="utf-8")

    def write(self, step: int, **values: float) -> None:
        """Appends the values of a step."""
        append_line(self.file, json.dumps({"step": step, **values}))
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Brings what was written to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.board is not None:
            self.board.flush()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DataError("tensorboard: the package is missing; pip install tensorboard, or leave it out") from None
    return SummaryWriter(str(folder), purge_step=step)


class Divergence:
    """Sees that a run diverges before its numbers are no longer finite.

    The mean of the last 20 losses must stay below 4 times the larger of the first 20's and log(vocab), which is what a
    token costs a model that knows nothing. A mean, because with weights 1/t a single loss may be ten times the usual
    one: so the first 20, in which a run may diverge too, count as at most ten times the first of them or log(vocab).
    """

    def __init__(self, vocab_size: int, losses: np.ndarray) -> None:
        self.limit = math.log(max(vocab_size, 2))
        self.count = 0
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=20)
        for loss in losses:
            self.check(float(loss), 0, judge=False)

    def check(self, loss: float, step: int, judge: bool = True) -> None:
        """Takes a step's loss; raises ArithmeticError where the run has diverged."""
        if not math.isfinite(loss):
            raise ArithmeticError(f"step {step}: the loss is {loss}; {ADVICE}")
        self.count += 1
        self.last.append(loss)
        if len(self.first) < 20:
            self.first.append(loss)
        mean, begun = (float(np.mean(losses)) for losses in (self.last, self.first))
        begun = min(begun, 10 * max(self.first[0], self.limit))
        if judge and len(self.last) == 20 and mean > 4 * max(begun, self.limit):
            raise ArithmeticError(
                f"step {step}: the run diverges, for its last 20 losses are {mean:.3g} on average and the first were "
                f"{begun:.3g}; {ADVICE}"
            )

    def complaint(self) -> str | None:
        """Returns what to say of a run that has learned next to nothing, whose last 20 losses are at least 0.9 times
        both the first 20 and log(vocab); of fewer than 40 losses halves are compared, and fewer than 20 say nothing.

        A rate that is far too high ends so: a step of Muon or AdamW is as large whatever the gradient, and behind the
        layers' norms even weights of 1e9 have finite losses.
        """
        if self.count < 20:
            return None
        some = min(20, self.count // 2)
        last, first = (float(np.mean(losses)) for losses in ([*self.last][-some:], self.first[:some]))
        if last < 0.9 * max(first, self.limit):
            return None
        return (
            f"next to nothing was learned: the last {some} losses are {last:.3g} on average, the first were "
            f"{first:.3g}, and a token that is guessed costs log(vocab) = {self.limit:.3g}; begin anew with a lower "
            "--lr, or train longer"
        )
