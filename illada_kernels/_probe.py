"""Answers `doctor` in a process of its own, because importing a broken torch or extension can end the process.

Prints one JSON line as each stage begins and one with what it found, so that the last line tells where it died.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
from collections.abc import Callable
from typing import Any

from ._dispatch import DEVICES
from .ops import OPS

BACKENDS = tuple(DEVICES)


def why(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Returns (result, None) or (None, reason). Broken installations raise anything, SystemExit included."""
    try:
        return function(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, why(error)


def torch_facts() -> dict[str, Any]:
    torch, error = attempt(lambda: importlib.import_module("torch"))
    if error:
        return {"error": error}
    version, error = attempt(lambda: str(torch.__version__))
    if error:
        return {"error": f"what is imported as torch has no version ({error})"}
    return {
        "version": version,
        "cuda": attempt(lambda: torch.version.cuda)[0],
        "threads": attempt(lambda: torch.get_num_threads())[0],
    }


def gpu_facts() -> dict[str, Any]:
    def facts() -> dict[str, Any]:
        import torch

        from . import _proven

        if not torch.cuda.is_available():
            built = torch.version.cuda is not None
            return {"reason": "torch sees no CUDA device" if built else "this torch is built without CUDA"}
        major, minor = torch.cuda.get_device_capability()
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = torch.cuda.get_device_name()
        return {"name": name, "capability": f"{major}.{minor}", "memory_gib": round(gib, 1), "driver": _proven.driver()}

    found, error = attempt(facts)
    return found if found is not None else {"reason": error}


def extension_facts() -> dict[str, Any]:
    module, error = attempt(lambda: importlib.import_module("illada_kernels._C"))
    if error:
        return {"error": error}
    names = ("__file__", "cpu_isa", "with_cuda")
    return {name.strip("_"): getattr(module, name, None) for name in names}


def op_facts(op: str) -> list[dict[str, Any]]:
    """Returns one row per backend, in the op's default order: reason None if available, its place in the order per
    device."""
    room, error = attempt(lambda: importlib.import_module(f"illada_kernels.ops.{OPS[op]}"))
    if error:
        return [{"backend": name, "reason": f"the op cannot be imported: {error}"} for name in BACKENDS]
    import torch

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    places = dict.fromkeys(devices, 0)
    rows: list[dict[str, Any]] = []
    for backend in room.BACKENDS:
        reason, broken = attempt(backend.available)
        row = {"backend": backend.name, "reason": reason or broken, "opt_in": backend.opt_in}
        row |= {"devices": [], "place": {}}
        for device in devices if row["reason"] is None else ():
            if backend.devices is None or device in backend.devices:
                row["devices"].append(device)
                if backend.by_default(op, device):
                    places[device] += 1
                    row["place"][device] = places[device]
        rows.append(row)
    absent = [name for name in BACKENDS if name not in [row["backend"] for row in rows]]
    return [*rows, *({"backend": name, "reason": "there is no such kernel for this op"} for name in absent)]


def main() -> None:
    stages: dict[str, Callable[[], Any]] = {"torch": torch_facts, "gpu": gpu_facts, "extension": extension_facts}
    for op in OPS:
        stages[op] = functools.partial(op_facts, op)
    for stage, function in stages.items():
        print(json.dumps({"stage": stage}), flush=True)
        print(json.dumps({"stage": stage, "found": function()}), flush=True)


if __name__ == "__main__":
    main()
    gc.freeze()  # otherwise the end looks through all of torch
