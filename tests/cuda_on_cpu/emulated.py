"""Stands in for `illada_kernels._gpu.launch`, so that the Python around a CUDA kernel runs with it on the CPU.

kernels = CudaRows(Emulated("csrc/cuda/masked_loss_rows.cu", "csrc/cuda/masked_loss_compact.cu", seed=3))
loss, *kept = gpu.forward(kernels, problem)            # CPU tensors; KernelFault as from Kernels.run
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
    """Every tensor is copied into guarded memory, with its strides and its place between 16-byte boundaries, and back
    after the call; the same memory passed twice is one copy. `last`: the GlobalArrays of the last call by position."""

    def __init__(
        self, *sources: str | Path, text: str | None = None, defines: tuple[str, ...] = (), seed: int = 0, **run: Any
    ) -> None:
        self.kernels = [compile_kernels(source, text=text, defines=defines) for source in sources]
        self.seed, self.run = seed, run

    def __call__(self, function: str, device: torch.device, *arguments: Any) -> None:
        self.last: dict[int, GlobalArray] = {}
        passed: list[Any] = []
        known: dict[Any, GlobalArray] = {}
        for position, a in enumerate(arguments):
            if isinstance(a, Tensor):
                memory = storage_of(a)
                key = (memory.data_ptr(), memory.dtype, len(memory)) if len(memory) else position
                if key not in known:
                    known[key] = GlobalArray(memory, f"argument {position}", memory.data_ptr() % 16)
                self.last[position] = known[key]
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
