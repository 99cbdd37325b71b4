"""Tells what the numbers were measured on: the device and the name of its results folder, versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from illada_kernels.doctor import build_info


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """Names a folder of results: 'Intel(R) Xeon(R) Processor, 2 threads' -> 'cpu-xeon-2c', 'NVIDIA H200' -> 'h200'."""
    name = re.sub(r"\((R|TM|C)\)|@.*?Hz|\b\d+-Core\b", " ", name, flags=re.IGNORECASE)
    threads = re.search(r", (\d+) threads$", name)
    words = re.findall(r"[a-z0-9]+", (name[: threads.start()] if threads else name).lower())
    kept = [word for word in words if word not in ("intel", "amd", "nvidia", "cpu", "processor", "with", "genuine")]
    return "-".join(["cpu", *kept, f"{threads[1]}c"] if threads else kept)


def versions() -> dict[str, str]:
    """Returns versions; on a GPU also those of CUDA, cuDNN, Triton and the driver."""
    import illada_kernels

    found = {
        "illada_kernels": illada_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        from illada_kernels import _proven

        found |= {"cuda": str(torch.version.cuda), "driver": _proven.driver()}
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        try:
            found["triton"] = metadata.version("triton")
        except metadata.PackageNotFoundError:
            pass
    return found


def commit() -> str:
    """Returns the commit, with a + if what is measured differs from it, a stale extension too; ILLADA_COMMIT where the
    checkout came without git."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--", "../csrc", "../illada_kernels", "../python", "*.py")
    head = git("rev-parse", "--short", "HEAD")
    return (
        head + ("+" if changed or build_info().get("stale") else "")
        if head
        else os.environ.get("ILLADA_COMMIT", "unknown")
    )


def gpu_limits() -> dict[str, Any]:
    """Returns what decides which cases fit: {memory, l2} in bytes, 0 where there is no GPU."""
    if not torch.cuda.is_available():
        return {"memory": 0, "l2": 0}
    properties = torch.cuda.get_device_properties(0)
    return {"memory": properties.total_memory, "l2": getattr(properties, "L2_cache_size", 64 << 20)}
