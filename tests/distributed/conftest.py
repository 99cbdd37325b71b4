"""`ranks`: what the ranks of a world found, run once however many processes run the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkout import locked

WORLDS = (2, 4)
Ranks = Callable[[str, int, str], list[str]]


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory, python: Callable[..., object]) -> Ranks:
    """(module, world, check) -> what went wrong, a traceback for each rank that failed."""

    def found(module: str, world: int, check: str) -> list[str]:
        base = tmp_path_factory.getbasetemp()
        base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        folder = base / module
        with locked(base / f"{module}.lock"):
            if not folder.exists():
                folder.mkdir()
                done = python("-m", "tests.helpers.ranks", str(folder), module, *map(str, WORLDS))
                (folder / "stderr").write_text(done.stderr)  # type: ignore[attr-defined]
        results = [read(folder / f"{world}.{rank}.json") for rank in range(world)]
        return [f"rank {r}: {result.get(check, missing(folder))}" for r, result in enumerate(results) if failed(result, check)]

    return found


def read(file: Path) -> dict[str, str]:
    return json.loads(file.read_text()) if file.exists() else {}


def failed(result: dict[str, str], check: str) -> bool:
    return result.get(check, "not run") != ""


def missing(folder: Path) -> str:
    return "was not run, because an earlier check failed or the rank died\n" + (folder / "stderr").read_text()[-2000:]
