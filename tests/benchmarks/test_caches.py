"""What caches cost in right answers: rows of every cache and rule, the table and the figure."""

from __future__ import annotations

import json

from benchmarks.quality import caches


def test_every_cache_is_measured_under_every_rule_and_drawn(tmp_path, capsys):
    """After three steps nothing is learned; what a pass computes is known all the same."""
    assert caches.main(["--task", "sort", "--steps", "3", "--problems", "4", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "caches.json").read_text())
    settings = [(rule, parameter) for rule, (_, parameters) in caches.RULES.items() for parameter in parameters]
    assert [(r["cache"], r["rule"], r["parameter"]) for r in rows] == [(c, *s) for c in caches.CACHES for s in settings]
    assert all(0 <= row["accuracy"] <= 1 and 1 <= row["tokens_per_pass"] <= 2 for row in rows)
    one_by_one = {r["cache"]: r["columns_per_token"] for r in rows if (r["rule"], r["parameter"]) == ("steps", 2)}
    # nine columns of prompt and eight of answer, in blocks of two; each block's first pass, then its second
    assert one_by_one["none"] == 17 and one_by_one["dual"] == (17 + 2) / 2
    assert one_by_one["prefix"] == (17 + (8 + 6 + 4 + 2) / 4) / 2
    assert one_by_one["interval, once"] == (17 + 3 * 4 + 4 * 2) / 8
    assert (tmp_path / "caches.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("\n| ") == len(caches.CACHES) + 1
