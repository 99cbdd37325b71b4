"""What is drawn and written of a GPU's rows: figures, tables, predictions."""

from __future__ import annotations

import json

import pytest

from benchmarks import run
from benchmarks.report import plot_lines, predictions, readme

RATES = {"gemm": 1e12, "copy": 1e11}


# ---- figures --------------------------------------------------------------------------------------------------------
def test_figures_are_drawn_from_rows_of_a_gpu(tmp_path):
    assert plot_lines.draw(tmp_path) == []
    for op in ("attention_fwd", "attention_bwd", "masked_loss", "unmask"):
        rows = []
        for at, case in enumerate(run.collect(op, "cuda")):
            row = {"op": op, "case": case.name, "facts": case.facts, "backend": ("cuda", None)[at % 2], "floor_ms": 1.0}
            row |= {"ms": {"p50": 2.0 + at}, "peak_memory": 2**30, "peers": {"cudnn": 3.0}, "beside": {}}
            rows.append(row | {"peer_memory": {"cudnn": 2**31}})
        (tmp_path / f"{op}.json").write_text(json.dumps(rows))
    drawn = plot_lines.draw(tmp_path)
    assert drawn == ["attention.png", "attention_masks.png", "masked_loss.png", "unmask.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_points_are_what_was_measured():
    facts = {"length": 4096, "flops": 8e12}
    row = {"facts": facts, "backend": "cuda", "ms": {"p50": 10.0}, "peers": {"cudnn": 20.0, "flash": 40.0}}
    got = plot_lines.points([row], plot_lines.fact("length"), plot_lines.tflops)
    assert got == {"cudnn": [(4096, 400.0)], "flash": [(4096, 200.0)], "cuda (ours)": [(4096, 800.0)]}
    assert plot_lines.against_dense(row, 10.0) == 2.0
    assert plot_lines.against_dense({**row, "beside": {"cudnn, no mask": 30.0}}, 10.0) == 3.0


def test_the_readme_shows_headlines_of_a_gpu_and_says_that_there_are_more(tmp_path):
    folder = tmp_path / "h200"
    folder.mkdir()
    row = {"op": "unmask", "case": "a", "dtype": "bfloat16", "device": "NVIDIA H200", "versions": {"torch": "2.13"}}
    row |= {"backend": "cuda", "ms": {"p50": 2.0}, "peers": {"x": 6.0}, "best_peer": "x", "ratio": 3.0}
    row |= {"floor_ratio": 0.5, "peak_memory": 2**20, "facts": {"headline": True}}
    (folder / "unmask.json").write_text(json.dumps([row, {**row, "case": "b", "facts": {"headline": False}}]))
    lines = readme.table(tmp_path).splitlines()
    assert lines[-3] == "| unmask | a | bfloat16 | 2 (cuda) | x 6 | 3.00 | 0.50 | 1.0 |"
    assert lines[-1].startswith("1 more cases")


def test_the_page_of_floors_is_that_of_the_cases():
    text = predictions.PAGE.read_text()
    assert predictions.updated(text) == text, "run: python -m benchmarks.report.predictions"
    full = {"flops": 780e9, "bytes": 4.3e9, "kind": "full", "direction": "forward", "head_dim": 128, "length": 8192}
    assert predictions.floor_ms(full) == pytest.approx(1.0)
    assert predictions.attention_prediction(full, "cuda") == "1.13-1.26"
    assert predictions.bound({**full, "bytes": 5e9}) == "memory"
    assert predictions.floor_ms({**full, "bytes": 8.6e9}) == 2.0
