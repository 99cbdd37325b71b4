"""Runs checks in several processes that talk through gloo: `python -m tests.helpers.ranks FOLDER MODULE WORLD ...`.

Imports torch once, because that takes seconds, and forks the ranks of every world from there. A check is a function of
the module named check_...; it runs on every rank. Each rank writes FOLDER/WORLD.RANK.json: {check: "" or traceback}.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)  # for a rank to arrive where another failed


folder = Path()  # of this run, for checks that leave something to a later world


def worlds(*sizes: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Marks a check that runs in worlds of these sizes only."""

    def mark(check: Callable[[], None]) -> Callable[[], None]:
        check.worlds = sizes  # type: ignore[attr-defined]
        return check

    return mark


def checks(module: str, world: int) -> dict[str, Callable[[], None]]:
    found = vars(importlib.import_module(module)).items()
    return {n: f for n, f in found if n.startswith("check_") and world in getattr(f, "worlds", (world,))}


def run_rank(module: str, rank: int, world: int) -> None:
    """Stops at the first check that fails: the ranks are no longer in step."""
    torch.set_num_threads(1)
    store = f"file://{folder}/{world}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=TIMEOUT)
    results: dict[str, str] = {}
    for name, check in checks(module, world).items():
        torch.manual_seed(0)
        begun = time.monotonic()
        try:
            check()
            results[name] = ""
            print(f"{world}.{rank} {name}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
        except BaseException:
            results[name] = traceback.format_exc()
            break
    (folder / f"{world}.{rank}.json").write_text(json.dumps(results))
    if "" in results.values() and all(not r for r in results.values()):
        dist.destroy_process_group()


def main(module: str, sizes: list[int]) -> None:
    importlib.import_module(module)
    for world in sizes:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                try:
                    run_rank(module, rank, world)
                finally:
                    sys.stderr.flush()
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    from tests.helpers import ranks  # not __main__: the checks import it by this name

    ranks.folder = Path(sys.argv[1])
    ranks.main(sys.argv[2], [int(size) for size in sys.argv[3:]])
