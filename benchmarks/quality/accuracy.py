"""Is generated text right? Exact answers against tokens per pass, for every rule, on tasks a tiny model learns here.

    python -m benchmarks.quality.accuracy            trains (about a minute a task on two cores), measures, draws
    python -m benchmarks.quality.accuracy --task sort --steps 400

Writes accuracy.json, where a task's rows replace its old ones, and accuracy.png under benchmarks/results/<device>/.
Fails if one token per pass is right less often than 95%. Rows: {task, rule, parameter, accuracy, tokens_per_pass,
problems, ...}; accuracy is the share of problems whose whole answer is right.
"""

from __future__ import annotations

import sys
from functools import partial

from illada_kernels import EntropyBound, Factor, Threshold, TopK

from .answers import GOAL, Rules, about, add_tasks, draw, folder_of, measure_rule, measure_rules, parser, trained, write
from .toy_tasks import TASKS

RULES: Rules = {
    "TopK(k)": (TopK, (1, 2, 3, 4, 8)),
    "Threshold(tau)": (Threshold, (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)),
    "Factor(f)": (Factor, (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5)),
    "EntropyBound(gamma)": (EntropyBound, (0.01, 0.05, 0.1, 0.3, 0.7, 1.5, 3.0)),
}
COLORS = ("#1b6ca8", "#c8553d", "#4b8f5c", "#7a5195")


def main(argv: list[str]) -> int:
    command = parser("accuracy", str(__doc__))
    add_tasks(command)
    options = command.parse_args(argv)
    rows, facts = [], about()
    for task, model, training in trained(options):
        for measured in measure_rules(RULES, partial(measure_rule, model, task, problems=options.problems)):
            row = {"task": task.name, "problems": options.problems, **measured}
            shown = f"{row['rule']:<20} {row['parameter']:<5} {row['accuracy']:6.1%} {row['tokens_per_pass']:6.2f}"
            print(f"{task.name:<8} {shown}")
            rows.append({**row, **training, **facts})
    folder = folder_of(options)
    rows = write(folder / "accuracy.json", rows)
    panels = {
        f"{task.name}: {task.about}": {
            name: [row for row in rows if (row["task"], row["rule"]) == (task.name, name)] for name in RULES
        }
        for task in TASKS.values()
        if any(row["task"] == task.name for row in rows)
    }
    draw(folder / "accuracy.png", panels, COLORS)
    one_by_one = {row["task"]: row["accuracy"] for row in rows if (row["rule"], row["parameter"]) == ("TopK(k)", 1)}
    failed = {task: accuracy for task, accuracy in one_by_one.items() if accuracy < GOAL}
    for task, accuracy in failed.items():
        print(f"{task}: one token per pass is right in {accuracy:.1%}, expected {GOAL:.0%}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
