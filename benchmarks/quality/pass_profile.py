"""Where the time of one decoding pass goes: linears, attention, head, unmasking, and all that is between them.

    python -m benchmarks.quality.pass_profile                      8 layers of 1024, 32 rows against 512 cached keys
    python -m benchmarks.quality.pass_profile --dim 2048 --rows 128 --dtype bfloat16

A pass is what the loop does for each step of a block: hidden rows of the block against the cache, then the head fused
with unmasking. Linears and attention are timed inside the pass; the head is the same product alone, and unmasking what
is left of the op. "between" is the rest of the pass: norms, RoPE, the cache's writes, SwiGLU's product, and Python.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from illada.config import ModelConfig
from illada.decoding.cache import Cache
from illada.model import Model

import illada_kernels
from illada_kernels import KeyRanges, TopK

from ..measure import keep_freed

PARTS = ("linears", "attention", "head", "unmasking", "between")


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - begin

    return call


def one_pass(model: Model, tokens: torch.Tensor, cache: Cache, first: int) -> None:
    """Computes hidden rows of the last columns, one token committed; the tokens are masks again afterwards."""
    rows = tokens.shape[1] - first
    positions = torch.arange(first, tokens.shape[1])[None]
    ranges = KeyRanges.full(cache.capacity)
    hidden = model(tokens[:, first:], ranges, positions, cache.at(first))
    illada_kernels.unmask(hidden, model.head_weight, tokens, positions, TopK(1), mask_id=model.config.mask_id)
    tokens[:, first:].fill_(model.config.mask_id)
    assert rows == hidden.shape[1]


def profile(model: Model, rows: int, keys: int, passes: int) -> dict[str, float]:
    """Returns milliseconds of each part, medians over passes."""
    c = model.config
    tokens = torch.full((1, keys), c.mask_id)
    cache = Cache(c, 1, keys, dtype=model.dtype)
    x = torch.randn(rows, c.dim).to(model.dtype)
    found: dict[str, list[float]] = {name: [] for name in PARTS}
    with torch.no_grad():
        for step in range(passes + 2):
            spent = dict.fromkeys(("linears", "attention", "unmask"), 0.0)
            with ExitStack() as patches:
                for place, function, name in (
                    (torch.nn.functional, "linear", "linears"),
                    (illada_kernels, "attention", "attention"),
                    (illada_kernels, "unmask", "unmask"),
                ):
                    wrapped = timed(getattr(place, function), spent, name)
                    patches.enter_context(mock.patch.object(place, function, wrapped))
                begin = time.perf_counter()
                one_pass(model, tokens, cache, keys - rows)
                whole = time.perf_counter() - begin
            begin = time.perf_counter()
            torch.mm(x, model.head_weight.T)
            head = min(time.perf_counter() - begin, spent["unmask"])
            if step >= 2:  # the first ones load and remember
                between = whole - sum(spent.values())
                parts = (spent["linears"], spent["attention"], head, spent["unmask"] - head, between)
                for name, seconds in zip(PARTS, parts):
                    found[name].append(seconds * 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def table(parts: dict[str, float]) -> str:
    whole = sum(parts.values())
    lines = ["| part | ms | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {ms:.3g} | {100 * ms / whole:.0f}% |" for name, ms in parts.items()]
    return "\n".join([*lines, f"| whole pass | {whole:.3g} | |"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.pass_profile", description=str(__doc__).splitlines()[0]
    )
    for name, default in {"layers": 8, "dim": 1024, "rows": 32, "keys": 512, "vocab": 32768, "passes": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    o = parser.parse_args(argv)
    keep_freed()
    sizes = {"dim": o.dim, "n_layers": o.layers, "n_heads": o.dim // 64, "n_kv_heads": o.dim // 128, "head_dim": 64}
    sizes |= {"ffn_dim": o.dim * 11 // 4, "vocab_size": o.vocab, "mask_id": 5, "eos_id": 2, "pad_id": 1}
    torch.manual_seed(0)
    model = Model(ModelConfig.preset("iLLaDA-8B", **sizes), dtype=getattr(torch, o.dtype)).eval()
    title = f"{o.layers} layers of {o.dim}, vocab {o.vocab}, {o.rows} rows, {o.keys} keys, {o.dtype}"
    print(f"{title}, {torch.get_num_threads()} threads\n\n{table(profile(model, o.rows, o.keys, o.passes))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
