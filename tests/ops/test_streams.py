"""TwoBuffers waits for what it must and for nothing else: streams played by vector clocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from illada_kernels import _streams


class Stream:
    """clock: of each stream by name, how many of its operations have finished before the next one of this stream."""

    def __init__(self, name: str) -> None:
        self.name, self.clock = name, {"current": 0, "second": 0}

    def run(self) -> dict[str, int]:
        """Enqueues an operation; returns what has finished before it."""
        before = dict(self.clock)
        self.clock[self.name] += 1
        return before

    def record_event(self) -> Stream:
        event = Stream(self.name)
        event.clock = dict(self.clock)
        return event

    def wait_event(self, event: Stream) -> None:
        self.clock = {name: max(n, event.clock[name]) for name, n in self.clock.items()}

    wait_stream = wait_event


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> tuple[Stream, Stream]:
    both = Stream("current"), Stream("second")
    monkeypatch.setattr(_streams, "_streams", lambda device: both)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return both


def rounds(count: int) -> Iterator[tuple[int, _streams.TwoBuffers]]:
    with _streams.TwoBuffers(4, torch.float32, torch.device("cpu")) as buffers:
        for turn in range(count):
            yield turn, buffers


def test_halves_are_filled_after_their_readers_and_read_after_they_are_filled(streams: tuple[Stream, Stream]) -> None:
    current, second = streams
    halves = []
    for turn, buffers in rounds(6):
        halves.append(buffers.to_fill().data_ptr())
        before = current.run()  # the fill of this turn
        assert before["second"] == max(turn - 1, 0), "waits for the reader of this half, not for the other's"
        with buffers.filled():
            assert second.run() == {"current": turn + 1, "second": turn}
    assert len(set(halves[::2])) == len(set(halves[1::2])) == 1 and halves[0] != halves[1]
    assert current.clock == {"current": 6, "second": 6}, "memory is used again after the last reader"


def test_an_error_leaves_no_reader_behind(streams: tuple[Stream, Stream]) -> None:
    current, second = streams
    with pytest.raises(ZeroDivisionError), _streams.TwoBuffers(4, torch.float32, torch.device("cpu")) as buffers:
        buffers.to_fill()
        with buffers.filled():
            second.run()
        raise ZeroDivisionError
    assert current.clock["second"] == 1


def test_a_cpu_has_one_stream() -> None:
    for turn, buffers in rounds(3):
        half = buffers.to_fill().fill_(turn)
        with buffers.filled():
            assert half.tolist() == [turn] * 4
