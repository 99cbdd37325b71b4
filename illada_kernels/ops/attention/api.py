"""attention: fused bidirectional attention under masks of at most two key ranges per query."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ..._checks import (
    FLOATS,
    cast_for_autocast,
    expect_contiguous,
    expect_device,
    expect_number,
    expect_shape,
    expect_tensor,
    holds,
    shown,
)
from ...key_ranges import KeyRanges
from .op import OPERATOR
from .problem import Problem


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges | None = None,
    *,
    scale: float | None = None,
    return_lse: bool,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys that `key_ranges` allows each query row; None allows all.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv); Hq a multiple of Hkv, query head h reads key head
    h // (Hq // Hkv). All three bfloat16, float16, float32 or float64 (float64 on the reference backend), alike; any
    strides with the last dimension contiguous. Under autocast they are cast to its dtype, except float64. `scale` is a
    float, D**-0.5 by default.

    Returns out (B, Sq, Hq, Dv) in q's dtype, and with `return_lse` also lse (B, Hq, Sq), the natural logarithm of each
    row's sum of exponentials, float32 (float64 for float64 inputs). Both are differentiable, once. Accumulates in
    float32.

    A row with no allowed key gives out = 0, lse = -inf and no gradient, whatever it holds. Keys and values outside the
    union of the ranges of a batch entry's rows reach no output and no gradient, even if NaN or inf. Any dimension B,
    Sq, Sk may be 0.

    deterministic=False permits a faster backward whose gradients may differ in the last bits from run to run: "cuda"
    then sums dq, up to a head_dim of 128, across blocks, in 4 D bytes of memory per row and head more. `backend`
    insists on one of "cuda" (Hopper, bfloat16 and float16), "triton" (NVIDIA GPUs from compute capability 8.0 on; both
    take D = Dv of 64, 96, 128 or 256), "cpu" and "reference". Default: the first that can; ILLADA_BACKEND in the
    environment also insists. The GPU backends have not yet run on a GPU: until `doctor --selftest` has passed only
    backend= reaches them.

    Raises TypeError or ValueError, before anything runs, on a wrong type, dtype, shape, device or stride; RuntimeError
    if the backend insisted on cannot run the call. Never synchronises with the host. Memory: the results, and what the
    backward needs: q, k, v, out and lse; the reference backend stores the (B, Hq, Sq, Sk) score matrix too. Flops:
    2 * (D + Dv) per allowed pair and query head, 2.5 times that backward. After FlashAttention (arXiv 2205.14135) and
    FlashAttention-2 (arXiv 2307.08691).
    """
    _check_tensors(q, k, v)
    if key_ranges is not None:
        _check_ranges(key_ranges, q, k)
    if scale is None:
        scale = q.shape[3] ** -0.5
    else:
        expect_number("scale", scale)
    q, k, v = cast_for_autocast(q.device, q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {x.dtype}; cast one of them, or use autocast")
    bounds = None if key_ranges is None else key_ranges.bounds
    out, lse = OPERATOR(Problem(q, k, v, bounds, scale, deterministic, backend or ""))
    return (out, lse) if return_lse else out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect_tensor(name, x, *FLOATS)
        expect_shape(name, x, "batch", "sequence", "heads", "head_dim")
        expect_device(name, x, q.device, "q")
        if not (holds(x.shape[2] >= 1) and holds(x.shape[3] >= 1)):
            raise ValueError(f"{name}: expected at least one head and one channel, got shape {tuple(x.shape)}")
        expect_contiguous(name, x)
    batch, _, heads, dim = q.shape
    expect_shape("k", k, batch, "Sk", "Hkv", dim, like="to match q")
    expect_shape("v", v, *k.shape[:3], "Dv", like="to match k")
    if not holds(heads % k.shape[2] == 0):
        raise ValueError(f"q: expected a multiple of k's {shown(k.shape[2])} heads, got {shown(heads)}")


def _check_ranges(key_ranges: KeyRanges, q: Tensor, k: Tensor) -> None:
    if not isinstance(key_ranges, KeyRanges):
        raise TypeError(
            f"key_ranges: expected KeyRanges or None, got {type(key_ranges).__name__}; "
            "KeyRanges.from_dense and from_padding take boolean masks"
        )
    bounds = key_ranges.bounds
    expect_device("key_ranges", bounds, q.device, "q")
    if not holds(key_ranges.num_keys == k.shape[1]):
        raise ValueError(
            f"key_ranges: expected num_keys = {shown(k.shape[1])}, the length of k, got {shown(key_ranges.num_keys)}"
        )
    expect_shape("key_ranges", bounds, (q.shape[0], 1), (q.shape[1], 1), 4, like="to match q")
