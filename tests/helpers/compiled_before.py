"""Stands for the compiler where the checkout's sources are built again: hands over what `make build` has compiled.

    CXX="python tests/helpers/compiled_before.py g++" python -m build

An object is taken only if the command is the one in build/build.ninja but for the place of the sources, and csrc/ holds
what it held when build/ was written. All else, and what a build lacks, goes to the compiler.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from illada_kernels import _build, _toolchain  # noqa: E402


def placeless(command: list[str], root: Path) -> list[str]:
    """The command with names relative to `root`; without the names of what it writes."""
    kept = [c for before, c in zip(["", *command], command) if before not in ("-o", "-MF") and c not in ("-o", "-MF")]
    return [c.replace(str(root), "@").replace(str(ROOT), "@") for c in kept]


def compiled_before(command: list[str]) -> Path | None:
    """The object file that the checkout's build made by this command."""
    sources = [Path(c) for c in command if c.endswith(".cpp")]
    record = ROOT / "illada_kernels" / "_build_info.json"
    if "-c" not in command or not sources or "csrc" not in sources[0].parts or not record.exists():
        return None
    root = next(p.parent for p in sources[0].parents if p.name == "csrc")
    if _build.fingerprint(root / "csrc") != json.loads(record.read_text()).get("sources"):
        return None
    listing = [_toolchain.find_ninja(), "-C", str(ROOT / "build"), "-t", "compdb"]
    known = json.loads(subprocess.run(listing, capture_output=True, text=True, check=True).stdout)
    for entry in known:
        made = ROOT / "build" / entry["output"]
        if placeless(shlex.split(entry["command"]), ROOT) == placeless(command, root) and made.exists():
            return made
    return None


def main() -> None:
    command = sys.argv[1:]
    made = compiled_before(command)
    if made is None:
        os.execvp(command[0], command)
    target = command[command.index("-o") + 1]
    shutil.copyfile(made, target)
    Path(command[command.index("-MF") + 1]).write_text(f"{target}: {command[command.index('-c') + 1]}\n")


if __name__ == "__main__":
    main()
