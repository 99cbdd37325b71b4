"""The rows of a case: what was measured, what the limit and the best peer are, and on what machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import measure
from .counts import gpu_profile, peak_memory
from .floor import floor_ms
from .journal import Journal
from .machine import commit, device_name, versions
from .measure import CALL_LIMIT, COMPILING, Case, Job, Watched, interleaved


def run_case(
    case: Case,
    device: str,
    rates: dict[str, float],
    rounds: int = 15,
    seconds: float = 20.0,
    ours: Sequence[str] | None = None,
    journal: Journal | None = None,
    left_out: Callable[[str], str | None] = lambda name: None,
    limit: float = CALL_LIMIT,
) -> list[dict[str, Any]]:
    """Returns one row per backend of ours that ran (of those named in `ours`), or one with `backend` None if none did;
    all contenders measured interleaved in this one run. `left_out` says of a backend of ours why it is not to be run;
    `limit`: seconds that the journal gives a call.

    floor_ms is the time that the case's flops or bytes take at the measured rates, or that a `limit` function took;
    floor_ratio = floor_ms / p50, ratio = best peer's p50 / p50. `failed` says of every contender that did not run why.
    """
    key = f"{case.op}|{case.name}|{case.dtype}"
    if journal:
        journal.begin(f"{key}|inputs", COMPILING * limit)
    work = case.build()
    if ours is not None:
        work.ours = {name: job for name, job in work.ours.items() if name.split()[0] in ours}
    for name in list(work.ours):
        if reason := left_out(name):
            work.absent[name] = reason
            del work.ours[name]
    groups = (work.ours, work.peers, work.limit, work.beside)
    if len(set().union(*groups)) != sum(map(len, groups)):
        raise ValueError(f"{case.op} {case.name}: two contenders have the same name")
    watched = Watched(device, key, journal, limit)
    times = interleaved(watched.ready(work), rounds, seconds, device, watched)
    errors: dict[str, float] = {}
    for name in work.ours if work.check else ():
        if name in times:
            watched.attempt(f"{name} check", lambda name: errors.update({name: work.check(name)}), name)
    floor = floor_ms(work.flops, work.bytes, rates)
    floor = max([floor, *(times[name]["p50"] for name in work.limit if name in times)])
    peers = {name: times[name]["p50"] for name in work.peers if name in times}
    best_peer = min(peers, key=lambda name: peers[name]) if peers else None
    beside = {name: times[name]["p50"] for name in work.beside if name in times}
    shared: dict[str, Any] = {"floor_ms": floor, "peers": peers, "best_peer": best_peer}
    shared |= {"beside": beside} if beside or device == "cuda" else {}
    if device == "cuda":
        shared |= {
            "limits": {name: times[name]["p50"] for name in work.limit if name in times},
            "peer_memory": {name: memory_of(work.peers[name], watched, name, device) for name in peers},
            "timing": f"graph of {work.replayed} calls" if work.replayed else "calls",
        }
    notes = {name: note for name, note in watched.notes.items() if name in times}
    for name, value in (("facts", case.facts), ("failed", watched.failed), ("notes", notes)):
        shared |= {name: value} if value else {}
    shared |= {"clock": "processor"} if measure.clock is measure.CLOCKS["processor"] else {}
    about = {"rates": rates, "device": device_name(device), "versions": versions(), "commit": commit()}
    rows = []
    for backend in [name for name in work.ours if name in times] or [None]:
        row: dict[str, Any] = {"op": case.op, "case": case.name, "dtype": case.dtype, "backend": backend}
        if backend is None:
            names = ("ms", "tflops", "gbps", "floor_ratio", "peak_memory", "launches", "host_syncs", "ratio")
            rows.append({**row, **dict.fromkeys(names), **shared, **about})
            continue
        p50 = times[backend]["p50"]
        row |= {"ms": times[backend], "tflops": work.flops / p50 * 1e-9, "gbps": work.bytes / p50 * 1e-6}
        row |= {"floor_ratio": floor / p50, "ratio": peers[best_peer] / p50 if best_peer else None}
        row |= {"peak_memory": memory_of(work.ours[backend], watched, backend, device)}
        row |= {"error": errors[backend]} if backend in errors else {}
        row |= gpu_profile(work.ours[backend]) if device == "cuda" else {"launches": None, "host_syncs": None}
        rows.append({**row, **shared, **about})
    return rows


def memory_of(job: Job, watched: Watched, name: str, device: str) -> int:
    watched.begin(name)
    return peak_memory(job, device)
