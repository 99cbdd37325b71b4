"""Chooses the backend that runs a call: of the room's ordered tuple, most capable first, the first that can.

A GPU kernel that no committed result has proved yet is `opt_in`: it enters that order once `doctor --selftest` has
passed on the machine (_proven.py). An explicit `backend=`, or ILLADA_BACKEND in the environment, never falls back: it
raises and lists every backend's reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import _proven

logger = logging.getLogger("illada_kernels")

DEVICES: dict[str, tuple[str, ...] | None] = {  # the backends and the device types each runs on; None: every device
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "cpu": ("cpu",),
    "reference": None,
}
UNRUN = "not yet run on a GPU; `python -m illada_kernels doctor --selftest` tries it and lets it in"


@dataclass(frozen=True)
class Backend:
    """One backend of a room.

    `module()` returns, and at first imports, the room's file or folder of that name. It has available() and
    supports(problem), which return None or the reason why not, and forward(problem) and backward(problem, ...), which
    _torch_ops.py describes.
    """

    name: str
    devices: tuple[str, ...] | None
    module: Callable[[], Any]
    opt_in: str | None = None  # why it is not in the default order until the selftest has passed on this machine

    def available(self) -> str | None:
        reason: str | None = self.module().available()
        return reason

    def reason(self, device: str, problem: Any) -> str | None:
        """Returns None, or why this backend cannot run the problem on the device."""
        if self.devices is not None and device not in self.devices:
            return f"runs on {' or '.join(self.devices)}, the tensors are on {device}"
        return self.available() or self.module().supports(problem)

    def by_default(self, op: str, device: str) -> bool:
        return self.opt_in is None or (device == "cuda" and _proven.proven(op, self.name))


def backends(room: str) -> tuple[Backend, ...]:
    """Returns the backends of a room (a package's name), those of which it has a file or folder, in their default
    order. None is imported before it is asked."""

    def there(name: str) -> bool:
        spec = importlib.util.find_spec(f"{room}.{name}")
        return spec is not None and spec.has_location  # a folder of which only __pycache__ is left has none

    def backend(name: str) -> Backend:
        module = functools.cache(lambda: importlib.import_module(f"{room}.{name}"))
        return Backend(name, DEVICES[name], module, UNRUN if DEVICES[name] == ("cuda",) else None)

    return tuple(backend(name) for name in DEVICES if there(name))


class Resolved(str):
    """The name of a backend that `choose` has given: the rest of the call, its backward too, does not ask again."""


def environment() -> str:
    """Returns the backend that ILLADA_BACKEND insists on, "" if none."""
    return os.environ.get("ILLADA_BACKEND", "")


def choose(op: str, backends: tuple[Backend, ...], device: str, problem: Any, wanted: str = "") -> Backend:
    """Returns the backend that runs `problem` on `device`. `wanted` (or else ILLADA_BACKEND) insists on one.

    Raises ValueError if there is no such backend, RuntimeError if none, or not that one, can run the call.
    """
    if wanted:
        return _insist(op, backends, device, problem, wanted, "backend")
    if wanted := environment():
        return _insist(op, backends, device, problem, wanted, "ILLADA_BACKEND")
    for candidate in backends:
        if candidate.by_default(op, device) and candidate.reason(device, problem) is None:
            if candidate.name == "reference" and device != "cpu":
                _log_reference_once(op, device, reasons(op, backends, device, problem))
            return candidate
    raise RuntimeError(f"no backend of {op} can run this call:\n{reasons(op, backends, device, problem)}")


def _insist(op: str, backends: tuple[Backend, ...], device: str, problem: Any, wanted: str, said_by: str) -> Backend:
    by_name = {b.name: b for b in backends}
    if wanted not in by_name and wanted in DEVICES:
        raise RuntimeError(f"{op} has no {wanted!r} backend yet:\n{reasons(op, backends, device, problem)}")
    if wanted not in by_name:
        raise ValueError(f"{said_by}: expected one of {', '.join(by_name)} for {op}, got {wanted!r}")
    if by_name[wanted].reason(device, problem) is not None:
        raise RuntimeError(f"backend {wanted!r} cannot run this {op} call:\n{reasons(op, backends, device, problem)}")
    return by_name[wanted]


def reasons(op: str, backends: tuple[Backend, ...], device: str, problem: Any) -> str:
    def said(b: Backend) -> str:
        return b.reason(device, problem) or ("can run it" if b.by_default(op, device) else str(b.opt_in))

    return "\n".join(f"  {b.name}: {said(b)}" for b in backends)


_logged: set[tuple[str, str, str]] = set()
_logged_lock = threading.Lock()


def _log_reference_once(op: str, device: str, why: str) -> None:
    with _logged_lock:
        if (op, device, why) in _logged:
            return
        _logged.add((op, device, why))
    logger.warning("%s on %s runs on the reference backend, which is slow and stores more:\n%s", op, device, why)
