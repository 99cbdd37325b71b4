"""A stand-in for CUDA graphs on a CPU: capturing records every operator, replaying runs the same ones on the same
tensors. As on a GPU, capturing changes nothing, and numbers that the host knew then stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from illada.decoding import loop, replay
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Those of an operator's arguments or results; torch's tree_leaves takes longer than the operators here."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graph(TorchDispatchMode):
    """Records while it is entered. `log` holds "capture" or "replay" for each time."""

    log: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # what capturing writes to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_of((args, kwargs)) if func._schema.is_mutable else ():
            storage = tensor.untyped_storage()
            self.before.setdefault(_memory(tensor), (storage, storage.clone()))
        result = func(*args, **kwargs)
        inputs, outputs = {_memory(t) for t in tensors_of((args, kwargs))}, tensors_of(result)
        is_view = bool(outputs) and not func._schema.is_mutable and all(_memory(t) in inputs for t in outputs)
        if not is_view:  # a view stays a view of the same memory
            self.calls.append((func, args, kwargs, outputs))
        return result

    def undo(self) -> None:
        """Takes back what was written while it was captured."""
        for storage, before in self.before.values():
            storage.copy_(before)

    def replay(self) -> None:
        self.log.append("replay")
        with _disable_current_modes():  # who watches operators sees none of a graph's
            for func, args, kwargs, outputs in self.calls:
                for old, new in zip(outputs, tensors_of(func(*args, **kwargs))):
                    if _memory(old) != _memory(new):
                        old.copy_(new)


class Capture:
    """Stands in for `torch.cuda.graph`."""

    def __init__(self, graph: Graph, pool: Any = None) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        self.graph.log.append("capture")
        self.graph.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.graph.__exit__(*error)
        self.graph.undo()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the CPU have graphs; returns the log of captures and replays."""
    log: list[str] = []
    monkeypatch.setattr(Graph, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(replay, "has_graphs", lambda device: True)
    assert loop.Replay is replay.Replay
    return log
