"""Counts how often a call changes from one project file to another: the stays of its data on the way through the code.

    python -m benchmarks.quality.stays                 a table per op: stays in all and per file, and changes per pair
    python -m benchmarks.quality.stays --op masked_loss

A stay is the time that execution spends in one file without a break: it begins with a call from another file, and
begins again with the return from one. A call into the extension is two stays, in bindings.cpp and in the kernel, which
returns to the caller. Frames of Python and torch between two project files do not count. The first call of a kind is
left out, because it loads and remembers.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import illada_kernels as ik

ROOT = Path(ik.__file__).parents[1]
FOLDERS = (ROOT / "illada_kernels", ROOT / "python")
EXTENSION = "illada_kernels._C"


def stays(job: Callable[[], Any], folders: tuple[Path, ...] = FOLDERS) -> list[str]:
    """Returns the files of the stays of one call of `job`, in order, relative to the parent of the first folder."""
    prefixes = tuple(f"{folder}/" for folder in folders)
    base, stack, found = folders[0].parent, [], []

    def enter(file: str) -> None:
        if not found or found[-1] != file:
            found.append(file)

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "c_call" and getattr(argument, "__module__", None) == EXTENSION and stack:
            for place in ("csrc/bindings.cpp", f"csrc/cpu/{Path(stack[-1]).parent.name}*.cpp", stack[-1]):
                enter(place)
        if event not in ("call", "return") or not file.startswith(prefixes):
            return
        if event == "call":
            stack.append(str(Path(file).relative_to(base)))
        elif stack:
            stack.pop()
        if stack:
            enter(stack[-1])

    sys.setprofile(trace)
    try:
        job()
    finally:
        sys.setprofile(None)
    return found


# ---- what is traced --------------------------------------------------------------------------------------------------


def masked_loss() -> Callable[[], Any]:
    """Takes `hidden` through masked_loss, forward and backward."""
    hidden, head = torch.randn(16, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    targets, masked = torch.arange(16), torch.arange(16) % 2 == 0
    return lambda: ik.masked_loss(hidden, head, targets, masked).backward()


def attention() -> Callable[[], Any]:
    """Takes q, k and v through attention under a mask, forward and backward."""
    q, k, v = (torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3))
    ranges = ik.KeyRanges.causal(8)
    return lambda: ik.attention(q, k, v, ranges).sum().backward()


def unmask() -> Callable[[], Any]:
    """Takes `logits` through one decoding step."""
    logits, tokens, positions = torch.randn(1, 4, 32), torch.full((1, 4), 31), torch.arange(4)[None]
    return lambda: ik.unmask_from_logits(logits, tokens.clone(), positions, ik.TopK(2), mask_id=31)


def generate() -> Callable[[], Any]:
    """Takes a prompt of two tokens through a model of one layer, which generates one token."""
    from illada import GenerationConfig, ModelConfig
    from illada import generate as continued
    from illada.model import Model

    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "ffn_dim": 32, "vocab_size": 32}
    config = ModelConfig.preset("demo", **sizes, max_seq_len=16, mask_id=31, eos_id=30, pad_id=29)
    model = Model(config).eval()
    settings = GenerationConfig(max_new_tokens=1, block_length=1)
    return lambda: continued(model, [[1, 2]], settings)


TRACED = {"masked_loss": masked_loss, "attention": attention, "unmask": unmask, "generate": generate}


# ---- tables ----------------------------------------------------------------------------------------------------------


def report(name: str, found: list[str]) -> str:
    """Returns Markdown: stays per file, and changes from one file to another."""
    lines = [f"## {name}: {len(found)} stays in {len(set(found))} files", "", "| file | stays |", "|---|---:|"]
    lines += [f"| {file} | {count} |" for file, count in Counter(found).most_common()]
    lines += ["", "| from | to | times |", "|---|---|---:|"]
    lines += [f"| {a} | {b} | {count} |" for (a, b), count in Counter(itertools.pairwise(found)).most_common()]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    description = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.stays", description=description)
    parser.add_argument("--op", choices=TRACED, help="only this one")
    options = parser.parse_args(argv)
    for name in [options.op] if options.op else TRACED:
        job = TRACED[name]()
        job()
        print(report(name, stays(job)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
