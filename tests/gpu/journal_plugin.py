"""A pytest plugin for tests on a GPU: `python -m pytest tests/gpu -p tests.gpu.journal_plugin`, run by on_gpu.

Writes what begins and how it ends to the journal named in ILLADA_JOURNAL, leaves out what is in there already, and asks
to be started again (exit status AGAIN) once a failing test has taken the CUDA context with it. Several such processes
share the tests: each claims the next that nobody has, in the folder ILLADA_CLAIMS, kernels of CUDA before Triton's,
which compile first.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from benchmarks.journal import AGAIN, Journal

STAGE = os.environ.get("ILLADA_STAGE", "tests")
LIMIT = float(os.environ.get("ILLADA_TEST_LIMIT", 15))  # seconds a test; of one that compiles Triton kernels thrice
journal = Journal(Path(os.environ.get("ILLADA_JOURNAL", os.devnull)), os.environ.get("ILLADA_BY", ""))
claims = os.environ.get("ILLADA_CLAIMS")
outcomes: dict[str, tuple[str, str]] = {}  # of the test under way: outcome, message


def key(nodeid: str) -> str:
    return f"{STAGE}|{nodeid}"


def compiles(nodeid: str) -> bool:
    return "triton" in nodeid


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = journal.ended().keys() | journal.avoided().keys()
    config.hook.pytest_deselected(items=[item for item in items if key(item.nodeid) in known])
    items[:] = sorted((item for item in items if key(item.nodeid) not in known), key=lambda i: compiles(i.nodeid))


def claimed(nodeid: str) -> bool:
    """Whether this process gets the test."""
    if claims is None:
        return True
    try:
        (Path(claims) / hashlib.sha256(nodeid.encode()).hexdigest()).touch(exist_ok=False)
        return True
    except FileExistsError:
        return False


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Fixtures of modules are set up anew for each test, since which comes next is not known."""
    if session.config.option.collectonly or session.testsfailed:
        return True
    for item in session.items:
        if claimed(item.nodeid):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
    return True


def pytest_runtest_logstart(nodeid: str) -> None:
    outcomes.pop(nodeid, None)
    journal.begin(key(nodeid), 3 * LIMIT if compiles(nodeid) else LIMIT)


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
    journal.end(key(nodeid), outcome=outcome, message=said)
    torch = sys.modules.get("torch")  # who has not imported it has no context to lose
    if outcome == "failed" and torch is not None and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(AGAIN)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.items is not None and journal.ended():
        session.exitstatus = pytest.ExitCode.OK  # all ran before
