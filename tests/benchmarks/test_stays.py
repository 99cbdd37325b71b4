"""benchmarks/quality/stays.py: what a stay is, on two files made here, and that the ops can be traced."""

from __future__ import annotations

import itertools
import sys

import pytest

from benchmarks.quality import stays

FIRST = """
import second
def outer(times):
    helper()
    for _ in range(times):
        sorted([2, 1], key=second.inner)
def helper():
    pass
"""
SECOND = """
import first
def inner(number):
    first.helper()
    return number
"""


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_stay_begins_with_a_call_from_another_file_and_again_with_the_return(times, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    for name, text in (("first", FIRST), ("second", SECOND)):
        (package / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(package))
    import first

    found = stays.stays(lambda: first.outer(times), (package,))
    there = ["package/second.py", "package/first.py"] * 2  # inner, helper, inner again, outer again; for each number
    assert found == ["package/first.py", *there * 2 * times]
    for name in ("first", "second"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", stays.TRACED)
def test_every_op_is_traced_from_its_door_to_the_extension(name):
    pytest.importorskip("illada_kernels._C", reason="the compiled extension is missing")
    job = stays.TRACED[name]()
    job()
    found = stays.stays(job)
    assert "csrc/bindings.cpp" in found and sys.getprofile() is None
    assert all(a != b for a, b in itertools.pairwise(found))
    text = stays.report(name, found)
    assert f"{name}: {len(found)} stays in {len(set(found))} files" in text and "| csrc/bindings.cpp | " in text


def test_hidden_stays_in_few_places_on_its_way_through_masked_loss():
    """What a reader of one call, forward and backward, has to jump; 90 before each op had one Problem."""
    pytest.importorskip("illada_kernels._C", reason="the compiled extension is missing")
    job = stays.masked_loss()
    job()
    assert len(stays.stays(job)) <= 45
