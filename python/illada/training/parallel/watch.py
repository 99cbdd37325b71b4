"""Watch: a thread on every rank that ends the job, and names the rank, when one dies or hangs.

Each rank tells the others through the store, once a period, that it lives, how far its main thread has come and where
it stands. A rank whose main thread has not moved for `patience` seconds judges: a rank that says nothing is dead or
stopped; else the others wait, in a collective, for one whose main thread is elsewhere.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from illada_kernels import distributed

from ...errors import RankError

WAIT = "wait for the others"  # the word for where the main thread reads what a collective gave
_TORCH = str(Path(torch.__file__).parent)
_COLLECTIVES = (str(Path(dist.__file__).parent), str(Path(distributed.__file__).parent))


@dataclass
class _Seen:
    """Holds what a rank said last, and when that changed, on this rank's clock."""

    said: dict[str, Any]
    at: float


class Watch:
    """Watches the ranks of the default group inside a `with`.

    Parameters
    ----------
    patience : float
        Seconds without progress of this rank's main thread before it judges; longer than a step, a save or an
        evaluation takes.
    period : float
        Seconds between two words of a rank.
    end : callable
        Ends the process with a message.
    """

    def __init__(
        self, patience: float, period: float = 0.5, end: Callable[[str], object] | None = None, store: Any = None
    ) -> None:
        self.patience, self.period, self.end = patience, period, end or _end
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store() if store is None else store
        self.store = dist.PrefixStore("illada watch", store.clone())
        self.main = threading.get_ident()
        self.step, self.word, self.moved_at, self.count = 0, "start", time.monotonic(), 0
        self.seen = {rank: _Seen({}, time.monotonic()) for rank in range(self.world)}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="illada watch", daemon=True)

    def __enter__(self) -> Watch:
        self._say()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def moved(self, step: int, word: str) -> None:
        """Notes that the main thread has come here."""
        self.step, self.word, self.moved_at = step, word, time.monotonic()

    def explained(self, error: BaseException) -> BaseException:
        """Returns the error, or where it only says that a connection broke, RankError naming the rank that broke it."""
        if not _is_about_others(error):
            self._post(self._one_line(error))
            return error
        deadline = time.monotonic() + max(2.0, 6 * self.period)
        while time.monotonic() < deadline:
            self._listen()
            for rank in range(self.world):
                if rank != self.rank and (message := self._posted(rank)):
                    return RankError(f"rank {rank} failed: {message}")
            time.sleep(self.period / 2)
        silent = self._silent(4 * self.period)
        if not silent:
            return error
        return RankError(f"{self._named(silent[0])} died in step {self._step(silent[0])}; {_KEPT}")

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.stopped.wait(self.period):
            try:
                self._say()
                self._listen()
            except Exception:  # the store has gone, with the process that held it; torchrun ends the others
                return
            if time.monotonic() - self.moved_at > self.patience:
                if (verdict := self._judge()) and self._first_to_judge():
                    self.end(verdict)

    def _say(self) -> None:
        self.count += 1
        frame = sys._current_frames().get(self.main)
        waits, where = _place(frame)
        waits = waits or self.word == WAIT
        said = {
            "count": self.count,
            "step": self.step,
            "word": self.word,
            "idle": time.monotonic() - self.moved_at,
            "waits": waits,
            "where": where,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self.store.set(str(self.rank), json.dumps(said))

    def _listen(self) -> None:
        for rank, seen in self.seen.items():
            if not self.store.check([str(rank)]):
                continue
            said = json.loads(self.store.get(str(rank)))
            if said != seen.said:
                self.seen[rank] = _Seen(said, time.monotonic())

    def _judge(self) -> str:
        silent = self._silent(max(self.patience / 2, 4 * self.period))
        if silent:
            rank = silent[0]
            seconds = time.monotonic() - self.seen[rank].at
            return f"{self._named(rank)} has not answered for {seconds:.0f} s, in step {self._step(rank)}; {_KEPT}"
        busy = [r for r, seen in self.seen.items() if not seen.said["waits"] and seen.said["idle"] > self.patience / 2]
        if not busy or len(busy) == self.world > 1:
            return ""
        rank = busy[0]
        said = self.seen[rank].said
        return (
            f"{self._named(rank)} has hung for {said['idle']:.0f} s in step {said['step']} ({said['word']}), at "
            f"{said['where']}, and the others wait for it; {_KEPT}"
        )

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [r for r, seen in self.seen.items() if r != self.rank and now - seen.at > seconds]

    def _step(self, rank: int) -> Any:
        return self.seen[rank].said.get("step", 0)

    def _named(self, rank: int) -> str:
        said = self.seen[rank].said
        return f"rank {rank} (process {said.get('pid', 'unknown')} on {said.get('host', 'an unknown host')})"

    def _first_to_judge(self) -> bool:
        return self.store.add("verdicts", 1) == 1

    # ---- errors -----------------------------------------------------------------------------------------------------

    def _post(self, message: str) -> None:
        try:
            self.store.set(f"failed {self.rank}", message)
        except Exception:  # nobody listens any more
            return

    def _posted(self, rank: int) -> str:
        key = f"failed {rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def leaves_to_first(self, error: BaseException, seconds: float = 5.0) -> bool:
        """Returns whether the first rank has failed alike, or does within these seconds: then it alone prints and
        cleans up."""
        deadline = time.monotonic() + seconds
        while self.rank != 0 and time.monotonic() < deadline:
            if said := self._posted(0):
                return said == self._one_line(error)
            time.sleep(self.period / 5)
        return False

    @staticmethod
    def _one_line(error: BaseException) -> str:
        return " ".join(str(error).split()) or type(error).__name__


_KEPT = "the job ends; go on from the last saved state with --resume"


def _place(frame: FrameType | None) -> tuple[bool, str]:
    """Returns whether a thread waits in a collective, and its innermost line outside of torch."""
    waits = False
    for at in reversed(traceback.extract_stack(frame) if frame is not None else []):
        if at.filename.startswith(_COLLECTIVES):
            waits = True
        elif not at.filename.startswith(_TORCH):
            return waits, f"{at.filename}:{at.lineno} in {at.name}"
    return waits, "an unknown line"


def _is_about_others(error: BaseException) -> bool:
    """Returns whether a collective failed, because of another rank."""
    words = ("Connection", "connection", "gloo", "NCCL", "Timed out", "timed out", "Socket")
    return isinstance(error, (RuntimeError, dist.DistBackendError)) and any(word in str(error) for word in words)


def _end(message: str) -> None:
    print(f"illada: {message}", file=sys.stderr, flush=True)
    os._exit(3)
