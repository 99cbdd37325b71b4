"""Runs the row functions in Triton: launch.py launches the kernels of rows.py, and is imported at the first call."""

from __future__ import annotations

from torch import Tensor

from ...._gpu import triton_reason
from .. import problem
from ..cpu import supports as supports

DEVICE = "cuda"  # the type of device whose memory the kernels read
available = triton_reason


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Returns x + delta (x without a delta) and its norm."""
    from . import launch

    return launch.norm(x, delta, weight, eps, in_fp32)


def swiglu(gate_up: Tensor) -> Tensor:
    from . import launch

    return launch.swiglu(gate_up)


def rope(
    call: problem.Rope,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor | None,
    start: int | Tensor,
    keep: Tensor | None,
) -> Tensor:
    """Returns the rotated q; writes keys, and values if there are any. The host waits for nothing."""
    from . import launch

    return launch.rope(call, q, k, v, cos, sin, keys, values, start, keep)
