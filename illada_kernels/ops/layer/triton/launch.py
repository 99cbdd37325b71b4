"""Launches the kernels of rows.py. The host looks at shapes and strides alone, so a CUDA graph can capture each call.

Allocates the outputs; rows that need three strides or more, and angles that are not contiguous, are copied first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ...._gpu import row_strides
from .. import problem
from . import rows

BLOCK = 8192  # the longest row that a program keeps in registers
TILE = 1024  # elements of a program where rows are short, and of swiglu
HEADS = 8


def norm_options(width: int) -> dict[str, int]:
    """Returns the tile and warps of a row of this length; 4 to 16 elements a thread."""
    block = min(triton.next_power_of_2(width), BLOCK)
    count = max(TILE // block, 1)
    return {"ROWS": count, "BLOCK": block, "WHOLE": width <= block, "num_warps": max(4, count * block // 512)}


def rope_options(half: int) -> dict[str, int]:
    return {"HEADS": HEADS, "PAIRS": triton.next_power_of_2(half), "num_warps": 4}


def in_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    return row_strides(x if x.stride(-1) == 1 else x.contiguous())


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, in_fp32: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty_like(out)
    width = x.shape[-1]
    if count := x.numel() // width:
        options = norm_options(width)
        x_rows, delta_rows = in_rows(x), (None, 1, 0, 0) if delta is None else in_rows(delta)
        with torch.cuda.device_of(x):
            rows.norm_kernel[(triton.cdiv(count, options["ROWS"]),)](
                *x_rows,
                *delta_rows,
                weight.contiguous(),
                count,
                width,
                eps,
                None if delta is None else total,
                out,
                IN_FP32=in_fp32,
                **options,
            )
    return total, out


def swiglu(gate_up: Tensor) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        with torch.cuda.device_of(out):
            programs = out.numel() // width * triton.cdiv(width, TILE)
            rows.swiglu_kernel[(programs,)](*in_rows(gate_up), width, out, BLOCK=TILE, num_warps=4)
    return out


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
    batch, length, heads, kv_heads, dim, slots, strides = call
    out = torch.empty((batch, length, heads, dim), dtype=q.dtype, device=q.device)
    parts = triton.cdiv(heads, HEADS) + (1 if values is None else 2) * triton.cdiv(kv_heads, HEADS)
    if batch * length * parts * dim:
        first, starts = (0, start.contiguous()) if isinstance(start, Tensor) else (int(start), None)
        with torch.cuda.device_of(q):
            rows.rope_kernel[(batch * length, parts)](
                q,
                k,
                v,
                cos.contiguous(),
                sin.contiguous(),
                starts,
                None if keep is None else keep.contiguous().view(torch.uint8),
                first,
                slots,
                length,
                heads,
                kv_heads,
                dim // 2,
                *strides,
                out,
                keys,
                values,
                **rope_options(dim // 2),
            )
    return out


# ---- for tests/gpu_code: what to compile ahead of time ---------------------------------------------------------------

_ALIGNED = dict.fromkeys(
    "x_outer_stride x_stride delta_outer_stride delta_stride width stride outer_stride half angle_batch q_batch "
    "q_token q_head k_batch k_token k_head v_batch v_token v_head keys_batch keys_slot keys_head values_batch "
    "values_slot values_head".split(),
    "i32:16",
)
_ARGUMENTS = _ALIGNED | {"eps": "fp32", "starts": "*i64:16", "keep": "*u8:16", "cos": "*fp32:16", "sin": "*fp32:16"}


def _configuration(name: str, kernel: Any, element: str, options: dict[str, Any], absent: str = "") -> tuple[Any, ...]:
    constants = {key: options[key] for key in options if key.isupper()} | dict.fromkeys(absent.split())
    pointers = dict.fromkeys("x delta weight total out q k v keys values gate_up".split(), f"*{element}:16")
    types = _ARGUMENTS | pointers
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    return f"{name} {element}", kernel, signature, constants, {"num_warps": options["num_warps"]}


def aot_configurations() -> Iterator[tuple[Any, ...]]:
    """Yields what a layer of 4096 with heads of 128 launches, and rows too long for registers."""
    for element in ("bf16", "fp16", "fp32"):
        wide = norm_options(4096) | {"IN_FP32": False}
        yield _configuration("norm of a sum, 4096", rows.norm_kernel, element, wide)
        yield _configuration("rope to cache", rows.rope_kernel, element, rope_options(64))
        yield _configuration("swiglu", rows.swiglu_kernel, element, {"BLOCK": TILE, "num_warps": 4})
    heads, long = (norm_options(width) | {"IN_FP32": True} for width in (128, 16384))
    yield _configuration("norm of heads, 128", rows.norm_kernel, "bf16", heads, "delta total")
    yield _configuration("norm of a sum, 16384", rows.norm_kernel, "bf16", long)
    yield _configuration("rope", rows.rope_kernel, "bf16", rope_options(64), "v values starts keep")
