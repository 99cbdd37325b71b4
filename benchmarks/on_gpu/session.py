"""Runs stages within their time: watches every process item by item, and goes on after what hangs or dies.

All that a run finds is in one journal, written line by line; a run that is killed at any moment is taken up from it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..journal import AGAIN, Journal, Tail
from ..run import wrong
from .plan import ROOT, Stage, Worker, deadlines
from .processes import Machine, Process, ended_with

POLL, DYING, KEPT = 0.2, 2.0, 5.0  # seconds between looks; for killed processes to end; of the whole for the summary


def architecture(capability: str) -> str:
    """Turns '9.0' into '90a' (wgmma and its tensor maps are of that one chip), '8.9' into '89'."""
    digits = capability.replace(".", "")
    return "90a" if digits == "90" else digits


def environment(card: dict[str, str] | None) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    env |= {"ILLADA_REQUIRE_EXT": "1"}
    return env | ({"ILLADA_CUDA_ARCHS": architecture(card["capability"])} if card else {})


@dataclass
class Watch:
    """A worker under way."""

    worker: Worker
    process: Process
    since: float  # when it was started, or began what it is at
    at: str | None = None  # what it is at
    lines: int = 0  # of its own in the journal
    before: int = 0  # how many of these there were at its first start
    starts: int = 1
    said: str | None = None  # why it was given up; "" if it ended well
    unfinished: bool = False


@dataclass
class Session:
    out: Path
    machine: Machine
    env: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)  # of the whole run, into the journal first of all

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.out / "journal.jsonl")
        self.journal.mend()
        self.tail = Tail(self.journal)

    def run(self, stages: list[Stage], seconds: float) -> list[dict[str, Any]]:
        """Runs the stages; returns the outcome of each stage, as it is in the journal."""
        start, outcomes = self.machine.now(), []
        self.journal.write({"run": [stage.name for stage in stages], "seconds": seconds, **self.facts})
        for stage, until in zip(stages, deadlines(stages, max(0.0, seconds - KEPT))):
            print(f"{stage.name} ...", flush=True)
            began = self.machine.now()
            with tempfile.TemporaryDirectory() as claims:
                try:
                    watches = self.run_stage(stage, start + until, claims)
                    outcome = self.outcome(stage, watches)
                except Exception as error:  # of this program: the stages after it still run
                    outcome = {"ok": False, "complete": False, "said": f"{type(error).__name__}: {error}"}
            outcome |= {"stage": stage.name, "seconds": round(self.machine.now() - began, 1)}
            self.journal.write(outcome)
            outcomes.append(outcome)
            print(f"  {'ok' if outcome['ok'] else 'FAILED'}, {outcome['seconds']} s: {outcome['said']}", flush=True)
        return outcomes

    # ---- one stage --------------------------------------------------------------------------------------------------
    def start(self, worker: Worker, claims: str) -> Process:
        env = {**self.env, **worker.env, "ILLADA_JOURNAL": str(self.journal.path), "ILLADA_BY": worker.name}
        self.tail.running[worker.name] = None  # what a run before this one had begun
        return self.machine.start(worker.name, worker.command, env | {"ILLADA_CLAIMS": claims}, self.out / "log.txt")

    def run_stage(self, stage: Stage, deadline: float, claims: str) -> list[Watch]:
        watches: list[Watch] = []
        try:
            for worker in stage.workers:
                if self.machine.now() >= deadline:
                    break
                self.tail.news()
                heard = self.tail.heard.get(worker.name, 0)
                try:
                    process = self.start(worker, claims)
                except OSError as error:  # ncu, say, which is not everywhere
                    self.journal.write({"avoid": f"{stage.name}|{worker.name}", "reason": str(error)})
                    watches.append(Watch(worker, Dead(), 0.0, said=str(error)))
                    continue
                watches.append(Watch(worker, process, self.machine.now(), lines=heard, before=heard))
            while any(watch.said is None for watch in watches):
                if self.machine.now() >= deadline:
                    break
                self.tail.news()
                for watch in watches:
                    if watch.said is None:
                        self.look(watch, claims)
                if any(watch.said is None for watch in watches):
                    self.machine.sleep(POLL)
        finally:
            late = [watch for watch in watches if watch.said is None]
            for watch in late:
                watch.said, watch.unfinished = "out of time", True
            self.kill([watch.process for watch in late])
        started = {watch.worker.name for watch in watches}
        return watches + [
            Watch(worker, Dead(), 0.0, said="no time was left for it", unfinished=True)
            for worker in stage.workers
            if worker.name not in started
        ]

    def kill(self, processes: list[Process]) -> None:
        """Waits a little for their end: they may hold memory of the GPU that the next process needs."""
        for process in processes:
            process.kill()
        until = self.machine.now() + DYING
        while any(process.poll() is None for process in processes) and self.machine.now() < until:
            self.machine.sleep(POLL)

    def look(self, watch: Watch, claims: str) -> None:
        """Ends a watch, or starts its process again without what it hung or died at."""
        worker, now = watch.worker, self.machine.now()
        running = self.tail.running.get(worker.name)
        heard = self.tail.heard.get(worker.name, 0)
        if heard != watch.lines or (running or {}).get("begin") != watch.at:
            watch.lines, watch.at, watch.since = heard, (running or {}).get("begin"), now
        code = watch.process.poll()
        if code is not None:
            self.tail.news()  # its last words
            running = self.tail.running.get(worker.name)
            if code in (0, 1) and not running:
                watch.said = "" if code == 0 else self.why_nothing(watch)
                return
            reason = ended_with(code)
        elif worker.journaled and now - watch.since > (running["limit"] if running else worker.idle):
            self.kill([watch.process])
            reason = f"no end within {running['limit'] if running else worker.idle:g} s"
            if not running:
                watch.said = f"{reason} of nothing that it named"
                return
        else:
            return
        if running:
            print(f"  {running['begin']}: {reason}; going on without it", flush=True)
            Journal(self.journal.path, worker.name).avoid(running["begin"], reason)
        elif code != AGAIN:
            watch.said = reason
            return
        if watch.starts > worker.restarts:
            watch.said = f"given up after {watch.starts} starts ({reason})"
            return
        self.tail.news()
        watch.process, watch.since, watch.at = self.start(worker, claims), self.machine.now(), None
        watch.lines, watch.starts = self.tail.heard.get(worker.name, 0), watch.starts + 1

    def why_nothing(self, watch: Watch) -> str:
        """Status 1: something failed, which the journal names; if it names nothing, the log's last line does."""
        if watch.worker.journaled and watch.lines > watch.before:
            return ""
        path = self.out / "log.txt"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return f"exit status 1: {lines[-1][:200]}" if lines else "exit status 1"

    def outcome(self, stage: Stage, watches: Iterable[Watch]) -> dict[str, Any]:
        watches = list(watches)
        names = {watch.worker.name for watch in watches}
        lines = [line for line in self.journal.lines() if line.get("by") in names]
        ended = {line["end"]: line for line in lines if "end" in line}
        avoided = {line["avoid"]: line["reason"] for line in lines if "avoid" in line}
        by = Counter(outcome_of(line) for line in ended.values())
        failed = {name: message(line) for name, line in ended.items() if outcome_of(line) == "failed"}
        said = [f"{count} {outcome}" for outcome, count in sorted(by.items(), key=lambda item: item[0] != "passed")]
        said += [f"{len(avoided)} hung or died"] if avoided else []
        said += [text for text, _ in Counter(watch.said for watch in watches if watch.said).most_common()]
        found: dict[str, Any] = {"failed": failed, "hung_or_died": avoided}
        good = not (failed or avoided or any(watch.said for watch in watches))
        if stage.name == "build":
            info = build_info()
            found["build"] = info
            good = good and bool(info.get("cuda"))
            built = f"for {info.get('cuda_archs')} in {info.get('seconds')} s"
            said += [built if info.get("cuda") else f"no CUDA: {info.get('cuda_reason')}"]
            said += [f"warning: {problem}" for problem in info.get("notes", [])[:3]]
        elif any(watch.worker.journaled for watch in watches):
            good = good and by["passed"] > 0
            said = said or ["nothing ran"]
        complete = not any(watch.unfinished for watch in watches)
        return {"ok": good, "complete": complete, "said": "; ".join(said) or "done", **found}


class Dead:
    """A process that could not be started."""

    def poll(self) -> int | None:
        return 1

    def kill(self) -> None:
        pass


def build_info() -> dict[str, Any]:
    path = ROOT / "illada_kernels" / "_build_info.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {"cuda_reason": "no build record"}


def outcome_of(line: dict[str, Any]) -> str:
    """Returns passed, failed or skipped."""
    if "outcome" in line:
        return str(line["outcome"])
    return "failed" if "error" in line or any(wrong(row) for row in line.get("rows", ())) else "passed"


def message(line: dict[str, Any]) -> str:
    said = line.get("message") or line.get("error")
    return str(said or "; ".join(wrong(row).strip() for row in line.get("rows", ()) if wrong(row)))[:300]


def done(journal: Journal) -> set[str]:
    """Returns the stages that a run before this one completed."""
    last = {line["stage"]: line.get("complete", False) for line in journal.lines() if "stage" in line}
    return {name for name, complete in last.items() if complete}
