"""The public row functions: they look at the tensors and hand them to the kernels of a pass, or to torch.

A pass asks `kernels_for` once and hands the answer to each call, because between two matmuls a look at every tensor
costs more than the arithmetic: the code for it is no longer in the processor's caches. Kernels (csrc/cpu/layer.cpp,
triton/) go over the rows once, in place of 2 to 13 operations of torch, and round once. Without, torch computes:
reference.py.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ... import _dispatch
from ..._extension import DTYPES
from ..._torch_ops import is_plain, is_traced
from . import problem, reference

BACKENDS = _dispatch.backends(__package__)


def kernels_for(*tensors: Tensor, backend: str | None = None) -> ModuleType | None:
    """Returns what the functions below take as `kernels`: a backend's module, or None where torch must compute.

    Parameters
    ----------
    *tensors : Tensor
        Some of those that the pass will meet.
    backend : {"triton", "cpu", "reference"}, optional
        Insists on one. Default: ILLADA_BACKEND if it names one of these, else the compiled extension on a CPU, and on a
        GPU Triton's kernels once `doctor --selftest` has let them in.

    Returns
    -------
    module or None
        None if a gradient is wanted, under a compiler, trace, mode or transform, with another ILLADA_BACKEND, or if the
        tensors are not plain float32, bfloat16 or float16 ones on one device with kernels. A call with kernels looks
        again, because in a transform they would lose derivatives, and gives torch's result where they cannot run.

    Raises
    ------
    ValueError
        For a `backend` that does not exist.
    RuntimeError
        For a `backend` that cannot run here, with every backend's reason.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.layer import kernels_for
    >>> kernels_for(torch.ones(2, dtype=torch.float64)) is None
    True
    """
    reason = _torch_alone(tensors)
    device = tensors[0].device.type if tensors else "cpu"
    if backend is not None:
        chosen = _dispatch.choose("layer", BACKENDS, device, tensors, backend)
        if reason is not None and chosen.name != "reference":
            raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")
    elif reason is not None:
        return None
    else:
        wanted = _dispatch.environment()
        able = (b for b in BACKENDS if (b.name == wanted if wanted else b.by_default("layer", device)))
        chosen = next((b for b in able if b.reason(device, tensors) is None), BACKENDS[-1])
    return None if chosen.name == "reference" else chosen.module()


def _torch_alone(tensors: tuple[Tensor, ...]) -> str | None:
    """Returns None, or why no kernel may take these tensors."""
    if is_traced() or not is_plain(tensors):
        return "a compiler, trace, mode or transform is active, or a tensor is not a plain one"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "a gradient is wanted, and kernels have none"
    return None if len({x.device for x in tensors}) < 2 else "the tensors are on several devices"


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
    if kernels is None or not _norm_fits(kernels, x, weight):
        return reference.rms_norm(x, weight, eps, in_fp32)
    normed: Tensor = kernels.norm(x, None, weight, eps, in_fp32)[1]
    return normed


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
    if kernels is None or x.shape != delta.shape or not _norm_fits(kernels, x, weight, delta):
        x = x + delta
        return x, rms_norm(x, weight, eps, in_fp32)
    both: tuple[Tensor, Tensor] = kernels.norm(x, delta, weight, eps, in_fp32)
    return both


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
    if kernels is None or not gate_up.dim() or gate_up.shape[-1] % 2 or not _fit(kernels, gate_up):
        return reference.swiglu(gate_up)
    product: Tensor = kernels.swiglu(gate_up)
    return product


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
    if kernels is not None and _rope_fits(kernels, cos, sin, q, k):
        rotated = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        call = _call(q, k, k, rotated, rotated, cos, sin)
        if call is not None:
            return kernels.rope(call, q, k, None, cos, sin, rotated, None, 0, None), rotated
    return reference.rotated(q, cos, sin), reference.rotated(k, cos, sin)


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
        Written in place, without a gradient or tangent. Each element has memory of its own, apart from that of q, k
        and v.
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
    TypeError
        For a start that is neither an int nor a Tensor, and a keep that is not a Tensor.
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
    if kernels is not None and _rope_fits(kernels, cos, sin, q, k, v, keys, values):
        call = _call(q, k, v, keys, values, cos, sin)
        if call is not None and all(x.device == q.device for x in (start, keep) if isinstance(x, Tensor)):
            _expect_window(start, keep, call.batch, call.length, call.slots)
            out: Tensor = kernels.rope(call, q, k, v, cos, sin, keys, values, start, keep)
            for x in (keys, values):  # autograd must notice that a tensor it saved has changed
                if not x.is_inference():
                    torch.autograd.graph.increment_version(x)
            return out
    _expect_slots(q, k, v, keys, values)
    _expect_window(start, keep, k.shape[0], k.shape[1], keys.shape[1])
    reference.write_to_cache(reference.rotated(k, cos, sin), keys, start, keep)
    reference.write_to_cache(v, values, start, keep)
    return reference.rotated(q, cos, sin)


def _expect_slots(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
    batch, length, kv_heads, dim = k.shape
    fit = q.shape == (batch, length, q.shape[2], dim) and v.shape == k.shape
    if not fit or not keys.shape == values.shape == (batch, keys.shape[1], kv_heads, dim):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, keys, values))
        raise ValueError(
            "q, k, v, keys, values: expected (B, S, heads, D), twice (B, S, kv_heads, D) and twice (B, slots, "
            f"kv_heads, D), got {shapes}"
        )


def _expect_window(start: int | Tensor, keep: Tensor | None, batch: int, length: int, slots: int) -> None:
    if isinstance(start, Tensor):
        if start.shape != (batch,) or start.dtype != torch.int64 or (slots == 0 < length):
            raise ValueError(
                f"start: expected an int or int64 ({batch},) and a slot for it, got {start.dtype} of shape "
                f"{tuple(start.shape)} and {slots} slots"
            )
    elif not isinstance(start, int) and not hasattr(start, "__index__"):  # as numpy's and torch's symbolic ones have
        raise TypeError(f"start: expected an int or int64 ({batch},), got {type(start).__name__}")
    elif not 0 <= start <= start + length <= slots:
        raise ValueError(f"start: expected a window within {slots} slots, got {start} .. {start + length}")
    if keep is None:
        return
    if not isinstance(keep, Tensor):
        raise TypeError(f"keep: expected a bool Tensor ({batch}, {length}), got {type(keep).__name__}")
    if keep.shape != (batch, length) or keep.dtype != torch.bool:
        raise ValueError(f"keep: expected bool ({batch}, {length}), got {keep.dtype} of shape {tuple(keep.shape)}")


# ---- what kernels may take -------------------------------------------------------------------------------------------

_TYPES = (Tensor, torch.nn.Parameter)
_forward_ad = torch.autograd.forward_ad


def _fit(kernels: ModuleType, *tensors: Tensor) -> bool:
    """Returns whether the kernels may read and write these: plain tensors of one dtype on one device of theirs."""
    dtype, device, wants = tensors[0].dtype, tensors[0].device, torch.is_grad_enabled()
    if _is_seen() or device.type != kernels.DEVICE or dtype not in DTYPES:
        return False
    for x in tensors:
        if type(x) not in _TYPES or x.dtype is not dtype or x.device != device or (wants and x.requires_grad):
            return False
    return True


def _is_seen() -> bool:
    """Returns whether a compiler, trace, mode, transform or forward-mode AD must see torch's operations, in an
    eighth of the time of `is_traced`."""
    return (
        torch.compiler.is_compiling()
        or _forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _norm_fits(kernels: ModuleType, x: Tensor, weight: Tensor, *delta: Tensor) -> bool:
    fit = _fit(kernels, x, weight, *delta) and weight.shape == x.shape[-1:]
    return fit and weight.numel() > 0 < weight.untyped_storage().nbytes() and x.dim() > 0


def _rope_fits(kernels: ModuleType, cos: Tensor, sin: Tensor, q: Tensor, *heads: Tensor) -> bool:
    return cos.device == q.device and _fit(kernels, q, *heads) and _fit(kernels, cos, sin)


def _call(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
) -> problem.Rope | None:
    shapes = (q.shape, k.shape, v.shape, keys.shape, values.shape, cos.shape, sin.shape)
    return problem.rope(shapes, q.stride(), k.stride(), v.stride(), keys.stride(), values.stride())
