"""Loads the compiled extension, and holds what callers of its entry points share: dtype codes, pointers, errors."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # illada_dtype of api.h
STALE = "the compiled extension is older than this code; build it again: python -m illada_kernels._build"


@functools.cache
def extension() -> tuple[ModuleType | None, str | None]:
    """Returns (the compiled extension, None) or (None, why it is missing). Torch is loaded first, so that both share
    one OpenMP.

    Raises ValueError if ILLADA_CPU_ISA names an instruction set that does not exist, or that this processor lacks.
    """
    try:
        module = importlib.import_module("._C", __package__)
    except ImportError as error:
        return None, f"the compiled extension is missing ({error}); `python -m illada_kernels doctor` says why"
    wanted = os.environ.get("ILLADA_CPU_ISA")
    if wanted and wanted != module.cpu_isa:
        raise ValueError(
            "ILLADA_CPU_ISA: expected scalar, avx2, avx512 or avx512_bf16 and no more than this processor has "
            f"({module.cpu_isa}), got {wanted!r}; unset it or name another"
        )
    return module, None


def extension_reason(*entry_points: str) -> str | None:
    """Returns None, or why the extension, or one of these entry points, cannot be used."""
    module, reason = extension()
    if module is None:
        return reason
    return None if all(hasattr(module, name) for name in entry_points) else STALE


@functools.cache
def native() -> ModuleType:
    """Returns the compiled extension; raises RuntimeError if it is missing."""
    module, reason = extension()
    if module is None:
        raise RuntimeError(reason)
    return module


def pointer(x: Tensor | None) -> int:
    """Returns the address of x's first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


_CPU_ERRORS = {1: "dtype not supported", 2: "argument out of range", 3: "out of memory"}


def check(op: str, code: int) -> None:
    """Raises RuntimeError unless a CPU entry point returned 0."""
    if code:
        raise RuntimeError(f"{op}: {_CPU_ERRORS.get(code, f'error {code}')}")
