"""Processor time of a training step on one thread, and how much of it the operating system takes to map memory.

    python -m benchmarks.quality.train_step                    the cases of benchmarks/suites/train.py
    python -m benchmarks.quality.train_step --case "4 x 128" --steps 21
    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 python -m benchmarks.quality.train_step

Processor time says what a step costs even where others use the machine too. Contenders take turns. "torch's norms" is
ours with the backward that torch derives of RMSNorm and RoPE. The variables make glibc keep what is freed, where it
otherwise maps an allocation above 32 MiB afresh each time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from illada import cpu_gradients

from ..measure import Case, Job
from ..suites.train import cases


def spent(job: Job) -> tuple[float, float]:
    """Returns milliseconds of this process's processor time that a call takes: (in all, in the kernel)."""
    before = os.times()
    job()
    after = os.times()
    system = after.system - before.system
    return 1e3 * (after.user - before.user + system), 1e3 * system


def with_torchs_norms(job: Job) -> Callable[[], Any]:
    def call() -> Any:
        with mock.patch.object(cpu_gradients, "wanted", lambda *tensors: False):
            return job()

    return call


def measured(case: Case, steps: int) -> dict[str, tuple[float, float]]:
    """Means (in all, in the kernel) of each contender: the clock ticks in hundredths of a second."""
    work = case.build()
    ours = work.ours["default"]
    jobs = {"ours": ours, "torch's norms": with_torchs_norms(ours), **work.peers}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
        job()
    for _ in range(steps):
        for name, job in jobs.items():
            times[name].append(spent(job))
    return {name: tuple(map(statistics.fmean, zip(*rows))) for name, rows in times.items()}  # type: ignore[misc]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="those whose name contains it")
    parser.add_argument("--steps", type=int, default=21)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| case | contender | processor time, ms | of it mapping memory | times ours |")
    print("|---|---|---:|---:|---:|")
    for case in cases("cpu"):
        if options.case in case.name:
            found = measured(case, options.steps)
            for name, (ms, system) in found.items():
                short = case.name.partition(", demo")[0]
                print(f"| {short} | {name} | {ms:.0f} | {system:.0f} | {ms / found['ours'][0]:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
