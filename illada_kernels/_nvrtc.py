"""Compiles and launches the CUDA row kernels by NVRTC, through CuPy, where the extension was built without nvcc.

A kernel is compiled at its first use (about a second). CuPy caches the binary on disk ($CUPY_CACHE_DIR, else ~/.cupy);
the key is its text, options, architecture and NVRTC's version. ops/<op>/nvrtc.py repeats in Python which kernel an
entry point of api.h launches and with what grid, because the host code beside the kernels is C++ for nvcc.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .ops import OPS

FOLDERS = ("nvrtc", "cuda", "include")  # of csrc, searched in this order: nvrtc stands in for the host's headers


class Launch(NamedTuple):
    """One kernel launch: what an entry point of api.h does."""

    source: str  # in csrc/cuda
    kernel: str  # the name in its source file: "rows_fwd<float>"
    grid: tuple[int, ...]
    block: int
    smem: int  # bytes of dynamic shared memory
    arguments: tuple[Any, ...]  # NumPy scalars and structures of the parameters' types; plain ints are 64-bit


def sources() -> Path:
    """Returns the folder csrc: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "_csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


@functools.cache
def fingerprint() -> str:
    """Returns a hash of every file that a kernel may include, because CuPy's cache key leaves included files out."""
    digest = hashlib.sha256()
    files = [p for folder in FOLDERS for p in (sources() / folder).rglob("*") if p.is_file()]
    for path in sorted(p for p in files if not p.name.endswith("_sm90a.cu")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# ---- requirements ----------------------------------------------------------------------------------------------------


@functools.cache
def reason() -> str | None:
    """Returns None, or what NVRTC lacks here."""
    cuda = (torch.version.cuda or "13").partition(".")[0]
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # a CuPy built for another NumPy or CUDA may raise anything
        return f"cupy cannot be imported ({type(error).__name__}: {error}); `pip install 'illada-kernels[cupy{cuda}]'`"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        package = "nvidia-cuda-nvrtc-cu12" if cuda == "12" else "nvidia-cuda-nvrtc"
        return f"CuPy finds no NVRTC ({type(error).__name__}: {str(error)[:200]}); `pip install {package}`"
    return None


def options() -> tuple[str, ...]:
    """Returns NVRTC's options. CuPy adds the architecture, -ftz=true and --device-as-default-execution-space."""
    return ("-std=c++17", *(f"-I{sources() / folder}" for folder in FOLDERS))


# ---- compiling and launching -----------------------------------------------------------------------------------------


def program(source: str) -> str:
    return f'// {fingerprint()}\n#include "{source}"\n'


@functools.cache
def kernel(source: str, name: str) -> Any:
    """Returns a cupy.RawKernel, which compiles and loads itself once per device."""
    cupy = importlib.import_module("cupy")
    module = cupy.RawModule(code=program(source), options=options(), name_expressions=(name,))
    return module.get_function(name)


def launch(entry: str, device: torch.device, *arguments: Any) -> None:
    """Launches what the extension's entry point would, on the current stream of `device`. Pointers are integers."""
    op = next(room for room in OPS.values() if entry.startswith(room))
    how: Launch = getattr(importlib.import_module(f".ops.{op}.nvrtc", __package__), entry)(*arguments)
    if 0 in how.grid:
        return  # CuPy would launch one block
    cupy = importlib.import_module("cupy")
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        stream = cupy.cuda.ExternalStream(torch._C._cuda_getCurrentRawStream(index), index)
        with cupy.cuda.Device(index), stream:
            function = kernel(how.source, how.kernel)
            if how.smem > 48 << 10:  # more must be asked for
                function.max_dynamic_shared_size_bytes = how.smem
            function(how.grid, (how.block,), how.arguments, shared_mem=how.smem)
