"""Passes without the host: `LateFlag` brings a bool back one pass late, `Replay` captures a pass as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def has_graphs(device: torch.device) -> bool:
    """Returns whether passes are captured there."""
    return device.type == "cuda"


class LateFlag:
    """Brings a bool from the device without waiting for the pass that is running.

    On a GPU `read` gives what the pass before the last wrote, and waits for that one alone, so that a pass is always
    queued behind the one that runs; a block then makes a pass too many, which changes nothing. On a CPU nothing is
    queued, and `read` gives what the last pass wrote. Both are the same in every run, whatever the timing.
    """

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        on_gpu = device.type == "cuda"
        self.lag = int(on_gpu) if lag is None else lag
        self.slots = torch.zeros(2, dtype=torch.bool, device="cpu", pin_memory=on_gpu)
        self.seen = self.slots.numpy()  # the same memory, read without an operator
        self.events = [torch.cuda.Event(), torch.cuda.Event()] if on_gpu else []
        self.reset()

    def reset(self) -> None:
        """Forgets what was written."""
        self.count = 0

    def write(self, flag: Tensor) -> None:
        """Queues the copy of a bool ()."""
        at = self.count % 2
        self.slots[at].copy_(flag, non_blocking=True)
        if self.events:
            self.events[at].record()
        self.count += 1

    def read(self) -> bool:
        """Returns what was written `lag` writes before the last; False if nothing was."""
        at = self.count - 1 - self.lag
        if at < 0:
            return False
        if self.events:
            self.events[at % 2].synchronize()
        return bool(self.seen[at % 2])


class Replay:
    """Runs a function that reads and writes the same tensors each time: on a GPU once, then as a captured graph.

    Arguments tell apart calls that run different operators. The second call with the same ones captures, because the
    first may still compile kernels; what runs once never pays for a graph. All graphs share one pool of memory, so a
    result holds until the next call.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.graphs = function, has_graphs(device)
        self.pool: Any = None
        self.calls: dict[Hashable, int] = {}
        self.captured: dict[Hashable, tuple[Any, Any]] = {}

    def __call__(self, *key: Hashable) -> Any:
        """Returns function(*key); from a graph always the same tensors."""
        if not self.graphs:
            return self.function(*key)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] == 1:
            return self.function(*key)
        if key not in self.captured:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = self.function(*key)
            self.captured[key] = (graph, result)
        graph, result = self.captured[key]
        graph.replay()
        return result
