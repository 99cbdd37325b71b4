"""One command for a machine with an NVIDIA GPU: builds, shows what is right, then measures; a table comes last.

    python -m benchmarks.on_gpu --out DIR                        everything worth knowing, in 525 seconds
    python -m benchmarks.on_gpu --out DIR --seconds 200 --stage rest      what such a run did not reach
    python -m benchmarks.on_gpu --out DIR --stage build,forward --cases full_8k_kv8,full_2k_kv8 --all-peers
    python -m benchmarks.on_gpu --dry-run                        what would run; needs no GPU
    python -m benchmarks.on_gpu --adopt DIR                      a run's files into results, figures and pages

A stage that fails, hangs or cannot start takes no time from the others, and what hangs or dies is killed, recorded and
left out of what follows. In DIR: journal.jsonl (all that was found, written as it is found), log.txt, summary.md and
profile.csv. The exit status is 1 if a stage failed. In a checkout without git, ILLADA_COMMIT names the commit.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from ..journal import Journal
from ..machine import commit, slug
from .adopt import adopt
from .plan import Settings, Stage, chosen, deadlines, more, plan
from .processes import Here, Machine, gpu
from .session import KEPT, Session, done, environment
from .summary import summary


def dry_run(stages: list[Stage], seconds: float, out: Path, card: dict[str, str] | None) -> None:
    from .. import peers

    print("GPU: " + (", ".join(card.values()) if card else "none here") + f"; a run would write to {out}")
    print(f"peers that cannot be imported here: {', '.join(peers.absent()) or 'none'}")
    for stage, until in zip(stages, deadlines(stages, seconds - KEPT)):
        print(f"{stage.name}: {stage.about}; {stage.seconds:g} s, ends at {until:.0f} s at the latest")
        for command in dict.fromkeys(" ".join(["python", *worker.command[1:]]) for worker in stage.workers):
            print(f"  {command}")


def main(argv: list[str], machine: Machine | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write to (default: gpu_run)", default=Path("gpu_run"))
    parser.add_argument("--seconds", type=float, default=525.0, help="end within so many seconds in all (525)")
    parser.add_argument("--stage", default="all", metavar="NAMES", help="all, rest or some, with commas; see --dry-run")
    parser.add_argument("--cases", default="", metavar="A,B", help="measure the cases of exactly these names, in order")
    parser.add_argument(
        "--ours", default="", metavar="NAMES", help="backends, instead of the plan's: all, none, triton"
    )
    parser.add_argument("--all-peers", action="store_true", help="those too that compile for long")
    parser.add_argument("--rounds", type=int, default=7, help="samples per contender (7)")
    parser.add_argument("--case-seconds", type=float, default=1.0, help="start no new round of a case after this (1)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--adopt", type=Path, metavar="DIR", help="turn the files of a run into what is committed")
    options = parser.parse_args(argv)
    if options.adopt:
        print("\n".join(adopt(options.adopt)))
        return 0
    out, card = options.out.resolve(), gpu()
    settings = Settings(options.rounds, options.case_seconds, options.all_peers, options.cases, options.ours)
    before = done(Journal(out / "journal.jsonl"))
    try:
        stages = chosen(options.stage, plan(out, settings), more(out, settings), before.__contains__)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        dry_run(stages, options.seconds, out, card)
        return 0
    if card is None:
        print("nvidia-smi lists no GPU here; --dry-run says what would run", file=sys.stderr)
        return 2
    facts = {"gpu": card, "commit": commit(), "folder": slug(card["name"])}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes end with the run
    session = Session(out, machine or Here(), environment(card), facts)
    outcomes = session.run(stages, options.seconds)
    text = summary(session.journal)
    (out / "summary.md").write_text(text)
    print(text)
    return int(not all(outcome["ok"] for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
