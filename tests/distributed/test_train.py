"""Training over 2 and 4 ranks, gloo on a CPU, equals training in one process."""

from __future__ import annotations

import pytest

from tests.distributed.conftest import WORLDS, Ranks
from tests.distributed.train_checks import PEFT
from tests.helpers.ranks import checks

MODULE = "tests.distributed.train_checks"


@pytest.mark.parametrize("world, check", [(w, c) for w in WORLDS for c in checks(MODULE, w)])
def test_every_rank_holds(world: int, check: str, ranks: Ranks) -> None:
    if "adapters" in check and not PEFT.exists():
        pytest.skip("make build/peft installs it, where the package index has it")
    failures = ranks(MODULE, world, check)
    assert not failures, "\n".join(failures)
