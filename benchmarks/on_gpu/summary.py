"""Writes what a run found, in Markdown: the stages, what failed, and last the rows beside their predictions."""

from __future__ import annotations

from typing import Any

from ..journal import Journal
from ..report import predictions
from ..report.readme import digits
from ..run import wrong

SHOWN = 12  # failures of a stage


def rows_of(journal: Journal) -> list[dict[str, Any]]:
    """Returns the rows of all cases that ended, the last of each (op, case, dtype, backend), in the order of the
    first."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in journal.lines():
        for row in line.get("rows", ()):
            found[row["op"], row["case"], row["dtype"], row["backend"]] = row
    measured = {key[:3] for key in found if key[3] is not None}
    return [row for key, row in found.items() if key[3] is not None or key[:3] not in measured]


def table(rows: list[dict[str, Any]]) -> list[str]:
    guesses = predictions.ranges()
    lines = [
        "| op | case | backend | ms | predicted | share of floor | fastest peer | ms | times faster |",
        "|---|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        best = row["best_peer"]
        peer = f"{best} | {digits(row['peers'][best])} | {row['ratio'] or 0:.2f}" if best else "none | | "
        head = f"| {row['op']} | {row['case']} | {row['backend'] or 'none'} |"
        if row["backend"] is None:
            lines.append(f"{head} | | | {peer} |")
            continue
        guess = guesses.get((row["op"], row["case"], row["backend"]), "")
        lines.append(f"{head} {digits(row['ms']['p50'])}{wrong(row)} | {guess} | {row['floor_ratio']:.2f} | {peer} |")
    return lines


def last_outcomes(journal: Journal) -> dict[str, dict[str, Any]]:
    return {line["stage"]: line for line in journal.lines() if "stage" in line}


def summary(journal: Journal) -> str:
    facts = [line for line in journal.lines() if "run" in line][-1:]
    lines = (
        [f"{facts[0]['gpu']['name']}, driver {facts[0]['gpu']['driver']}, commit {facts[0]['commit']}", ""]
        if facts
        else []
    )
    lines += ["| stage | | s | |", "|---|---|---:|---|"]
    outcomes = last_outcomes(journal)
    lines += [
        f"| {name} | {'ok' if o['ok'] else 'FAILED'} | {o['seconds']:g} | {cell(o['said'])} |"
        for name, o in outcomes.items()
    ]
    failed = []
    for kind, text in (("failed", "failed"), ("hung_or_died", "hung or died")):
        for name, outcome in outcomes.items():
            items = list(outcome.get(kind, {}).items())
            failed += [f"- {name}, {text}: {what}: {reason}" for what, reason in items[:SHOWN]]
            failed += [f"- {name}, {text}: {len(items) - SHOWN} more, in the journal"] if len(items) > SHOWN else []
    lines += ["", *failed, ""] if failed else [""]
    return "\n".join([*lines, *table(rows_of(journal))]) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]
