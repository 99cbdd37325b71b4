"""The machine as a run sees it: a clock, and processes that can be started and killed. Tests have a stand-in."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

ROOT = Path(__file__).resolve().parents[2]
PER_PROCESS, PER_LOG = 256 << 10, 12 << 20  # bytes of output that are kept, of a process and in all


class Process(Protocol):
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


class Machine(Protocol):
    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def start(self, name: str, command: Sequence[str], env: dict[str, str], log: Path) -> Process: ...


class Child:
    """A process in a session of its own, its output appended to `log`."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
        assert self.process.stdout is not None
        self.reader = threading.Thread(target=self.keep, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def keep(self, output: IO[bytes]) -> None:
        with output, self.log.open("ab") as log:
            left = max(0, min(PER_PROCESS, PER_LOG - log.tell()))
            while data := os.read(output.fileno(), 1 << 16):
                log.write(data[:left])
                log.flush()
                left = max(0, left - len(data))

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self.reader.join(2)  # a grandchild may hold the pipe
        return code

    def kill(self) -> None:
        """Kills the process and its children, without waiting for their end, which a GPU may hold up."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Here:
    """Stands for this machine."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(self, name: str, command: Sequence[str], env: dict[str, str], log: Path) -> Process:
        with log.open("ab") as file:
            file.write(f"\n==== {name}: {' '.join(command)}\n".encode())
        return Child(command, env, log)


def ended_with(code: int) -> str:
    if code < 0:
        try:
            return f"died of {signal.Signals(-code).name}"
        except ValueError:
            return f"died of signal {-code}"
    return f"exit status {code}"


def gpu() -> dict[str, str] | None:
    """Returns {name, capability, driver} of the first GPU as nvidia-smi tells it, None without one."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in (found.stdout.splitlines() or [""])[0].split(",")]
    return dict(zip(("name", "capability", "driver"), values)) if found.returncode == 0 and len(values) == 3 else None
