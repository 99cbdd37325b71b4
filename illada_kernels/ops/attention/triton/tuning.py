"""Chooses tile sizes of the Triton kernels: the committed tables and the choice for a call; measure.py changes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


def strides(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None) -> tuple[int, ...]:
    """Returns the strides of batch, row and head of q, k and v, then of batch and row of the bounds, 0 if broadcast."""
    ranges = (0, 0) if bounds is None else tuple(bounds.stride(i) if bounds.shape[i] > 1 else 0 for i in (0, 1))
    return *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *ranges


def head_parts(dim: int) -> tuple[int, int]:
    """Returns head_dim as one power of two, or a sum of two."""
    head = 1 << (dim.bit_length() - 1)
    return head, dim - head


class Tile(NamedTuple):
    """Packed query rows, keys of a whole tile and of a masked part, warps, and pipeline stages over either."""

    rows: int
    keys: int
    part: int
    warps: int
    stages: int
    masked_stages: int


FULL = "head_dim 64 without bounds"  # of the configurations compiled ahead of time, the one without a mask
Table = dict[str, dict[int, Tile]]  # "any" GPU, what "sm_90" and later do differently, "float32" -> head_dim -> tile

# Chosen by the compiler's report, not by measurement: no spills on sm_80, sm_90 and sm_100, shared memory within the
# 99 KiB of a block on sm_86, 89 and 120. tests/gpu_code/triton_table.csv shows the result; four tiles spill up to 40
# bytes. float32 does not use tensor cores.
FORWARD: Table = {
    "any": {
        64: Tile(128, 64, 32, 4, 3, 1),
        96: Tile(128, 32, 32, 8, 3, 1),
        128: Tile(128, 32, 32, 8, 3, 1),
        256: Tile(64, 32, 32, 8, 2, 1),
    },
    "sm_90": {128: Tile(128, 64, 32, 8, 3, 1), 256: Tile(64, 32, 16, 8, 2, 1)},
    "float32": dict.fromkeys((64, 96, 128, 256), Tile(16, 16, 16, 4, 1, 1)),
}
KEYS_BACKWARD: Table = {  # dk and dv of a tile of keys
    "any": {
        64: Tile(32, 128, 128, 8, 2, 1),
        96: Tile(16, 64, 64, 8, 2, 1),
        128: Tile(32, 64, 64, 8, 2, 1),
        256: Tile(32, 32, 32, 8, 2, 1),
    },
    "sm_90": {96: Tile(32, 64, 64, 8, 2, 1)},
    "float32": dict.fromkeys((64, 96, 128, 256), Tile(16, 16, 16, 4, 1, 1)),
}
QUERIES_BACKWARD: Table = {  # dq of a tile of rows
    "any": {
        64: Tile(128, 64, 32, 8, 2, 1),
        96: Tile(64, 32, 32, 8, 2, 1),
        128: Tile(64, 64, 32, 8, 2, 1),
        256: Tile(32, 32, 32, 8, 2, 1),
    },
    "float32": dict.fromkeys((64, 96, 128, 256), Tile(16, 16, 16, 4, 1, 1)),
}


measured: dict[tuple[int, torch.device, torch.dtype, int], Tile] = {}  # by table, device, dtype and head_dim


def choose(table: Table, q: Tensor) -> Tile:
    dim = q.shape[3]
    if (id(table), q.device, q.dtype, dim) in measured:
        return measured[id(table), q.device, q.dtype, dim]
    if q.dtype == torch.float32:
        return table["float32"][dim]
    # a block of sm_120 has less shared memory than one of sm_90
    later = q.device.type == "cuda" and 9 <= torch.cuda.get_device_capability(q.device)[0] < 12
    return table.get("sm_90", {}).get(dim, table["any"][dim]) if later else table["any"][dim]


def every_tile(table: Table) -> Iterator[tuple[str, int, torch.dtype, Tile, tuple[int, ...]]]:
    """Yields each tile of the table and the architectures that use it; 16-bit ones as bfloat16, one also as float16."""
    later = table.get("sm_90", {})
    for dim, tile in table["any"].items():
        yield f"head_dim {dim}", dim, torch.bfloat16, tile, (80,) if dim in later else (80, 90, 100)
    for dim, tile in later.items():
        yield f"head_dim {dim} from sm_90 on", dim, torch.bfloat16, tile, (90, 100)
    for dim, tile in table["float32"].items():
        yield f"head_dim {dim} float32", dim, torch.float32, tile, (80,)
    yield "head_dim 64 float16", 64, torch.float16, table["any"][64], (90,)
    yield FULL, 64, torch.bfloat16, table["any"][64], (90,)


def aot(
    kernel: Any, name: str, dtype: torch.dtype, fixed: dict[str, Any], warps: int, archs: tuple[int, ...]
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """Returns what tests/gpu_code/triton_code.py compiles: pointers and strides divisible by 16, as they mostly are."""
    if name == FULL:
        fixed = fixed | {x: None for x in ("bounds", "hulls", "dlse") if x in kernel.arg_names}
    kind = {torch.float32: "*fp32:16", torch.float16: "*fp16:16", torch.bfloat16: "*bf16:16"}[dtype]
    signature = dict.fromkeys(kernel.arg_names, "i32:16")
    signature |= dict.fromkeys(("num_queries", "num_keys", "kv_heads", "packed_rows"), "i32") | {"scale": "fp32"}
    signature |= dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), kind)
    signature |= dict.fromkeys(("lse", "dlse", "log_sums", "deltas"), "*fp32:16")
    signature |= dict.fromkeys(("bounds", "hulls"), "*i32:16") | dict.fromkeys(fixed, "constexpr")
    return kernel, {name: signature[name] for name in kernel.arg_names}, fixed, {"num_warps": warps, "archs": archs}
