"""attention: fused bidirectional attention under masks of at most two key ranges per query."""

from __future__ import annotations

from typing import Literal, overload

import torch
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
    largest,
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
    """Computes softmax(scale * q k^T) v over the keys that `key_ranges` allows each query row.

    Parameters
    ----------
    q : (B, Sq, Hq, D) bfloat16, float16, float32 or float64 (float64 on the reference backend)
    k : (B, Sk, Hkv, D), q's dtype
        Query head h reads key head h // (Hq // Hkv); Hq is a multiple of Hkv.
    v : (B, Sk, Hkv, Dv), q's dtype
        Any strides of q, k and v with the last dimension contiguous. Any of B, Sq and Sk may be 0.
    key_ranges : KeyRanges, optional
        None: every query attends to every key.
    scale : float, optional
        Default D**-0.5. Finite as a float32, for float64 as a float64; a compiled function checks it as well.
    return_lse : bool
        Also return the log-sum-exp of each row.
    deterministic : bool
        False permits a faster backward whose gradients may differ in the last bits from run to run: "cuda" then sums
        dq across blocks, up to a head_dim of 128, in 4 D more bytes per row and head.
    backend : str, optional
        Insist on "cuda" (Hopper; bfloat16, float16), "triton" (NVIDIA GPUs from compute capability 8.0 on), both for
        D = Dv in 64, 96, 128 and 256, "cpu" or "reference". Default: the first that can; ILLADA_BACKEND also insists.

    Returns
    -------
    out : (B, Sq, Hq, Dv), q's dtype
        0 for a row with no allowed key.
    lse : (B, Hq, Sq) float32 (float64 for float64), with `return_lse`
        Natural logarithm of the sum of exponentials; -inf for a row with no allowed key.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, dtype, shape, device or stride. Nothing has run.
    RuntimeError
        The backend insisted on cannot run the call; the message lists every backend's reason.

    Notes
    -----
    Keys and values outside the union of the ranges of a batch entry's rows reach no output and no gradient, even if
    NaN or inf; neither do q and the upstream gradient of rows without keys.

    Both results are differentiable once, in reverse mode and in forward mode (`torch.func.jvp`, in plain PyTorch with
    at most 64 MiB of scores at a time); `vmap` folds into the batch. Under autocast q, k and v are cast to its dtype,
    except float64. Accumulates in float32. Never synchronises with the host.

    Memory: the results, and for the backward q, k, v, out and lse; the reference stores the (B, Hq, Sq, Sk) scores too.
    Flops: 2 * (D + Dv) per allowed pair and query head, 2.5 times that backward.

    After FlashAttention (arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import KeyRanges, attention
    >>> q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    >>> lengths = torch.tensor([6, 3])
    >>> attention(q, k, v, KeyRanges.padding(lengths, 6)).shape
    torch.Size([2, 6, 4, 8])
    """
    if torch.compiler.is_compiling() or not _fit(q, k, v):
        check_tensors(q, k, v)
    if key_ranges is not None:
        check_ranges(key_ranges, q, k.shape[1])
    if scale is None:
        scale = q.shape[3] ** -0.5
    else:
        most = largest(q.dtype)
        expect_number("scale", scale, -most, most)
    q, k, v = cast_for_autocast(q.device, q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {x.dtype}; cast one of them, or use autocast")
    bounds = None if key_ranges is None else key_ranges.bounds
    out, lse = OPERATOR(Problem(q, k, v, bounds, scale, deterministic, backend or ""))
    return (out, lse) if return_lse else out


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Returns whether `check_tensors` would find nothing, in a fifth of its time; symbolic and odd things are left to
    it."""
    if not (type(q) is type(k) is type(v) is Tensor and q.dtype == k.dtype == v.dtype and q.dtype in FLOATS):
        return False
    shapes = q.shape, k.shape, v.shape
    if not len(shapes[0]) == len(shapes[1]) == len(shapes[2]) == 4 or not q.device == k.device == v.device:
        return False
    (batch, _, heads, dim), (kv_batch, keys, kv_heads, kv_dim), (v_batch, v_keys, v_heads, dim_v) = shapes
    return (
        (batch, dim) == (kv_batch, kv_dim)
        and (v_batch, v_keys, v_heads) == (kv_batch, keys, kv_heads)
        and heads > 0 < kv_heads
        and dim > 0 < dim_v
        and heads % kv_heads == 0
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
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


def check_ranges(key_ranges: KeyRanges, q: Tensor, keys: int, what: str = "the length of k") -> None:
    if not isinstance(key_ranges, KeyRanges):
        raise TypeError(
            f"key_ranges: expected KeyRanges or None, got {type(key_ranges).__name__}; "
            "KeyRanges.from_dense and from_padding take boolean masks"
        )
    bounds = key_ranges.bounds
    expect_device("key_ranges", bounds, q.device, "q")
    if not holds(key_ranges.num_keys == keys):
        raise ValueError(f"key_ranges: expected num_keys = {shown(keys)}, {what}, got {shown(key_ranges.num_keys)}")
    expect_shape("key_ranges", bounds, (q.shape[0], 1), (q.shape[1], 1), 4, like="to match q")
