"""Every example runs as it stands, and what it prints is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
SAYS = {  # a pattern of the last line, and what its numbers must satisfy
    "antibodies": (
        r"loss \S+ as its own code; (\d+) of (\d+) residues recovered in (\d+) passes",
        lambda right, masked, passes: right > masked / 2 and passes < masked,
    ),
    "conversations": (r"loss (\S+) to (\S+)", lambda before, after: after < before / 3),
    "encoder": (r"logits and gradients agree on (\d+) tokens", lambda tokens: tokens == 72),
    "foreign_model": (
        r"the same loss: (\S+) by torch, (\S+) patched",
        lambda before, after: abs(after - before) < 1e-3,
    ),
    "trainer": (r"one batch by hand (\S+)", lambda loss: loss < 1),
}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_and_says_what_is_right(name, python, tmp_path):
    if name == "antibodies" and not (FOLDER.parent / "build" / "antiberty").is_dir():
        pytest.skip("make build/antiberty installs the weights, where the package index has them")
    if name in ("antibodies", "encoder", "trainer"):
        pytest.importorskip("transformers", reason="no transformers")
    if name == "trainer":
        pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    done = python(str(FOLDER / f"{name}.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    pattern, right = SAYS[name]
    found = re.match(pattern, done.stdout.splitlines()[-1])
    assert found and right(*map(float, found.groups())), done.stdout


def test_every_example_is_run_and_short():
    scripts = {path.stem: path.read_text().splitlines() for path in FOLDER.glob("*.py")}
    assert set(scripts) == set(SAYS)
    assert {name: len(lines) for name, lines in scripts.items() if len(lines) >= 60} == {}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_cell_by_cell_and_is_stored_without_outputs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": path.stem}
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 3
    for number, cell in enumerate(code, 1):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    counted = capsys.readouterr().out.splitlines()[-1].split()
    assert counted == [str((4 + i) % 16) for i in range(16)]  # place 5 was told to be 9
