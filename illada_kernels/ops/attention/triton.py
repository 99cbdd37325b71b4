"""Attention in Triton: which calls it takes, the committed tile sizes, and the way to the kernels.

triton_fwd.py and triton_bwd.py hold the kernels and are imported at the first call: this module does without Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._gpu import triton_reason

_HEAD_DIMS = (64, 96, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def available() -> str | None:
    """None, or why Triton kernels cannot run."""
    if (reason := triton_reason()) is not None:
        return reason
    if torch.version.hip:
        return "has tile sizes for NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"


def supports(request: Any) -> str | None:
    """None, or why this call (its q, k and v) cannot run here."""
    q, v = request.q, request.v
    if q.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32, not {q.dtype}"
    if q.shape[3] not in _HEAD_DIMS or v.shape[3] != q.shape[3]:
        return f"takes q and v of a head_dim of 64, 96, 128 or 256, not {q.shape[3]} and {v.shape[3]}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, Sq, Hq, D), k, v (B, Sk, Hkv, D), bounds int32 (B or 1, Sq or 1, 4) or None for full: out, lse.

    out (B, Sq, Hq, D) in q's dtype, lse (B, Hq, Sq) float32. Memory: the results.
    """
    from . import triton_fwd

    return triton_fwd.forward(q, k, v, _plain(bounds), scale, choose(FORWARD, q))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, shaped and typed like q, k and v, of the sum of out * dout and lse * dlse (dlse may be None).

    Bitwise the same run after run. Memory: the results, and 8 bytes per row of out.
    """
    from . import triton_bwd

    tiles = choose(KEYS_BACKWARD, q), choose(QUERIES_BACKWARD, q)
    return triton_bwd.backward(dout, dlse, q, k, v, out, lse, _plain(bounds), scale, *tiles)


def _plain(bounds: Tensor | None) -> Tensor | None:
    return bounds if bounds is None or bounds.stride(2) == 1 else bounds.contiguous()


def strides(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None) -> tuple[int, ...]:
    """Batch, row and head of q, k and v; batch and row of the bounds, 0 where they are broadcast."""
    ranges = (0, 0) if bounds is None else tuple(bounds.stride(i) if bounds.shape[i] > 1 else 0 for i in (0, 1))
    return *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *ranges


def head_parts(dim: int) -> tuple[int, int]:
    """head_dim as one power of two, or a sum of two."""
    head = 1 << (dim.bit_length() - 1)
    return head, dim - head


# ---- tile sizes ------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Packed query rows, keys of a full tile and of a masked one, warps, stages of the pipeline over each of the two."""

    rows: int
    keys: int
    part: int
    warps: int
    stages: int
    masked_stages: int


Table = dict[str, dict[int, Tile]]  # family of GPUs, or float32 -> head_dim -> tile

# Chosen for registers without spills and shared memory that fits, as tests/gpu_code/triton_table.csv shows; not measured.
# "99 KiB": GPUs whose blocks have no more shared memory (sm_86, sm_89, sm_120). "float32": any GPU; no tensor cores.
FORWARD: Table = {
    "sm_80": {
        64: Tile(128, 64, 32, 4, 3, 2), 96: Tile(128, 64, 32, 4, 3, 2), 128: Tile(128, 64, 32, 8, 3, 2), 256: Tile(128, 32, 16, 8, 3, 2),
    },
    "99 KiB": {
        64: Tile(128, 64, 32, 4, 2, 2), 96: Tile(128, 32, 16, 4, 2, 2), 128: Tile(128, 32, 16, 8, 2, 2), 256: Tile(64, 32, 16, 4, 2, 2),
    },
    "sm_90": {
        64: Tile(128, 128, 64, 8, 3, 2), 96: Tile(128, 64, 32, 8, 3, 2), 128: Tile(128, 64, 32, 8, 3, 2), 256: Tile(128, 32, 16, 8, 3, 2),
    },
    "float32": {
        64: Tile(32, 32, 16, 4, 1, 1), 96: Tile(32, 32, 16, 4, 1, 1), 128: Tile(32, 32, 16, 4, 1, 1), 256: Tile(32, 16, 8, 4, 1, 1),
    },
}  # fmt: skip
KEYS_BACKWARD: Table = {  # dk and dv of a tile of keys
    "sm_80": {
        64: Tile(64, 128, 64, 8, 2, 1), 96: Tile(64, 64, 32, 4, 2, 1), 128: Tile(64, 64, 32, 4, 2, 1), 256: Tile(32, 64, 32, 8, 2, 1),
    },
    "99 KiB": {
        64: Tile(64, 64, 32, 4, 2, 1), 96: Tile(32, 64, 32, 4, 2, 1), 128: Tile(32, 64, 32, 4, 2, 1), 256: Tile(16, 32, 16, 4, 1, 1),
    },
    "sm_90": {
        64: Tile(64, 128, 64, 8, 2, 1), 96: Tile(64, 64, 32, 4, 2, 1), 128: Tile(64, 64, 32, 4, 2, 1), 256: Tile(32, 64, 32, 8, 2, 1),
    },
    "float32": {
        64: Tile(16, 32, 16, 4, 1, 1), 96: Tile(16, 32, 16, 4, 1, 1), 128: Tile(16, 32, 16, 4, 1, 1), 256: Tile(16, 16, 8, 4, 1, 1),
    },
}  # fmt: skip
QUERIES_BACKWARD: Table = {  # dq of a tile of rows
    "sm_80": {
        64: Tile(128, 64, 32, 8, 2, 1), 96: Tile(128, 32, 16, 8, 2, 1), 128: Tile(128, 32, 16, 8, 2, 1), 256: Tile(64, 32, 16, 8, 2, 1),
    },
    "99 KiB": {
        64: Tile(64, 64, 32, 4, 2, 1), 96: Tile(64, 32, 16, 4, 2, 1), 128: Tile(64, 32, 16, 4, 2, 1), 256: Tile(32, 32, 16, 4, 1, 1),
    },
    "sm_90": {
        64: Tile(128, 64, 32, 8, 2, 1), 96: Tile(128, 32, 16, 8, 2, 1), 128: Tile(128, 32, 16, 8, 2, 1), 256: Tile(64, 32, 16, 8, 2, 1),
    },
    "float32": {
        64: Tile(32, 16, 8, 4, 1, 1), 96: Tile(32, 16, 8, 4, 1, 1), 128: Tile(32, 16, 8, 4, 1, 1), 256: Tile(16, 16, 8, 4, 1, 1),
    },
}  # fmt: skip


def choose(table: Table, q: Tensor) -> Tile:
    return table["float32" if q.dtype == torch.float32 else _family(q.device)][q.shape[3]]


@functools.cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":  # Triton's interpreter
        return "sm_80"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    return "sm_90" if major in (9, 10, 11) else "99 KiB"


def every_tile(table: Table) -> Iterator[tuple[str, int, torch.dtype, Tile]]:
    """Each tile of the table once, named by what uses it; 16-bit ones as bfloat16, the first also as float16."""
    seen = set()
    for family, tiles in table.items():
        for dim, tile in tiles.items():
            dtype = torch.float32 if family == "float32" else torch.bfloat16
            if (dim, dtype, tile) not in seen:
                seen.add((dim, dtype, tile))
                yield f"{family} head_dim {dim}", dim, dtype, tile
    first = next(iter(table))
    yield f"{first} head_dim 128 float16", 128, torch.float16, table[first][128]


def aot(
    kernel: Any, dtype: torch.dtype, fixed: dict[str, Any], warps: int
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """What tests/gpu_code/triton_code.py compiles: pointers and strides divisible by 16, as they mostly are."""
    kind = {torch.float32: "*fp32:16", torch.float16: "*fp16:16", torch.bfloat16: "*bf16:16"}[dtype]
    signature = dict.fromkeys(kernel.arg_names, "i32:16")
    signature |= dict.fromkeys(("num_queries", "num_keys", "kv_heads", "packed_rows"), "i32") | {"scale": "fp32"}
    signature |= dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), kind)
    signature |= dict.fromkeys(("lse", "dlse", "log_sums", "deltas"), "*fp32:16")
    signature |= dict.fromkeys(("bounds", "hulls"), "*i32:16") | dict.fromkeys(fixed, "constexpr")
    return kernel, {name: signature[name] for name in kernel.arg_names}, fixed, {"num_warps": warps}
