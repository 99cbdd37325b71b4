"""The floor of a case: the least time that its flops and bytes can take at the rates of this machine, and the rates."""

from __future__ import annotations

import statistics

import torch

from .measure import sample


def floor_ms(flops: float, bytes: float, rates: dict[str, float]) -> float:
    """Returns milliseconds; rates: FLOP/s of a matrix product and bytes/s of a copy."""
    return max(flops / rates["gemm"], bytes / rates["copy"]) * 1e3


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """Returns FLOP/s of a large square product of random matrices, the ceiling of compute-bound cases."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = [sample(lambda: a @ b, 1, device) for _ in range(12 if device == "cuda" else 6)]
    return 2 * n**3 / (statistics.median(times[1:]) * 1e-3)


def copy_rate(device: str, megabytes: int = 1024) -> float:
    """Returns bytes/s, read plus write, of a copy too large for the caches."""
    a = torch.randn(megabytes << 18, device=device)
    b = torch.empty_like(a)
    times = [sample(lambda: b.copy_(a), 1, device) for _ in range(12 if device == "cuda" else 6)]
    return 2 * a.numel() * 4 / (statistics.median(times[1:]) * 1e-3)


def ceilings(device: str, dtype: str) -> dict[str, float]:
    """Returns the rates that a row's floor uses, measured now. On a CPU a half-precision product may also run in
    float32."""
    dtypes = {getattr(torch, dtype), torch.float32} if device == "cpu" else {getattr(torch, dtype)}
    return {"gemm": max(gemm_rate(device, t) for t in dtypes), "copy": copy_rate(device)}
