"""A pytest plugin for tests on a GPU: `python -m pytest tests/gpu -p tests.gpu.journal_plugin`, run by on_gpu.py.

Writes what begins and how it ends to the journal named in ILLADA_JOURNAL, leaves out what is in there already, and asks
to be started again (exit status AGAIN) once a failing test has taken the CUDA context with it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.journal import AGAIN, Journal

LIMIT = float(os.environ.get("ILLADA_TEST_LIMIT", 90))  # seconds a test, compilation of Triton kernels included
journal = Journal(Path(os.environ.get("ILLADA_JOURNAL", os.devnull)))
outcomes: dict[str, tuple[str, str]] = {}  # of the test under way: outcome, message


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = journal.ended().keys() | journal.avoided().keys()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    outcomes.pop(nodeid, None)
    journal.begin(nodeid, LIMIT)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome, message(report)


def message(report: pytest.TestReport) -> str:
    """One line: why it was skipped, or the exception."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines()
    return lines[0][:300] if lines else ""


def pytest_runtest_logfinish(nodeid: str) -> None:
    outcome, said = outcomes.get(nodeid, ("passed", ""))
    journal.end(nodeid, outcome=outcome, message=said)
    if outcome == "failed" and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(AGAIN)
