"""`pytest benchmarks --benchmark-only`: every case of every bench file as a pytest-benchmark test of our first backend.

The peers of the case are timed interleaved with it and stand in the extra info; `python -m benchmarks.run` gives rows.
"""

from __future__ import annotations

import pytest
import torch

from . import measure, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [case for op in run.FILES if run.exists(op) for case in run.collect(op, DEVICE)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}-{case.dtype}")
def test_case(case: measure.Case, benchmark) -> None:
    if DEVICE == "cpu":
        measure.keep_freed()
    work = case.build()
    if not work.ours:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in work.absent.items()))
    backend, job = next(iter(work.ours.items()))
    benchmark.group = case.op
    watched = measure.Watched(DEVICE, case.name)
    jobs = {name: timed for name, timed in watched.ready(work).items() if name == backend or name in work.peers}
    times = measure.interleaved(jobs, rounds=3, seconds=10, device=DEVICE, watched=watched)
    assert backend in times, watched.failed.get(backend)
    benchmark.extra_info.update(backend=backend, **{f"{name} ms": t["p50"] for name, t in times.items()})

    def once() -> None:
        job()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=3, warmup_rounds=0)
