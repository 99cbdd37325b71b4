"""Tokens per pass at 95% right answers, before and after training on a sampler's own trajectories.

    python -m benchmarks.quality.fewer_passes            trains a tiny model, tunes copies of it, measures, draws
    python -m benchmarks.quality.fewer_passes --steps 200 --tune 50 --problems 200

Each copy is tuned for as many steps from the same weights. "data again" is the control, "constrained order" the
model's own trajectories, the best of several by its bound. "distilled" sees those of its one-token-a-pass sampler,
"taken over" states that its fast sampler reaches, from which the model before takes over.
Writes fewer_passes.json and fewer_passes.png under benchmarks/results/<device>/. Rows: {task, model, rule, parameter,
accuracy, tokens_per_pass, problems, ...}, and one {task, model, "at_95": tokens per pass} a model.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from illada.decoding.config import GenerationConfig
from illada.model import Model
from illada.training.data import Document
from illada.training.objectives import Example, sft, trajectory
from illada.training.optim import optimizers
from illada.training.record import record
from illada.training.trajectories import Trajectories, Trajectory

from illada_kernels import EntropyBound, Threshold, TopK

from .answers import GOAL, Rules, about, draw, folder_of, measure_rule, measure_rules, parser
from .toy_tasks import END, MASK, TASKS, Task, config, train

RULES: Rules = {
    "TopK(k)": (TopK, (1, 2, 4, 8)),
    "Threshold(tau)": (Threshold, (0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3)),
    "EntropyBound(gamma)": (EntropyBound, (0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 3.0)),
}
COLORS = {
    "before": "#888888",
    "data again": "#c8553d",
    "constrained order": "#4b8f5c",
    "distilled": "#1b6ca8",
    "taken over": "#7a5195",
}


def tuned(model: Model, batch: Callable[[int, torch.Generator], Example], steps: int, lr: float) -> Model:
    """Returns a copy of the model after `steps` more steps, the learning rate falling to 0."""
    model = copy.deepcopy(model).train()
    steppers = optimizers(model, "muon", lr=lr, adamw_lr=lr / 3)
    groups = [(group, group["lr"]) for stepper in steppers for group in stepper.param_groups]
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group, rate in groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        batch(step, generator).loss(model).backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
    return model.eval()


def on_data(task: Task, size: int) -> Callable[[int, torch.Generator], Example]:
    def batch(step: int, generator: torch.Generator) -> Example:
        prompts, answers = task.draw(size, generator)
        return sft(torch.cat([prompts, answers], 1), torch.full((size,), prompts.shape[1]), MASK, generator)

    return batch


def on_trajectories(rows: list[Trajectory], size: int) -> Callable[[int, torch.Generator], Example]:
    length = max(len(t.prompt) + len(t.response) for t in rows)
    lines = "\n".join(t.line() for t in rows)
    source = Trajectories([Document("recorded", lines.encode())], length, size, seed=0, eos_id=END)

    def batch(step: int, generator: torch.Generator) -> Example:
        tokens, states = source.batch(step)
        return trajectory(torch.from_numpy(tokens), mask_id=MASK, generator=generator, **states.tensors())

    return batch


def recorded(model: Model, task: Task, count: int, rule: Any, seed: int, **how: Any) -> list[Trajectory]:
    """Returns trajectories of `count` problems, each kept one."""
    decoding = {name: how.pop(name) for name in ("temperature", "rank_temperature") if name in how}
    prompts, answers = task.draw(count, torch.Generator().manual_seed(seed))
    length = answers.shape[1]
    setting = GenerationConfig(
        max_new_tokens=length, block_length=length, rule=rule, stop_ids=(), seed=seed, **decoding
    )
    return [t for kept in record(model, prompts.tolist(), setting, batch_size=512, **how) for t in kept]


def models(task: Task, base: Model, o: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """Yields the model before, then each copy."""

    def distilled(model: Model, rule: Any, seed: int, steps: int = o.tune, **how: Any) -> Model:
        rows = recorded(model, task, o.prompts, rule, seed, **how)
        return tuned(model, on_trajectories(rows, o.batch), steps, o.lr)

    yield "before", base
    yield "data again", tuned(base, on_data(task, o.batch), o.tune, o.lr)
    yield (
        "constrained order",
        distilled(base, TopK(1), 2**41, draws=o.draws, keep=1, temperature=1.0, rank_temperature=0.1),
    )
    yield "distilled", distilled(base, TopK(1), 2**41)
    student = base
    for turn in range(o.turns):
        student = distilled(student, Threshold(0.5), 2**41 + turn * 2**20, o.tune // o.turns, teacher=base)
    yield "taken over", student


def before(task: Task, steps: int, file: Path | None) -> Model:
    """Returns the model that is tuned, from the file where there is one."""
    if file is None or not file.exists():
        model = train(task, steps=steps)
        if file is not None:
            torch.save(model.state_dict(), file)
        return model
    model = Model(config(task))
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def at_goal(rows: list[dict[str, Any]]) -> float:
    """Returns the most tokens per pass that a measured setting reaches with 95% of the answers right, 0 for none."""
    return max((row["tokens_per_pass"] for row in rows if row["accuracy"] >= GOAL), default=0.0)


def main(argv: list[str]) -> int:
    command = parser("fewer_passes", str(__doc__))
    command.add_argument("--steps", type=int, default=600, help="of the training before (default 600)")
    command.add_argument(
        "--base", type=Path, help="a file of the weights before; where it is missing they are put there"
    )
    command.add_argument("--tune", type=int, default=120, help="steps of each copy (default 120)")
    command.add_argument("--lr", type=float, default=0.01, help="of these steps (default 0.01)")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--prompts", type=int, default=4096, help="problems whose trajectories are recorded")
    command.add_argument("--draws", type=int, default=2, help="trajectories of which the best is kept (default 2)")
    command.add_argument("--turns", type=int, default=1, help="rounds of recording in which the teacher takes over")
    command.add_argument("--problems", type=int, default=400)
    options = command.parse_args(argv)
    task, steps = TASKS["either"], options.steps
    rows: list[dict[str, Any]] = []
    facts = {"training_steps": steps, "tuning_steps": options.tune, "problems": options.problems, **about()}
    folder = folder_of(options)
    begun = time.perf_counter()
    for name, model in models(task, before(task, steps, options.base), options):
        seconds = time.perf_counter() - begun
        measured = [
            {"task": task.name, "model": name, **row}
            for row in measure_rules(RULES, partial(measure_rule, model, task, problems=options.problems))
        ]
        goal = {"task": task.name, "model": name, "at_95": at_goal(measured), "seconds": round(seconds, 1)}
        print(f"{name:<18} {goal['at_95']:.2f} tokens a pass with {GOAL:.0%} right; {seconds:.0f} s", flush=True)
        rows += [{**row, **facts} for row in (*measured, goal)]
        (folder / "fewer_passes.json").write_text(json.dumps(rows, indent=1) + "\n")
        begun = time.perf_counter()
    panels = {
        f"{rule}, {task.about}": {
            name: [row for row in rows if (row["model"], row.get("rule")) == (name, rule)] for name in COLORS
        }
        for rule in ("Threshold(tau)", "EntropyBound(gamma)")
    }
    draw(folder / "fewer_passes.png", panels, tuple(COLORS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
