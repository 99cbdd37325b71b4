"""Timing: every contender of a case in turn, A B A B, and rows that say what the limit and the best peer are.

A bench_<op>.py holds `cases(device) -> Iterable[Case]`; `python -m benchmarks.run` and
`pytest benchmarks --benchmark-only` read them. A row's fields are in `run_case`.
"""

from __future__ import annotations

import gc
import itertools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Job = Callable[[], Any]
SAMPLE_MS = 2.0  # a shorter job is called repeatedly within one sample: the clock and its call cost about 1 us


@dataclass
class Work:
    """What one case runs: contenders by name (ours by backend, and peers), each doing the whole job once."""

    ours: dict[str, Job]
    peers: dict[str, Job]
    flops: float = 0.0  # floating-point operations that the mathematics needs
    bytes: float = 0.0  # bytes that must move between memory and chip
    limit: dict[str, Job] = field(default_factory=dict)  # measured ceilings: functions that run at the limit


@dataclass(frozen=True)
class Case:
    op: str  # attention_fwd, attention_bwd, masked_loss, unmask, generate, train
    name: str
    dtype: str
    build: Callable[[], Work]


def rotating(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Job:
    """A job that takes the next set of inputs at each call, so that none is still in the cache from the call before."""
    turn = itertools.cycle(inputs)
    return lambda: function(*next(turn))


# ---- time -----------------------------------------------------------------------------------------------------------


def sample(job: Job, calls: int, device: str) -> float:
    """Milliseconds per call, over `calls` calls; on a GPU from one event to another on the stream."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            job()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        job()
    return (time.perf_counter() - begin) * 1e3 / calls


def interleaved(
    contenders: dict[str, Job], rounds: int = 15, seconds: float = 20.0, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Milliseconds {p20, p50, p80} per contender: one sample of each per round, so that a slow spell of the machine
    meets all of them. Two unmeasured calls first; at least 3 rounds, and no new one after `seconds`."""
    calls: dict[str, int] = {}
    for name, job in contenders.items():
        sample(job, 1, device)
        calls[name] = max(1, round(SAMPLE_MS / max(sample(job, 1, device), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > seconds:
                break
            for name, job in contenders.items():
                times[name].append(sample(job, calls[name], device))
    finally:
        gc.enable()
    return {name: quantiles(values) for name, values in times.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": _quantile(ordered, q / 100) for q in (20, 50, 80)}


def _quantile(ordered: list[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# ---- ceilings -------------------------------------------------------------------------------------------------------


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of random matrices, the ceiling of compute-bound cases."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = [sample(lambda: a @ b, 1, device) for _ in range(6)]
    return 2 * n**3 / (statistics.median(times[1:]) * 1e-3)


def copy_rate(device: str, megabytes: int = 1024) -> float:
    """Bytes/s, read plus write, of a copy too large for the caches."""
    a = torch.randn(megabytes << 18, device=device)
    b = torch.empty_like(a)
    times = [sample(lambda: b.copy_(a), 1, device) for _ in range(6)]
    return 2 * a.numel() * 4 / (statistics.median(times[1:]) * 1e-3)


def ceilings(device: str, dtype: str) -> dict[str, float]:
    """The rates that a row's floor uses, measured now. On a CPU a half-precision product may also run in float32."""
    dtypes = {getattr(torch, dtype), torch.float32} if device == "cpu" else {getattr(torch, dtype)}
    return {"gemm": max(gemm_rate(device, t) for t in dtypes), "copy": copy_rate(device)}


# ---- memory, launches -----------------------------------------------------------------------------------------------


def peak_memory(job: Job, device: str) -> int:
    """Peak bytes that torch's allocator holds during one call, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = job()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    current = peak = 0
    for event in profiled(job, device, memory=True):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def profiled(job: Job, device: str, memory: bool = False) -> list[Any]:
    """The profiler's events of one call, in the order of time."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, profile_memory=memory) as recorded:
        result = job()
        if device == "cuda":
            torch.cuda.synchronize()
    del result
    native: Any = recorded.profiler
    return sorted(native.kineto_results.events(), key=lambda event: event.start_ns())


def count_calls(names: Iterable[str]) -> tuple[int, int]:
    """(kernel launches, host synchronisations) among the names of CUDA API calls; the profiled call's own last
    synchronisation is not counted."""
    called = list(names)
    launches = sum(bool(re.match(r"cu(da)?(LaunchKernel|LaunchCooperative|GraphLaunch)", name)) for name in called)
    syncs = sum(bool(re.match(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize", name)) for name in called)
    return launches, max(0, syncs - 1)


# ---- rows -----------------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """'Intel(R) Xeon(R) Processor, 2 threads' -> 'cpu-xeon-2c', 'NVIDIA H200' -> 'h200': a folder of results."""
    name = re.sub(r"\((R|TM|C)\)|@.*?Hz|\b\d+-Core\b", " ", name, flags=re.IGNORECASE)
    threads = re.search(r", (\d+) threads$", name)
    words = re.findall(r"[a-z0-9]+", (name[: threads.start()] if threads else name).lower())
    kept = [word for word in words if word not in ("intel", "amd", "nvidia", "cpu", "processor", "with", "genuine")]
    return "-".join(["cpu", *kept, f"{threads[1]}c"] if threads else kept)


def versions() -> dict[str, str]:
    import illada_kernels

    return {
        "illada_kernels": illada_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit, with a + if what is measured differs from it."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../csrc", "../illada_kernels", "../python", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def run_case(
    case: Case, device: str, rates: dict[str, float], rounds: int = 15, seconds: float = 20.0
) -> list[dict[str, Any]]:
    """One row per backend of ours; all contenders measured interleaved in this one run.

    floor_ms is the time that the case's flops or bytes take at the measured rates, or that a `limit` function took;
    floor_ratio = floor_ms / p50, ratio = best peer's p50 / p50.
    """
    work = case.build()
    contenders = {**work.ours, **work.peers, **work.limit}
    if len(contenders) != len(work.ours) + len(work.peers) + len(work.limit):
        raise ValueError(f"{case.op} {case.name}: two contenders have the same name")
    times = interleaved(contenders, rounds, seconds, device)
    floor = max(work.flops / rates["gemm"], work.bytes / rates["copy"]) * 1e3
    floor = max([floor, *(times[name]["p50"] for name in work.limit)])
    peers = {name: times[name]["p50"] for name in work.peers}
    best_peer = min(peers, key=lambda name: peers[name]) if peers else None
    rows = []
    for backend, job in work.ours.items():
        p50 = times[backend]["p50"]
        launches = syncs = None
        if device == "cuda":
            launches, syncs = count_calls(event.name() for event in profiled(job, device))
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "dtype": case.dtype,
                "backend": backend,
                "ms": times[backend],
                "tflops": work.flops / p50 * 1e-9,
                "gbps": work.bytes / p50 * 1e-6,
                "floor_ms": floor,
                "floor_ratio": floor / p50,
                "peak_memory": peak_memory(job, device),
                "launches": launches,
                "host_syncs": syncs,
                "peers": peers,
                "best_peer": best_peer,
                "ratio": peers[best_peer] / p50 if best_peer else None,
                "rates": rates,
                "device": device_name(device),
                "versions": versions(),
                "commit": commit(),
            }
        )
    return rows
