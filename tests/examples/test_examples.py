"""Every example runs as it stands, and what it prints is right."""

from __future__ import annotations

import importlib.util
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


# Forks for each example, because importing torch and transformers takes longer than most of them.
RUN_EACH = """
import gc, os, runpy, sys, traceback
gc.disable()
import torch
folder, *names = sys.argv[1:]
for name in names:
    if name == "import":
        import transformers
        continue
    gc.freeze()  # neither the forks nor the end look through what was imported
    if os.fork() == 0:
        gc.enable()
        os.mkdir(name)
        os.chdir(name)
        for stream in (1, 2):
            os.dup2(os.open(f"../{name}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        try:
            sys.argv = [f"{folder}/{name}.py"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]))
"""


ALONE = ("conversations", "foreign_model")
ON_TRANSFORMERS = ("encoder", "trainer", "antibodies")


def left_out() -> dict[str, str]:
    """What cannot run here, and why."""
    found = {}
    if importlib.util.find_spec("accelerate") is None:
        found["trainer"] = "transformers' Trainer needs accelerate"
    if not (FOLDER.parent / "build" / "antiberty").is_dir():
        found["antibodies"] = "make build/antiberty installs the weights, where the package index has them"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("names", [ALONE, ON_TRANSFORMERS], ids=" ".join)
def test_an_example_runs_and_says_what_is_right(names, python, tmp_path):
    if names != ALONE:
        pytest.importorskip("transformers", reason="no transformers")
    without = {name: reason for name, reason in left_out().items() if name in names}
    first = () if names == ALONE else ("import",)
    done = python("-c", RUN_EACH, str(FOLDER), *first, *(name for name in names if name not in without), cwd=tmp_path)
    ran = dict(line.split() for line in done.stdout.splitlines())
    assert {*ran, *without} == set(names), done.stderr
    for name, code in ran.items():
        out, error = (tmp_path / f"{name}.{stream}" for stream in (1, 2))
        assert code == "0", f"{name}: {error.read_text()[-3000:]}"
        pattern, right = SAYS[name]
        found = re.match(pattern, out.read_text().splitlines()[-1])
        assert found and right(*map(float, found.groups())), f"{name}: {out.read_text()}"
    if without:
        pytest.skip(f"all but {without}")


def test_every_example_is_run_and_short():
    scripts = {path.stem: path.read_text().splitlines() for path in FOLDER.glob("*.py")}
    assert set(scripts) == set(SAYS) == {*ALONE, *ON_TRANSFORMERS}
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
