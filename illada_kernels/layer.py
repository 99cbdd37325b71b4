"""What a transformer layer does between its matmuls: RMSNorm, RoPE with the cache's write, SwiGLU.

A pass asks `kernels_for` once and hands the answer to each call, because between two matmuls a look at every tensor
costs more than the arithmetic: the code for it is no longer in the processor's caches. With kernels, csrc/cpu/layer.cpp
goes over the rows once, in place of 2 to 13 operations of torch, and rounds once. Without, torch computes; this is the
specification, has gradients, runs on every device, and a compiler fuses it.
"""

from __future__ import annotations

import array
import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _dispatch
from ._extension import DTYPES, check, extension, extension_reason, pointer
from ._torch_ops import is_plain, is_traced

__all__ = ["add_rms_norm", "apply_rope", "kernels_for", "rms_norm", "rope_to_cache", "swiglu"]


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """Returns what the functions below take as `kernels`: the compiled extension, or None where torch must compute.

    Parameters
    ----------
    *tensors : Tensor
        Some of those that the pass will meet.

    Returns
    -------
    module or None
        None if a gradient is wanted, under a compiler, trace, mode or transform, with ILLADA_BACKEND=reference, without
        the extension, or if a tensor is not a plain float32, bfloat16 or float16 one on a CPU. Valid while none of this
        changes.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.layer import kernels_for
    >>> kernels_for(torch.ones(2, dtype=torch.float64)) is None
    True
    """
    if is_traced() or not is_plain(tensors) or any(not x.is_cpu or x.dtype not in DTYPES for x in tensors):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    return None if _dispatch.environment() == "reference" else _extension()


@functools.cache
def _extension() -> ModuleType | None:
    return None if extension_reason("layer_rope_cpu") else extension()[0]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, in_fp32: bool = False, *, kernels: ModuleType | None = None
) -> Tensor:
    """Computes x / sqrt(mean(x^2) + eps) * weight over the last dimension, with float32 sums.

    Parameters
    ----------
    x : Tensor (..., D)
    weight : Tensor (D,)
    eps : float
    in_fp32 : bool
        Rounds to x's dtype once, after the weight (SDAR); else before it too, as LLaDA, Dream and Qwen do.
    kernels : module, optional
        What `kernels_for` has returned.

    Returns
    -------
    Tensor (..., D)

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.layer import rms_norm
    >>> rms_norm(torch.tensor([3.0, -3.0]), torch.tensor([1.0, 2.0]), 0.0)
    tensor([ 1., -2.])
    """
    if kernels is None or not _norm_fits(x, weight):
        if in_fp32 and x.dtype != torch.float64:
            return (F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight.float()).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight
    return _norm(kernels, x.contiguous(), None, weight, eps, in_fp32)[1]


def add_rms_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float,
    in_fp32: bool = False,
    *,
    kernels: ModuleType | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns x + delta, rounded to x's dtype, and `rms_norm` of it.

    Parameters
    ----------
    x, delta : Tensor (..., D)
    weight : Tensor (D,)
    eps : float
    in_fp32 : bool
    kernels : module, optional
        What `kernels_for` has returned.

    Returns
    -------
    sum, normalised : Tensor (..., D)

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.layer import add_rms_norm
    >>> add_rms_norm(torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0]), torch.ones(2), 0.0)
    (tensor([ 3., -3.]), tensor([ 1., -1.]))
    """
    if kernels is None or x.shape != delta.shape or not _fit(delta, x) or not _norm_fits(x, weight):
        x = x + delta
        return x, rms_norm(x, weight, eps, in_fp32)
    return _norm(kernels, x.contiguous(), delta.contiguous(), weight, eps, in_fp32)


def swiglu(gate_up: Tensor, *, kernels: ModuleType | None = None) -> Tensor:
    """Computes silu(gate) * up, where gate_up (..., 2 D) holds gate and then up.

    Parameters
    ----------
    gate_up : Tensor (..., 2 D)
    kernels : module, optional
        What `kernels_for` has returned.

    Returns
    -------
    Tensor (..., D)

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.layer import swiglu
    >>> swiglu(torch.tensor([0.0, 100.0, 5.0, 2.0]))
    tensor([  0., 200.])
    """
    if kernels is None or not _fit(gate_up, gate_up) or gate_up.shape[-1] % 2:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if rows := out.numel() and out.numel() // width:
        where = (gate_up.data_ptr(), rows, width, out.data_ptr())
        check("swiglu", kernels.layer_swiglu_cpu(DTYPES[out.dtype], *where, torch.get_num_threads()))
    return out


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, kernels: ModuleType | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (x[i], x[i + D / 2]) of q and k: (a, b) becomes (a cos - b sin, b cos + a sin).

    Parameters
    ----------
    q : Tensor (B, S, heads, D)
    k : Tensor (B, S, kv_heads, D)
    cos, sin : Tensor (B or 1, S, 1, D / 2)
        torch computes in their dtype, the kernels in float32.
    kernels : module, optional
        What `kernels_for` has returned.

    Returns
    -------
    q, k : Tensor
        New ones.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.layer import apply_rope
    >>> angle = torch.tensor(torch.pi / 2).view(1, 1, 1, 1)
    >>> q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    >>> apply_rope(q, q, angle.cos(), angle.sin())[0].round().flatten()
    tensor([-0., 1.])
    """
    if kernels is None or not _rope_fits(q, k, k, cos, sin):
        return _rotated(q, cos, sin), _rotated(k, cos, sin)
    rotated = k.new_empty(k.shape)
    return _rope(kernels, q, k, None, cos, sin, rotated, None, 0, None), rotated


def rope_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int | Tensor,
    keep: Tensor | None = None,
    *,
    kernels: ModuleType | None = None,
) -> Tensor:
    """Rotates q and k as `apply_rope`, writes k and v into slots of a cache, and returns q.

    Parameters
    ----------
    q : Tensor (B, S, heads, D)
    k, v : Tensor (B, S, kv_heads, D)
    cos, sin : Tensor (B or 1, S, 1, D / 2)
    keys, values : Tensor (B, slots, kv_heads, D)
        Written in place, without a gradient.
    start : int or int64 Tensor (B,)
        The slot of a sequence's first token. An int must let all tokens fit; slots of a tensor are clamped, and of
        tokens that share one the last is there.
    keep : bool Tensor (B, S), optional
        Writes only tokens where it is true.
    kernels : module, optional
        What `kernels_for` has returned.

    Returns
    -------
    Tensor (B, S, heads, D)

    Raises
    ------
    ValueError
        For shapes or dtypes that do not fit each other, and an int start from which the tokens do not fit.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.layer import rope_to_cache
    >>> x, still = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 1)
    >>> keys, values = torch.zeros(2, 1, 3, 1, 2)
    >>> q = rope_to_cache(x, x, 2 * x, still, 0 * still, keys, values, 1)
    >>> keys.flatten().tolist(), values.flatten().tolist()
    ([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0, 0.0, 0.0])
    """
    _expect_slots(q, k, v, keys, values, start, keep)
    if kernels is not None and _rope_fits(q, k, v, cos, sin) and _slots_fit(k, keys, values, start, keep):
        return _rope(kernels, q, k, v, cos, sin, keys, values, start, keep)
    slots, length, rotated = keys.shape[1], k.shape[1], _rotated(k, cos, sin)
    for new, held in ((rotated.detach(), keys), (v.detach(), values)):
        if isinstance(start, Tensor):
            places = torch.arange(length, device=k.device)[None] + start[:, None]
            where: tuple[slice | Tensor, Tensor | slice]
            where = (torch.arange(k.shape[0], device=k.device)[:, None], places.clamp(0, slots - 1))
        else:
            where = (slice(None), slice(start, start + length))
        new = new.to(held.dtype)
        held[where] = new if keep is None else torch.where(keep[..., None, None], new, held[where])
    return _rotated(q, cos, sin)


def _expect_slots(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: int | Tensor, keep: Tensor | None
) -> None:
    batch, length, kv_heads, dim = k.shape
    slots = keys.shape[1]
    fit = q.shape == (batch, length, q.shape[2], dim) and v.shape == k.shape
    if not fit or not keys.shape == values.shape == (batch, slots, kv_heads, dim):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, keys, values))
        raise ValueError(
            "q, k, v, keys, values: expected (B, S, heads, D), twice (B, S, kv_heads, D) and twice (B, slots, "
            f"kv_heads, D), got {shapes}"
        )
    if isinstance(start, Tensor):
        if start.shape != (batch,) or start.dtype != torch.int64 or (slots == 0 < length):
            raise ValueError(
                f"start: expected an int or int64 ({batch},) and a slot for it, got {start.dtype} of shape "
                f"{tuple(start.shape)} and {slots} slots"
            )
    elif not 0 <= start <= start + length <= slots:
        raise ValueError(f"start: expected a window within {slots} slots, got {start} .. {start + length}")
    if keep is not None and (keep.shape != (batch, length) or keep.dtype != torch.bool):
        raise ValueError(f"keep: expected bool ({batch}, {length}), got {keep.dtype} of shape {tuple(keep.shape)}")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# ---- csrc/cpu/layer.cpp ----------------------------------------------------------------------------------------------


def _fit(x: Tensor, like: Tensor) -> bool:
    """Returns whether x is what a kernel may read and write beside `like`: a tensor in a CPU's memory, of its dtype."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (x.requires_grad or like.requires_grad)):
        return False
    plain = type(x) in _TYPES and type(like) in _TYPES and x.is_cpu and like.is_cpu
    return plain and x.dtype is like.dtype and x.dtype in DTYPES


_TYPES = (Tensor, torch.nn.Parameter)


def _norm_fits(x: Tensor, weight: Tensor) -> bool:
    return _fit(x, weight) and weight.shape == x.shape[-1:] and weight.untyped_storage().nbytes() > 0


def _norm(
    module: ModuleType, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """Returns x + delta (x without a delta) and its norm."""
    out, total = torch.empty_like(x), x if delta is None else torch.empty_like(x)
    dim, weight = x.shape[-1], weight.contiguous()
    code = module.layer_rms_norm_cpu(
        DTYPES[x.dtype],
        *map(pointer, (x, delta, weight)),
        *(x.numel() // dim, dim, eps, in_fp32),
        *(total.data_ptr(), out.data_ptr()),
        torch.get_num_threads(),
    )
    check("rms_norm", code)
    return total, out


def _rope_fits(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Returns whether layer_rope_cpu takes these: one dtype, heads of even width in one piece, and angles for them."""
    batch, length, _, dim = q.shape
    shape = (length, 1, dim // 2)
    return (
        _fit(q, k)
        and _fit(v, k)
        and _fit(cos, sin)
        and k.shape == v.shape == (batch, length, k.shape[2], dim)
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and dim % 2 == 0
        and cos.shape == sin.shape
        and cos.shape[1:] == shape
        and cos.shape[0] in (1, batch)
    )


def _slots_fit(k: Tensor, keys: Tensor, values: Tensor, *where: int | Tensor | None) -> bool:
    here = all(x.is_cpu for x in where if isinstance(x, Tensor))
    return here and _fit(keys, k) and _fit(values, k) and keys.stride(3) == values.stride(3) == 1


def _rope(
    module: ModuleType,
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
    """Returns the rotated q; writes keys, and values if there are any."""
    batch, length, heads, dim = q.shape
    out = q.new_empty(q.shape)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    starts = start.contiguous() if isinstance(start, Tensor) else None
    keep = None if keep is None else keep.contiguous()
    tensors = (q, k, k if v is None else v, keys, keys if values is None else values)
    strides = array.array("q", [s for x in tensors for s in x.stride()[:3]])
    strides.append(cos.stride(0) if cos.shape[0] > 1 else 0)
    code = module.layer_rope_cpu(
        DTYPES[q.dtype],
        *map(pointer, (q, k, v, cos, sin)),
        *(batch, length, heads, k.shape[2], dim),
        strides.buffer_info()[0],
        *map(pointer, (out, keys, values)),
        *(keys.shape[1], 0 if starts is not None else start),
        *map(pointer, (starts, keep)),
        torch.get_num_threads(),
    )
    check("apply_rope", code)
    for x in (keys, values):  # autograd must notice that a tensor it saved has changed
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)
    return out
