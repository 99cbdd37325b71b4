"""benchmarks/quality/pass_profile.py: parts that add up to a pass, and no part that is forgotten."""

from __future__ import annotations

import re
import time

import illada.model
import pytest

import illada_kernels
from benchmarks.quality import pass_profile

SMALL = ["--layers", "2", "--dim", "128", "--rows", "4", "--keys", "16", "--vocab", "64", "--passes", "3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_has_every_part_and_their_sum(capsys, dtype):
    assert pass_profile.main([*SMALL, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    times = {name: float(ms) for name, ms in re.findall(r"^\| ([\w ]+) \| ([\d.e-]+) \|", out, flags=re.MULTILINE)}
    assert list(times) == [*pass_profile.PARTS, "whole pass"] and dtype in out
    assert sum(times.values()) == pytest.approx(2 * times["whole pass"], rel=0.02)


def test_time_is_booked_where_it_is_spent(monkeypatch):
    def slower(function, seconds):
        def call(*arguments, **options):
            time.sleep(seconds)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(illada_kernels, "attention", slower(illada_kernels.attention, 0.02))
    monkeypatch.setattr(illada.model, "swiglu", slower(illada.model.swiglu, 0.05))
    config = pass_profile.ModelConfig.preset("demo", n_layers=2)
    parts = pass_profile.profile(pass_profile.Model(config).eval(), 4, 16, 1)
    assert parts["attention"] >= 40 and parts["between"] >= 100
