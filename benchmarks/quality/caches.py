"""Measures what each cache costs in right answers and saves in columns, by rule, on tasks that a tiny model learns.

    python -m benchmarks.quality.caches            trains (about a minute a task on two cores), measures, draws
    python -m benchmarks.quality.caches --task sort --problems 100

Writes caches.json and caches.png under benchmarks/results/<device>/. Rows: {task, cache, rule, parameter, accuracy,
tokens_per_pass, columns_per_token, ...}; accuracy is the share of problems whose whole answer is right, columns are
those that the model computes for the batch of all problems, prompts included. All masks are shown from the start, and
blocks hold two tokens.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from illada.model import Model

from illada_kernels import Factor, Threshold

from ..report import plot_lines
from .answers import Rules, about, add_tasks, folder_of, measure_rules, parser, solve, trained, write
from .toy_tasks import Task

BLOCK = 2
CACHES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "vicinity 2": {"cache": "vicinity", "vicinity": 2},
    "vicinity 4": {"cache": "vicinity", "vicinity": 4},
    "interval, once": {"cache": "interval"},
    "interval, every 4": {"cache": "interval", "refresh_every": 4},
}
RULES: Rules = {  # settings of each
    "steps": (lambda steps: {"steps_per_block": steps}, (2, 1)),
    "Threshold(tau)": (lambda tau: {"rule": Threshold(tau)}, (0.99, 0.95, 0.9, 0.7, 0.5)),
    "Factor(f)": (lambda f: {"rule": Factor(f)}, (0.05, 0.1, 0.4, 1.0)),
}


def measure_one(
    model: Model, task: Task, cache: dict[str, Any], rule: dict[str, Any], problems: int
) -> dict[str, float]:
    columns = 0

    def count(module: Any, args: Any) -> None:
        nonlocal columns
        columns += args[0].numel()

    handle = model.register_forward_pre_hook(count)
    try:
        found, result = solve(model, task, problems, block_length=BLOCK, variable_length=False, **cache, **rule)
    finally:
        handle.remove()
    return {**found, "columns_per_token": columns / sum(result.filled)}


def measure_task(model: Model, task: Task, problems: int) -> list[dict[str, Any]]:
    rows = []
    for cache, how in CACHES.items():
        for row in measure_rules(RULES, partial(measure_one, model, task, how, problems=problems)):
            rows.append({"task": task.name, "cache": cache, **row})
            shown = f"{row['accuracy']:6.1%} {row['tokens_per_pass']:6.2f} {row['columns_per_token']:7.1f}"
            print(f"{task.name:<8} {cache:<16} {row['rule']:<15} {row['parameter']:<5} {shown}")
    return rows


def table(rows: list[dict[str, Any]], task: str) -> str:
    """Returns Markdown: a line for each cache, its accuracy and tokens a pass under some rules, and its columns."""
    chosen = [("steps", 2), ("steps", 1), ("Threshold(tau)", 0.9), ("Factor(f)", 0.4)]
    found = {(r["cache"], r["rule"], r["parameter"]): r for r in rows if r["task"] == task}
    names = {"steps": "block in passes: {}", "Threshold(tau)": "Threshold({})", "Factor(f)": "Factor({})"}
    titles = [names[rule].format(parameter) for rule, parameter in chosen]
    lines = ["| cache | " + " | ".join(titles) + " | columns a token |", "|---|" + "---:|" * (len(chosen) + 1)]
    for cache in CACHES:
        cells = [found[(cache, *how)] for how in chosen]
        shown = [f"{100 * c['accuracy']:.1f}%, {c['tokens_per_pass']:.2f}" for c in cells]
        columns = ", ".join(f"{c['columns_per_token']:.0f}" for c in cells)
        lines.append(f"| {cache} | {' | '.join(shown)} | {columns} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    command = parser("caches", str(__doc__))
    add_tasks(command)
    options = command.parse_args(argv)
    rows, facts = [], {"problems": options.problems, **about()}
    for task, model, _ in trained(options):
        measured = measure_task(model, task, options.problems)
        rows += [{**row, **facts} for row in measured]
        print(table(measured, task.name))
    folder = folder_of(options)
    write(folder / "caches.json", rows)
    plot_lines.draw(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
