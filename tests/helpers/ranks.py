"""Runs checks in several processes that talk through gloo: `python -m tests.helpers.ranks FOLDER MODULE WORLD ...`.

Imports torch once, because that takes seconds, and forks the ranks of every world from there. A check is a function of
the module named check_...; it runs on every rank, after the module's `prepare`, which runs once. Each rank leaves
FOLDER/WORLD.CHECK.RANK: "", or a traceback.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.helpers.seeds import spare_seeds

TIMEOUT = datetime.timedelta(seconds=60)  # for a rank to arrive where another failed
Check = Callable[[], None]

folder = Path()  # of this run, for checks that leave something to a later world


def worlds(*sizes: int, breaks: bool = False) -> Callable[[Check], Check]:
    """Marks a check that runs in worlds of these sizes only. breaks: ranks may die in it, so it has a world of its own,
    which ends when one of them does."""

    def mark(check: Check) -> Check:
        check.worlds, check.breaks = sizes, breaks  # type: ignore[attr-defined]
        return check

    return mark


def checks(module: str, world: int) -> dict[str, Check]:
    found = vars(importlib.import_module(module)).items()
    return {n: f for n, f in found if n.startswith("check_") and world in getattr(f, "worlds", (world,))}


def report(check: str, what: str = "") -> None:
    """Leaves this rank's result."""
    (folder / f"{dist.get_world_size()}.{check}.{dist.get_rank()}").write_text(what)


def run_rank(some: dict[str, Check], rank: int, world: int, port: int) -> None:
    """Stops at the first check that fails: the ranks are no longer in step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=TIMEOUT)
    for name, check in some.items():
        torch.manual_seed(0)
        begun = time.monotonic()
        try:
            check()
        except BaseException:
            report(name, traceback.format_exc())
            return
        report(name)
        print(f"{world}.{rank} {name}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
    dist.barrier()  # no rank leaves while another still needs it
    dist.destroy_process_group()


def run_world(some: dict[str, Check], world: int, breaks: bool) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                run_rank(some, rank, world, port)
            finally:
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    first, _ = os.wait()
    children.remove(first)
    told = any(list(folder.glob(f"{world}.{check}.*")) for check in some)
    deadline = time.monotonic() + ((1 if told else 5) if breaks else 1000)
    while children:
        gone, _ = os.waitpid(-1, os.WNOHANG)
        if gone:
            children.remove(gone)
        elif time.monotonic() > deadline:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        else:
            time.sleep(0.02)


def main(module: str, sizes: list[int]) -> None:
    getattr(importlib.import_module(module), "prepare", lambda: None)()
    spare_seeds()
    gc.freeze()  # otherwise each rank's collector writes to, and so copies, what all of them share
    gc.set_threshold(20_000)
    for world in sizes:
        found = checks(module, world)
        run_world({n: f for n, f in found.items() if not getattr(f, "breaks", False)}, world, False)
        for name, check in found.items():
            if getattr(check, "breaks", False):
                run_world({name: check}, world, True)


if __name__ == "__main__":
    from tests.helpers import ranks  # not __main__: the checks import it by this name

    ranks.folder = Path(sys.argv[1])
    ranks.main(sys.argv[2], [int(size) for size in sys.argv[3:]])
