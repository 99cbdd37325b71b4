"""benchmarks/quality/packed_layers.py: a cell for every kind of layer, and answers that packing can spoil."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import packed_layers


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_the_table_has_floor_plain_and_every_kind(capsys, monkeypatch):
    monkeypatch.setattr(packed_layers, "ceilings", lambda device, dtype: {"gemm": 1e9, "copy": 1e9})
    options = ["--size", "64", "96", "--rows", "1", "5", "--rounds", "3", "--copies", "1"]
    assert packed_layers.main(options) == 0
    head, _, *rows = rows_of(capsys.readouterr().out)
    assert head[1:] == [f"float32 {name}" for name in ("floor", "plain", "packed")] + [
        f"bfloat16 {name}" for name in ("floor", "plain", "packed", "int8", "int4")
    ]
    assert [row[0] for row in rows] == ["1", "5"] and all(float(cell) > 0 for row in rows for cell in row[1:])
    # of one row the weights' bytes, of five the operations: 64 * 96 * 4 and 2 * 5 * 64 * 96 at 1e9 a second
    assert [row[1] for row in rows] == ["0.0246", "0.0614"]


def test_answers_of_every_kind_are_counted(capsys, monkeypatch):
    asked = []

    def measured(model, task, rule, problems):
        kinds = {type(m).__name__ for layer in model.layers for m in layer.children()}
        asked.append((model.dtype, kinds & {"Linear", "PackedLinear", "Int8Linear", "Int4Linear"}))
        return {"accuracy": 0.5}

    monkeypatch.setattr(packed_layers, "measure_rule", measured)
    assert packed_layers.main(["--answers", "--steps", "1", "--problems", "1"]) == 0
    assert rows_of(capsys.readouterr().out)[2:] == [[name, "50.0%"] for name in ("float32", "bfloat16", "int8", "int4")]
    half = torch.bfloat16
    assert asked == [
        (torch.float32, {"Linear"}),
        (half, {"PackedLinear"}),
        (half, {"Int8Linear"}),
        (half, {"Int4Linear"}),
    ]


def test_a_size_that_int4_cannot_take_raises():
    with pytest.raises(RuntimeError):
        packed_layers.times(1, (40, 96), "bfloat16", 1, 3)
