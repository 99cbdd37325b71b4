"""benchmarks/quality/fewer_passes.py: a curve for every model and rule, and the tokens a pass at 95%."""

from __future__ import annotations

import json

from benchmarks.quality import fewer_passes
from benchmarks.quality.fewer_passes import COLORS, RULES, at_goal


def test_every_model_and_rule_is_measured_and_drawn(tmp_path, capsys):
    sizes = {"steps": 2, "tune": 2, "batch": 4, "prompts": 6, "draws": 2, "problems": 5}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert fewer_passes.main([*options, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "fewer_passes.json").read_text())
    for model in COLORS:
        measured = [row for row in rows if row["model"] == model and "rule" in row]
        assert {(r["rule"], r["parameter"]) for r in measured} == {(r, x) for r, (_, xs) in RULES.items() for x in xs}
        assert all(1 <= row["tokens_per_pass"] <= 8 and 0 <= row["accuracy"] <= 1 for row in measured)
        assert [row["at_95"] for row in rows if row["model"] == model and "at_95" in row] == [at_goal(measured)]
    assert (tmp_path / "fewer_passes.png").stat().st_size > 10_000
    assert all(f"{model:<18}" in capsys.readouterr().out for model in list(COLORS)[:1])


def test_the_goal_counts_settings_that_reach_it_alone():
    rows = [{"accuracy": a, "tokens_per_pass": t} for a, t in ((0.99, 2.0), (0.95, 3.0), (0.94, 8.0))]
    assert at_goal(rows) == 3.0 and at_goal(rows[2:]) == 0.0
