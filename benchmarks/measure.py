"""Timing: every contender of a case in turn, A B A B, over rotating inputs, and rows that say what the limit and the best peer are.

A bench_<op>.py holds `cases(device) -> Iterable[Case]`; `python -m benchmarks.run` and `pytest benchmarks --benchmark-only` read them.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Work:
    """What one case runs: contenders by name (ours by backend, and peers), each a function of nothing that does the whole job once."""

    ours: dict[str, Callable[[], Any]]
    peers: dict[str, Callable[[], Any]]
    flops: float = 0.0  # floating-point operations that the mathematics needs
    bytes: float = 0.0  # bytes that must move between memory and chip
    limit: dict[str, Callable[[], Any]] = field(default_factory=dict)  # measured ceilings: name -> function that runs at the limit


@dataclass(frozen=True)
class Case:
    op: str  # attention_fwd, attention_bwd, masked_loss, unmask, generate, train
    name: str
    dtype: str
    build: Callable[[], Work]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _once(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int = 15, seconds: float = 20.0) -> dict[str, dict[str, float]]:
    """Milliseconds {p20, p50, p80} per contender: one call of each per round, after one unmeasured round; at least 3 rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for fn in contenders.values():
        fn()
    gc.collect()
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, fn in contenders.items():
            times[name].append(_once(fn))
    return {name: quantiles(values) for name, values in times.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    p20, p50, p80 = (_quantile(sorted(values), q) for q in (0.2, 0.5, 0.8))
    return {"p20": p20, "p50": p50, "p80": p80}


def _quantile(ordered: list[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def gemm_rate(device: str, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of an n-cubed product of random matrices, the ceiling for compute-bound cases."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [_once(lambda: a @ b) for _ in range(6)]
    return 2 * n**3 / (statistics.median(times[1:]) * 1e-3)


def copy_rate(device: str, megabytes: int = 256) -> float:
    """Bytes/s, read plus write, of a copy too large for the caches."""
    a = torch.randn(megabytes << 18, device=device)
    b = torch.empty_like(a)
    times = [_once(lambda: b.copy_(a)) for _ in range(6)]
    return 2 * a.numel() * 4 / (statistics.median(times[1:]) * 1e-3)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = open("/proc/cpuinfo").read().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    import illada_kernels

    return {"illada_kernels": illada_kernels.__version__, "torch": torch.__version__, "python": platform.python_version()}


def commit() -> str:
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


def run_case(case: Case, device: str, ceilings: dict[str, float], rounds: int = 15, seconds: float = 20.0) -> list[dict[str, Any]]:
    """One row per backend of ours; all contenders measured interleaved in this one run."""
    work = case.build()
    times = interleaved({**work.ours, **work.peers, **work.limit}, rounds, seconds)
    floor = max(work.flops / ceilings["gemm"], work.bytes / ceilings["copy"]) * 1e3
    floor = max([floor, *(times[name]["p50"] for name in work.limit)])
    peers = {name: times[name]["p50"] for name in work.peers}
    best_peer = min(peers, key=lambda name: peers[name]) if peers else None
    rows = []
    for backend in work.ours:
        p50 = times[backend]["p50"]
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
                "peak_memory": extra_memory(work.ours[backend], device),
                "launches": None,
                "host_syncs": None,
                "peers": peers,
                "best_peer": best_peer,
                "ratio": peers[best_peer] / p50 if best_peer else None,
                "device": device_name(device),
                "versions": versions(),
                "commit": commit(),
            }
        )
    return rows


def extra_memory(fn: Callable[[], Any], device: str) -> int | None:
    """Peak bytes of tensors allocated by one call, beyond what was there before; counted by the profiler on a CPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    return cpu_peak_memory(fn)


def cpu_peak_memory(fn: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = fn()
    del result
    current = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def select(cases: Iterable[Case], pattern: str) -> list[Case]:
    return [case for case in cases if pattern in case.name]
