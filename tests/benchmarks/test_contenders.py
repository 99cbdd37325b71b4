"""Contenders of a case that fail, hang or die."""

from __future__ import annotations

import json
import time

import pytest

from benchmarks import measure, run
from benchmarks.journal import Journal
from benchmarks.measure import Case, Work
from benchmarks.report import plot, readme
from benchmarks.rows import run_case

RATES = {"gemm": 1e12, "copy": 1e11}


def fails():
    raise RuntimeError("no kernel image\nis available")


def test_a_contender_that_raises_is_recorded_and_the_others_are_measured():
    work = Work({"cuda": fails, "triton": lambda: None}, {"bad": fails, "good": lambda: time.sleep(1e-4)})
    work.absent, work.notes = {"cpu": "made for CPUs"}, {"good": "as it is", "bad": "never told"}
    (row,) = run_case(Case("unmask", "c", "float32", lambda: work), "cpu", RATES, rounds=3)
    assert row["backend"] == "triton" and list(row["peers"]) == ["good"] and row["notes"] == {"good": "as it is"}
    reason = "RuntimeError: no kernel image"
    assert row["failed"] == {"cpu": "made for CPUs", "bad": reason, "cuda": reason}


@pytest.mark.parametrize("calls_that_work", [1, 2, 3, 5])
def test_a_contender_that_raises_late_is_left_out_of_the_rounds(calls_that_work, monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_MS", 0.0)  # one call a sample
    left, called = [calls_that_work], []

    def breaks():
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")

    work = Work({"cuda": lambda: called.append(1)}, {"breaks": breaks})
    (row,) = run_case(Case("unmask", "c", "float32", lambda: work), "cpu", RATES, rounds=4)
    assert row["failed"] == {"breaks": "RuntimeError: out of memory"} and row["peers"] == {}
    assert len(called) >= 1 + 2 + 4


def peers_only_row() -> dict:
    work = Work({"cuda": fails}, {"good": lambda: time.sleep(1e-4)}, flops=1e6)
    case = Case("masked_loss", "c", "float32", lambda: work, {"vocab": 155136})
    (row,) = run_case(case, "cpu", RATES, rounds=3)
    return row


def test_peers_and_ceilings_are_measured_when_none_of_ours_runs(tmp_path):
    row = peers_only_row()
    assert row["backend"] is None and row["ms"] is None and row["best_peer"] == "good" and row["floor_ms"] > 0
    assert json.dumps(row) and "none of ours" in run.line(row)
    folder = tmp_path / "h200"
    folder.mkdir()
    (folder / "masked_loss.json").write_text(json.dumps([row]))
    assert plot.rows_of(folder) == []
    assert readme.table(tmp_path).splitlines()[-1].startswith("| masked_loss | c | float32 | absent | good ")
    work = Work({"cuda": lambda: None}, {"good": lambda: None})
    (asked,) = run_case(Case("unmask", "c", "float32", lambda: work), "cpu", RATES, rounds=3, ours=[])
    assert asked["backend"] is None


def test_what_the_journal_says_hung_or_ended_is_not_run_again(tmp_path, monkeypatch, capsys):
    record = Journal(tmp_path / "journal")
    record.avoid("unmask|two|float32|hangs", "no end within 60 s")
    record.end("unmask|one|float32")
    called = []

    def case(name: str) -> Case:
        work = Work({"ours": lambda: called.append(name)}, {"hangs": lambda: called.append("hangs")})
        return Case("unmask", name, "float32", lambda: work)

    known = [case("one"), case("two")]
    monkeypatch.setattr(run, "exists", lambda op: True)
    monkeypatch.setattr(run, "collect", lambda op, device, pattern="": known)
    monkeypatch.setattr(run, "ceilings", lambda device, dtype: RATES)
    path = tmp_path / "rows.json"
    arguments = ["--op", "unmask", "--json", str(path), "--device", "cpu", "--rounds", "3"]
    assert run.main([*arguments, "--journal", str(record.path)]) == 0
    assert set(called) == {"two"} and record.current() is None and "unmask|two|float32" in record.ended()
    assert json.loads(path.read_text())[0]["failed"] == {"hangs": "no end within 60 s"}


def test_what_hung_twice_is_left_out_of_every_case():
    avoided = {f"unmask|{case}|float32|cuda": "no end within 60 s" for case in ("a", "b")}
    assert "left out after a" in measure.twice(avoided, "unmask", "cuda")
    assert measure.twice(avoided, "unmask", "triton") is None and measure.twice(avoided, "masked_loss", "cuda") is None


def test_a_case_that_cannot_be_built_fails_and_the_next_is_measured(tmp_path, monkeypatch, capsys):
    known = [Case("unmask", "bad", "float32", fails), Case("unmask", "good", "float32", lambda: Work({"x": fails}, {}))]
    monkeypatch.setattr(run, "exists", lambda op: True)
    monkeypatch.setattr(run, "collect", lambda op, device, pattern="": known)
    monkeypatch.setattr(run, "ceilings", lambda device, dtype: RATES)
    path = tmp_path / "rows.json"
    assert run.main(["--op", "unmask", "--json", str(path), "--device", "cpu", "--rounds", "3"]) == 1
    assert [row["case"] for row in json.loads(path.read_text())] == ["good"]
    assert "bad float32: RuntimeError: no kernel image" in capsys.readouterr().out
