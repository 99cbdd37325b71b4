"""One command for a machine with an NVIDIA GPU: builds, shows what is right, then measures; a short table comes last.

    python -m benchmarks.on_gpu                                            the stages up to unmask
    python -m benchmarks.on_gpu --stage build,compare,tests,selftest --seconds 570 --out folder
    python -m benchmarks.on_gpu --stage attention --case block_diffusion   cases whose names contain a text
    python -m benchmarks.on_gpu --dry-run                                  what would run; needs no GPU

Stages: build (the extension, for this GPU alone), compare (the CPU emulator of CUDA against the GPU, bit for bit),
tests (tests/gpu), selftest (doctor's: what passes enters the default order), attention, loss, unmask (benchmarks, peers
interleaved), and by name only: models (generate, train), peers (ceilings and peers alone, where none of ours is
ready: peers_<op>.json). A stage that fails or runs out of time
stops no other; the exit status is 1 then. What hangs or dies is killed, recorded and left out of what follows.
Written under --out (default benchmarks/results/<device>): <op>.json, selftest.json, summary.json, log.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from . import journal, run
from .journal import Journal
from .machine import commit, slug
from .measure import why

ROOT = Path(__file__).resolve().parent.parent
# seconds that a stage may take, unless --seconds leaves less
LIMITS = {
    "build": 300,
    "compare": 240,
    "tests": 400,
    "selftest": 240,
    "attention": 560,
    "loss": 300,
    "unmask": 300,
    "models": 400,
    "peers": 560,
}
BENCHMARKS = {
    "attention": ("attention_fwd", "attention_bwd"),
    "loss": ("masked_loss",),
    "unmask": ("unmask",),
    "models": ("generate", "train"),
    "peers": ("attention_fwd", "attention_bwd", "masked_loss", "unmask"),
}
TESTS = {"compare": str(ROOT / "tests/cuda_on_cpu/test_hardware.py"), "tests": str(ROOT / "tests/gpu")}
SELFTEST_LIMIT, KEPT = 90.0, 60.0  # seconds for one op and backend; for each stage to come


@dataclass
class Session:
    """What the stages share: where to write, the environment of child processes, when to end."""

    options: argparse.Namespace
    out: Path
    temporary: Path
    log: IO[bytes]
    deadline: float  # of the stage under way
    env: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)  # of the stage under way, for summary.json

    def left(self) -> float:
        return self.deadline - time.time()

    def last_words(self) -> str:
        """The end of the log, for a child that has nothing else to say."""
        path = self.out / "log.txt"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return lines[-1][:200] if lines else "no output"


Stage = Callable[[Session], tuple[bool, str]]


def gpu() -> dict[str, str] | None:
    """{name, capability, driver} of the first GPU as nvidia-smi tells it, None without one."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in (found.stdout.splitlines() or [""])[0].split(",")]
    return dict(zip(("name", "capability", "driver"), values)) if found.returncode == 0 and len(values) == 3 else None


def architecture(capability: str) -> str:
    """'9.0' -> '90a' (wgmma and its tensor maps are of that one chip), '8.9' -> '89'."""
    digits = capability.replace(".", "")
    return "90a" if digits == "90" else digits


# ---- stages ---------------------------------------------------------------------------------------------------------
def build(session: Session) -> tuple[bool, str]:
    env = session.env | {"ILLADA_REQUIRE_EXT": "1"}
    error = journal.run(commands("build", session)[0], session.deadline, session.log, env)
    path = ROOT / "illada_kernels" / "_build_info.json"
    info = json.loads(path.read_text()) if path.exists() else {}
    session.facts["build"] = info
    if error or not info.get("cuda"):
        return False, f"no CUDA: {info.get('cuda_reason', 'no build record')}" + (f" ({error})" if error else "")
    return True, f"for {info['cuda_archs']} in {info['seconds']} s"


def tests(stage: str, session: Session) -> tuple[bool, str]:
    record = Journal(session.temporary / f"{stage}.journal")
    env = session.env | {"ILLADA_JOURNAL": str(record.path)}
    if stage == "compare":  # one test, with two compilers in it
        env["ILLADA_TEST_LIMIT"] = str(LIMITS["compare"])
    error, _ = journal.supervise(commands(stage, session)[0], record, session.deadline, session.log, env)
    ended, avoided = record.ended(), record.avoided()
    by: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for name, line in ended.items():
        by.setdefault(line["outcome"], []).append(name)
    session.facts |= {"failed": {name: ended[name]["message"] for name in by["failed"]}, "hung_or_died": avoided}
    session.facts["skipped"] = {name: ended[name]["message"] for name in by["skipped"]}
    said = ", ".join(f"{len(names)} {outcome}" for outcome, names in by.items() if names) or "nothing ran"
    said += f", {len(avoided)} hung or died" if avoided else ""
    said += f"; {error}" if error else ""
    skipped = stage == "compare" and by["skipped"]  # then nothing was compared
    said += f"; {session.last_words()}" if not ended else ""
    return bool(by["passed"]) and not (by["failed"] or avoided or error or skipped), said


def selftest(session: Session) -> tuple[bool, str]:
    from illada_kernels import doctor

    found = doctor.report()
    which = [each for each in doctor.to_selftest(found) if each[2] == "cuda"]
    found["selftest"] = []
    for each in which:
        if session.left() > 5:
            found["selftest"].append(doctor.selftest_one(*each, seconds=min(SELFTEST_LIMIT, session.left())))
    (session.out / "selftest.json").write_text(json.dumps(found, indent=1) + "\n")
    passed = [f"{row['op']}/{row['backend']}" for row in found["selftest"] if row["passed"]]
    failed = [f"{row['op']}/{row['backend']}" for row in found["selftest"] if not row["passed"]]
    said = f"passed {', '.join(passed) or 'none'}" + (f"; FAILED {', '.join(failed)}" if failed else "")
    missing = len(which) - len(found["selftest"])
    said += f"; no time for {missing} more" if missing else ""
    return bool(passed) and not (failed or missing), said


def benchmark(stage: str, session: Session) -> tuple[bool, str]:
    said, good = [], True
    every = commands(stage, session)
    for at, (op, command) in enumerate(zip(BENCHMARKS[stage], every)):
        record = Journal(journal_path(stage, op, session))
        until = time.time() + session.left() / (len(every) - at)
        error, status = journal.supervise(command, record, until, session.log, session.env)
        ended, avoided = record.ended(), record.avoided()
        broken = {name: line["error"] for name, line in ended.items() if "error" in line}
        if not ended and error is None:
            error = f"exit status {status}, {session.last_words()}"
        session.facts[op] = {"cases": len(ended), "failed": broken, "hung_or_died": avoided, "error": error}
        lies = wrong_rows(Path(command[command.index("--json") + 1]), ended)
        broken |= dict.fromkeys(lies, "wrong results")
        notes = [f"{len(broken)} failed"] * bool(broken) + [f"{len(avoided)} hung or died"] * bool(avoided)
        said.append(f"{op}: {len(ended)} cases" + "".join(f", {note}" for note in [*notes, *filter(None, [error])]))
        good = good and not (error or broken or avoided or status or not ended)
    return good, "; ".join(said)


def wrong_rows(path: Path, ended: Iterable[str]) -> list[str]:
    """Of the cases that ended, those in which a backend of ours was far off, NaN included."""
    rows = json.loads(path.read_text()) if path.exists() else []
    found = [f"{row['op']}|{row['case']}|{row['dtype']}" for row in rows if run.wrong(row)]
    return [name for name in dict.fromkeys(found) if name in ended]


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {"build": build}
    found |= {name: lambda session, name=name: tests(name, session) for name in TESTS}  # type: ignore[misc]
    found["selftest"] = selftest
    found |= {name: lambda session, name=name: benchmark(name, session) for name in BENCHMARKS}  # type: ignore[misc]
    return found


def journal_path(stage: str, op: str, session: Session) -> Path:
    return session.temporary / f"{stage}-{op}.journal"


def commands(stage: str, session: Session) -> list[list[str]]:
    """The child processes of a stage; selftest starts its own."""
    python = [sys.executable, "-m"]
    if stage == "build":
        return [[*python, "illada_kernels._build"]]
    if stage in TESTS:
        quiet = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "tests.gpu.journal_plugin"]
        return [[*python, "pytest", TESTS[stage], *quiet]]
    if stage == "selftest":
        return [[*python, "illada_kernels", "doctor", "--selftest", "--json"]]
    found = []
    for op in BENCHMARKS[stage]:
        path = session.out / (f"peers_{op}.json" if stage == "peers" else f"{op}.json")
        command = [*python, "benchmarks.run", "--op", op, "--device", "cuda", "--json", str(path)]
        command += ["--journal", str(journal_path(stage, op, session)), "--rounds", str(session.options.rounds)]
        command += ["--seconds", str(session.options.case_seconds), "--case", session.options.case]
        found.append([*command, "--ours", "none" if stage == "peers" else session.options.ours])
    return found


# ---- what is said ---------------------------------------------------------------------------------------------------
def dry_run(names: list[str], session: Session) -> None:
    from . import peers

    card = gpu()
    print("GPU: " + (", ".join(card.values()) if card else "none here") + f"; results would go to {session.out}")
    print(f"peers that cannot be imported here: {', '.join(peers.absent()) or 'none'}")
    for name in names:
        print(f"{name}: at most {LIMITS[name]} s")
        for command in commands(name, session):
            print("  " + " ".join(["python", *command[1:]]))
        for op in BENCHMARKS.get(name, ()):
            cases = [case.name for case in run.collect(op, "cuda", session.options.case)]
            print(f"    {op}: {len(cases)} cases: {', '.join(cases)}")


def rows_table(session: Session, began: float) -> list[str]:
    """One line per row of the files that were written since."""
    lines = []
    for path in sorted(session.out.glob("*.json")):
        if path.stem.removeprefix("peers_") not in run.FILES or path.stat().st_mtime < began:
            continue
        lines.append(f"{path.stem:<40} {'backend':<9} {'ms':>9} {'floor':>5}  best peer")
        for row in json.loads(path.read_text()):
            time_and_share = f"{row['ms']['p50']:9.3f} {row['floor_ratio']:5.2f}" if row["backend"] else " " * 15
            best = row["best_peer"]
            ratio = f" {row['ratio']:.2f}x" if row["ratio"] else ""
            peer = f"{best} {row['peers'][best]:.3f}{ratio}" if best else "-"
            lines.append(f"{row['case'][:40]:<40} {row['backend'] or '-':<9} {time_and_share}  {peer}{run.wrong(row)}")
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=str(__doc__).splitlines()[0])
    usual = ",".join(name for name in LIMITS if name not in ("models", "peers"))
    parser.add_argument("--stage", default=usual, help=f"comma-separated, of {', '.join(LIMITS)} (up to unmask)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: benchmarks/results/<device>)")
    parser.add_argument("--seconds", type=float, default=1e6, help="end within so many seconds in all")
    parser.add_argument("--case", default="", metavar="TEXT", help="benchmark only cases whose name contains TEXT")
    parser.add_argument(
        "--ours", default="all", metavar="NAMES", help="backends to measure: cuda,triton (all), or none"
    )
    parser.add_argument("--rounds", type=int, default=11, help="samples per contender (11)")
    parser.add_argument("--case-seconds", type=float, default=2.0, help="start no new round of a case after this (2)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    options = parser.parse_args(argv)
    names = [name for name in options.stage.split(",") if name]
    if unknown := [name for name in names if name not in LIMITS]:
        parser.error(f"--stage: expected some of {', '.join(LIMITS)}, got {', '.join(unknown)}")
    names = [name for name in LIMITS if name in names]  # what shows correctness comes first
    card = gpu()
    out = options.out or run.RESULTS / (slug(card["name"]) if card else "<device>")
    with tempfile.TemporaryDirectory() as temporary, open(os.devnull, "wb") as nowhere:
        session = Session(options, out.resolve(), Path(temporary), nowhere, 0.0, environment(card))
        if options.dry_run:
            dry_run(names, session)
            return 0
        if card is None:
            print("nvidia-smi lists no GPU here; --dry-run says what would run", file=sys.stderr)
            return 2
        session.out.mkdir(parents=True, exist_ok=True)
        with (session.out / "log.txt").open("ab") as session.log:
            return run_stages(names, session, card)


def environment(card: dict[str, str] | None) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return env | ({"ILLADA_CUDA_ARCHS": architecture(card["capability"])} if card else {})


def time_for(stage: str, left: float, later: int) -> float:
    """Seconds that a stage may take of those left: some are kept for the stages after it."""
    return min(LIMITS[stage], max(left - KEPT * later, left / (later + 1)))


def run_stages(names: list[str], session: Session, card: dict[str, str]) -> int:
    began, outcomes = time.time(), {}
    end = began + session.options.seconds
    for at, name in enumerate(names):
        start, later = time.time(), len(names) - at - 1
        session.deadline, session.facts = start + time_for(name, end - start, later), {}
        print(f"{name} ...", flush=True)
        session.log.write(f"\n==== {name} ====\n".encode())
        session.log.flush()
        try:
            good, said = stages()[name](session) if session.left() > 1 else (False, "no time was left for it")
        except Exception as error:
            good, said = False, why(error)
        outcomes[name] = {"ok": good, "said": said, "seconds": round(time.time() - start, 1), **session.facts}
        summary = {"gpu": card, "commit": commit(), "stages": outcomes}
        (session.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join(rows_table(session, began)))
    for name, outcome in outcomes.items():
        print(f"{name:<10} {'ok' if outcome['ok'] else 'FAILED':<7} {outcome['seconds']:6.1f} s  {outcome['said']}")
        for kind in ("failed", "hung_or_died"):
            for what, reason in list(outcome.get(kind, {}).items())[:12]:
                print(f"    {kind.replace('_', ' ')}: {what}: {reason}")
    print(f"written to {session.out}")
    return int(not all(outcome["ok"] for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
