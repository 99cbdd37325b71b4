"""Attention under the masks of this field, forward and backward, against whoever else computes it.

On a CPU: scaled_dot_product_attention (SDPA) with the dense boolean mask and, for full attention, without, and
FlexAttention under torch.compile, which has no backward there. Each gets its favourite layout (batch, heads, sequence,
dim), contiguous; SDPA's key heads are repeated for its query heads, FlexAttention's block mask is made beforehand. On a
GPU: 16384 tokens in all, 32 query heads of 128 with 8 and 32 key heads, bfloat16, and the peers of peers/attention.py.
The floor is the matrix-product rate, or for a few queries against a cache the copy rate.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import illada_kernels as ik
from illada_kernels import KeyRanges
from illada_kernels.ops.attention import cases as shapes
from illada_kernels.ops.attention.op import BACKENDS

from ..measure import Case, Job, Work, rotating, sets_beyond_cache
from ..on_gpu import variants
from ..peers import attention as attention_peers
from ..peers import ours_on
from ..peers.attention import DOCUMENTS, GpuCase, heads_first


def _packed_128(case: shapes.Case, device: str) -> KeyRanges:
    starts = torch.arange(0, case.keys + 1, 128, dtype=torch.int32)
    return KeyRanges.packed(starts, case.keys).to(device)


def _block_diffusion_32(case: shapes.Case, device: str) -> KeyRanges:
    return KeyRanges.block_diffusion(case.keys // 2, 32, device=device)


CPU_SHAPES = (
    shapes.Case("full(2048)", 1, 2048, 2048, 8, 8, 64),
    shapes.Case("block_diffusion(1024, 32)", 1, 2048, 2048, 8, 8, 64, _block_diffusion_32),
    shapes.Case("packed(32 of 128)", 1, 4096, 4096, 8, 8, 64, _packed_128),
)


def _gpu_mask(case: shapes.Case, device: str) -> KeyRanges | None:
    assert isinstance(case, GpuCase)
    if case.kind == "block_diffusion":
        return KeyRanges.block_diffusion(case.keys // 2, case.block, device=device)
    if case.kind == "packed":
        return KeyRanges.packed(attention_peers.boundaries(device), case.keys)
    if case.kind == "cached":  # every slot used: then peers need no mask
        return KeyRanges.cached(torch.full((case.batch,), case.keys, device=device), case.queries, case.keys)
    return None


def gpu_shapes() -> tuple[list[GpuCase], list[GpuCase]]:
    """Returns (for training: forward and backward, queries against a cache: forward alone)."""
    tokens, training, cached = sum(DOCUMENTS), [], []
    for kv in (8, 32):
        heads = (32, kv, 128, _gpu_mask)
        for s in (16384, 8192, 4096, 2048, 1024):
            name = f"full_{s // 1024}k_kv{kv}"
            training.append(GpuCase(name, tokens // s, s, s, *heads, kind="full", flex=kv == 8 and s in (2048, 8192)))
        for block in (32, 4):
            name = f"block_diffusion_4k_b{block}_kv{kv}"
            training.append(
                GpuCase(name, 2, 8192, 8192, *heads, kind="block_diffusion", block=block, flex=kv == 8 or block == 32)
            )
        training.append(GpuCase(f"packed_16k_kv{kv}", 1, tokens, tokens, *heads, kind="packed", flex=kv == 8))
        for batch, keys, new in ((b, k, n) for b in (16, 1) for k in (16384, 4096, 1024) for n in (32, 64)):
            name = f"cached_{keys // 1024}k_q{new}_b{batch}_kv{kv}"
            cached.append(GpuCase(name, batch, new, keys, *heads, kind="cached", flex=kv == 8 and keys == 16384))
    for dim in (64, 96, 256):
        heads = (4096 // dim, 4096 // dim, dim, _gpu_mask)
        training.append(GpuCase(f"full_8k_d{dim}", 2, 8192, 8192, *heads, kind="full"))
    return training, cached


FLEX = "flex, compiled"
FASTER = " deterministic=False"  # after a backend's name: its backward of other sums every run


# ---- a CPU ----------------------------------------------------------------------------------------------------------
def backends(device: str) -> list[str]:
    fast = [b for b in BACKENDS if b.devices and device in b.devices and b.available() is None]
    return [b.name for b in fast] or ["reference"]


def sdpa_forward(mask: Tensor | None) -> Callable[..., Any]:
    return lambda q, k, v, dout: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def our_forward(ranges: KeyRanges | None, contender: str) -> Callable[..., Any]:
    backend, exact = contender.split()[0], FASTER not in contender
    return variants.call(
        contender, lambda q, k, v, dout: ik.attention(q, k, v, ranges, deterministic=exact, backend=backend)
    )


def with_gradients(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Any:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(forward(q, k, v, dout), (q, k, v), dout)

    return run


def build(shape: shapes.Case, op: str, dtype: torch.dtype, device: str) -> Work:
    sets = [shape.inputs(dtype, device, seed) for seed in range(2)]
    layout = heads_first(shape.heads)
    sdpa_sets = [tuple(layout(x) for x in inputs) for inputs in sets]
    ranges = shape.key_ranges(device)
    ones = torch.ones(1, shape.queries, shape.keys, dtype=torch.bool, device=device)
    mask = (ones if ranges is None else ranges.dense())[:, None]  # (B or 1, 1, Sq, Sk)
    ours = {name: our_forward(ranges, name) for name in backends(device)}
    peers = {"sdpa_dense_mask": sdpa_forward(mask)} | ({"sdpa": sdpa_forward(None)} if ranges is None else {})
    flex = {}
    if op == "attention_fwd" and device == "cpu":
        attend = attention_peers.flex_on_cpu(shape, ranges)
        grouped_sets = [tuple(attention_peers.grouped(x) for x in inputs) for inputs in sets]
        flex = {FLEX: rotating(lambda q, k, v, dout: attend(q, k, v), grouped_sets)}
    directions = ["forward"] if op == "attention_fwd" else ["forward", "backward"]
    if op == "attention_bwd":
        ours = {name: with_gradients(run) for name, run in ours.items()}
        peers = {name: with_gradients(run) for name, run in peers.items()}
    return Work(
        ours={name: rotating(run, sets) for name, run in ours.items()},
        peers={name: rotating(run, sdpa_sets) for name, run in peers.items()} | flex,
        absent={} if flex or device != "cpu" else {FLEX: "FlexAttention has no backward on a CPU"},
        flops=sum(shapes.flops(shape, direction) for direction in directions),
        bytes=sum(shapes.bytes(shape, dtype, direction) for direction in directions),
    )


# ---- a GPU ----------------------------------------------------------------------------------------------------------
DIRECTIONS = {"forward": ("forward",), "backward": ("backward",), "forward+backward": ("forward", "backward")}


def backward_alone(forward: Callable[..., Any], sets: list[tuple[Tensor, ...]]) -> Job:
    """Gradients of outputs that are there already, one graph per set of inputs, made at the first call."""
    pulls: list[tuple[Tensor, list[Tensor], Tensor]] = []
    turn = itertools.count()

    def job() -> Any:
        if not pulls:
            for *qkv, dout in sets:
                leaves = [x.detach().requires_grad_() for x in qkv]
                pulls.append((forward(*leaves, dout), leaves, dout))
        out, leaves, dout = pulls[next(turn) % len(pulls)]
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return job


def job_of(direction: str, forward: Callable[..., Any], sets: list[tuple[Tensor, ...]]) -> Job:
    if direction == "backward":
        return backward_alone(forward, sets)
    return rotating(forward if direction == "forward" else with_gradients(forward), sets)


def build_on_gpu(shape: GpuCase, direction: str, dtype: torch.dtype, device: str, quick: bool = False) -> Work:
    flops, moved = cost(shape, direction, dtype)
    count = sets_beyond_cache(moved, device)
    sets = [shape.inputs(dtype, device, seed) for seed in range(count)]
    ranges = shape.key_ranges(device)
    if direction == "backward":  # FlexAttention compiles for long: once with gradients is enough
        shape = dataclasses.replace(shape, flex=False)
    found = attention_peers.find(shape, sets[0], quick)

    @functools.cache  # peers of one layout share their inputs
    def laid_out(layout: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, ...]]:
        return [tuple(layout(x) for x in inputs) for inputs in sets]

    def peer(layout: Callable[[Tensor], Tensor], attend: Callable[..., Tensor]) -> Job:
        return job_of(direction, lambda q, k, v, dout: attend(q, k, v), laid_out(layout))

    names, absent = ours_on(BACKENDS, device)
    if direction != "forward" and "cuda" in names and shape.head_dim <= 128:  # beyond it is the same path
        names.insert(names.index("cuda") + 1, "cuda" + FASTER)
    if direction == "forward" and "cuda" in names:
        names += variants.measured(shape.name)
    check = None if direction == "backward" else lambda name: error_of(name, ranges, sets[-1], direction)
    return Work(
        check=check,
        ours={name: job_of(direction, our_forward(ranges, name), sets) for name in names},
        peers={name: peer(*how) for name, how in found.calls.items()},
        beside={name: peer(*how) for name, how in found.beside.items()},
        absent=found.absent | absent,
        notes=found.notes,
        flops=flops,
        bytes=moved,
        replayed=count if shape.kind == "cached" else 0,
    )


def error_of(backend: str, ranges: KeyRanges | None, inputs: tuple[Tensor, ...], direction: str) -> float:
    """Returns ||ours - exact|| / ||exact|| in the middle 64 rows and the last 64 of the last batch entry, the larger:
    of out, with the backward of dq; exact in float32 of the same inputs."""
    q, k, v, dout = inputs
    ours = (our_forward if direction == "forward" else our_gradients)(ranges, backend)(*inputs)
    entry, rows, errors = slice(len(q) - 1, len(q)), q.shape[1], []
    k32, v32 = k[entry].float(), v[entry].float()
    for first in (max(rows // 2 - 32, 0), max(rows - 64, 0)):
        here = slice(first, min(first + 64, rows))
        some = q[entry, here].float().requires_grad_(direction != "forward")
        exact, _ = shapes.plain(some, k32, v32, ranges and ranges[entry, here], q.shape[3] ** -0.5)
        if direction != "forward":
            (exact,) = torch.autograd.grad(exact, some, dout[entry, here].float())
        difference = ours[entry, here].float() - exact
        errors.append(difference.norm() / exact.norm())
    return float(torch.stack(errors).max())  # NaN if one is


def our_gradients(ranges: KeyRanges | None, backend: str) -> Callable[..., Tensor]:
    return lambda *inputs: with_gradients(our_forward(ranges, backend))(*inputs)[0]


def cost(shape: GpuCase, direction: str, dtype: torch.dtype) -> tuple[float, float]:
    flops = sum(shapes.flops(shape, each) for each in DIRECTIONS[direction])
    return flops, sum(shapes.bytes(shape, dtype, each) for each in DIRECTIONS[direction])


def gpu_case(shape: GpuCase, direction: str, quick: bool = False) -> Case:
    op = "attention_fwd" if direction == "forward" else "attention_bwd"
    flops, moved = cost(shape, direction, torch.bfloat16)
    density = shape.pairs() / (shape.batch * shape.queries * shape.keys)
    facts = {"kind": shape.kind, "direction": direction, "length": shape.keys, "queries": shape.queries}
    facts |= {"batch": shape.batch, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    facts |= {"density": density, "flops": flops, "bytes": moved}
    shown = shape.kind in ("block_diffusion", "packed") or shape.keys == 16384 or shape.keys == 4096 == shape.queries
    facts["headline"] = shape.kv_heads == 8 and direction != "backward" and shown
    name = shape.name if direction == "forward" else f"{shape.name} {direction}"
    return Case(op, name, "bfloat16", lambda: build_on_gpu(shape, direction, torch.bfloat16, "cuda", quick), facts)


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """Yields cases: attention_bwd is forward and backward together, as a training step runs them; on a GPU the backward
    alone too."""
    if device == "cuda":
        training, cached = gpu_shapes()
        for shape in (*training, *cached):
            yield gpu_case(shape, "forward", quick)
        for shape in training:
            for direction in ("backward", "forward+backward"):
                yield gpu_case(shape, direction, quick)
        return
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

    def case(shape: shapes.Case, op: str, dtype: torch.dtype) -> Case:
        return Case(op, shape.name, names[dtype], lambda: build(shape, op, dtype, device))

    for op in ("attention_fwd", "attention_bwd"):
        for dtype in names:
            for shape in CPU_SHAPES:
                yield case(shape, op, dtype)
        for shape in shapes.CPU_CASES:
            yield case(shape, op, torch.float32)
