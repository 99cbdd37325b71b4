"""The run on a GPU, without one: on a stand-in clock with stand-in processes every stage gets its seconds whatever the
others do, a run that is killed is taken up from its files, and a made-up run is turned into results."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import machine, run
from benchmarks.journal import AGAIN, Journal, Tail
from benchmarks.on_gpu import __main__ as command
from benchmarks.on_gpu import adopt, plan, processes, session, smoke, summary
from benchmarks.report import predictions, readme
from tests.helpers import stand_in_machine as stand_in

CARD = {"name": "NVIDIA H200", "capability": "9.0", "driver": "580.1"}
UPSETS = {
    "hangs": stand_in.works("x", upset="hangs"),
    "dies": stand_in.works("x", upset="dies"),
    "loses the GPU": stand_in.works("x", upset="loses the GPU"),
    "fails": stand_in.works("x", upset="fails"),
    "hangs while it starts": stand_in.never_starts,
    "cannot be imported": stand_in.cannot_import,
    "is not there": stand_in.missing,
    "hangs at every item": lambda journal: stand_in.works("x", items=99, upset="hangs", each=1e9)(journal),
}


@pytest.fixture(autouse=True)
def built(monkeypatch):
    monkeypatch.setattr(session, "POLL", 0.5)
    monkeypatch.setattr(session, "build_info", lambda: {"cuda": True, "cuda_archs": "90a", "seconds": 30})


def scripts(stages: list[plan.Stage]) -> dict:
    """Every process takes nearly all the seconds of its stage."""
    found = {}
    for stage in stages:
        for worker in stage.workers:
            if worker.journaled:
                found[worker.name] = stand_in.works(stage.name, items=5, each=(stage.seconds - 6) / 5)
            else:
                found[worker.name] = stand_in.builds(stage.seconds - 3)
    return found


def go(out: Path, told: dict, stages: list[plan.Stage], seconds: float = 525, **options) -> tuple[list[dict], float]:
    here = stand_in.StandIn(told, **options)
    outcomes = session.Session(out, here, {}, {"gpu": CARD, "commit": "abc", "folder": "h200"}).run(stages, seconds)
    return outcomes, here.clock


# ---- time -----------------------------------------------------------------------------------------------------------
def test_the_plan_fits_into_nine_minutes_and_its_cases_exist(tmp_path):
    stages = plan.plan(tmp_path)
    assert sum(stage.seconds for stage in stages) <= 525 - session.KEPT
    names = {op: {case.name for case in run.collect(op, "cuda")} for op in plan.MEASURED}
    for op, cases in zip(plan.MEASURED, (plan.FORWARD, plan.BACKWARD, plan.LOSS, plan.UNMASK)):
        assert set(cases.split(",")) <= names[op]
    assert set(plan.TRITON.split(",")) <= set.union(*names.values())
    assert len({worker.name for stage in stages for worker in stage.workers}) == sum(len(s.workers) for s in stages)
    kernels = re.findall(r"__global__.*?(\w+)\(const|__global__.*?\b(\w+)\(", sources(), flags=re.S)
    assert {*plan.PROFILED.split("|")} <= {name for pair in kernels for name in pair} or all(
        re.search(rf"__global__[^;{{]*\b{name}\(", sources()) for name in plan.PROFILED.split("|")
    )


def sources() -> str:
    return "\n".join(path.read_text() for path in (plan.ROOT / "csrc" / "cuda").glob("*.cu*"))


def test_a_run_in_which_all_is_well_ends_in_time_with_every_stage_complete(tmp_path):
    stages = plan.plan(tmp_path)
    outcomes, took = go(tmp_path, scripts(stages), stages)
    assert [o["stage"] for o in outcomes] == [stage.name for stage in stages] and took <= 525
    assert all(o["ok"] and o["complete"] for o in outcomes), outcomes
    assert len(list(tmp_path.iterdir())) <= 8 - 2  # with profile.csv and summary.md


@pytest.mark.parametrize("upset", UPSETS)
@pytest.mark.parametrize("stage", [stage.name for stage in plan.plan(Path("."))])
def test_whatever_a_stage_does_the_others_get_their_seconds(stage, upset, tmp_path):
    stages = plan.plan(tmp_path)
    told = scripts(stages)
    told |= {worker.name: UPSETS[upset] for s in stages if s.name == stage for worker in s.workers}
    outcomes, took = go(tmp_path, told, stages)
    assert took <= 525
    by = {o["stage"]: o for o in outcomes}
    assert not by[stage]["ok"], by[stage]
    assert all(o["ok"] and o["complete"] for name, o in by.items() if name != stage), (stage, upset, outcomes)


@pytest.mark.parametrize("upset", UPSETS)
def test_where_everything_goes_wrong_the_run_ends_in_time_and_says_so(upset, tmp_path, capsys):
    stages = plan.plan(tmp_path)
    outcomes, took = go(tmp_path, {worker.name: UPSETS[upset] for s in stages for worker in s.workers}, stages)
    assert took <= 525 and len(outcomes) == len(stages) and not any(o["ok"] for o in outcomes)
    text = summary.summary(Journal(tmp_path / "journal.jsonl"))
    assert text.count("FAILED") == len(stages)


def test_what_a_stage_leaves_over_goes_to_the_next(tmp_path):
    stages = plan.plan(tmp_path)
    told = scripts(stages) | {
        "build": stand_in.builds(5),
        "variants": stand_in.builds(5),
        "smoke": stand_in.works("smoke", items=7, each=10),
    }
    outcomes, took = go(tmp_path, told, stages)
    assert all(o["complete"] for o in outcomes) and outcomes[1]["seconds"] > stages[1].seconds and took <= 525


def test_less_time_is_shared_by_all(tmp_path):
    stages = plan.plan(tmp_path)
    until = plan.deadlines(stages, 260)
    assert until == pytest.approx([sum(s.seconds for s in stages[: i + 1]) / 2 for i in range(len(stages))])
    assert plan.deadlines(stages, 1000)[-1] == 1000 and plan.deadlines(stages, 1000)[0] == 1000 - 520 + 60
    _, took = go(tmp_path, scripts(stages), stages, 200)
    assert took <= 200


# ---- items ----------------------------------------------------------------------------------------------------------
def one(out: Path, script, seconds: float = 60.0, **worker) -> dict:
    (outcome,), _ = go(
        out, {"w": script}, [plan.Stage("s", seconds, "", (plan.Worker("w", ("x",), **worker),))], seconds + 5
    )
    return outcome


def test_what_hangs_or_dies_is_recorded_and_the_rest_goes_on(tmp_path):
    for upset, reason in (("hangs", "no end within 10 s"), ("dies", "died of SIGSEGV"), ("loses the GPU", "illegal")):
        outcome = one(tmp_path / upset, stand_in.works("i", upset=upset))
        assert not outcome["ok"] and outcome["complete"] and outcome["said"] == "5 passed; 1 hung or died"
        ((name, why),) = outcome["hung_or_died"].items()
        assert name == "i|w 2" and reason in why
    failed = one(tmp_path / "fails", stand_in.works("i", upset="fails"))
    assert failed["said"] == "5 passed; 1 failed" and failed["failed"] == {"i|w 2": "AssertionError: off"}


def test_what_hangs_at_the_start_or_again_and_again_is_given_up(tmp_path):
    outcome = one(tmp_path / "a", stand_in.never_starts, idle=20.0)
    assert "no end within 20 s of nothing that it named" in outcome["said"] and outcome["seconds"] < 25

    def hangs_at_every_item(journal):
        for i in range(99):
            if f"i|{i}" not in journal.avoided():
                yield 1.0, lambda j, i=i: j.begin(f"i|{i}", 1.0)
                yield 1e9, None

    outcome = one(tmp_path / "b", hangs_at_every_item, restarts=3)
    assert "given up after 4 starts" in outcome["said"] and len(outcome["hung_or_died"]) == 4


def test_a_program_that_is_not_there_fails_its_stage_at_once(tmp_path):
    outcome = one(tmp_path, stand_in.missing)
    assert "no such program" in outcome["said"] and outcome["seconds"] == 0 and not outcome["ok"]


def test_an_import_error_shows_its_last_words(tmp_path):
    outcome = one(tmp_path, stand_in.cannot_import)
    assert outcome["said"].startswith("exit status 1: ==== w") and not outcome["ok"]


# ---- taking up a run ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("second", range(7, 520, 37))
def test_a_run_killed_at_any_second_is_taken_up_without_doing_anything_again(second, tmp_path):
    stages = plan.plan(tmp_path)
    here = stand_in.StandIn(scripts(stages), dies_at=second)
    facts = {"gpu": CARD, "commit": "abc", "folder": "h200"}
    with pytest.raises(stand_in.Killed):
        session.Session(tmp_path, here, {}, facts).run(stages, 525)
    journal = Journal(tmp_path / "journal.jsonl")
    before, complete = set(journal.ended()), session.done(journal)
    with journal.path.open("ab") as file:
        file.write(b'{"end": "cut o')
    rest = plan.chosen("rest", stages, [], complete.__contains__)
    assert [s.name for s in rest] == ["build", *(s.name for s in stages[1:] if s.name not in complete)]
    outcomes, _ = go(tmp_path, scripts(stages), rest, 525)
    assert all(o["ok"] and o["complete"] for o in outcomes)
    ends = [line["end"] for line in journal.lines() if "end" in line]
    assert len(ends) == len(set(ends)) and before < set(ends)


def test_a_run_that_is_taken_up_is_not_good_because_the_one_before_was(tmp_path):
    stages = [plan.Stage("s", 60, "", (plan.Worker("w", ("x",)),))]
    (first,), _ = go(tmp_path, {"w": stand_in.works("i", items=40, each=3.0)}, stages, 60)
    (second,), _ = go(tmp_path, {"w": stand_in.cannot_import}, stages, 60)
    assert not first["complete"] and not second["ok"] and "exit status 1" in second["said"]


def test_processes_that_a_gpu_holds_cost_a_stage_little(tmp_path):
    class Held(stand_in.StandInProcess):
        def kill(self):
            pass

    here = stand_in.StandIn({"w": stand_in.never_starts})
    right, here.start = here.start, lambda *arguments: held(right(*arguments))

    def held(process):
        process.__class__ = Held
        return process

    workers = tuple(plan.Worker(f"w{i}", ("x",), idle=999.0) for i in range(10))
    run_here = session.Session(tmp_path, here, {}, {})
    (outcome,) = run_here.run([plan.Stage("s", 20, "", workers)], 20 + session.KEPT)
    assert outcome["said"] == "out of time" and not outcome["ok"]
    assert here.clock <= 20 + session.DYING + 2


def test_a_journal_that_is_cut_anywhere_loses_at_most_what_was_under_way(tmp_path):
    journal = Journal(tmp_path / "journal", "p")
    for i in range(4):
        journal.begin(f"{i}", 5)
        journal.end(f"{i}", rows=[{"case": "µ" * i}])
    whole = journal.path.read_bytes()
    for at in range(len(whole)):
        cut = Journal(tmp_path / "cut", "p")
        cut.path.write_bytes(whole[:at])
        found = len(cut.ended())
        assert found >= whole[:at].count(b'"end"') - 1
        cut.mend()
        cut.end("more")
        assert len(cut.ended()) == found + 1


def test_processes_that_share_a_journal_are_told_apart(tmp_path):
    a, b = (Journal(tmp_path / "journal", by) for by in "ab")
    tail = Tail(a)
    a.begin("one", 1)
    b.begin("two", 2)
    assert {by: line["begin"] for by, line in tail.news().items()} == {"a": "one", "b": "two"}
    a.end("one")
    assert tail.news()["a"] is None and b.current()["begin"] == "two" and a.current() is None
    assert tail.heard == {"a": 2, "b": 1}


# ---- real processes -------------------------------------------------------------------------------------------------
CHILD = """
import os, sys, time
from pathlib import Path
from benchmarks.journal import AGAIN, Journal
journal = Journal(Path(os.environ["ILLADA_JOURNAL"]), os.environ["ILLADA_BY"])
print("x" * 5_000_000)
for what in ("fine", "hangs", "dies", "loses the device"):
    if what in journal.ended() or what in journal.avoided():
        continue
    journal.begin(what, 0.3 if what == "hangs" else 60)
    if what == "hangs":
        time.sleep(60)
    if what == "dies":
        os.abort()
    if what == "loses the device":
        journal.avoid(what, "illegal address")
        os._exit(AGAIN)
    journal.end(what)
"""


def test_real_processes_are_watched_killed_and_started_again_and_their_output_is_bounded(tmp_path):
    worker = plan.Worker("child", (sys.executable, "-c", CHILD))
    here = session.Session(tmp_path, processes.Here(), session.environment(None), {})
    (outcome,) = here.run([plan.Stage("s", 100, "", (worker,))], 105)
    expected = {"hangs": "no end within 0.3 s", "dies": "died of SIGABRT", "loses the device": "illegal address"}
    assert outcome["hung_or_died"] == expected and outcome["said"] == "1 passed; 3 hung or died"
    assert processes.PER_PROCESS < (tmp_path / "log.txt").stat().st_size < 5 * processes.PER_PROCESS
    assert processes.PER_LOG + processes.PER_PROCESS < 16 << 20
    assert len(here.journal.ended()) == 1 and AGAIN not in (0, 1)


def test_tests_run_side_by_side_and_go_on_after_one_that_hangs(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        textwrap.dedent("""
        import time, pytest
        @pytest.mark.parametrize("i", range(6))
        def test_a(i): pass
        def test_hangs(): time.sleep(60)
        def test_wrong(): assert 1 + 1 == 3, "off by one"
        @pytest.mark.skip(reason="needs 2 GPUs")
        def test_skipped(): pass
    """)
    )
    workers = plan.tests("tests", str(file), 2, limit=2.0)
    here = session.Session(tmp_path / "out", processes.Here(), session.environment(None), {})
    begin = time.monotonic()
    (outcome,) = here.run([plan.Stage("tests", 200, "", workers)], 205)
    assert outcome["said"] == "6 passed; 1 failed; 1 skipped; 1 hung or died", (tmp_path / "out/log.txt").read_text()
    assert [*outcome["hung_or_died"].values()] == ["no end within 2 s"] and time.monotonic() - begin < 150
    assert [*outcome["failed"].values()] == ["AssertionError: off by one"]
    (again,) = here.run([plan.Stage("tests", 200, "", workers)], 205)  # nothing is left: nothing runs again
    assert again["said"] == outcome["said"] and again["complete"]


def test_smoke_passes_with_right_kernels_and_says_what_a_wrong_one_leaves_out(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    assert smoke.main(["--journal", str(path), "--backend", "reference", "--device", "cpu"]) == 0
    assert len(Journal(path).ended()) == 1 + 33 + 4 + 3 + 8 + 4 and smoke.failures(Journal(path)) == {}
    right = smoke.ik.attention
    monkeypatch.setattr(smoke.ik, "attention", lambda q, *a, **k: right(q, *a, **k) * (1 if q.shape[3] != 96 else 1.1))
    some = [
        item for item in smoke.items("reference", "cpu", smoke.torch.float32) if re.search(r" (64|96): full", item[0])
    ]
    monkeypatch.setattr(smoke, "items", lambda *arguments: some)
    broken = tmp_path / "broken"
    assert smoke.main(["--journal", str(broken), "--backend", "reference", "--device", "cpu"]) == 1
    failed = smoke.failures(Journal(broken))
    cases = {case.name: case for op in plan.MEASURED for case in run.collect(op, "cuda")}
    assert len(failed) == 3 and "smoke|attention forward 96: full" in failed
    assert "relative error 0.1" in smoke.left_out(cases["full_8k_d96"], "cuda", failed)
    for name, contender in (("full_8k_d64", "cuda"), ("full_8k_d96", "triton"), ("half_v126k", "cuda")):
        assert smoke.left_out(cases[name], contender, failed) is None


@pytest.mark.parametrize(
    "name, contender, needed",
    [
        ("full_8k_d96 backward", "cuda deterministic=False", ["attention forward 96", "attention fused 96"]),
        ("full_8k_kv8 backward", "cuda", ["attention forward 128", "attention backward 128"]),
        ("entropy_1x8_v126k_t1", "cuda", ["unmask head 16", "unmask commit"]),
        ("hidden_4x32_v126k_t0", "cuda", ["unmask head 128", "unmask commit"]),
        ("hidden_8x32_v126k_t0", "cuda", ["unmask spans", "unmask commit"]),
        ("top_p0.9_64x32_v126k_t1", "cuda", ["unmask bounds", "unmask commit"]),
        ("top_p0.9_2x32_v126k_t1", "cuda", ["unmask draw", "unmask commit"]),
        ("renoise_1x256_v126k_t1", "cuda", ["unmask renoise", "unmask commit"]),
        ("half_v126k_minimum", "cuda", ["masked_loss gradients", "masked_loss minimum"]),
        ("half_v126k_no_grad", "cuda", ["masked_loss no_grad"]),
        ("half_v126k", "triton", []),
    ],
)
def test_what_a_case_needs_is_what_smoke_runs(name, contender, needed):
    (case,) = [case for op in plan.MEASURED for case in run.collect(op, "cuda") if case.name == name]
    assert smoke.needs(case, contender) == needed
    assert set(needed) <= {item.split(":")[0] for item, _ in smoke.items()}


# ---- the command ----------------------------------------------------------------------------------------------------
def test_a_dry_run_says_what_would_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "gpu", lambda: None)
    assert command.main(["--dry-run", "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    for text in (
        "illada_kernels._build",
        "test_hardware.py",
        "tests/gpu",
        "selftest attention cuda",
        "--op masked_loss",
    ):
        assert text in said
    assert "--cases full_8k_kv8,block_diffusion_4k_b32_kv8," in said and "--peers quick --limit 15" in said
    assert not (tmp_path / "new").exists()
    command.main(["--dry-run", "--stage", "forward", "--cases", "full_2k_kv8,full_1k_kv8", "--all-peers"])
    assert "--cases full_2k_kv8,full_1k_kv8 " in (said := capsys.readouterr().out) and "--peers all --limit 60" in said


def test_without_a_gpu_nothing_runs_and_an_unknown_stage_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "gpu", lambda: None)
    assert command.main(["--out", str(tmp_path / "new")]) == 2 and not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        command.main(["--stage", "build,burn"])
    assert "got burn" in capsys.readouterr().err


def test_the_command_ends_with_a_table_and_its_status_says_whether_a_stage_failed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "gpu", lambda: CARD)
    stages = plan.plan(tmp_path)
    rows = made_up("attention_fwd", "full_8k_kv8", "cuda", 3.4, {"cudnn": 4.0})

    def measures(journal):
        yield 1.0, lambda j: j.end("attention_fwd|full_8k_kv8|bfloat16 [cuda]", rows=[rows])
        yield 0.0, 0

    here = stand_in.StandIn(scripts(stages) | {"forward": measures})
    assert command.main(["--out", str(tmp_path)], here) == 0
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1].startswith("| attention_fwd | full_8k_kv8 | cuda | 3.4 | 3.19-3.55 | 0.83 |")
    assert {path.name for path in tmp_path.iterdir()} == {"journal.jsonl", "log.txt", "summary.md"}
    worse = stand_in.StandIn(scripts(stages) | {"loss": stand_in.cannot_import})
    assert command.main(["--out", str(tmp_path / "b"), "--stage", "build,loss"], worse) == 1
    assert worse.started == ["build", "variants", "loss"]


def test_another_nvcc_may_spill_without_failing_the_build_and_the_summary_says_so(tmp_path, monkeypatch):
    info = {"cuda": True, "cuda_archs": "90a", "seconds": 30, "notes": ["attend (sm_90a): 8 bytes spill stores"]}
    monkeypatch.setattr(session, "build_info", lambda: info)
    stages = plan.plan(tmp_path)[:1]
    (outcome,), _ = go(tmp_path, {"build": stand_in.builds(9), "variants": stand_in.builds(9)}, stages)
    assert outcome["ok"] and "warning: attend (sm_90a): 8 bytes spill" in outcome["said"]
    monkeypatch.setattr(session, "build_info", lambda: {"cuda": False, "cuda_reason": "no nvcc"})
    (outcome,), _ = go(tmp_path, {"build": stand_in.builds(9), "variants": stand_in.builds(9)}, stages)
    assert not outcome["ok"] and "no CUDA: no nvcc" in outcome["said"]


def test_hopper_is_built_for_with_its_own_instructions():
    assert [session.architecture(c) for c in ("9.0", "8.9", "10.0")] == ["90a", "89", "100"]


def test_a_copy_without_git_takes_the_commit_from_the_environment(tmp_path, monkeypatch, python):
    shutil.copytree(plan.ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results"))
    code = "from benchmarks.machine import commit; print(commit())"
    done = python("-c", code, path=(tmp_path, plan.ROOT), cwd=tmp_path, ILLADA_COMMIT="fedcba9")
    assert done.stdout == "fedcba9\n", done.stderr
    assert machine.commit() != "fedcba9"


# ---- adoption -------------------------------------------------------------------------------------------------------
def made_up(op: str, case: str, backend: str | None, ms: float, peers: dict[str, float]) -> dict:
    (known,) = [each for each in run.collect(op, "cuda") if each.name == case]
    best = min(peers, key=peers.get)
    row = {"op": op, "case": case, "dtype": known.dtype, "backend": backend, "facts": known.facts, "error": 0.001}
    row |= {"ms": {"p20": ms, "p50": ms, "p80": ms}, "floor_ms": 0.83 * ms, "floor_ratio": 0.83, "peers": peers}
    row |= {"best_peer": best, "ratio": peers[best] / ms, "tflops": 600.0, "gbps": 100.0, "peak_memory": 2**30}
    row |= {"beside": {}, "limits": {}, "peer_memory": dict.fromkeys(peers, 2**30), "launches": 1, "host_syncs": 0}
    return row | {"device": "NVIDIA H200", "versions": {"torch": "2.11.0+cu130"}, "commit": "abc", "rates": {}}


@pytest.fixture
def a_run(tmp_path) -> Path:
    """The files of a run: attention right and fast, masked_loss slower than its peer, unmask wrong in one test."""
    out = tmp_path / "run"
    stages = plan.plan(out)
    go(out, scripts(stages), stages)
    journal = Journal(out / "journal.jsonl", "forward")
    rows = [
        made_up("attention_fwd", "full_8k_kv8", "cuda", 3.4, {"cudnn": 4.0, "flash": 5.0}),
        made_up("attention_fwd", "block_diffusion_4k_b32_kv8", "cuda", 0.95, {"cudnn, dense mask": 9.0}),
        made_up("attention_bwd", "full_8k_kv8 backward", "cuda", 12.0, {"cudnn": 11.0}),
        made_up("masked_loss", "half_v126k", "cuda", 18.0, {"Liger, scaled": 17.0}),
        made_up("unmask", "hidden_8x32_v126k_t0", "cuda", 0.4, {"float32": 2.0}),
        made_up("unmask", "selection_32x1024", "triton", 0.01, {"float32": 0.1}),
    ]
    for row in rows:
        journal.end(f"{row['op']}|{row['case']}|{row['dtype']}", rows=[row])
    for op in plan.OPS:
        for backend in ("cuda", "triton"):
            good = (op, backend) != ("attention", "triton")
            facts = {"outcome": "passed" if good else "failed", "message": "" if good else "case 3: off"}
            journal.end(f"selftest|{op}/{backend}", **facts)
    journal.end("tests|tests/gpu/test_unmask.py::test_x[triton]", outcome="failed", message="wrong")
    journal.end("tests|tests/gpu/test_unmask.py::test_y[cuda]", outcome="passed", message="")
    return out


def test_a_run_becomes_results_figures_tables_outcomes_and_an_order(a_run, tmp_path):
    results, order = tmp_path / "results", tmp_path / "_committed.json"
    pages = []
    for page in (readme.ROOT / "README.md", readme.ROOT / "docs/measurements/attention.md", predictions.PAGE):
        pages.append(Path(shutil.copy(page, tmp_path / page.name)))
    order.write_text('{"8.0": ["unmask/cuda"]}')
    said = "\n".join(adopt.adopt(a_run, results, pages[:2], pages[2], order))
    folder = results / "h200"
    unmask = [row["case"] for row in json.loads((folder / "unmask.json").read_text())]
    assert unmask == ["hidden_8x32_v126k_t0", "selection_32x1024"]
    checks = json.loads((folder / "checks.json").read_text())
    assert checks["commit"] == "abc" and checks["selftests"]["attention/triton"]["message"] == "case 3: off"
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == {"cases.png", "attention.png", "attention_masks.png", "masked_loss.png", "unmask.png"}
    assert "| attention_fwd | block_diffusion_4k_b32_kv8 | bfloat16 | 0.95 (cuda) |" in pages[0].read_text()
    assert "NVIDIA H200, torch 2.11.0+cu130" in pages[1].read_text()
    text = pages[2].read_text()
    assert re.search(r"\| full_8k_kv8 \| \w+ \| 2.82 \| 3.19-3.55, was 3.4 \|", text) and "11.7-12.5, was 12 |" in text
    assert re.search(r"\| half_v126k \| 3 \| 16.3 \| 17-17.6; cuda was 18 \|", text)
    assert re.search(r"\| hidden_8x32_v126k_t0 \| \w+ \| 0.34 \| [\d.-]+, was 0.4 \|", text)
    let_in = ["attention/cuda", "unmask/cuda", "unmask_from_logits/cuda"]
    assert json.loads(order.read_text()) == {"8.0": ["unmask/cuda"], "9.0": let_in}
    for line in (
        "let into the default order: attention/cuda, 2.17 times as fast as the fastest peer, in the mean of 3 rows",
        "kept out of it: attention/triton: selftest: case 3: off",
        "kept out of it: masked_loss/cuda: 0.94 times as fast",
        "kept out of it: masked_loss/triton: not measured beside a peer",
        "kept out of it: unmask/triton: 1 failures, first tests|tests/gpu/test_unmask.py::test_x[triton]",
    ):
        assert line in said, said
    assert adopt.adopt(a_run, results, pages[:2], pages[2], order) and pages[2].read_text() == text  # twice is once


def test_what_is_no_run_or_of_other_cases_is_refused(a_run, tmp_path):
    with pytest.raises(ValueError, match="found no run"):
        adopt.adopt(tmp_path / "nothing", tmp_path / "results", [], predictions.PAGE, tmp_path / "order")
    row = made_up("unmask", "selection_32x1024", "cuda", 1.0, {"x": 1.0}) | {"case": "of long ago"}
    Journal(a_run / "journal.jsonl").end("unmask|of long ago|float32", rows=[row])
    with pytest.raises(ValueError, match="no suite has the cases of long ago"):
        adopt.adopt(a_run, tmp_path / "results", [], predictions.PAGE, tmp_path / "order")


@pytest.mark.parametrize(
    "what, room, backend, against",
    [
        ("smoke|attention forward 96: full", "attention", "cuda", True),
        ("smoke|attention forward 96: full", "attention", "triton", False),
        ("tests|tests/gpu/test_attention_cuda_fwd.py::test_sizes[7]", "attention", "cuda", True),
        ("tests|tests/gpu/test_attention_cuda_fwd.py::test_sizes[7]", "attention", "triton", False),
        ("tests|tests/gpu/test_masked_loss.py::test_z", "masked_loss", "triton", True),
        ("large|tests/gpu/test_attention.py::test_named[triton-full_8k]", "attention", "cuda", False),
        ("attention_fwd|full_8k_kv8|bfloat16|cuda deterministic=False", "attention", "cuda", True),
        ("attention_fwd|full_8k_kv8|bfloat16|cudnn", "attention", "cuda", False),
        ("compare|tests/cuda_on_cpu/test_hardware.py::test_x", "unmask", "cuda", True),
    ],
)
def test_a_failure_speaks_against_the_kernels_that_it_is_about(what, room, backend, against):
    assert adopt.concerns(what, room, backend) is against
