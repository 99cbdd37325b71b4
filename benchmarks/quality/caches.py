"""What each cache costs in right answers and saves in columns, for each rule, on tasks a tiny model learns here.

    python -m benchmarks.quality.caches            trains (about a minute a task on two cores), measures, draws
    python -m benchmarks.quality.caches --task sort --problems 100

Writes caches.json and caches.png under benchmarks/results/<device>/. Rows: {task, cache, rule, parameter, accuracy,
tokens_per_pass, columns_per_token, ...}; accuracy is the share of problems whose whole answer is right, columns are
those that the model computes for the batch of all problems, prompts included. All masks are shown from the start, and
blocks hold two tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from illada.decoding.config import GenerationConfig
from illada.decoding.generate import generate
from illada.model import Model

from illada_kernels import Factor, Threshold

from .. import measure
from ..report import plot_lines
from ..run import RESULTS
from .toy_tasks import TASKS, Task, train

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
RULES: dict[str, tuple[Any, tuple[float, ...]]] = {
    "steps": (lambda steps: {"steps_per_block": steps}, (2, 1)),
    "Threshold(tau)": (lambda tau: {"rule": Threshold(tau)}, (0.99, 0.95, 0.9, 0.7, 0.5)),
    "Factor(f)": (lambda f: {"rule": Factor(f)}, (0.05, 0.1, 0.4, 1.0)),
}


def measure_one(model: Model, task: Task, settings: dict[str, Any], problems: int) -> dict[str, float]:
    """The problems are the same for every rule and cache."""
    prompts, answers = task.draw(problems, torch.Generator().manual_seed(2**40))
    columns = 0

    def count(module: Any, args: Any) -> None:
        nonlocal columns
        columns += args[0].numel()

    config = GenerationConfig(
        max_new_tokens=answers.shape[1], block_length=BLOCK, variable_length=False, stop_ids=(), **settings
    )
    handle = model.register_forward_pre_hook(count)
    try:
        result = generate(model, prompts, config)
    finally:
        handle.remove()
    right = task.right(prompts, torch.tensor(result.tokens)).float().mean().item()
    return {
        "accuracy": right,
        "tokens_per_pass": result.tokens_per_pass,
        "columns_per_token": columns / sum(result.filled),
    }


def measure_task(model: Model, task: Task, problems: int) -> list[dict[str, Any]]:
    rows = []
    for cache, how in CACHES.items():
        for name, (rule, parameters) in RULES.items():
            for parameter in parameters:
                measured = measure_one(model, task, {**how, **rule(parameter)}, problems)
                rows.append({"task": task.name, "cache": cache, "rule": name, "parameter": parameter, **measured})
                shown = f"{measured['accuracy']:6.1%} {measured['tokens_per_pass']:6.2f}"
                print(
                    f"{task.name:<8} {cache:<16} {name:<15} {parameter:<5} {shown} {measured['columns_per_token']:7.1f}"
                )
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
    description = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.caches", description=description)
    parser.add_argument("--task", choices=TASKS, help="only this one")
    parser.add_argument("--steps", type=int, help="training steps (the task's own number)")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="folder to write to (default: under benchmarks/results/)")
    options = parser.parse_args(argv)
    device = measure.device_name("cpu")
    about = {"problems": options.problems, "device": device, "versions": measure.versions(), "commit": measure.commit()}
    rows = []
    for task in [TASKS[options.task]] if options.task else TASKS.values():
        model = train(task, steps=options.steps, report=lambda s, loss: s % 100 or print(f"step {s}, loss {loss:.3f}"))
        rows += [{**row, **about} for row in measure_task(model, task, options.problems)]
        print(table(rows, task.name))
    folder = options.out or RESULTS / measure.slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "caches.json"
    measured = {row["task"] for row in rows}
    others = [row for row in json.loads(file.read_text()) if row["task"] not in measured] if file.exists() else []
    file.write_text(json.dumps([*others, *rows], indent=1) + "\n")
    plot_lines.draw(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
