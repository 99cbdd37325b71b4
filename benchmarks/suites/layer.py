"""A layer between its matmuls: two RMSNorms (one with the residual), RoPE with the cache's write, SwiGLU, of iLLaDA-8B.

The peers are the same expressions in torch's operations, and compiled by torch.compile. The floor reads every input and
writes every output once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from illada.config import ModelConfig
from torch import Tensor

from illada_kernels import layer
from illada_kernels.ops.layer import BACKENDS

from ..measure import Case, Job, Work, rotating, sets_beyond_cache
from ..peers import ours_on

SLOTS = 2048
EPS = 1e-5


class Inputs(NamedTuple):
    h: Tensor  # (B, S, dim)
    attended: Tensor
    weight: Tensor
    qkv: Tensor  # (B, S, heads + 2 kv_heads, head_dim)
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    start: Tensor
    gate_up: Tensor


Function = Callable[[Inputs, tuple[int, int, int], ModuleType | None], tuple[Tensor, ...]]


def norm(x: Inputs, heads: tuple[int, int, int], kernels: ModuleType | None) -> tuple[Tensor, ...]:
    return layer.add_rms_norm(x.h, x.attended, x.weight, EPS, kernels=kernels)


def rope(x: Inputs, heads: tuple[int, int, int], kernels: ModuleType | None) -> tuple[Tensor, ...]:
    q, k, v = x.qkv.split_with_sizes(heads, 2)
    return (layer.rope_to_cache(q, k, v, x.cos, x.sin, x.keys, x.values, x.start, kernels=kernels),)


def swiglu(x: Inputs, heads: tuple[int, int, int], kernels: ModuleType | None) -> tuple[Tensor, ...]:
    return (layer.swiglu(x.gate_up, kernels=kernels),)


def whole(x: Inputs, heads: tuple[int, int, int], kernels: ModuleType | None) -> tuple[Tensor, ...]:
    first = layer.rms_norm(x.h, x.weight, EPS, kernels=kernels)
    return (first, *rope(x, heads, kernels), *norm(x, heads, kernels), *swiglu(x, heads, kernels))


FUNCTIONS: dict[str, Function] = {"layer": whole, "norm": norm, "rope": rope, "swiglu": swiglu}


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """Yields `layer_4x32`: all of it, for 4 sequences of 32 rows; norm, rope and swiglu: parts of it."""
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    for batch in (1, 4, 32) if device == "cuda" else (1,):
        for name in FUNCTIONS:
            for dtype in dtypes:
                yield Case("layer", f"{name}_{batch}x32", dtype, partial(build, name, batch, 32, dtype, device))


def inputs(config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: str) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    heads, few, dim = config.n_heads, config.n_kv_heads, config.head_dim
    angle = torch.rand(batch, length, 1, dim // 2, device=device)
    return Inputs(
        *(randn(batch, length, config.dim), randn(batch, length, config.dim), randn(config.dim)),
        *(randn(batch, length, heads + 2 * few, dim), angle.cos(), angle.sin()),
        *torch.zeros(2, batch, SLOTS, few, dim, dtype=dtype, device=device),
        torch.randint(0, SLOTS - length, (batch,), device=device),
        randn(batch, length, 2 * config.ffn_dim),
    )


def moved(name: str, config: ModelConfig, rows: int, itemsize: int) -> float:
    """Bytes read and written."""
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    entries = {"norm": 4 * config.dim, "rope": 2 * heads, "swiglu": 3 * config.ffn_dim}
    entries["layer"] = sum(entries.values()) + 2 * config.dim
    return float(entries[name] * rows * itemsize)


def build(name: str, batch: int, length: int, dtype: str, device: str) -> Work:
    torch.manual_seed(0)
    config = ModelConfig.preset("iLLaDA-8B")
    heads, kind = (config.n_heads, config.n_kv_heads, config.n_kv_heads), getattr(torch, dtype)
    bytes = moved(name, config, batch * length, kind.itemsize)
    sets = [(inputs(config, batch, length, kind, device),) for _ in range(min(sets_beyond_cache(bytes, device), 16))]
    function = FUNCTIONS[name]

    def job(run: Function, kernels: ModuleType | None) -> Job:
        return torch.no_grad()(rotating(lambda x: run(x, heads, kernels), sets))

    names, absent = ours_on(BACKENDS, device)
    kernels = {backend: layer.kernels_for(*sets[0][0][:3], backend=backend) for backend in names}
    peers = {"PyTorch": job(function, None), "PyTorch, compiled": job(torch.compile(function, dynamic=False), None)}
    work = Work({backend: job(function, module) for backend, module in kernels.items()}, peers, 0.0, bytes)
    work.absent, work.replayed = absent, len(sets)
    work.check = lambda backend: error_of(function, sets[0][0], heads, kernels[backend])
    return work


@torch.no_grad()
def error_of(function: Function, x: Inputs, heads: tuple[int, int, int], kernels: ModuleType | None) -> float:
    """Returns the relative error of the results and of the cache against float32 of the same inputs, the largest."""
    held = [y.clone() for y in (x.keys, x.values)]
    ours = (*function(x._replace(keys=held[0], values=held[1]), heads, kernels), *held)
    up = Inputs(*(y.float() if y.is_floating_point() else y.clone() for y in x))
    exact = (*function(up, heads, None), up.keys, up.values)
    return max(float((a.float() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(ours, exact))
