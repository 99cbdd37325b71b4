"""Counts what one call of a job costs beside time: memory, kernel launches, host synchronisations, kernels' shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

Job = Callable[[], Any]


def peak_memory(job: Job, device: str) -> int:
    """Returns the peak bytes that torch's allocator holds during one call, beyond what it held before."""
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
    """Returns the profiler's events of one call, in the order of time."""
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
    """Counts (kernel launches, host synchronisations) among the names of CUDA API calls; the profiled call's own last
    synchronisation is not counted."""
    called = list(names)
    launches = sum(bool(re.match(r"cu(da)?(LaunchKernel|LaunchCooperative|GraphLaunch)", name)) for name in called)
    syncs = sum(bool(re.match(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize", name)) for name in called)
    return launches, max(0, syncs - 1)


def gpu_profile(job: Job) -> dict[str, Any]:
    """Returns {launches, host_syncs, kernels: {name: ms}} of one call; all None where the profiler does not work."""
    try:
        events = profiled(job, "cuda")
        launches, syncs = count_calls(event.name() for event in events)
        kernels: dict[str, float] = {}
        for event in events:
            if "CUDA" in str(event.device_type()):
                name = re.split(r"[<(]", event.name().removeprefix("void "))[0][-80:]
                kernels[name] = kernels.get(name, 0.0) + event.duration_ns() * 1e-6
        return {"launches": launches, "host_syncs": syncs, "kernels": kernels}
    except (RuntimeError, AttributeError):
        return {"launches": None, "host_syncs": None, "kernels": None}
