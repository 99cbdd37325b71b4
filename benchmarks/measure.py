"""Timing: every contender of a case in turn, A B A B, each watched.

suites/<name>.py holds `cases(device) -> Iterable[Case]`; `python -m benchmarks.run` and
`pytest benchmarks --benchmark-only` read them. A row's fields are in `rows.run_case`.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from illada import heap

from .counts import count_calls, peak_memory
from .journal import Journal
from .machine import commit, device_name, gpu_limits, processor, slug, versions

__all__ = ["commit", "count_calls", "device_name", "peak_memory", "processor", "slug", "versions"]  # taken from here

Job = Callable[[], Any]
SAMPLE_MS = 2.0  # a shorter job is called repeatedly within one sample: the clock and its call cost about 1 us
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}  # of a CPU; `run` chooses
clock = CLOCKS["wall"]
CALL_LIMIT = 60.0  # seconds in which a contender's first call must end, and any sample
COMPILING = 4  # times as long for those that compile or tune at length
WRONG = 0.02  # a relative error that no rounding of bfloat16 explains: the time of such a row means nothing
SLOW_STARTERS = ("compiled", "triton", "Liger", "cut-cross", "quack", "FlashInfer")


@dataclass
class Work:
    """Holds what one case runs: contenders by name (ours by backend, and peers), each doing the whole job once."""

    ours: dict[str, Job]
    peers: dict[str, Job]
    flops: float = 0.0  # floating-point operations that the mathematics needs
    bytes: float = 0.0  # bytes that must move between memory and chip
    limit: dict[str, Job] = field(default_factory=dict)  # measured ceilings: functions that run at the limit
    beside: dict[str, Job] = field(default_factory=dict)  # timed in the same rounds, but another job: no peers
    absent: dict[str, str] = field(default_factory=dict)  # contenders that cannot run here, and why
    notes: dict[str, str] = field(default_factory=dict)  # how a contender was called
    check: Callable[[str], float] | None = None  # relative error of a backend of ours, at this very size
    replayed: int = 0  # on a GPU, time replays of a CUDA graph of so many calls: short jobs without the host's share


@dataclass(frozen=True)
class Case:
    op: str  # of run.FILES
    name: str
    dtype: str
    build: Callable[[], Work]
    facts: dict[str, Any] = field(default_factory=dict)  # what figures and floors need: length, density, rows, flops


def rotating(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Job:
    """Returns a job that takes the next set of inputs at each call, so that none is still in the cache from the call
    before."""
    turn = itertools.cycle(inputs)
    return lambda: function(*next(turn))


def sets_beyond_cache(bytes_of_one: float, device: str) -> int:
    """Returns how many sets of inputs to rotate, so that they are three times the GPU's L2 cache, and at most 64."""
    cache = gpu_limits()["l2"] if device == "cuda" else 0
    return max(2, min(64, -(-3 * cache // max(1, int(bytes_of_one)))))


def keep_freed() -> str | None:
    """Keeps freed memory in this process, for all contenders alike, or says why not.

    Otherwise a call maps its output again or not, depending on what was freed before it. The threshold is the one that
    glibc reaches by itself; larger blocks may still be mapped each time, as in a user's process.
    """
    return heap.keep_freed(heap.GLIBC_MOST)


# ---- time -----------------------------------------------------------------------------------------------------------


class Replay:
    """`calls` calls of a job, captured as a CUDA graph; calling it replays them."""

    def __init__(self, job: Job, calls: int) -> None:
        self.calls, self.graph = calls, torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            job()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            for _ in range(calls):
                job()

    def __call__(self) -> None:
        self.graph.replay()


def sample(job: Job, calls: int, device: str) -> float:
    """Returns milliseconds per call, over `calls` calls, by `clock`; on a GPU from one event to another on the
    stream."""
    each = calls * getattr(job, "calls", 1)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            job()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / each
    begin = clock()
    for _ in range(calls):
        job()
    return (clock() - begin) * 1e3 / each


def interleaved(
    contenders: dict[str, Job],
    rounds: int = 15,
    seconds: float = 20.0,
    device: str = "cpu",
    watched: Watched | None = None,
) -> dict[str, dict[str, float]]:
    """Returns milliseconds {p20, p50, p80} per contender: one sample of each per round, so that a slow spell of the
    machine meets all of them. Two unmeasured calls first; at least 3 rounds, and no new one after `seconds`. `watched`
    hears what begins, and of a contender that raises, which is then left out."""
    watched = watched or Watched(device)
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {}

    def warm_up(name: str, job: Job) -> None:
        sample(job, 1, device)
        once = max(sample(job, 1, device) * getattr(job, "calls", 1), 1e-3)
        calls[name], times[name] = max(1, round(SAMPLE_MS / once)), []

    for name, job in contenders.items():
        watched.attempt(name, warm_up, name, job)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > seconds:
                break
            for name in [name for name in times if name not in watched.failed]:
                watched.attempt(
                    name, lambda name: times[name].append(sample(contenders[name], calls[name], device)), name
                )
    finally:
        gc.enable()
    return {name: quantiles(values) for name, values in times.items() if name not in watched.failed}


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": _quantile(ordered, q / 100) for q in (20, 50, 80)}


def _quantile(ordered: list[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# ---- contenders that cannot run -------------------------------------------------------------------------------------


class ContextLost(RuntimeError):
    """A kernel's fault has ended this process's CUDA context: nothing more can run in it."""


def why(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def reason_of(error: Exception, device: str) -> str:
    """Returns why a job cannot run. Raises ContextLost if nothing can any more."""
    reason = why(error)
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as after:
            raise ContextLost(f"{reason}; then {why(after)}") from after
    return reason


class Watched:
    """Contenders of a case under way: each begun in the journal, and why those that cannot run cannot."""

    def __init__(self, device: str, key: str = "", journal: Journal | None = None, limit: float = CALL_LIMIT) -> None:
        self.device, self.key, self.journal, self.limit = device, key, journal, limit
        self.avoided = journal.avoided() if journal else {}
        self.failed: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.raises = not key  # outside of a case an error is the caller's

    def begin(self, name: str) -> None:
        if self.journal:
            slow = any(word in name for word in SLOW_STARTERS)
            self.journal.begin(f"{self.key}|{name}", self.limit * (COMPILING if slow else 1))

    def attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        self.begin(name)
        try:
            function(*arguments)
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            if self.raises:
                raise
            self.failed[name] = reason_of(error, self.device)

    def ready(self, work: Work) -> dict[str, Job]:
        """Returns the jobs that can run, each called once, as graphs where that is asked for."""
        self.failed, self.notes = dict(work.absent), dict(work.notes)
        jobs: dict[str, Job] = {}
        groups = (work.peers, work.limit, work.beside, work.ours)  # ours last: a graph that breaks off is ours alone
        for name, job in itertools.chain.from_iterable(group.items() for group in groups):
            reason = self.avoided.get(f"{self.key}|{name}") or twice(self.avoided, self.key.split("|")[0], name)
            if reason is not None:
                self.failed[name] = reason
                continue
            self.attempt(name, job)
            if name in self.failed:
                continue
            if self.device == "cuda" and work.replayed:
                job, note = replayed(job, work.replayed)
                if note:
                    self.notes[name] = f"{self.notes[name]}; {note}" if name in self.notes else note
            jobs[name] = job
        return {name: jobs[name] for group in (work.ours, *groups[:3]) for name in group if name in jobs}


def twice(avoided: dict[str, str], op: str, name: str) -> str | None:
    """Returns why a contender is left out everywhere: it has hung or died in two cases of the op."""
    times = [key for key in avoided if key.split("|")[0] == op and key.split("|")[-1] == name]
    return f"left out after {times[0].split('|')[1]} ({avoided[times[0]]}) and another" if len(times) > 1 else None


def capture_something() -> None:
    """Ends a capture, because one that broke off leaves the random generator believing that it goes on."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
    torch.cuda.synchronize()


def replayed(job: Job, calls: int) -> tuple[Job, str | None]:
    """Returns the job as a graph, or as it is and why it cannot be captured."""
    try:
        replay = Replay(job, calls)
        replay()
        torch.cuda.synchronize()
        return replay, None
    except Exception as error:
        reason = why(error)
    try:
        capture_something()
    except Exception as error:
        raise ContextLost(f"{reason}; then {why(error)}") from error
    return job, f"not captured in a graph, so with the host's share: {reason}"
