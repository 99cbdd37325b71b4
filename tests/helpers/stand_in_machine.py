"""A machine for tests of benchmarks.on_gpu: a clock that only waiting moves, and processes that do as they are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.journal import Journal

Act = Callable[[Journal], None]
Script = Iterator[tuple[float, Act | int | None]]  # (after so many seconds, what is done; an int ends the process)


class Killed(BaseException):
    """The run itself is killed."""


class StandInProcess:
    def __init__(self, machine: StandIn, script: Script, journal: Journal) -> None:
        self.machine, self.script, self.journal, self.at = machine, script, journal, machine.clock
        self.next = next(script, (1e9, None))
        self.code: int | None = None

    def poll(self) -> int | None:
        while self.code is None and self.at + self.next[0] <= self.machine.clock:
            self.at += self.next[0]
            act = self.next[1]
            if isinstance(act, int):
                self.code = act
            elif act is not None:
                act(self.journal)
            self.next = next(self.script, (1e9, None))
        return self.code

    def kill(self) -> None:
        self.code = -9 if self.code is None else self.code


class StandIn:
    """`scripts`: what a process of a worker does, by the beginning of its name; `dies_at`: when the run is killed."""

    def __init__(self, scripts: dict[str, Callable[[Journal], Script]], dies_at: float = 1e9) -> None:
        self.scripts, self.dies_at, self.clock = scripts, dies_at, 0.0
        self.started: list[str] = []
        self.running: list[StandInProcess] = []

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        self.clock += seconds
        for process in self.running:
            process.poll()
        if self.clock >= self.dies_at:
            raise Killed

    def start(self, name: str, command: Sequence[str], env: dict[str, str], log: Path) -> StandInProcess:
        self.started.append(name)
        with log.open("a") as file:
            file.write(f"==== {name}\n")
        script = self.scripts[max((key for key in self.scripts if name.startswith(key)), key=len)]
        if script is missing:
            raise FileNotFoundError(f"no such program: {os.fspath(command[0])}")
        journal = Journal(Path(env["ILLADA_JOURNAL"]), env["ILLADA_BY"])
        self.running.append(StandInProcess(self, script(journal), journal))
        return self.running[-1]


def known(journal: Journal) -> set[str]:
    return {*journal.ended(), *journal.avoided()}


# ---- what processes do ----------------------------------------------------------------------------------------------
def works(
    prefix: str, items: int = 6, each: float = 1.0, start: float = 3.0, upset: str = ""
) -> Callable[[Journal], Script]:
    """Begins and ends items; `upset` happens at the third, unless that is to be avoided: "hangs", "dies", "fails",
    "loses the GPU"."""

    def script(journal: Journal) -> Script:
        yield start, None
        wrong, before = False, known(journal)
        for i in range(items):
            name = f"{prefix}|{journal.by} {i}"
            if name in before:
                continue
            yield 0.0, lambda j, n=name: j.begin(n, max(10.0, 2 * each if each < 1e6 else 0))
            if i == 2 and upset in ("hangs", "dies"):
                yield (1e9, None) if upset == "hangs" else (each, -11)
            if i == 2 and upset == "loses the GPU":
                yield each, lambda j, n=name: j.avoid(n, "illegal address")
                yield 0.0, 77
            facts = {"error": "AssertionError: off"} if i == 2 and upset == "fails" else {}
            wrong = wrong or bool(facts)
            yield each, lambda j, n=name, f=facts: j.end(n, **f)
        yield 0.5, int(wrong)

    return script


def cannot_import(journal: Journal) -> Script:
    yield 2.0, 1


def never_starts(journal: Journal) -> Script:
    yield 1e9, None


def builds(seconds: float) -> Callable[[Journal], Script]:
    def script(journal: Journal) -> Script:
        yield seconds, 0

    return script


def missing(journal: Journal) -> Script:
    """Marks a program that there is not."""
    raise AssertionError("not started")
