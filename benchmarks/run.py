"""Measures the cases of an op on this machine and writes them as rows.

    python -m benchmarks.run --op masked_loss                         into benchmarks/results/<device>/masked_loss.json
    python -m benchmarks.run --op unmask --case topk --json out.json  only cases whose name contains "topk", elsewhere
    python -m benchmarks.run --op unmask --cases a,b --journal file   these two in this order, their rows into a journal
    python -m benchmarks.run --op unmask --ours none                  ceilings and peers alone
    OMP_NUM_THREADS=1 python -m benchmarks.run --op generate --clock processor --json one_thread.json

With `--clock processor` a time is what one thread took of the processor, for a machine that others use as well.
A case that is measured again replaces its rows in the file; the others stay. Columns: ours, the share of the floor
reached (1 is the limit of the hardware), the fastest peer, and how many times faster we are than it. A contender that
raises is recorded with its reason; with --journal, one that hangs or dies too (on_gpu restarts what it ended).
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

from illada_kernels._extension import STALE
from illada_kernels.doctor import build_info

from . import measure, peers
from .floor import ceilings
from .journal import AGAIN, Journal
from .measure import Case
from .on_gpu.smoke import failures, left_out
from .rows import run_case

RESULTS = Path(__file__).parent / "results"
Keep = Callable[[Case, list[dict[str, Any]]], None]
FILES = {
    "attention_fwd": "attention",
    "attention_bwd": "attention",
    "masked_loss": "masked_loss",
    "unmask": "unmask",
    "layer": "layer",
    "generate": "generate",
    "train": "train",
}


def exists(op: str) -> bool:
    return importlib.util.find_spec(f"benchmarks.suites.{FILES[op]}") is not None


def collect(op: str, device: str, quick: bool = False) -> list[Case]:
    """Collects cases. `quick`: with the peers that are fast and hardly compile, instead of all."""
    cases: Callable[..., Iterable[Case]] = importlib.import_module(f"benchmarks.suites.{FILES[op]}").cases
    return [case for case in cases(device, quick) if case.op == op]


def select(known: list[Case], names: str, text: str) -> list[Case]:
    """Returns the cases of exactly these comma-separated names, in their order; without names those that contain
    `text`.

    Raises ValueError, which lists what there is, for a name that there is not or a text that none contains."""
    if names:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        found = [case for name in wanted for case in known if case.name == name]
        wrong = [name for name in wanted if name not in {case.name for case in found}]
    else:
        found, wrong = [case for case in known if text in case.name], []
    if wrong or not found:
        asked = f"no case is named {', '.join(wrong)}" if wrong else f"no case contains {text!r}"
        raise ValueError("\n".join([f"{asked}; there are:", *(f"  {case.op}: {case.name}" for case in known)]))
    return found


def merge(rows: list[dict[str, Any]], old: list[dict[str, Any]], known: list[Case]) -> list[dict[str, Any]]:
    """Puts `rows` in place of the old rows of the same cases, in the bench file's order; rows of cases gone are
    dropped."""
    order = {(case.name, case.dtype): at for at, case in enumerate(known)}
    fresh = {(row["case"], row["dtype"]) for row in rows}
    kept = [row for row in old if (row["case"], row["dtype"]) in order.keys() - fresh]
    return sorted([*kept, *rows], key=lambda row: order[row["case"], row["dtype"]])


def write(path: Path, rows: list[dict[str, Any]], known: list[Case]) -> None:
    """Replaces the file at once: whoever is killed here leaves the old one."""
    old = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(merge(rows, old, known), indent=1) + "\n")
    fresh.replace(path)


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


def measure_all(cases: list[Case], options: argparse.Namespace, keep: Keep, journal: Journal | None) -> int:
    """Measures; returns the exit status: 0, 1 if a case failed, AGAIN if the GPU's context is lost. `keep` gets the
    rows of a case."""
    ours = None if options.ours == "all" else [name for name in options.ours.split(",") if name != "none"]
    ended = journal.ended() if journal else {}
    failed = failures(journal) if journal else {}
    rates: dict[str, dict[str, float]] = {}
    failures_here = 0
    for case in cases:
        key = ended_key(case, options.ours)
        if key in ended:
            continue
        try:
            if case.dtype not in rates:
                rates[case.dtype] = ceilings(options.device, case.dtype)
            rows = run_case(
                case,
                options.device,
                rates[case.dtype],
                options.rounds,
                options.seconds,
                ours,
                journal,
                lambda name, case=case: left_out(case, name, failed),
                options.limit,
            )
        except Exception as error:
            print(f"{case.name} {case.dtype}: {measure.why(error)}", flush=True)
            if lost(error, options.device):
                if journal and (current := journal.current()):
                    journal.avoid(current["begin"], measure.why(error))
                return AGAIN if journal else 1
            failures_here += 1
            if journal:
                journal.end(key, error=measure.why(error))
        else:
            print("\n".join(line(row) for row in rows), flush=True)
            keep(case, rows)
            if journal:
                journal.end(key, rows=rows)
        free(options.device)
    return int(failures_here > 0)


def ended_key(case: Case, ours: str) -> str:
    """Returns a case in the journal, measured with these backends."""
    return f"{case.op}|{case.name}|{case.dtype}" + ("" if ours == "all" else f" [{ours}]")


def lost(error: Exception, device: str) -> bool:
    """Returns whether the error has ended the CUDA context, so that nothing more can be measured in this process."""
    if isinstance(error, measure.ContextLost) or device != "cuda":
        return isinstance(error, measure.ContextLost)
    try:
        torch.cuda.synchronize()
        return False
    except Exception:
        return True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=str(__doc__).splitlines()[0])
    parser.add_argument("--op", required=True, help=f"of {', '.join(FILES)}; several with commas")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--cases", default="", metavar="A,B", help="the cases of exactly these names, in this order")
    parser.add_argument("--json", type=Path, help="the file to write (default: under benchmarks/results/)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="samples per contender (15)")
    parser.add_argument("--seconds", type=float, default=20.0, help="start no new round of a case after this (20)")
    parser.add_argument("--limit", type=float, default=measure.CALL_LIMIT, help="seconds a call, with --journal (60)")
    parser.add_argument("--ours", default="all", metavar="NAMES", help="backends of ours: cuda,triton or none (all)")
    parser.add_argument("--peers", choices=("all", "quick"), default="all", help="quick: those that hardly compile")
    parser.add_argument("--journal", type=Path, help="rows go there; a case that ended there is not run again")
    parser.add_argument("--clock", choices=tuple(measure.CLOCKS), default="wall", help="of a CPU (wall)")
    parser.add_argument("--by", default="", help="the name of this process in the journal")
    options = parser.parse_args(argv)
    if options.clock == "processor":
        if options.device != "cpu" or torch.get_num_threads() > 1 or not options.json:
            parser.error("--clock processor: expected a CPU, one thread (OMP_NUM_THREADS=1) and --json")
        measure.clock = measure.CLOCKS["processor"]
    ops = [op.strip() for op in options.op.split(",")]
    if unknown := [op for op in ops if op not in FILES]:
        parser.error(f"--op: expected some of {', '.join(FILES)}, got {', '.join(unknown)}")
    for op in ops:
        if not exists(op):
            print(f"{op}: no benchmark here (benchmarks/suites/{FILES[op]}.py)", file=sys.stderr)
            return 1
    known = {op: collect(op, options.device, options.peers == "quick") for op in ops}
    try:
        cases = select([case for op in ops for case in known[op]], options.cases, options.case)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if not (options.json or options.journal) and build_info().get("stale"):
        print(f"no result is written here: {STALE}", file=sys.stderr)
        return 1
    name = measure.device_name(options.device)
    folder = RESULTS / measure.slug(name)

    def keep(case: Case, rows: list[dict[str, Any]]) -> None:
        if options.json or not options.journal:
            write(options.json or folder / f"{case.op}.json", rows, known[case.op])

    if options.device == "cpu" and (reason := measure.keep_freed()):
        print(f"freed memory is not kept in the process: {reason}")
    print(f"{options.op} on {name}; peers that cannot be measured here: {', '.join(peers.absent()) or 'none'}")
    print(f"{'case':<64} {'ours ms':>10} {'floor':>7}  best peer")
    status = measure_all(cases, options, keep, options.journal and Journal(options.journal, options.by))
    print(f"written to {options.json or options.journal or folder}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
