"""Measures packed linear layers: `illada.pack` beside `torch.nn.Linear`, and answers of a packed model.

    python -m benchmarks.quality.packed_layers             times of one layer, a table in milliseconds
    python -m benchmarks.quality.packed_layers --answers   trains a tiny model to sort digits, packs it, checks answers

A time is the median of interleaved runs. The weights take turns, so that none stays in a cache. The floor is the time
that the layer's flops or bytes take at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from illada.packing import Int4Linear, Int8Linear, PackedLinear, pack
from torch import nn

from illada_kernels import TopK

from ..floor import ceilings, floor_ms
from ..measure import Job, interleaved, keep_freed, rotating
from .answers import measure_rule
from .toy_tasks import sort, train

KINDS = {"packed": PackedLinear, "int8": Int8Linear, "int4": Int4Linear}
DTYPES = {"float32": ("packed",), "bfloat16": ("packed", "int8", "int4")}


def times(rows: int, size: tuple[int, int], dtype: str, copies: int, rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of each kind of layer."""
    number = getattr(torch, dtype)
    plain = [nn.Linear(*size, bias=False, dtype=number) for _ in range(copies)]
    x = torch.randn(rows, size[0]).to(number)
    layers: dict[str, list[nn.Module]] = {"plain": list(plain)}
    layers |= {name: [KINDS[name](one) for one in plain] for name in DTYPES[dtype]}

    def job(name: str) -> Job:
        return rotating(lambda layer: layer(x), [(one,) for one in layers[name]])

    with torch.no_grad():
        found = interleaved({name: job(name) for name in layers}, rounds, 10.0)
    return {name: ms["p50"] for name, ms in found.items()}


def table(size: tuple[int, int], rows: tuple[int, ...], copies: int, rounds: int) -> str:
    columns = [(dtype, name) for dtype, names in DTYPES.items() for name in ("floor", "plain", *names)]
    lines = [
        "| rows | " + " | ".join(f"{dtype} {name}" for dtype, name in columns) + " |",
        "|---" * len(columns) + "|---|",
    ]
    rates = {dtype: ceilings("cpu", dtype) for dtype in DTYPES}
    for count in rows:
        ms: dict[tuple[str, str], float] = {}
        for dtype in DTYPES:
            flops, moved = 2.0 * count * size[0] * size[1], size[0] * size[1] * getattr(torch, dtype).itemsize
            ms[dtype, "floor"] = floor_ms(flops, moved, rates[dtype])
            ms |= {(dtype, name): value for name, value in times(count, size, dtype, copies, rounds).items()}
        lines.append(f"| {count} | " + " | ".join(f"{ms[column]:.3g}" for column in columns) + " |")
    return "\n".join(lines)


def answers(steps: int, problems: int) -> str:
    """Trains a model whose widths int4 takes, and packs copies of it."""
    task = sort(5, steps=steps)
    trained = train(task, ffn_dim=256)
    lines = ["| weights | right answers |", "|---|---:|"]
    for weights in ("float32", "bfloat16", "int8", "int4"):
        model = copy.deepcopy(trained)
        if weights != "float32":
            model = pack(model.to(torch.bfloat16), weights="same" if weights == "bfloat16" else weights)
        lines.append(f"| {weights} | {100 * measure_rule(model, task, TopK(1), problems)['accuracy']:.1f}% |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    name, what = "python -m benchmarks.quality.packed_layers", str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog=name, description=what)
    parser.add_argument("--answers", action="store_true", help="train, pack, and check answers")
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 11264), metavar=("IN", "OUT"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 4, 32, 128))
    parser.add_argument("--copies", type=int, default=3, help="weights that take turns (3)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=360, help="of training (360)")
    parser.add_argument("--problems", type=int, default=2000)
    o = parser.parse_args(argv)
    keep_freed()
    if o.answers:
        print(answers(o.steps, o.problems))
    else:
        print(f"ms, a layer of {o.size[0]} to {o.size[1]}, {torch.get_num_threads()} threads\n")
        print(table(tuple(o.size), tuple(o.rows), o.copies, o.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
