"""Attention's C++ entry points alone: without the checks, the allocations and the dispatch that a call of Python adds.

    python -m benchmarks.quality.attention_alone                         every CPU case, both directions and dtypes
    python -m benchmarks.quality.attention_alone --case packed --rounds 60
    OMP_NUM_THREADS=1 python -m benchmarks.quality.attention_alone --clock processor

A cell is ms, the median of calls in turns, and GFLOP/s on allowed pairs, of the fastest call. Outputs are allocated
once, two sets of inputs take turns. `ILLADA_CPU_ISA=avx2` chooses the instruction set, as everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable

import torch

from illada_kernels._extension import DTYPES, check, native, pointer
from illada_kernels.ops.attention import cases, cpu
from illada_kernels.ops.attention.problem import Problem, element_strides

from .. import measure
from ..suites.attention import CPU_SHAPES

SHAPES = (*CPU_SHAPES, *cases.CPU_CASES)
DIRECTIONS = ("forward", "backward")
Run = Callable[[], None]


def entries(shape: cases.Case, dtype: torch.dtype, seed: int) -> dict[str, Run]:
    """Returns a call of each entry point; that of the backward adds to dq what it has added before."""
    q, k, v, dout = shape.inputs(dtype, "cpu", seed)
    ranges = shape.key_ranges("cpu")
    problem = Problem(q, k, v, None if ranges is None else ranges.bounds, shape.head_dim**-0.5)
    out, lse = cpu.forward(problem)
    dq, dk, dv = torch.zeros(q.shape), torch.empty_like(k), torch.empty_like(v)
    bounds, sizes = problem.bounds, (*problem.sizes(),)
    before, after = element_strides(q, k, v, bounds), element_strides(q, k, v, bounds, out, dout)
    read, written = (q, k, v, bounds, out, lse), (dout, None, dq, dk, dv)

    def forward() -> None:
        where = map(pointer, read)
        rest = (*sizes, before.buffer_info()[0], problem.scale, torch.get_num_threads())
        check("attention", native().attention_fwd_cpu(DTYPES[dtype], *where, *rest))

    def backward() -> None:
        where = map(pointer, (*read, *written))
        rest = (*sizes, after.buffer_info()[0], problem.scale, torch.get_num_threads())
        check("attention_bwd", native().attention_bwd_cpu(DTYPES[dtype], *where, *rest))

    return {"forward": forward, "backward": backward}


def times(shape: cases.Case, rounds: int) -> dict[tuple[str, torch.dtype], list[float]]:
    """Returns the milliseconds of each call, by direction and dtype."""
    dtypes = (torch.float32, torch.bfloat16)
    sets = {dtype: [entries(shape, dtype, seed) for seed in range(2)] for dtype in dtypes}
    found: dict[tuple[str, torch.dtype], list[float]] = {key: [] for key in itertools.product(DIRECTIONS, dtypes)}
    for at in range(-2, rounds):  # the first of each set is not counted
        for (direction, dtype), samples in found.items():
            ms = measure.sample(sets[dtype][at % 2][direction], 1, "cpu")
            samples += [ms] if at >= 0 else []
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=12, help="calls of each (default 12)")
    parser.add_argument("--clock", choices=measure.CLOCKS, default="wall")
    options = parser.parse_args(arguments)
    chosen = [shape for shape in SHAPES if options.case in shape.name]
    if not chosen or options.rounds < 1:
        known = ", ".join(shape.name for shape in SHAPES)
        parser.error(f"expected --case of {known}, and --rounds of at least 1")
    if options.clock == "processor" and torch.get_num_threads() != 1:
        parser.error("--clock processor: expected one thread (OMP_NUM_THREADS=1)")
    measure.clock = measure.CLOCKS[options.clock]
    measure.keep_freed()
    names = [f"{direction}, {dtype}" for direction in DIRECTIONS for dtype in ("float32", "bfloat16")]
    print(f"| | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for shape in chosen:
        cells = []
        for (direction, _), ms in times(shape, options.rounds).items():
            rate = cases.flops(shape, direction) / min(ms) / 1e6
            cells.append(f"{statistics.median(ms):.4g} ms, {rate:.3g}")
        print(f"| {shape.name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
