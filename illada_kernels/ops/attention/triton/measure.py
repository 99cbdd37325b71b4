"""Measures tile sizes of the Triton kernels on a machine, for the calls that follow in this process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..problem import Problem
from . import tuning
from .tuning import Tile


def tune(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> dict[str, tuple[Tile, float]]:
    """Measures tiles on these tensors (those of a Problem) and, in this process, uses the fastest for calls of
    their dtype and head_dim on their device. Returns each kernel's tile and the milliseconds of its direction.

    Compiles some thirty tiles a kernel: minutes. Other tiles mean other sums, so the last bits of results may change.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    from . import bwd, fwd

    problem = Problem(q, k, v, bounds, q.shape[3] ** -0.5)
    out, lse = fwd.forward(problem)

    def forwards() -> Any:
        return fwd.forward(problem)

    def backwards() -> Any:
        return bwd.backward(problem, out, None, out, lse)

    fastest = {}
    for name, table, run in (
        ("forward", tuning.FORWARD, forwards),
        ("keys backward", tuning.KEYS_BACKWARD, backwards),
        ("queries backward", tuning.QUERIES_BACKWARD, backwards),
    ):
        times = {}
        for tile in _neighbours(tuning.choose(table, q)):
            tuning.measured[id(table), q.device, q.dtype, q.shape[3]] = tile
            try:
                times[tile] = float(do_bench(run))
            except OutOfResources:
                continue
        best = min(times, key=times.__getitem__)
        tuning.measured[id(table), q.device, q.dtype, q.shape[3]] = best
        fastest[name] = best, times[best]
    return fastest


def _neighbours(tile: Tile) -> Iterator[Tile]:
    """Yields the tile itself, then those with half and twice its rows and keys, other warps, more stages."""
    for rows, keys, warps, more in itertools.product((1, 0.5, 2), (1, 0.5, 2), (tile.warps, 12 - tile.warps), (0, 1)):
        keys = max(16, int(tile.keys * keys))
        yield Tile(max(16, int(tile.rows * rows)), keys, min(tile.part, keys), warps, tile.stages + more, 1)
