"""Overlaps matmuls with the kernels that read their results: two buffers in turn, and a second stream that reads them.

Works on one device without synchronising the host, and inside a captured graph, which the second stream joins and
leaves by events. On a CPU there is one stream and nothing to wait for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ._torch_ops import is_watched


@functools.cache
def _beside(device: int, stream: int) -> torch.cuda.Stream:
    """Returns the second stream of a stream: one of its own, because a captured graph takes it along."""
    return torch.cuda.Stream(device)


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """Returns (the current stream, the second one); None on a CPU."""
    if device.type != "cuda":
        return None
    current = torch.cuda.current_stream(device)
    return current, _beside(current.device_index, current.cuda_stream)


def is_captured(device: torch.device) -> bool:
    """Returns whether what is launched on the device now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def reuse(device: torch.device) -> Any:
    """Returns a key of where a tensor that is made once may be used again; None where it has to be made anew.

    A tensor made in a captured graph is filled by its replays alone; one that is captured must outlive the graph. On
    another stream it may not be filled yet.
    """
    if is_watched() or is_captured(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class TwoBuffers:
    """Two halves of one allocation. In turn, the current stream fills one and the second stream reads it, while the
    current stream fills the other.

    with TwoBuffers(size, dtype, device) as buffers:
        for ...:
            fill(buffers.to_fill())         # the half whose last reader has finished
            with buffers.filled():
                read(...)                   # on the second stream

    On leaving, the current stream waits for the second one, so that memory may be used again.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._halves = torch.empty(2, size, dtype=dtype, device=device)
        self._streams = _streams(device)
        self._read: list[torch.cuda.Event | None] = [None, None]
        self._turn = 1

    def to_fill(self) -> Tensor:
        """Returns the next half, (size,)."""
        self._turn ^= 1
        read = self._read[self._turn]
        if self._streams and read:
            self._streams[0].wait_event(read)
        return self._halves[self._turn]

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Runs its body on the second stream, after what the current one has enqueued so far."""
        if self._streams is None:
            yield
            return
        current, second = self._streams
        second.wait_stream(current)
        with torch.cuda.stream(second):
            yield
        self._read[self._turn] = second.record_event()

    def __enter__(self) -> TwoBuffers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._streams:
            self._streams[0].wait_stream(self._streams[1])
