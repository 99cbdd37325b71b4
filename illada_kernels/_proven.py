"""Decides which GPU kernels are in the default order: those that passed `python -m illada_kernels doctor --selftest` on
this machine, and those that a committed result lets in (_committed.json, by `python -m benchmarks.on_gpu --adopt`).

Outcomes are stored in $XDG_CACHE_HOME (or ~/.cache)/illada_kernels/selftest.json under the GPU's name and driver, with
a fingerprint of the kernel. Another GPU, driver, torch, triton or kernel source needs a new selftest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "illada_kernels" / "selftest.json"


def driver() -> str:
    """Returns the version of NVIDIA's kernel module, or, if /proc does not tell, the driver's CUDA version."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        version = ctypes.c_int()
        code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))  # which torch has loaded too
        if code:
            raise RuntimeError(f"cuDriverGetVersion failed: error {code}") from None
        return f"CUDA {version.value}"


def machine() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}, driver {driver()}, {platform.system()}"


@functools.cache
def kernel(op: str, backend: str) -> str:
    """Returns a fingerprint of the code that would run: torch, the extension's sources or Triton's version, the op's
    Python files."""
    import torch

    package = Path(__file__).parent
    room = package / "ops" / op.removesuffix("_from_logits")
    parts = [str(torch.__version__)]
    if backend == "cuda":
        info = json.loads((package / "_build_info.json").read_text())
        parts += [str(info.get("sources")), str(info.get("cuda_archs"))]
        if not info.get("cuda"):
            from . import _nvrtc

            parts += ["NVRTC", _nvrtc.fingerprint()]
    else:
        parts.append(metadata.version("triton"))
    files = [*sorted(room.rglob("*.py")), *(package / f"{name}.py" for name in ("rules", "_gpu", "_matmul", "_nvrtc"))]
    code = hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]
    return " ".join([*parts, code])


def _read() -> dict[str, dict[str, str]]:
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {gpu: passed for gpu, passed in known.items() if isinstance(passed, dict)}


def committed(op: str, backend: str) -> bool:
    """Returns whether a committed result lets this kernel in on GPUs of this compute capability."""
    import torch

    if not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    let_in = json.loads(Path(__file__).with_name("_committed.json").read_text())
    return f"{op}/{backend}" in let_in.get(f"{major}.{minor}", ())


@functools.cache
def proven(op: str, backend: str) -> bool:
    """Returns whether this kernel, in its present form, has passed the selftest on this GPU and driver, or a committed
    result lets it in and it has not failed here. Reads the files once."""
    try:
        remembered, now = _read().get(machine(), {}).get(f"{op}/{backend}"), kernel(op, backend)
        return remembered == now or (remembered != f"failed {now}" and committed(op, backend))
    except Exception:  # whatever is broken there, nothing is proven
        return False


def remember(op: str, backend: str, passed: bool) -> Path:
    """Stores the outcome of a selftest. A failure overrides an earlier pass and a committed result."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):  # selftests may run side by side
        known = _read()
        entry = known.setdefault(machine(), {})
        entry[f"{op}/{backend}"] = kernel(op, backend) if passed else f"failed {kernel(op, backend)}"
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        fresh.replace(path)
    proven.cache_clear()
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
