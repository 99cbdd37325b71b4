"""`ranks`: what the ranks of a world found, run once however many processes run the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkout import locked

WORLDS = (2, 4)
Ranks = Callable[[str, int, str], list[str]]


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory, python: Callable[..., object]) -> Ranks:
    """(module, world, check) -> what went wrong on each rank that failed. Where ranks may die, one must tell."""

    def found(module: str, world: int, check: str) -> list[str]:
        base = tmp_path_factory.getbasetemp()
        base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        folder = base / module
        with locked(base / f"{module}.lock"):
            if not folder.exists():
                folder.mkdir()
                done = python("-m", "tests.helpers.ranks", str(folder), module, *map(str, WORLDS))
                (folder / "stderr").write_text(done.stderr)  # type: ignore[attr-defined]
        said = {rank: read(folder / f"{world}.{check}.{rank}") for rank in range(world)}
        told = [what for what in said.values() if what is not None]
        if len(told) == world or (told and "breaks" in check):
            return [f"rank {rank}: {what}" for rank, what in said.items() if what]
        return [f"rank {rank}: {what}" for rank, what in said.items() if what != ""] + [(folder / "stderr").read_text()]

    return found


def read(file: Path) -> str | None:
    return file.read_text() if file.exists() else None
