"""Says why GPU backends cannot run here, and calls the extension's CUDA entry points."""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from . import _nvrtc
from ._extension import extension, extension_reason, native


@functools.cache
def device_reason() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA GPU that torch can use"


def cuda_reason() -> str | None:
    """Returns None, or why the extension's CUDA kernels cannot run."""
    if (reason := extension_reason()) is not None:
        return reason
    return device_reason() if native().with_cuda else "the extension was built without CUDA"


def hopper_reason() -> str | None:
    """Returns None, or why the sm_90a kernels cannot run: only compute capability 9.0 has wgmma."""
    if (reason := cuda_reason()) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"needs a GPU of compute capability 9.0, this one has {major}.{minor}"


def rows_reason() -> str | None:
    """Returns None, or why the row kernels (plain .cu files) cannot run. NVRTC compiles them if nvcc did not."""
    if (reason := cuda_reason()) is None or device_reason() is not None:
        return reason
    return None if (missing := _nvrtc.reason()) is None else f"{reason}; NVRTC cannot compile them either: {missing}"


@functools.cache
def triton_reason() -> str | None:
    """Returns None, or why Triton kernels cannot run here."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a Triton built for another Python or torch may raise anything
        return f"triton cannot be imported ({type(error).__name__}: {error}); `pip install triton`"
    return device_reason()


def _plain(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, ctypes.Structure):
        return ctypes.addressof(argument)
    return 0 if argument is None else argument


def launch(function: str, device: torch.device, *arguments: Any) -> None:
    """Launches a CUDA entry point on the current stream of `device`.

    Without CUDA in the extension, NVRTC compiles and launches the same kernel. Tensors and ctypes structures are passed
    as pointers, None as null. Raises RuntimeError with CUDA's message if the launch fails.
    """
    plain = [_plain(a) for a in arguments]
    module, _ = extension()
    if module is None or not module.with_cuda:
        return _nvrtc.launch(function, device, *plain)
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        code = getattr(module, function)(*plain, stream)
    if code:
        raise RuntimeError(f"{function}: {torch.cuda.CudaError(code)}")


def row_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Returns (x, inner, outer_stride, stride): row r of the flattened leading dimensions starts at element
    r // inner * outer_stride + r % inner * stride. Copies x only if its rows need three strides or more."""
    dims: list[tuple[int, int]] = []  # (size, stride), outermost first, neighbours merged
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return row_strides(x.contiguous())
    if len(dims) == 2:
        return x, dims[1][0], dims[0][1], dims[1][1]
    return x, max(x.shape[:-1].numel(), 1), 0, dims[0][1] if dims else x.shape[-1]
