"""Writes what a run is doing, line by line, to a file, from which a watcher knows what hung or died, and goes on.

A kernel that waits for ever, or faults and takes its CUDA context with it, ends the process that launched it. So each
process writes what it begins, and how that ended with all that is to be kept of it; who watches kills it when something
takes too long, and starts it again. A file that is cut off at any moment lacks at most what was under way. Several
processes may write one file: each line is one write, and says by whom. Standard library only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

AGAIN = 77  # the exit status with which a process whose GPU context is lost asks to be started again


class Journal:
    """Lines {"begin": what, "limit": s}, {"end": what, ...facts}, {"avoid": what, "reason": text}, each with "by"."""

    def __init__(self, path: Path, by: str = "") -> None:
        self.path, self.by = path, by

    def write(self, line: dict[str, Any]) -> None:
        data = json.dumps({**line, "by": self.by}).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, data)
        finally:
            os.close(file)

    def begin(self, what: str, limit: float) -> None:
        self.write({"begin": what, "limit": limit})

    def end(self, what: str, **facts: Any) -> None:
        self.write({"end": what, **facts})

    def avoid(self, what: str, reason: str) -> None:
        self.write({"avoid": what, "reason": reason})

    def mend(self) -> None:
        """Ends a line that was cut off, so that the next one is whole."""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def lines(self) -> list[dict[str, Any]]:
        return parsed(self.path.read_bytes()) if self.path.exists() else []

    def ended(self) -> dict[str, dict[str, Any]]:
        return {line["end"]: line for line in self.lines() if "end" in line}

    def avoided(self) -> dict[str, str]:
        return {line["avoid"]: line["reason"] for line in self.lines() if "avoid" in line}

    def current(self) -> dict[str, Any] | None:
        """Returns what this process has begun and neither ended nor avoided."""
        return Tail(self).news().get(self.by)


def parsed(data: bytes) -> list[dict[str, Any]]:
    """Returns the lines that are whole; a line that was cut off counts as none."""
    found = []
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


class Tail:
    """Follows a journal that grows: what each process has under way."""

    def __init__(self, journal: Journal) -> None:
        self.path, self.at = journal.path, 0
        self.running: dict[str, dict[str, Any] | None] = {}
        self.heard: dict[str, int] = {}  # lines so far, by process

    def news(self) -> dict[str, dict[str, Any] | None]:
        """Returns {by: the line that began what is under way, or None}, after the whole lines written since."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.at)
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self.at += whole
            for line in parsed(data[:whole]):
                by = str(line.get("by", ""))
                self.heard[by] = self.heard.get(by, 0) + 1
                if "begin" in line or "end" in line or "avoid" in line:
                    self.running[by] = line if "begin" in line else None
        return self.running
