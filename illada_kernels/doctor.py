"""Prints what this machine has, what was built, which backend of each op can run here, and why not the others.

    python -m illada_kernels doctor              the table, as text
    python -m illada_kernels doctor --json       the same, to read by machine
    python -m illada_kernels doctor --selftest   every available kernel against the reference, each in its own process

The report always exits with 0, even if torch or the extension is missing or broken; --selftest exits with 1 if a kernel
fails. Nothing here imports torch: a process of its own does, and if that one dies the report says where.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, _build
from ._probe import BACKENDS, attempt
from .ops import OPS

PACKAGE = Path(__file__).parent
OPTIONAL = ("triton", "cupy", "numpy", "safetensors", "tokenizers")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m illada_kernels")
    doctor = parser.add_subparsers(dest="command", required=True).add_parser(
        "doctor", help="what this machine has, what was built, which backends can run"
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.add_argument("--selftest", action="store_true", help="check every available kernel against the reference")
    options = parser.parse_args(argv)
    found = report()
    if options.selftest:
        found["selftest"] = selftest(found)
    print(json.dumps(found, indent=1) if options.json else "\n".join(text(found)))
    return int(any(not row["passed"] for row in found.get("selftest", ())))


def report() -> dict[str, Any]:
    probed = probe()
    return {
        "illada_kernels": {"version": __version__, "path": str(PACKAGE)},
        "python": {"version": platform.python_version(), "platform": platform.platform(), "path": sys.executable},
        "torch": probed["torch"],
        "packages": {name: attempt(partial(metadata.version, name))[0] for name in OPTIONAL},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("ILLADA_")},
        "compilers": compilers(),
        "gpu": probed["gpu"],
        "build": build_info(),
        "extension": probed["extension"],
        "ops": {op: probed[op] for op in OPS},
    }


def compilers() -> dict[str, str]:
    """Returns the version of each compiler that a build would use now, or why there is none."""
    cxx, no_cxx = attempt(lambda: _build.version_line(_build.find_compiler()))
    ninja, no_ninja = attempt(lambda: _build.version_line(_build.find_ninja()))
    found, broken = attempt(_build.find_nvcc)
    nvcc, reason = found or (None, str(broken))
    return {
        "c++": cxx or str(no_cxx),
        "ninja": f"ninja {ninja}" if ninja else str(no_ninja),
        "nvcc": _build.version_line(nvcc) if nvcc else reason,
    }


def build_info() -> dict[str, Any]:
    """Returns _build_info.json, and whether the sources beside it (in a checkout) are still those it was built from."""
    info, error = attempt(lambda: json.loads((PACKAGE / "_build_info.json").read_text()))
    needed = ("compiler", "seconds") if isinstance(info, dict) and info.get("extension") else ("extension", "reason")
    if error or not isinstance(info, dict) or not all(name in info for name in needed):
        return {"extension": False, "reason": f"no build was recorded ({error or 'unreadable'}): `make build`"}
    csrc = PACKAGE.parent / "csrc"
    if csrc.is_dir():
        info["stale"] = info.get("sources") != _build.fingerprint(csrc)
    return info


def child(arguments: list[str], timeout: float) -> tuple[list[dict[str, Any]], str | None]:
    """Returns the JSON lines that `python -m ARGUMENTS` prints, and how it died if it did. It sees the modules we
    see."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return [], f"did not end within {timeout:.0f} s"
    lines = [attempt(partial(json.loads, line))[0] for line in done.stdout.splitlines()]
    return [line for line in lines if isinstance(line, dict)], death_of(done.returncode, done.stderr)


def death_of(code: int, stderr: str = "") -> str | None:
    """Returns how a process with this exit code died, None for 0."""
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"exited with {code}: {(stderr.strip().splitlines() or ['no message'])[-1]}" if code else None


def probe() -> dict[str, Any]:
    lines, death = child(["illada_kernels._probe"], 120)
    found = {line["stage"]: line["found"] for line in lines if "found" in line}
    begun = [line["stage"] for line in lines if "found" not in line and "stage" in line]
    reason = f"not checked: looking at {begun[-1] if begun else 'this package'} {death or 'printed nothing'}"
    found.setdefault("torch", {"error": reason})
    found.setdefault("gpu", {"reason": reason})
    found.setdefault("extension", {"error": reason})
    for op in OPS:
        found.setdefault(op, [{"backend": name, "reason": reason} for name in BACKENDS])
    return found


Which = tuple[str, str, str]  # op, backend, device
SELFTEST_SECONDS = 600


def selftest(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Tests every op, backend and device that the report calls available, each in a process of its own."""
    each = to_selftest(found)
    on_cpu = [which for which in each if which[2] == "cpu"]
    outcomes = dict(zip(on_cpu, selftest_in_forks(on_cpu)))
    return [outcomes[which] if which in outcomes else selftest_one(*which) for which in each]


def selftest_in_forks(each: list[Which]) -> list[dict[str, Any]]:
    """Runs _selftest in forks of one process, because importing torch takes longer than most tests."""
    flat = [part for which in each for part in which]
    command = ["illada_kernels._selftest", "--each", str(SELFTEST_SECONDS), *flat]
    lines, death = child(command, SELFTEST_SECONDS * len(each)) if each else ([], None)
    rest, outcomes = iter(lines), []
    for which in each:
        said: list[dict[str, Any]] = []
        code = None
        for line in rest:
            if "ended" in line:
                code = line["ended"]
                break
            said.append(line)
        slow = f"did not end within {SELFTEST_SECONDS} s" if code == -signal.SIGALRM else None
        outcomes.append(outcome(which, said, (death or "it was not run") if code is None else slow or death_of(code)))
    return outcomes


def outcome(which: Which, lines: list[dict[str, Any]], death: str | None) -> dict[str, Any]:
    """Returns what the selftest of one op, backend and device has said, failed if its process died."""
    result = {**dict(zip(("op", "backend", "device"), which)), "passed": False, "cases": []}
    result |= lines[-1] if lines else {"error": death or "printed nothing"}
    return result | ({"passed": False, "error": result.get("error") or death} if death else {})


def to_selftest(found: dict[str, Any]) -> list[Which]:
    """Returns (op, backend, device); the reference is what the others are compared with."""
    rows = [(op, row) for op in OPS for row in found["ops"][op] if row["backend"] != "reference"]
    return [(op, row["backend"], device) for op, row in rows for device in row.get("devices", ())]


def selftest_one(op: str, backend: str, device: str, seconds: float = SELFTEST_SECONDS) -> dict[str, Any]:
    """Runs _selftest in a process of its own, which is killed after `seconds`."""
    return outcome((op, backend, device), *child(["illada_kernels._selftest", op, backend, device], seconds))


# ---- text -----------------------------------------------------------------------------------------------------------


def text(found: dict[str, Any]) -> list[str]:
    torch, gpu, python = found["torch"], found["gpu"], found["python"]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    card = "{name}, sm {capability}, driver {driver}".format_map(gpu) if "name" in gpu else gpu["reason"]
    lines = [
        f"illada_kernels {found['illada_kernels']['version']} in {found['illada_kernels']['path']}",
        "",
        f"python     {python['version']}, {python['platform']}",
        "torch      " + torch.get("error", f"{torch.get('version')}, {torch.get('threads')} threads"),
        f"packages   {packages or 'none of ' + ', '.join(OPTIONAL)}",
        *(f"{name:<10} {version}" for name, version in found["compilers"].items()),
        f"GPU        {card}",
        *(f"           {name}={value}" for name, value in found["environment"].items()),
        *extension_lines(found["build"], found["extension"]),
        "",
        *table(found["ops"]),
    ]
    if "selftest" in found:
        lines += ["", *selftest_lines(found["selftest"])]
    return lines


def extension_lines(build: dict[str, Any], extension: dict[str, Any]) -> list[str]:
    cuda = f"CUDA for {build['cuda_archs']}" if build.get("cuda") else f"no CUDA: {build.get('cuda_reason', '?')}"
    if not build["extension"]:
        lines = [f"build      {build['reason']}"]
    else:
        lines = [f"build      {build['compiler']}; {cuda}; {build['seconds']} s"]
    lines += [f"           {note}" for note in build.get("notes", ())]
    if build.get("stale"):
        lines.append("           csrc/ has changed since: `make build`")
    working = f"works, {extension.get('cpu_isa')} instructions"
    return [*lines, "extension  " + (extension.get("error") or working)]


def table(ops: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Returns a line per op and backend; reasons, which many share, follow once each under a number."""
    lines = [f"{'op':<24} {'backend':<10} {'default order':<16} state"]
    reasons: list[str] = []

    def numbered(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"[{reasons.index(reason) + 1}]"

    for op, rows in ops.items():
        for row in rows:
            place = ", ".join(f"{device} {at}" for device, at in row.get("place", {}).items()) or "-"
            state = f"not available {numbered(row['reason'])}" if row["reason"] else "available"
            if row.get("opt_in") and "cuda" not in row["place"]:
                state += (
                    f" {numbered(row['opt_in'])}"
                    if row["reason"]
                    else f" as backend={row['backend']!r} {numbered(row['opt_in'])}"
                )
            lines.append(f"{op:<24} {row['backend']:<10} {place:<16} {state}")
    return [*lines, *(f"[{at}] {reason}" for at, reason in enumerate(reasons, 1))]


def selftest_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'op':<24} {'backend':<10} {'device':<8} selftest"]
    for row in rows:
        bad = [f"{case['case']}: {case['error']}" for case in row["cases"] if case["error"]]
        bad += [row["error"]] if row.get("error") else []
        outcome = f"passed, {len(row['cases'])} cases" if row["passed"] else "FAILED: " + "; ".join(bad)
        lines.append(f"{row['op']:<24} {row['backend']:<10} {row['device']:<8} {outcome}")
        if row.get("remembered"):
            lines.append(f"{'':<44} remembered in {row['remembered']}: now in the default order")
    return lines
