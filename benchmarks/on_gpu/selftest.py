"""The doctor's selftest of one op and backend, into the journal: what passes enters the default order on this machine.

python -m benchmarks.on_gpu.selftest attention cuda --journal FILE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from illada_kernels import doctor

from ..journal import Journal

LIMIT = 60.0


def main(argv: list[str]) -> int:
    description = str(__doc__).splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu.selftest", description=description)
    parser.add_argument("op")
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--by", default="selftest")
    options = parser.parse_args(argv)
    journal, key = Journal(options.journal, options.by), f"selftest|{options.op}/{options.backend}"
    if "outcome" in journal.ended().get(key, {}):
        return 0
    journal.begin(key, LIMIT + 10)
    result = doctor.selftest_one(options.op, options.backend, options.device, seconds=LIMIT)
    wrong = [f"{case['case']}: {case['error']}" for case in result["cases"] if case["error"]]
    said = "; ".join(wrong[:3]) or result.get("error", "")
    journal.end(key, outcome="passed" if result["passed"] else "failed", message=said, selftest=result)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
