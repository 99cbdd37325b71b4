"""What a run is doing, line by line in a file, so that who watches it knows what hung or died, and can go on after it.

A kernel that waits for ever, or faults and takes its CUDA context with it, ends the process that launched it. The
process therefore writes what it begins; `supervise` kills it when that takes too long, notes what is to be avoided, and
starts it again. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

AGAIN = 77  # the exit status with which a process whose GPU context is lost asks to be started again


class Journal:
    """Lines {"begin": what, "limit": s}, {"end": what, ...facts}, {"avoid": what, "reason": text}."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, what: str, limit: float) -> None:
        self._write({"begin": what, "limit": limit, "at": time.time()})

    def end(self, what: str, **facts: Any) -> None:
        self._write({"end": what, **facts})

    def avoid(self, what: str, reason: str) -> None:
        self._write({"avoid": what, "reason": reason})

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def ended(self) -> dict[str, dict[str, Any]]:
        return {line["end"]: line for line in self.lines() if "end" in line}

    def avoided(self) -> dict[str, str]:
        return {line["avoid"]: line["reason"] for line in self.lines() if "avoid" in line}

    def current(self) -> dict[str, Any] | None:
        """What has begun and neither ended nor is avoided: the last line, if that is a beginning."""
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - 4096))
            last = file.read().splitlines()[-1:]
        try:
            line = json.loads(last[0]) if last else {}
        except ValueError:  # being written
            return None
        return line if "begin" in line else None


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its children; waits at most 10 s for a process that a GPU holds."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass


def run(command: Sequence[str], deadline: float, log: IO[bytes], env: dict[str, str]) -> str | None:
    """Runs a command to its end, output into `log`. None, or why it did not end with 0."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        code = process.wait(max(0.1, deadline - time.time()))
    except subprocess.TimeoutExpired:
        stop(process)
        return "out of time"
    return None if code == 0 else ended_with(code)


def ended_with(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def watch(process: subprocess.Popen[bytes], journal: Journal, deadline: float, poll: float = 0.2) -> str | None:
    """Waits for the end. None if it ended by itself with 0 or 1 (something failed, and it says what), else why not."""
    while process.poll() is None:
        now, current = time.time(), journal.current()
        if now > deadline:
            stop(process)
            return "out of time"
        if current is not None and now > current["at"] + current["limit"]:
            stop(process)
            return f"no end within {current['limit']:g} s"
        time.sleep(poll)
    return None if process.returncode in (0, 1) else ended_with(process.returncode)


def supervise(
    command: Sequence[str], journal: Journal, deadline: float, log: IO[bytes], env: dict[str, str], restarts: int = 12
) -> tuple[str | None, int]:
    """(None, exit status) once the command has ended by itself, else (why it was given up, status). Whatever it was at
    when it hung or died is avoided from then on."""
    for _ in range(restarts + 1):
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        reason = watch(process, journal, deadline)
        if reason is None:
            return None, process.returncode or 0
        if reason == "out of time":
            return reason, 1
        current = journal.current()
        if current is not None:
            print(f"  {current['begin']}: {reason}; going on without it", file=sys.stderr, flush=True)
            journal.avoid(current["begin"], reason)
        elif process.returncode != AGAIN:
            return reason, 1
    return f"given up after {restarts} restarts", 1
