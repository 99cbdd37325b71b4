"""benchmarks/floor.py: rates that a processor can have, and the least time that they give."""

from __future__ import annotations

import functools

import pytest

from benchmarks import floor


def test_the_ceilings_of_this_machine_are_measured(monkeypatch):
    monkeypatch.setattr(floor, "copy_rate", functools.partial(floor.copy_rate, megabytes=32))
    rates = floor.ceilings("cpu", "bfloat16")
    assert 1e9 < rates["gemm"] < 1e15 and 1e8 < rates["copy"] < 1e13
    # a half-precision product may run in float32 where that is faster
    assert rates["gemm"] > floor.gemm_rate("cpu", floor.torch.float32) / 2


def test_the_floor_is_the_larger_of_operations_and_bytes():
    rates = {"gemm": 1e9, "copy": 1e8}
    assert floor.floor_ms(2e6, 1e5, rates) == pytest.approx(2.0)
    assert floor.floor_ms(1e6, 3e5, rates) == pytest.approx(3.0)
