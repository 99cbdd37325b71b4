"""Runs commands of `illada` in forks of one process, which imports what they need: torch and peft take four seconds."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

CLOSED_PIPE = "|"


class Command(NamedTuple):
    """One call of `illada`. stdout: a file, or CLOSED_PIPE for a pipe that nobody reads."""

    arguments: Sequence[str]
    stdout: str = os.devnull
    env: Mapping[str, str] = MappingProxyType({})


def run(
    python: Callable[..., Any], folder: Path, groups: Sequence[Sequence[Command]], imports: Sequence[str], **more: Any
) -> list[list[tuple[int, str]]]:
    """Returns the exit code and standard error of each command. Those of a group run at once, the groups in turn."""
    folder.mkdir()
    (folder / "commands").write_text(json.dumps([[(*some, dict(env)) for *some, env in group] for group in groups]))
    done = python("-m", "tests.helpers.forks", str(folder), *imports, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout)
    return [
        [(code, (folder / f"{i}.{j}").read_text()) for j, code in enumerate(group)] for i, group in enumerate(codes)
    ]


def start(command: Command, stderr: Path) -> int:
    """Returns the child's process id."""
    child = os.fork()
    if child:
        return child
    if command.stdout == CLOSED_PIPE:
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open(command.stdout, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(command.env)
    from illada.cli import main

    sys.exit(main(command.arguments))  # not os._exit: the interpreter's own end is a part of a command


def main(folder: Path) -> None:
    groups = [[Command(*fields) for fields in group] for group in json.loads((folder / "commands").read_text())]
    codes = []
    for i, group in enumerate(groups):
        children = [start(command, folder / f"{i}.{j}") for j, command in enumerate(group)]
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(codes))


if __name__ == "__main__":
    gc.disable()
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # as the command does with what it imports
    gc.enable()
    main(Path(sys.argv[1]))
