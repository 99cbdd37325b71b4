"""Turns the files of a run into what is committed: rows, checks, figures, tables, outcomes beside the predictions, and
the list of kernels that these results let into the default order."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import run
from ..journal import Journal
from ..report import plot, predictions, readme
from .session import done
from .summary import last_outcomes, rows_of

ORDER = Path(__file__).resolve().parents[2] / "illada_kernels" / "_committed.json"


def adopt(
    folder: Path,
    results: Path = run.RESULTS,
    pages: Sequence[Path] = tuple(readme.PAGES),
    predicted: Path = predictions.PAGE,
    order: Path = ORDER,
) -> list[str]:
    """Writes it all; returns what was written, and which kernels are let in or kept out and why.

    Raises ValueError if the folder holds no run, or rows of cases that no suite has."""
    journal = Journal(folder / "journal.jsonl")
    runs, rows = [line for line in journal.lines() if "run" in line], rows_of(journal)
    if not runs:
        raise ValueError(
            f"{folder}: expected the files of `python -m benchmarks.on_gpu --out {folder}`, found no run in them"
        )
    target, said = results / runs[-1]["folder"], []
    target.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        known = run.collect(op, "cuda")
        mine = [row for row in rows if row["op"] == op]
        if gone := {row["case"] for row in mine} - {case.name for case in known}:
            raise ValueError(f"{op}: no suite has the cases {', '.join(sorted(gone))}; adopt at the commit of the run")
        run.write(target / f"{op}.json", mine, known)
        said.append(f"{len(mine)} rows of {op} in {target / f'{op}.json'}")
    checks = {"gpu": runs[-1]["gpu"], "commit": runs[-1]["commit"], "complete": sorted(done(journal))}
    checks |= {"stages": last_outcomes(journal), "selftests": selftests(journal)}
    (target / "checks.json").write_text(json.dumps(checks, indent=1) + "\n")
    let_in, kept_out = verdicts(journal, rows)
    known_order = json.loads(order.read_text()) if order.exists() else {}
    known_order[runs[-1]["gpu"]["capability"]] = sorted(let_in)
    order.write_text(json.dumps(known_order, indent=1, sort_keys=True) + "\n")
    plot.main([str(target)])
    for page in pages:
        page.write_text(readme.updated(page.read_text(), results))
    predicted.write_text(predictions.updated(predicted.read_text(), results))
    said += [f"let into the default order: {name}, {why}" for name, why in let_in.items()]
    said += [f"kept out of it: {name}: {why}" for name, why in kept_out.items()]
    return [*said, f"written: {target}, {order}, {', '.join(map(str, (*pages, predicted)))}"]


def selftests(journal: Journal) -> dict[str, dict[str, Any]]:
    return {
        name.removeprefix("selftest|"): {"outcome": line["outcome"], "message": line["message"]}
        for name, line in journal.ended().items()
        if name.startswith("selftest|")
    }


def verdicts(journal: Journal, rows: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns ({op/backend: how fast}, {op/backend: why not}): let in is what passed its selftest, failed in no test or
    row, and is not slower than the fastest peer in the geometric mean of its rows."""
    let_in: dict[str, str] = {}
    kept_out: dict[str, str] = {}
    tested, failing = selftests(journal), failed_items(journal)
    for name in sorted(tested):
        op, backend = name.split("/")
        room = op.removesuffix("_from_logits")
        mine = [row for row in rows if row["op"].startswith(room) and row["backend"] == backend]
        ratios = [row["ratio"] for row in mine if row["ratio"]]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
        bad = [what for what in failing if concerns(what, room, backend)]
        if tested[name]["outcome"] != "passed":
            kept_out[name] = f"selftest: {tested[name]['message'] or 'did not pass'}"
        elif bad:
            kept_out[name] = f"{len(bad)} failures, first {bad[0]}"
        elif any(run.wrong(row) for row in mine):
            kept_out[name] = "wrong at the size measured"
        elif not ratios:
            kept_out[name] = "not measured beside a peer"
        elif mean < 1:
            kept_out[name] = f"{mean:.2f} times as fast as the fastest peer, in the mean of {len(ratios)} rows"
        else:
            let_in[name] = f"{mean:.2f} times as fast as the fastest peer, in the mean of {len(ratios)} rows"
    return let_in, kept_out


def failed_items(journal: Journal) -> list[str]:
    """Tests, smoke and contenders that failed, hung or died, by their names in the journal."""
    ended = [name for name, line in journal.ended().items() if line.get("outcome") == "failed" or "error" in line]
    return [name for name in [*ended, *journal.avoided()] if not name.startswith("selftest|")]


def concerns(what: str, room: str, backend: str) -> bool:
    """Returns whether a failure speaks against a backend of a room: a test with both names, smoke (which is CUDA's), a
    contender; a test that names no backend speaks against all."""
    place, _, rest = what.partition("|")
    if place == "smoke":
        return backend == "cuda" and (rest.startswith(room) or rest == "the first tensor")
    if place in ("tests", "large"):
        named = [name for name in ("cuda", "triton") if name in rest.split("::")[-1] or f"_{name}_" in rest]
        return f"test_{room}" in rest and (backend in named or not named)
    if place == "compare":
        return backend == "cuda"
    return place.startswith(room) and rest.split("|")[-1].split()[0] == backend
