"""Attention under the masks of this field, forward and forward + backward, against scaled_dot_product_attention (SDPA).

SDPA gets the dense boolean mask, its favourite layout (batch, heads, sequence, dim), contiguous, and key heads already
repeated for its query heads; for full attention it also runs without a mask. The floor is the matrix-product rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import illada_kernels as ik
from illada_kernels import KeyRanges
from illada_kernels.ops.attention import cases as shapes
from illada_kernels.ops.attention.op import BACKENDS

from .measure import Case, Work, rotating


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


# ---- contenders ------------------------------------------------------------------------------------------------------
def backends(device: str) -> list[str]:
    fast = [b for b in BACKENDS if b.devices and device in b.devices and b.available() is None]
    return [b.name for b in fast] or ["reference"]


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(B, S, H, D) -> contiguous (B, heads, S, D), each head repeated for its group."""
    return x.transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1).contiguous()


def sdpa_forward(mask: Tensor | None) -> Callable[..., Any]:
    return lambda q, k, v, dout: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def our_forward(ranges: KeyRanges | None, backend: str) -> Callable[..., Any]:
    return lambda q, k, v, dout: ik.attention(q, k, v, ranges, backend=backend)


def with_gradients(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Any:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(forward(q, k, v, dout), (q, k, v), dout)

    return run


def build(shape: shapes.Case, op: str, dtype: torch.dtype, device: str) -> Work:
    sets = [shape.inputs(dtype, device, seed) for seed in range(2)]
    sdpa_sets = [tuple(heads_first(x, shape.heads) for x in inputs) for inputs in sets]
    ranges = shape.key_ranges(device)
    ones = torch.ones(1, shape.queries, shape.keys, dtype=torch.bool, device=device)
    mask = (ones if ranges is None else ranges.dense())[:, None]  # (B or 1, 1, Sq, Sk)
    ours = {name: our_forward(ranges, name) for name in backends(device)}
    peers = {"sdpa_dense_mask": sdpa_forward(mask)} | ({"sdpa": sdpa_forward(None)} if ranges is None else {})
    directions = ["forward"] if op == "attention_fwd" else ["forward", "backward"]
    if op == "attention_bwd":
        ours = {name: with_gradients(run) for name, run in ours.items()}
        peers = {name: with_gradients(run) for name, run in peers.items()}
    return Work(
        ours={name: rotating(run, sets) for name, run in ours.items()},
        peers={name: rotating(run, sdpa_sets) for name, run in peers.items()},
        flops=sum(shapes.flops(shape, direction) for direction in directions),
        bytes=sum(shapes.bytes(shape, dtype, direction) for direction in directions),
    )


def cases(device: str) -> Iterator[Case]:
    """attention_bwd is forward and backward together, as a training step runs them."""
    if device != "cpu":
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
