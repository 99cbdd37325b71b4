"""Draws each device's committed results: python -m benchmarks.report.plot [results/<device> ...]

cases.png: left, how many times faster each case is than its fastest peer (a line at 1, logarithmic); right, which share
of the hardware's floor it reaches. From a GPU's rows also the figures of plot_lines.py. They lie beside the rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..run import FILES, RESULTS
from . import plot_lines

COLORS = dict(zip(FILES, ("#1b6ca8", "#5aa9d6", "#c8553d", "#4b8f5c", "#8c8c8c", "#7a5195", "#b8860b")))


def rows_of(folder: Path, absent: bool = False) -> list[dict[str, Any]]:
    """Returns one row per case, that of the backend that ran first (the default one), ops in the order of FILES;
    `absent`: also cases in which none of ours ran."""
    rows = []
    for op in FILES:
        path = folder / f"{op}.json"
        seen = set()
        for row in json.loads(path.read_text()) if path.exists() else []:
            case = (row["case"], row["dtype"])
            if case not in seen and (absent or row["backend"] is not None):
                rows.append(row)
            seen.add(case)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    height = 1.2 + 0.24 * len(rows)
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(11, height), width_ratios=(3, 2), layout="constrained"
    )
    places = range(len(rows))
    colors = [COLORS[row["op"]] for row in rows]
    ratios = [row["ratio"] or 1.0 for row in rows]
    left.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.7)
    left.set_xscale("log")
    low, high = min(0.5, *ratios), max(2.0, *ratios)
    left.set_xlim(low / 1.15, high * 1.9)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 1.15 <= t <= high * 1.9]
    left.set_xticks(ticks)
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.axvline(1, color="black", linewidth=1)
    for place, row, ratio in zip(places, rows, ratios):
        text = f"{ratio:.2f}  {row['best_peer']}" if row["ratio"] else "no peer"
        left.annotate(text, (max(ratio, 1), place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    left.set_xlabel("times faster than the fastest peer (named)")
    left.set_yticks(places, [f"{row['op']}  {row['case']}  {row['dtype']}" for row in rows], fontsize=7)
    left.set_ylim(len(rows) - 0.4, -0.6)
    right.barh(places, [row["floor_ratio"] for row in rows], color=colors, height=0.7)
    right.axvline(1, color="black", linewidth=1)
    right.set_xlim(0, max(1.05, *(row["floor_ratio"] for row in rows)))
    right.set_xlabel("share of the floor (1: hardware limit)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['device']}; torch {rows[0]['versions']['torch']}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    folders = [Path(name) for name in argv] or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    for folder in folders:
        if rows := rows_of(folder):
            draw(rows, folder / "cases.png")
            print(f"{len(rows)} cases in {folder / 'cases.png'}")
        for name in plot_lines.draw(folder):
            print(f"written {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
