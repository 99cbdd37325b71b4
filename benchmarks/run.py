"""Measures the cases of an op on this machine and writes them as rows.

    python -m benchmarks.run --op masked_loss                         into benchmarks/results/<device>/masked_loss.json
    python -m benchmarks.run --op unmask --case topk --json out.json  only cases whose name contains "topk", elsewhere
    python -m benchmarks.run --op unmask --ours none                  ceilings and peers alone

A case that is measured again replaces its rows in the file; the others stay. Columns: ours, the share of the floor
reached (1 is the limit of the hardware), the fastest peer, and how many times faster we are than it. A contender that
raises is recorded with its reason; with --journal, one that hangs or dies too (on_gpu.py restarts what it ended).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import measure, peers
from .floor import ceilings
from .journal import AGAIN, Journal
from .measure import Case
from .rows import run_case

RESULTS = Path(__file__).parent / "results"
FILES = {
    "attention_fwd": "attention",
    "attention_bwd": "attention",
    "masked_loss": "masked_loss",
    "unmask": "unmask",
    "generate": "generate",
    "train": "train",
}


def exists(op: str) -> bool:
    return importlib.util.find_spec(f"benchmarks.suites.{FILES[op]}") is not None


def collect(op: str, device: str, pattern: str = "") -> list[Case]:
    cases: Callable[[str], Iterable[Case]] = importlib.import_module(f"benchmarks.suites.{FILES[op]}").cases
    return [case for case in cases(device) if case.op == op and pattern in case.name]


def merge(rows: list[dict[str, Any]], old: list[dict[str, Any]], known: list[Case]) -> list[dict[str, Any]]:
    """`rows` in place of the old rows of the same cases, in the bench file's order; rows of cases gone are dropped."""
    order = {(case.name, case.dtype): at for at, case in enumerate(known)}
    fresh = {(row["case"], row["dtype"]) for row in rows}
    kept = [row for row in old if (row["case"], row["dtype"]) in order.keys() - fresh]
    return sorted([*kept, *rows], key=lambda row: order[row["case"], row["dtype"]])


def write(path: Path, rows: list[dict[str, Any]], known: list[Case]) -> None:
    old = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merge(rows, old, known), indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    peer = "-"
    if row["best_peer"]:
        ratio = f", {row['ratio']:.2f}x" if row["ratio"] else ""
        peer = f"{row['best_peer']} {row['peers'][row['best_peer']]:.3f} ms{ratio}"
    name = f"{row['case']} {row['dtype']} [{row['backend'] or 'none of ours'}]"
    if row["backend"] is None:
        return f"{name:<64} {'-':>10} {'-':>7}  {peer}"
    return f"{name:<64} {row['ms']['p50']:10.3f} {row['floor_ratio']:7.2f}  {peer}{wrong(row)}"


def wrong(row: dict[str, Any]) -> str:
    error = row.get("error")
    return "" if error is None or error <= measure.WRONG else f"  WRONG: relative error {error:.2g}"


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_all(
    cases: list[Case], options: argparse.Namespace, known: list[Case], path: Path, journal: Journal | None
) -> int:
    """The exit status: 0, 1 if a case failed, AGAIN if the GPU's context is lost."""
    ours = None if options.ours == "all" else [name for name in options.ours.split(",") if name != "none"]
    ended = journal.ended() if journal else {}
    rates: dict[str, dict[str, float]] = {}
    failures = 0
    for case in cases:
        key = f"{case.op}|{case.name}|{case.dtype}"
        if key in ended:
            continue
        try:
            if case.dtype not in rates:
                rates[case.dtype] = ceilings(options.device, case.dtype)
            rows = run_case(case, options.device, rates[case.dtype], options.rounds, options.seconds, ours, journal)
        except Exception as error:
            print(f"{case.name} {case.dtype}: {measure.why(error)}", flush=True)
            if lost(error, options.device):
                if journal and (current := journal.current()):
                    journal.avoid(current["begin"], measure.why(error))
                return AGAIN if journal else 1
            failures += 1
            if journal:
                journal.end(key, error=measure.why(error))
        else:
            print("\n".join(line(row) for row in rows), flush=True)
            write(path, rows, known)
            if journal:
                journal.end(key)
        free(options.device)
    return int(failures > 0)


def lost(error: Exception, device: str) -> bool:
    """Whether the error has ended the CUDA context, so that nothing more can be measured in this process."""
    if isinstance(error, measure.ContextLost) or device != "cuda":
        return isinstance(error, measure.ContextLost)
    try:
        torch.cuda.synchronize()
        return False
    except Exception:
        return True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=str(__doc__).splitlines()[0])
    parser.add_argument("--op", required=True, choices=FILES)
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, help="the file to write (default: under benchmarks/results/)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="samples per contender (15)")
    parser.add_argument("--seconds", type=float, default=20.0, help="start no new round of a case after this (20)")
    parser.add_argument("--ours", default="all", metavar="NAMES", help="backends of ours: cuda,triton or none (all)")
    parser.add_argument("--journal", type=Path, help="what began and ended; a case ended there is not run again")
    options = parser.parse_args(argv)
    if not exists(options.op):
        print(f"{options.op}: no benchmark here (benchmarks/suites/{FILES[options.op]}.py)", file=sys.stderr)
        return 1
    known = collect(options.op, options.device)
    cases = [case for case in known if options.case in case.name]
    if not cases:
        print(f"no case of {options.op} contains {options.case!r}; there are:", file=sys.stderr)
        print("\n".join(f"  {case.name}" for case in known), file=sys.stderr)
        return 1
    name = measure.device_name(options.device)
    path = options.json or RESULTS / measure.slug(name) / f"{options.op}.json"
    print(f"{options.op} on {name}; peers that cannot be measured here: {', '.join(peers.absent()) or 'none'}")
    print(f"{'case':<64} {'ours ms':>10} {'floor':>7}  best peer")
    status = measure_all(cases, options, known, path, options.journal and Journal(options.journal))
    print(f"written to {path}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
