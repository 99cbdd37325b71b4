"""Freed memory: whether the C library keeps it in the process for the next allocation, or returns it to the system.

Memory that comes back from the system costs a page fault for every 4 KiB, about 1.6 microseconds on a virtual machine.
glibc returns blocks above its mmap threshold, and what is free at the end of its heap beyond its trim threshold. It
raises both itself as blocks are freed, up to 32 and 64 MiB, so that the time of a call depends on earlier calls. No
import of torch: a command calls this first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

SWITCH = "ILLADA_KEEP_MEMORY"
GLIBC_MOST = 32 << 20  # the mmap threshold that glibc reaches by itself
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's parameters


def keep_freed(largest: int = 1 << 30) -> str | None:
    """Tells glibc to keep freed blocks of up to `largest` bytes; returns None, or why it was left as it is.

    Older versions of glibc take at most 32 MiB, which they get then. `ILLADA_KEEP_MEMORY=0` and glibc's own variables
    come first. Raises ValueError for another value of that variable than 0 and 1.
    """
    if reason := _left_alone(os.environ):
        return reason
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return "the C library is not glibc"
    sizes = {largest, min(largest, GLIBC_MOST)}
    if not any(libc.mallopt(_MMAP_THRESHOLD, size) for size in sorted(sizes, reverse=True)):
        return f"glibc refused a threshold of {largest} bytes"
    libc.mallopt(_TRIM_THRESHOLD, -1)  # -1: never
    return None


def _left_alone(environment: Mapping[str, str]) -> str | None:
    switch = environment.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 or 1, got {switch!r}")
    if switch == "0":
        return f"{SWITCH}=0"
    own = [name for name in environment if name.startswith(("MALLOC_MMAP_", "MALLOC_TRIM_"))]
    own += ["GLIBC_TUNABLES"] if "glibc.malloc." in environment.get("GLIBC_TUNABLES", "") else []
    return f"{own[0]} is set" if own else None
