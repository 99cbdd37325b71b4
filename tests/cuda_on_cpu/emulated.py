"""Stands in for `illada_kernels._gpu.launch`, so that the Python around a CUDA kernel runs with it on the CPU.

monkeypatch.setattr(native, "launch", Emulated("csrc/cuda/masked_loss_rows.cu", seed=3))
loss, kept = native.cuda_rows_forward(...)            # CPU tensors; KernelFault as from Kernels.run
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cuda_on_cpu.library import GlobalArray, compile_kernels


def storage_of(x: Tensor) -> Tensor:
    """The memory from x's first to its last element, in x's dtype, one-dimensional: what a pointer to x reaches."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    return x.as_strided((span,), (1,))


class Emulated:
    """Every tensor is copied into guarded memory, with its strides, and back after the call. `last`: the GlobalArrays
    of the last call by position."""

    def __init__(
        self, *sources: str | Path, text: str | None = None, defines: tuple[str, ...] = (), seed: int = 0, **run: Any
    ) -> None:
        self.kernels = [compile_kernels(source, text=text, defines=defines) for source in sources]
        self.seed, self.run = seed, run

    def __call__(self, function: str, device: torch.device, *arguments: Any) -> None:
        self.last: dict[int, GlobalArray] = {}
        passed: list[Any] = []
        for position, a in enumerate(arguments):
            if isinstance(a, Tensor):
                self.last[position] = GlobalArray(storage_of(a), f"argument {position}")
                passed.append(self.last[position])
            else:
                passed.append(ctypes.c_float(a) if isinstance(a, float) else a)
        self.adjust(function, passed)
        name = f"illada_{function}"
        kernels = next(k for k in self.kernels if k.holds(name))
        assert kernels.run(name, *passed, None, seed=self.seed, **self.run) == 0
        for position, array in self.last.items():
            if passed[position] is array:
                storage_of(arguments[position]).copy_(array.tensor)

    def adjust(self, function: str, passed: list[Any]) -> None:
        """Called before each run; a test's own class may change what is passed."""
