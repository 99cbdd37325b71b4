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
        said = [result.get(check, "not run") for result in results]
        more = "\n" + (folder / "stderr").read_text()[-2000:] if "not run" in said else ""
        return [f"rank {rank}: {what}{more}" for rank, what in enumerate(said) if what]

    return found


def read(file: Path) -> dict[str, str]:
    return json.loads(file.read_text()) if file.exists() else {}
