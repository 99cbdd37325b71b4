"""Figures by `python -m benchmarks.report.plot`, of a GPU's rows: attention.png (TFLOP/s against length),
attention_masks.png (speed against the density of the mask), masked_loss.png (time and memory against the share of
masked tokens) and unmask.png (time against rows); of any device: caches.png (right answers against what they cost).
Ours are drawn thick, floors dashed; a figure without rows is not drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[float, float]]]  # contender: (x, y)


def select(folder: Path, op: str, **facts: Any) -> list[dict[str, Any]]:
    """Returns the rows of an op, of every backend, whose facts are these."""
    path = folder / f"{op}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if all(row.get("facts", {}).get(name) == value for name, value in facts.items())]


def points(
    rows: list[dict[str, Any]], x: Callable[[dict[str, Any]], float], y: Callable[[dict[str, Any], float], float | None]
) -> Points:
    """Returns x(row) and y(row, ms) of ours, "<backend> (ours)", and of each peer, sorted by x."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        times = dict(row["peers"])
        if row["backend"] is not None:
            times[f"{row['backend']} (ours)"] = row["ms"]["p50"]
        for name, ms in times.items():
            if (value := y(row, ms)) is not None:
                found.setdefault(name, {})[x(row)] = value
    return {name: sorted(values.items()) for name, values in found.items()}


def tflops(row: dict[str, Any], ms: float) -> float:
    return row["facts"]["flops"] / ms * 1e-9


def against_dense(row: dict[str, Any], ms: float) -> float | None:
    """Draws how many times faster than cuDNN on the same rows without a mask."""
    dense = row.get("beside", {}).get("cudnn, no mask") or row["peers"].get("cudnn")
    return dense / ms if dense else None


def memory(rows: list[dict[str, Any]]) -> Points:
    """Draws GiB at the peak against the share of masked tokens."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        peaks = dict(row.get("peer_memory", {}))
        if row["backend"] is not None:
            peaks[f"{row['backend']} (ours)"] = row["peak_memory"]
        for name, value in peaks.items():
            found.setdefault(name, {})[row["facts"]["ratio"]] = value / 2**30
    return {name: sorted(values.items()) for name, values in found.items()}


@dataclass
class Panel:
    title: str
    across: str
    up: str
    points: Points
    guide: Points = field(default_factory=dict)  # dashed


def lines(path: Path, title: str, panels: list[Panel], scale: str) -> None:
    """Panels side by side; `scale` names the axes that are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.6), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels):
        for contender, values in sorted(panel.points.items(), key=lambda item: "(ours)" not in item[0]):
            ours = "(ours)" in contender
            axis.plot(*zip(*values), marker="o", markersize=3, linewidth=2.5 if ours else 1, label=contender)
        for contender, values in panel.guide.items():
            axis.plot(*zip(*values), color="black", linestyle="--", linewidth=1, label=contender)
        if "x" in scale:
            axis.set_xscale("log", base=2)
        if "y" in scale:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set(title=panel.title, xlabel=panel.across, ylabel=panel.up)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=6)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def fact(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: row["facts"][name]


def milliseconds(row: dict[str, Any], ms: float) -> float:
    return ms


def floor(rows: list[dict[str, Any]], x: Callable[[dict[str, Any]], float]) -> Points:
    return {"floor": sorted({x(row): row["floor_ms"] for row in rows}.items())} if rows else {}


# ---- figures --------------------------------------------------------------------------------------------------------
def attention(folder: Path) -> list[Panel]:
    ways = {"forward": "attention_fwd", "backward": "attention_bwd", "forward+backward": "attention_bwd"}
    full = {"kind": "full", "kv_heads": 8, "head_dim": 128}
    return [
        Panel(way, "length", "TFLOP/s", points(select(folder, op, direction=way, **full), fact("length"), tflops))
        for way, op in ways.items()
    ]


def attention_masks(folder: Path) -> list[Panel]:
    kinds = ("full", "block_diffusion", "packed")
    rows = [row for kind in kinds for row in select(folder, "attention_fwd", kind=kind, kv_heads=8)]
    found = points(rows, fact("density"), against_dense)
    ideal = {"as many times as there are fewer pairs": [(d, 1 / d) for d in (0.0625, 0.25, 1.0)]}
    return [Panel("forward, 8 key heads", "share of pairs attended", "times dense cuDNN", found, ideal)]


def masked_loss(folder: Path) -> list[Panel]:
    rows = select(folder, "masked_loss", vocab=126464, products=3, minimum=False, capacity=False)
    ratio, across = fact("ratio"), "share of tokens masked"
    times = Panel("time, V = 126464", across, "ms", points(rows, ratio, milliseconds), floor(rows, ratio))
    return [times, Panel("peak memory, V = 126464", across, "GiB", memory(rows))]


def unmask(folder: Path) -> list[Panel]:
    panels = []
    for temperature in (0.0, 1.0):
        rows = select(folder, "unmask", vocab=126464, temperature=temperature)
        rows = [row for row in rows if row["facts"]["kind"] != "loop"]
        found = points(rows, fact("rows"), milliseconds)
        title = f"temperature {temperature:g}, V = 126464"
        panels.append(Panel(title, "rows", "ms", found, floor(rows, fact("rows"))))
    return panels


def caches(folder: Path) -> list[Panel]:
    """Draws for each task accuracy against tokens a pass, then against the columns computed, a line for each cache."""
    path, panels = folder / "caches.json", []
    rows = json.loads(path.read_text()) if path.exists() else []
    for task in dict.fromkeys(row["task"] for row in rows):
        for across, what in (("tokens_per_pass", "tokens a pass"), ("columns_per_token", "columns computed a token")):
            found: Points = {}
            for row in rows:
                if row["task"] == task and row["rule"] == "Threshold(tau)":
                    found.setdefault(row["cache"], []).append((row[across], 100 * row["accuracy"]))
            found = {cache: sorted(line) for cache, line in found.items()}
            panels.append(Panel(f"{task}, Threshold of 0.99 to 0.5", what, "answers right, %", found))
    return panels


FIGURES = {
    "attention": (attention, "x"),
    "attention_masks": (attention_masks, "xy"),
    "masked_loss": (masked_loss, ""),
    "unmask": (unmask, "xy"),
    "caches": (caches, ""),
}


def draw(folder: Path) -> list[str]:
    """Draws; returns the names of the figures that the folder has rows for."""
    drawn = []
    for name, (panels_of, scale) in FIGURES.items():
        if panels := [panel for panel in panels_of(folder) if panel.points]:
            lines(folder / f"{name}.png", folder.name, panels, scale)
            drawn.append(f"{name}.png")
    return drawn
