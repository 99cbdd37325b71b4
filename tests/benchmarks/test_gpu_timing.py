"""The timing that only a GPU reaches, on a stand-in."""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, run
from benchmarks.journal import AGAIN, Journal
from benchmarks.measure import Case, Work
from benchmarks.rows import run_case

RATES = {"gemm": 1e12, "copy": 1e11}


# ---- the code that only a GPU reaches, on a stand-in ----------------------------------------------------------------
class FakeGraph:
    capturing: FakeGraph | None = None

    def __init__(self):
        self.jobs, self.replays = 0, 0

    def replay(self):
        self.replays += 1


@contextlib.contextmanager
def fake_capture(graph):
    FakeGraph.capturing = graph
    try:
        yield
    finally:
        FakeGraph.capturing = None


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def fake_gpu(monkeypatch):
    nothing = SimpleNamespace(wait_stream=lambda stream: None)
    stand_ins = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 164,
        "get_device_name": lambda: "NVIDIA H200",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(measure, "capture_something", lambda: None)


def test_rows_of_a_gpu_say_how_they_were_timed_and_what_ran_beside(fake_gpu):
    called = []

    def only_eager():
        if FakeGraph.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        time.sleep(1e-4)

    work = Work({"cuda": lambda: called.append(1)}, {"eager": only_eager}, bytes=1e3, replayed=4)
    work.limit, work.beside = {"product": lambda: time.sleep(1e-4)}, {"dense": lambda: time.sleep(1e-4)}
    (row,) = run_case(Case("unmask", "c", "bfloat16", lambda: work, {"rows": 1}), "cuda", RATES, rounds=3)
    assert (
        row["timing"] == "graph of 4 calls" and list(row["limits"]) == ["product"] and list(row["beside"]) == ["dense"]
    )
    assert "not captured" in row["notes"]["eager"] and row["best_peer"] == "eager" and row["device"] == "NVIDIA H200"
    assert row["peak_memory"] == 64 and row["peer_memory"] == {"eager": 64} and row["facts"] == {"rows": 1}
    assert row["launches"] == 0 and isinstance(row["kernels"], dict) and json.dumps(row)
    assert len(called) == 1 + 1 + 4 + 1 + 1  # first, before the capture, in it; memory, profile: all else is replayed


def test_a_lost_context_ends_the_process_and_names_the_contender(fake_gpu, monkeypatch, tmp_path):
    def gone():
        raise RuntimeError("an illegal memory access was encountered")

    def break_it():
        monkeypatch.setattr(torch.cuda, "synchronize", gone)
        gone()

    known = [Case("unmask", "c", "bfloat16", lambda: Work({"cuda": break_it}, {"peer": lambda: None}))]
    monkeypatch.setattr(run, "exists", lambda op: True)
    monkeypatch.setattr(run, "collect", lambda op, device, pattern="": known)
    monkeypatch.setattr(run, "ceilings", lambda device, dtype: RATES)
    record = Journal(tmp_path / "journal")
    arguments = ["--op", "unmask", "--json", str(tmp_path / "rows"), "--device", "cuda", "--journal", str(record.path)]
    assert run.main(arguments) == AGAIN
    ((what, reason),) = record.avoided().items()
    assert what == "unmask|c|bfloat16|cuda" and "illegal memory access" in reason and record.current() is None
