"""Measures and draws how many generated answers are right, for accuracy, caches, fewer_passes and packed_layers."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from illada.decoding.config import GenerationConfig
from illada.decoding.generate import generate
from illada.decoding.generation import Generation
from illada.model import Model

from .. import measure
from ..run import RESULTS
from .toy_tasks import TASKS, Task, train

GOAL = 0.95
Rules = dict[str, tuple[Callable[[Any], Any], tuple[float, ...]]]  # name -> (parameter -> rule, parameters)


def solve(model: Model, task: Task, problems: int, **settings: Any) -> tuple[dict[str, float], Generation]:
    """Returns the share of answers that are right and tokens per pass, and what was generated. The problems are the
    same in every call. One block holds the whole answer, unless settings say otherwise."""
    prompts, answers = task.draw(problems, torch.Generator().manual_seed(2**40))
    length = answers.shape[1]
    config = GenerationConfig(**{"max_new_tokens": length, "block_length": length, "stop_ids": (), **settings})
    result = generate(model, prompts, config)
    right = task.right(prompts, torch.tensor(result.tokens)).float().mean().item()
    return {"accuracy": right, "tokens_per_pass": result.tokens_per_pass}, result


def measure_rule(model: Model, task: Task, rule: Any, problems: int) -> dict[str, float]:
    return solve(model, task, problems, rule=rule)[0]


def measure_rules(rules: Rules, measured: Callable[[Any], dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Yields a row for each rule and parameter."""
    for name, (rule, parameters) in rules.items():
        for parameter in parameters:
            yield {"rule": name, "parameter": parameter, **measured(rule(parameter))}


def draw(path: Path, panels: dict[str, dict[str, list[dict[str, Any]]]], colors: tuple[str, ...]) -> None:
    """Draws accuracy against tokens per pass; a panel for each title, a line for each name of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for (name, rows), color in zip(lines.items(), colors):
            points = sorted((row["tokens_per_pass"], 100 * row["accuracy"]) for row in rows)
            axis.plot(*zip(*points), "o-", markersize=4, color=color, label=name)
        axis.axhline(100 * GOAL, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens per pass")
        axis.set_ylim(-3, 103)
    axes[0][0].set_ylabel("answers exactly right, %")
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# ---- the command lines -----------------------------------------------------------------------------------------------


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.quality.{name}", description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write to (default: under benchmarks/results/)")
    return parser


def add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, help="only this one")
    parser.add_argument("--steps", type=int, help="training steps (the task's own number)")
    parser.add_argument("--problems", type=int, default=1000)


def trained(options: argparse.Namespace) -> Iterator[tuple[Task, Model, dict[str, float]]]:
    """Yields each task of the command line, the model that learned it, and what the training took."""
    for task in [TASKS[options.task]] if options.task else TASKS.values():
        start, steps = time.perf_counter(), options.steps or task.steps
        model = train(task, steps=steps, report=lambda s, loss: s % 100 or print(f"step {s}, loss {loss:.3f}"))
        seconds = time.perf_counter() - start
        print(f"{task.name}: {steps} steps, {seconds:.0f} s")
        yield task, model, {"training_steps": steps, "training_seconds": round(seconds, 1)}


def about() -> dict[str, Any]:
    return {"device": measure.device_name("cpu"), "versions": measure.versions(), "commit": measure.commit()}


def folder_of(options: argparse.Namespace) -> Path:
    """Returns the folder to write to, made if there is none."""
    folder: Path = options.out or RESULTS / measure.slug(measure.device_name("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes the rows, and those of other tasks that the file held, in the order of TASKS; returns all."""
    kept = TASKS.keys() - {row["task"] for row in rows}
    others = [row for row in json.loads(file.read_text()) if row["task"] in kept] if file.exists() else []
    rows = sorted([*others, *rows], key=lambda row: list(TASKS).index(row["task"]))
    file.write_text(json.dumps(rows, indent=1) + "\n")
    return rows
