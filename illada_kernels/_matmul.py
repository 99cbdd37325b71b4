"""The large products of masked_loss and unmask: torch.mm, summed in float32.

Every product writes to a given `out`, which autocast leaves alone.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Computes out = a @ b, or out += a @ b, summed in float32. out has their dtype or float32."""
    if out.dtype == a.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _adds_to_float32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:  # in pieces that stay in the L2 cache
        for start in range(0, len(out), 1024):
            out[start : start + 1024] += torch.mm(a[start : start + 1024], b, out_dtype=out.dtype)


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether this torch adds a half-precision product to a float32 matrix (2.9 did not: it wants one
    dtype)."""
    a, out = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except RuntimeError:  # by a check on the host, before anything is launched
        return False
    return True


_sums_lock = threading.Lock()
_sums_users = 0
_sums_before: list[tuple[str, bool, bool | None]] = []  # (setting, reduced sums, split k; None where torch has no such)


def _reduced_sums(setting: str, allowed: bool, split_k: bool | None) -> None:
    """Sets whether sums may be reduced; since 2.10 by a pair, because a bool alone would allow split k again."""
    setattr(torch.backends.cuda.matmul, setting, allowed if split_k is None else (allowed, split_k))


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """Makes cuBLAS add the partial products of an element in float32, where torch by default lets it take half
    precision. Whether it may split the sum stays as the user has it."""
    global _sums_users
    flags = torch.backends.cuda.matmul
    with _sums_lock:
        if _sums_users == 0:
            names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
            _sums_before[:] = [(name, getattr(flags, name), getattr(flags, name + "_split_k", None)) for name in names]
            for name, _, split_k in _sums_before:
                _reduced_sums(name, False, split_k)
        _sums_users += 1
    try:
        yield
    finally:
        with _sums_lock:
            _sums_users -= 1
            if _sums_users == 0:
                for before in _sums_before:
                    _reduced_sums(*before)
