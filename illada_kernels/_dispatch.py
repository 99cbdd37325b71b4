"""Which backend runs a call: of an ordered tuple of backends in each room, most capable first, the first that can.

A kernel that has not run on a GPU yet is `opt_in`: it enters that order once `doctor --selftest` has passed on the
machine (_proven.py). An explicit `backend=` argument, or ILLADA_BACKEND in the environment, never falls back: it raises
and lists every backend's reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import _proven

logger = logging.getLogger("illada_kernels")

KERNELS = ("cuda", "triton", "cpu", "reference")  # the backends there are; not every op has each


@dataclass(frozen=True)
class Backend:
    """`available()` and `supports(request)` give None, or the reason why not. `devices`: device types it runs on."""

    name: str
    devices: tuple[str, ...] | None  # None: every device
    available: Callable[[], str | None]
    supports: Callable[[Any], str | None]
    opt_in: str | None = None  # why it is not in the default order, until the selftest has passed on this machine

    def reason(self, device: str, request: Any) -> str | None:
        if self.devices is not None and device not in self.devices:
            return f"runs on {' or '.join(self.devices)}, the tensors are on {device}"
        return self.available() or self.supports(request)

    def by_default(self, op: str, device: str) -> bool:
        return self.opt_in is None or (device == "cuda" and _proven.proven(op, self.name))


_BY_ENVIRONMENT = "ILLADA_BACKEND="


def requested(backend: str | None) -> str:
    """What an operator carries: the argument, else what ILLADA_BACKEND says now, so that a backward is run by whatever
    ran its forward. Under torch.compile, which would freeze it, the operator looks itself."""
    import torch

    if backend or torch.compiler.is_compiling():
        return backend or ""
    wanted = os.environ.get("ILLADA_BACKEND")
    return f"{_BY_ENVIRONMENT}{wanted}" if wanted else ""


def choose(op: str, backends: tuple[Backend, ...], device: str, request: Any, backend: str | None = None) -> str:
    """The name of the backend that runs `request` on `device`. `backend` (or ILLADA_BACKEND) insists on one."""
    if wanted := backend or requested(None):
        name = wanted.removeprefix(_BY_ENVIRONMENT)
        return _insist(op, backends, device, request, name, "backend" if name == wanted else "ILLADA_BACKEND")
    for candidate in backends:
        if candidate.by_default(op, device) and candidate.reason(device, request) is None:
            if candidate.name == "reference" and device != "cpu":
                _log_reference_once(op, device, reasons(op, backends, device, request))
            return candidate.name
    raise RuntimeError(f"no backend of {op} can run this call:\n{reasons(op, backends, device, request)}")


def _insist(op: str, backends: tuple[Backend, ...], device: str, request: Any, wanted: str, said_by: str) -> str:
    by_name = {b.name: b for b in backends}
    if wanted not in by_name and wanted in KERNELS:
        raise RuntimeError(f"{op} has no {wanted!r} backend yet:\n{reasons(op, backends, device, request)}")
    if wanted not in by_name:
        raise ValueError(f"{said_by}: expected one of {', '.join(by_name)} for {op}, got {wanted!r}")
    if by_name[wanted].reason(device, request) is not None:
        raise RuntimeError(f"backend {wanted!r} cannot run this {op} call:\n{reasons(op, backends, device, request)}")
    return wanted


def reasons(op: str, backends: tuple[Backend, ...], device: str, request: Any) -> str:
    def said(b: Backend) -> str:
        return b.reason(device, request) or ("can run it" if b.by_default(op, device) else str(b.opt_in))

    return "\n".join(f"  {b.name}: {said(b)}" for b in backends)


_logged: set[tuple[str, str, str]] = set()
_logged_lock = threading.Lock()


def _log_reference_once(op: str, device: str, why: str) -> None:
    with _logged_lock:
        if (op, device, why) in _logged:
            return
        _logged.add((op, device, why))
    logger.warning("%s on %s runs on the reference backend, which is slow and stores more:\n%s", op, device, why)


@functools.cache
def extension() -> tuple[ModuleType | None, str | None]:
    """(the compiled extension, None) or (None, why it is missing). Torch comes first: both then share one OpenMP.

    Raises ValueError if ILLADA_CPU_ISA names an instruction set that there is not, or that this processor lacks.
    """
    import torch  # noqa: F401

    try:
        module = importlib.import_module("illada_kernels._C")
    except ImportError as error:
        return None, f"the compiled extension is missing ({error}); `python -m illada_kernels doctor` says why"
    wanted = os.environ.get("ILLADA_CPU_ISA")
    if wanted and wanted != module.cpu_isa:
        raise ValueError(
            f"ILLADA_CPU_ISA: expected scalar, avx2 or avx512 and no more than this processor has ({module.cpu_isa}), "
            f"got {wanted!r}; unset it or name another"
        )
    return module, None


STALE = "the compiled extension is older than this code; build it again: python -m illada_kernels._build"


def extension_reason() -> str | None:
    return extension()[1]


def native() -> ModuleType:
    module, reason = extension()
    if module is None:
        raise RuntimeError(reason)
    return module


_CPU_ERRORS = {1: "dtype not supported", 2: "argument out of range", 3: "out of memory"}


def check(op: str, code: int) -> None:
    """Raises RuntimeError unless a CPU entry point returned 0."""
    if code:
        raise RuntimeError(f"{op}: {_CPU_ERRORS.get(code, f'error {code}')}")
