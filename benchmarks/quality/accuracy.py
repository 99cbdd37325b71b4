"""Is generated text right? Exact answers against tokens per pass, for every rule, on tasks a tiny model learns here.

    python -m benchmarks.quality.accuracy            trains (about a minute a task on two cores), measures, draws
    python -m benchmarks.quality.accuracy --task sort --steps 400

Writes accuracy.json, where a task's rows replace its old ones, and accuracy.png under benchmarks/results/<device>/.
Fails if one token per pass is right less often than 95%. Rows: {task, rule, parameter, accuracy, tokens_per_pass,
problems, ...}; accuracy is the share of problems whose whole answer is right.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from illada.decoding.config import GenerationConfig
from illada.decoding.generate import generate
from illada.model import Model

from illada_kernels import EntropyBound, Factor, Threshold, TopK

from .. import measure
from ..run import RESULTS
from .toy_tasks import TASKS, Task, train

GOAL = 0.95
RULES: dict[str, tuple[Any, tuple[float, ...]]] = {
    "TopK(k)": (TopK, (1, 2, 3, 4, 8)),
    "Threshold(tau)": (Threshold, (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)),
    "Factor(f)": (Factor, (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5)),
    "EntropyBound(gamma)": (EntropyBound, (0.01, 0.05, 0.1, 0.3, 0.7, 1.5, 3.0)),
}


def measure_rule(model: Model, task: Task, rule: Any, problems: int) -> dict[str, float]:
    """One block holds the whole answer. The problems are the same for every rule."""
    prompts, answers = task.draw(problems, torch.Generator().manual_seed(2**40))
    length = answers.shape[1]
    config = GenerationConfig(max_new_tokens=length, block_length=length, rule=rule, stop_ids=())
    result = generate(model, prompts, config)
    right = task.right(prompts, torch.tensor(result.tokens))
    return {"accuracy": right.float().mean().item(), "tokens_per_pass": result.tokens_per_pass}


def measure_task(model: Model, task: Task, problems: int) -> list[dict[str, Any]]:
    rows = []
    for name, (rule, parameters) in RULES.items():
        for parameter in parameters:
            measured = measure_rule(model, task, rule(parameter), problems)
            row = {"task": task.name, "rule": name, "parameter": parameter, "problems": problems, **measured}
            print(f"{task.name:<8} {name:<20} {parameter:<5} {row['accuracy']:6.1%} {row['tokens_per_pass']:6.2f}")
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 3.8), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for name, color in zip(RULES, ("#1b6ca8", "#c8553d", "#4b8f5c", "#7a5195")):
            points = sorted(
                (row["tokens_per_pass"], 100 * row["accuracy"])
                for row in rows
                if row["task"] == task and row["rule"] == name
            )
            axis.plot(*zip(*points), "o-", markersize=4, color=color, label=name)
        axis.axhline(100 * GOAL, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}: {TASKS[task].about}", fontsize=9)
        axis.set_xlabel("tokens per pass")
        axis.set_ylim(-3, 103)
    axes[0][0].set_ylabel("answers exactly right, %")
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    description = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.accuracy", description=description)
    parser.add_argument("--task", choices=TASKS, help="only this one")
    parser.add_argument("--steps", type=int, help="training steps (the task's own number)")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="folder to write to (default: under benchmarks/results/)")
    options = parser.parse_args(argv)
    device = measure.device_name("cpu")
    about = {"device": device, "versions": measure.versions(), "commit": measure.commit()}
    rows = []
    for task in [TASKS[options.task]] if options.task else TASKS.values():
        start = time.perf_counter()
        steps = options.steps or task.steps
        model = train(task, steps=steps, report=lambda s, loss: s % 100 or print(f"step {s}, loss {loss:.3f}"))
        seconds = time.perf_counter() - start
        print(f"{task.name}: {steps} steps, {seconds:.0f} s")
        training = {"training_steps": steps, "training_seconds": round(seconds, 1)}
        rows += [{**row, **training, **about} for row in measure_task(model, task, options.problems)]
    folder = options.out or RESULTS / measure.slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "accuracy.json"
    kept = TASKS.keys() - {row["task"] for row in rows}
    others = [row for row in json.loads(file.read_text()) if row["task"] in kept] if file.exists() else []
    rows = sorted([*others, *rows], key=lambda row: list(TASKS).index(row["task"]))
    file.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, folder / "accuracy.png")
    one_by_one = {row["task"]: row["accuracy"] for row in rows if (row["rule"], row["parameter"]) == ("TopK(k)", 1)}
    failed = {task: accuracy for task, accuracy in one_by_one.items() if accuracy < GOAL}
    for task, accuracy in failed.items():
        print(f"{task}: one token per pass is right in {accuracy:.1%}, expected {GOAL:.0%}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
