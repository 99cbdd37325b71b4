"""The benchmark machinery: order of runs, quantiles, memory, rows, files; and that committed results are whole."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, rows, run
from benchmarks.measure import Case, Work
from benchmarks.report import plot, readme
from benchmarks.rows import run_case

FIELDS = set(
    "op case dtype backend ms tflops gbps floor_ms floor_ratio peak_memory launches host_syncs peers best_peer ratio "
    "device versions commit".split()
)


def test_contenders_run_in_turn_after_an_unmeasured_warm_up(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(measure, "SAMPLE_MS", 0.0)  # one call a sample
    times = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4)
    assert order == ["a", "a", "b", "b", *"abababab"]
    assert set(times["a"]) == {"p20", "p50", "p80"}


def test_short_jobs_are_repeated_within_a_sample_and_timed_per_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure, "clock", lambda: clock[0])
    calls = 0

    def job():
        nonlocal calls
        calls += 1
        clock[0] += 2e-4

    times = measure.interleaved({"job": job}, rounds=3)
    assert calls == 2 + 3 * 10 and times["job"]["p20"] == pytest.approx(0.2)


def test_the_processor_s_clock_stands_while_a_job_waits(monkeypatch):
    def waits():
        time.sleep(0.05)

    assert measure.sample(waits, 1, "cpu") >= 50
    monkeypatch.setattr(measure, "clock", measure.CLOCKS["processor"])
    assert measure.sample(waits, 1, "cpu") < 25


def test_the_processor_s_clock_is_for_one_thread_and_a_file_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "clock", measure.clock)  # main() sets it
    cases = [Case("unmask", "a", "float32", lambda: Work({"ours": lambda: None}, {}))]
    monkeypatch.setattr(run, "collect", lambda op, device, quick=False: cases)
    path = tmp_path / "rows.json"
    command = ["--op", "unmask", "--device", "cpu", "--rounds", "3", "--clock", "processor"]
    for threads, more in ((2, ["--json", str(path)]), (1, [])):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with pytest.raises(SystemExit):
            run.main([*command, *more])
        assert "--clock processor: expected a CPU, one thread" in capsys.readouterr().err
    assert run.main([*command, "--json", str(path)]) == 0
    assert [row["clock"] for row in json.loads(path.read_text())] == ["processor"]


def test_no_round_begins_after_the_time_is_up_but_three_always_run():
    order: list[int] = []

    def job():
        order.append(1)
        time.sleep(5e-3)

    measure.interleaved({"job": job}, rounds=50, seconds=0.0)
    assert len(order) == 2 + 3


def test_quantiles_interpolate_between_samples():
    assert measure.quantiles([3.0, 1.0, 2.0, 5.0, 4.0]) == pytest.approx({"p20": 1.8, "p50": 3.0, "p80": 4.2})


def test_rotating_inputs_come_one_after_another():
    got: list[int] = []
    job = measure.rotating(got.append, [(1,), (2,), (3,)])
    for _ in range(5):
        job()
    assert got == [1, 2, 3, 1, 2]


def test_peak_memory_counts_what_is_alive_at_once_and_not_what_was_there_before():
    mib = 2**20
    held = torch.ones(4 * mib)

    def job():
        first = torch.empty(mib)  # 4 MiB
        second = torch.empty(2 * mib)  # 8 MiB beside it
        del first, second
        return held.add(torch.empty(mib)[0])  # 16 MiB, with 4 MiB

    peak = measure.peak_memory(job, "cpu")
    assert 20 * mib <= peak < 20 * mib + 4096


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Intel(R) Xeon(R) Processor, 2 threads", "cpu-xeon-2c"),
        ("AMD EPYC 9B14 96-Core Processor, 8 threads", "cpu-epyc-9b14-8c"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz, 6 threads", "cpu-core-i7-8700k-6c"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_a_device_gives_the_name_of_its_results_folder(name, folder):
    assert measure.slug(name) == folder


def test_launches_and_synchronisations_are_told_apart_from_other_calls():
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "aten::mm", "cudaStreamSynchronize"]
    assert measure.count_calls([*names, "cudaDeviceSynchronize"]) == (2, 1)
    assert measure.count_calls(["cudaDeviceSynchronize"]) == (0, 0)


# ---- rows -----------------------------------------------------------------------------------------------------------


def pause(milliseconds: float):
    return lambda: time.sleep(milliseconds / 1e3)


def test_a_row_compares_with_the_fastest_peer_and_the_nearest_limit(monkeypatch):
    took = {"cpu": 4.0, "reference": 8.0, "slow": 40.0, "fast": 12.0, "limit": 2.0}
    times = {name: {"p20": ms - 1, "p50": ms, "p80": ms + 1} for name, ms in took.items()}
    monkeypatch.setattr(rows, "interleaved", lambda contenders, *_: {name: times[name] for name in contenders})
    ours, peers = {"cpu": pause(0), "reference": pause(0)}, {"slow": pause(0), "fast": pause(0)}
    for limit, floor in (({"limit": pause(0)}, 2.0), ({}, 1.0)):  # a measured limit, else 1 ms of flops
        work = Work(ours, peers, flops=2e6, bytes=1e6, limit=limit)
        case = Case("unmask", "c", "float32", lambda work=work: work)
        got = run_case(case, "cpu", {"gemm": 2e9, "copy": 1e12})
        assert [(row["backend"], row["best_peer"]) for row in got] == [("cpu", "fast"), ("reference", "fast")]
        assert all(row.keys() >= FIELDS for row in got) and json.dumps(got)
        assert [row["ratio"] for row in got] == [3.0, 1.5]
        assert [row["floor_ratio"] for row in got] == [floor / 4, floor / 8]
        assert [row["tflops"] for row in got] == pytest.approx([5e-4, 2.5e-4])
        assert [row["gbps"] for row in got] == pytest.approx([0.25, 0.125])


def test_two_contenders_of_one_name_are_refused():
    work = Work({"same": pause(0)}, {"same": pause(0)})
    with pytest.raises(ValueError, match="same name"):
        run_case(Case("unmask", "c", "float32", lambda: work), "cpu", {"gemm": 1.0, "copy": 1.0})


def row(case: str, p50: float) -> dict:
    return {"case": case, "dtype": "float32", "ms": {"p50": p50}}


def test_a_case_measured_again_replaces_its_rows_and_cases_gone_are_dropped(tmp_path):
    known = [Case("unmask", name, "float32", lambda: Work({}, {})) for name in ("a", "b", "c")]
    path = tmp_path / "deep" / "x.json"
    gone = Case("unmask", "gone", "float32", known[0].build)
    run.write(path, [row("gone", 1), row("c", 1), row("b", 1)], [*known, gone])
    run.write(path, [row("b", 2), row("a", 2)], known)
    assert [(r["case"], r["ms"]["p50"]) for r in json.loads(path.read_text())] == [("a", 2), ("b", 2), ("c", 1)]


def test_runner_measures_the_cases_that_are_asked_for_and_prints_and_writes_them(monkeypatch, tmp_path, capsys):
    def cases(device, quick):
        for name in ("one", "other"):
            yield Case("unmask", name, "float32", lambda: Work({"cpu": pause(1)}, {"plain": pause(3)}, bytes=1e3))

    monkeypatch.setattr(run, "exists", lambda op: True)
    bench = SimpleNamespace(cases=cases)
    monkeypatch.setattr(run, "importlib", SimpleNamespace(import_module=lambda name: bench))  # of run alone
    monkeypatch.setattr(run, "ceilings", lambda device, dtype: {"gemm": 1e9, "copy": 1e9})
    path = tmp_path / "rows.json"
    assert run.main(["--op", "unmask", "--case", "other", "--json", str(path), "--device", "cpu", "--rounds", "3"]) == 0
    (only,) = json.loads(path.read_text())
    assert only["case"] == "other" and "plain" in capsys.readouterr().out
    assert run.main(["--op", "unmask", "--case", "nothing", "--json", str(path), "--device", "cpu"]) == 1
    assert "no case contains 'nothing'; there are:\n  unmask: one\n  unmask: other" in capsys.readouterr().err
    exact = ["--op", "unmask", "--cases", "other,one", "--journal", str(tmp_path / "j"), "--by", "p", "--device", "cpu"]
    assert run.main([*exact, "--rounds", "3"]) == 0  # exactly these, in this order, their rows in the journal
    ended = measure.Journal(tmp_path / "j").ended()
    assert list(ended) == ["unmask|other|float32", "unmask|one|float32"]
    assert all(line["rows"][0]["best_peer"] == "plain" and line["by"] == "p" for line in ended.values())
    assert run.main(["--op", "unmask", "--cases", "other,on", "--device", "cpu"]) == 1
    assert "no case is named on;" in capsys.readouterr().err
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "build_info", lambda: {"stale": True})
    assert run.main(["--op", "unmask", "--device", "cpu", "--rounds", "3"]) == 1
    assert "older than this code" in capsys.readouterr().err and not (tmp_path / "results").exists()


@pytest.mark.parametrize("device, said", [("cpu", True), ("cuda", False)])
def test_the_runner_keeps_freed_memory_on_a_cpu_or_says_why_not(device, said, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(run, "collect", lambda op, device, quick=False: [Case("unmask", "one", "float32", Work)])
    monkeypatch.setattr(run, "measure_all", lambda *_: 0)
    monkeypatch.setattr(measure, "device_name", lambda device: device)
    monkeypatch.setattr(measure.heap, "keep_freed", lambda largest: asked.append(largest) or "SWITCH=0")
    assert run.main(["--op", "unmask", "--device", device, "--json", str(tmp_path / "rows.json")]) == 0
    assert asked == [32 << 20] * said
    assert ("freed memory is not kept in the process: SWITCH=0" in capsys.readouterr().out) is said


def test_an_absent_suite_is_told_not_raised(monkeypatch, capsys):
    monkeypatch.setitem(run.FILES, "generate", "of_nothing")
    assert run.main(["--op", "generate", "--device", "cpu"]) == 1
    assert "of_nothing.py" in capsys.readouterr().err


# ---- committed results ----------------------------------------------------------------------------------------------

COMMITTED = sorted(path for path in run.RESULTS.glob("*/*.json") if path.stem in run.FILES)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_rows_are_whole_and_agree_with_themselves(path):
    rows = json.loads(path.read_text())
    assert rows
    for row in rows:
        assert row.keys() >= FIELDS and row["op"] == path.stem
        assert measure.slug(row["device"]) == path.parent.name
        assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["floor_ratio"] == pytest.approx(row["floor_ms"] / row["ms"]["p50"])
        if row["peers"]:
            assert row["best_peer"] == min(row["peers"], key=row["peers"].get)
            assert row["ratio"] == pytest.approx(row["peers"][row["best_peer"]] / row["ms"]["p50"])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_rows_belong_to_cases_that_exist(path):
    device = "cpu" if path.parent.name.startswith("cpu") else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("the cases of a GPU are listed on a GPU")
    known = {(case.name, case.dtype) for case in run.collect(path.stem, device)}
    assert {(row["case"], row["dtype"]) for row in json.loads(path.read_text())} <= known


def test_figure_and_table_take_one_row_per_case(tmp_path):
    base = {"dtype": "float32", "device": "X, 2 threads", "versions": {"torch": "2.13"}, "floor_ratio": 0.5}
    fast = {**base, "op": "unmask", "case": "a", "backend": "cpu", "ms": {"p50": 2.0}, "peak_memory": 2**20}
    fast |= {"peers": {"plain": 6.0}, "best_peer": "plain", "ratio": 3.0}
    lone = {**fast, "case": "b", "peers": {}, "best_peer": None, "ratio": None}
    folder = tmp_path / "cpu-x-2c"
    folder.mkdir()
    (folder / "unmask.json").write_text(json.dumps([fast, {**fast, "backend": "reference", "ms": {"p50": 9.0}}, lone]))
    assert [row["backend"] for row in plot.rows_of(folder)] == ["cpu", "cpu"]
    assert plot.main([str(folder)]) == 0
    assert (folder / "cases.png").read_bytes().startswith(b"\x89PNG")
    lines = readme.table(tmp_path).splitlines()
    assert lines[-2:] == [
        "| unmask | a | float32 | 2 | plain 6 | 3.00 | 0.50 | 1.0 |",
        "| unmask | b | float32 | 2 | none |  | 0.50 | 1.0 |",
    ]
