"""Recorded trajectories: a JSON line each, the best of several by the model's bound, and training batches of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import from_numpy

from ..errors import DataError
from .data import Document
from .pairs import shuffled

_FORM = '{"prompt": [ids], "response": [ids], "order": [passes], "bound": number, "block": 0, "first": 1}'


@dataclass(frozen=True)
class Trajectory:
    """Holds what a sampler wrote behind a prompt, and in which pass it committed each token."""

    prompt: list[int]
    response: list[int]
    order: list[int]  # pass 1, 2, ... of each response token; 0: it was given; -1: a mask that no pass filled
    bound: float  # log p of what the passes from `first` on committed, each token given the state it was committed in
    block: int = 0  # the masks of so many response tokens appear with the first pass of their block; 0: all at once
    first: int = 1  # the first pass whose state counts: a teacher made it and those behind it

    @property
    def mean_bound(self) -> float:
        """Returns the bound per committed token, in nats."""
        return self.bound / sum(k >= self.first for k in self.order)

    def line(self) -> str:
        """Returns the JSON line."""
        return json.dumps(asdict(self))


def best(trajectories: Sequence[Trajectory], keep: int) -> list[Trajectory]:
    """Returns the `keep` trajectories of highest bound a token, best first; equal ones in their order.

    Seed Diffusion (arXiv 2508.02193) keeps, of the trajectories that the model makes, those that maximise its bound. A
    bound that is not finite is never kept.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    finite = [t for t in trajectories if math.isfinite(t.bound)]
    return sorted(finite, key=lambda t: -t.mean_bound)[:keep]


@dataclass(frozen=True)
class States:
    """Holds what `objectives.trajectory` reads beside the tokens of a batch; int64, (B, S) or (B,)."""

    order: np.ndarray
    lengths: np.ndarray
    appear: np.ndarray | None
    first: np.ndarray

    def tensors(self) -> dict[str, Any]:
        """Returns the arguments of `objectives.trajectory` by name."""
        return {name: None if x is None else from_numpy(x) for name, x in vars(self).items()}


class Trajectories:
    """Training batches of recorded trajectories; step i's batch is a function of (seed, i).

    Parameters
    ----------
    lines : list of Document
        JSON lines as `Trajectory.line` writes them.
    length : int
    batch_size, seed : int
    eos_id : int
        Stands where there is no token: behind a row, and where no pass filled a mask.
    block : int
        The model's causal_block. Above 0 what lies behind a row counts as masks, because its last block shows them.
    cut : bool
        Keep the first `length` tokens of a row that is longer; `self.shortened` counts them. Otherwise it is refused.

    Raises
    ------
    DataError
        Naming the line: for another form, orders that are not a sampler's, a prompt that leaves no room for a token
        that a pass committed, and without `cut` for rows that are longer than `length`.
    """

    def __init__(
        self,
        lines: list[Document],
        length: int,
        batch_size: int,
        seed: int,
        eos_id: int,
        block: int = 0,
        cut: bool = False,
    ):
        self.length, self.batch_size, self.seed, self.eos_id, self.block = length, batch_size, seed, eos_id, block
        texts = [
            (f"{document.name}, line {number}", line)
            for document in lines
            for number, line in enumerate(document.content.decode("utf-8-sig").split("\n"), 1)
            if line.strip()
        ]
        read = [(where, parse(where, line)) for where, line in texts]
        if not read:
            raise DataError(f"trajectories: expected lines like {_FORM}, found none; write them with illada record")
        long = [(where, len(t.prompt) + len(t.response)) for where, t in read]
        long = [(where, size) for where, size in long if size > length]
        if long and not cut:
            raise DataError(
                f"{long[0][0]}: prompt and response have {long[0][1]} tokens, more than --length {length}, as have "
                f"{len(long)} of {len(read)} lines; give --length {max(size for _, size in long)}, or --cut to keep "
                "what fits"
            )
        self.shortened = len(long)
        self.rows = [self._row(where, t) for where, t in read]
        self.varying = any(t.block for _, t in read)

    def _row(self, where: str, t: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
        """Returns (tokens, order, appear), each (length,), then the row's length and first pass."""
        size = min(len(t.prompt) + len(t.response), self.length)
        tokens = np.full(self.length, self.eos_id, np.int64)
        order = np.full(self.length, -1 if self.block else 0, np.int64)
        given = [0] * len(t.prompt)
        order[:size] = [*given, *t.order][:size]
        tokens[:size] = [*t.prompt, *t.response][:size]
        tokens[order < 0] = self.eos_id
        if not (order >= t.first).any():
            raise DataError(
                f"{where}: expected a token that a pass from {t.first} on committed within --length {self.length}, "
                "found none; give a larger --length"
            )
        appear = np.zeros(self.length, np.int64)
        for start in range(0, len(t.response), t.block) if t.block else ():
            committed = [k for k in t.order[start : start + t.block] if k > 0]
            begin = len(t.prompt) + start
            appear[begin : begin + t.block] = min(committed, default=max(t.order) + 1)
        return tokens, order, appear, size, t.first

    def ids(self) -> np.ndarray:
        """Returns all tokens."""
        return np.concatenate([tokens for tokens, *_ in self.rows])

    def everything(self) -> np.ndarray:
        """Returns all that the batches are made of, by which a resumed run knows its data."""
        return np.concatenate([np.concatenate([*row[:3], row[3:]]) for row in self.rows])

    def batch(self, step: int) -> tuple[np.ndarray, States]:
        """Returns int64 tokens (batch_size, length) and their states."""
        rows = [self.rows[i] for i in shuffled(len(self.rows), step, self.batch_size, self.seed)]
        tokens, order, appear, lengths, first = (np.stack(column) for column in zip(*rows))
        return tokens, States(order, lengths, appear if self.varying else None, first)


def parse(where: str, line: str) -> Trajectory:
    """Returns the trajectory of a JSON line; raises DataError naming it for anything else."""
    try:
        entry = json.loads(line)
        made = Trajectory(**entry)
    except (ValueError, TypeError):
        raise DataError(f"{where}: expected {_FORM}, got {line[:60]!r}") from None
    for name in ("prompt", "response", "order"):
        ids = getattr(made, name)
        if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 2**31 for i in ids):
            raise DataError(f"{where}: {name}: expected a list of integers, got {str(ids)[:60]}")
    numbers: dict[str, Any] = {"block": made.block, "first": made.first}
    if any(type(n) is not int for n in numbers.values()) or made.block < 0 or made.first < 1:
        raise DataError(f"{where}: expected block >= 0 and first >= 1, integers, got {numbers}")
    if len(made.order) != len(made.response):
        raise DataError(
            f"{where}: order: expected a pass for each of {len(made.response)} response tokens, got {len(made.order)}"
        )
    if min(made.order, default=0) < -1 or max(made.order, default=0) < made.first:
        raise DataError(
            f"{where}: order: expected passes from 1, 0 or -1, the largest at least first = {made.first}, got "
            f"{min(made.order, default=0)} to {max(made.order, default=0)}"
        )
    return made
