"""Writes the table of measurements in README.md, between its markers, from benchmarks/results:

python -m benchmarks.report.readme
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..run import RESULTS
from .plot import rows_of

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- measured: written by python -m benchmarks.report.readme -->", "<!-- /measured -->"


def table(results: Path = RESULTS) -> str:
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        every = rows_of(folder, absent=True)
        rows = [row for row in every if row.get("facts", {}).get("headline", True)]
        if not rows:
            continue
        parts += [
            f"{rows[0]['device']}, torch {rows[0]['versions']['torch']} (`benchmarks/results/{folder.name}/`)",
            "",
            "| op | case | dtype | ours, ms | fastest peer, ms | times faster | share of floor | memory, MiB |",
            "|---|---|---|---:|---:|---:|---:|---:|",
            *map(table_row, rows),
            "",
        ]
        if len(rows) < len(every):
            parts += [f"{len(every) - len(rows)} more cases are in `benchmarks/results/{folder.name}/`.", ""]
    return "\n".join(parts).strip()


def table_row(row: dict[str, Any]) -> str:
    peer, ratio = "none", ""
    if row["best_peer"]:
        peer = f"{row['best_peer']} {digits(row['peers'][row['best_peer']])}"
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
    head = f"| {row['op']} | {row['case']} | {row['dtype']} |"
    if row["backend"] is None:
        return f"{head} absent | {peer} | | | |"
    named = f" ({row['backend']})" if "facts" in row else ""  # on a GPU there are several
    return (
        f"{head} {digits(row['ms']['p50'])}{named} | {peer} | {ratio} "
        f"| {row['floor_ratio']:.2f} | {row['peak_memory'] / 2**20:.1f} |"
    )


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def updated(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    sys.exit(0)
