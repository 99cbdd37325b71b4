"""scaled_dot_product_attention: torch's signature and layout over `attention`, so that it can be replaced by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..._checks import FLOATS, expect_device, expect_number, expect_tensor, holds, known
from ..._remembered import Remembered, allows
from ..._streams import is_captured, reuse
from ...key_ranges import KeyRanges
from .api import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | KeyRanges | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Calls `attention` with the arguments and the layout, heads first, of torch's scaled_dot_product_attention.

    Parameters
    ----------
    query : (..., Hq, Sq, D)
    key : (..., Hkv, Sk, D)
    value : (..., Hkv, Sk, Dv)
        Strides are free but for the last dimension. Three dimensions are a batch of single heads, with enable_gqa the
        heads of one sequence. Leading dimensions are broadcast, heads too without enable_gqa.
    attn_mask : KeyRanges or Tensor, optional
        A tensor is broadcast to (..., Hq, Sq, Sk). Bool: True where a query may attend. Floating-point: added to the
        scores, and 0 or at most finfo(dtype).min / 2 everywhere. At most two runs of keys a query, the same for all
        heads.
    dropout_p : float
        Only 0.
    is_causal : bool
        Query i sees keys 0 .. i whatever their numbers, as in torch. `KeyRanges.causal(num_queries, num_keys)` is
        aligned for a cache: the last query sees all keys.
    scale : float, optional
        Default D**-0.5.
    enable_gqa : bool
        Permits fewer key heads, and fewer value heads, than query heads, numbers that divide it; one that all share
        needs no permission. Numbers that differ between key and value cost a copy with as many heads as query has.
    backend : str, optional
        As in `attention`.

    Returns
    -------
    Tensor
        (..., Hq, Sq, Dv). A query that may attend to no key gives 0.

    Raises
    ------
    TypeError, ValueError
        As `attention` raises; also for a dropout, for a mask beside is_causal, for a bias that is not a mask, and for a
        mask with a query of more than two runs or with heads that differ.

    Notes
    -----
    Reads a tensor mask once, with one host synchronisation, and remembers the result while the mask lives and is not
    written to, so that 32 layers that share a mask synchronise once. A write is seen by the tensor's version, and on
    the CPU, where it may go past the version (.data, NumPy), by a CRC-32 of the mask as well. On a GPU a write through
    .data or DLPack is not seen: hand over a clone, or KeyRanges, which are never remembered. Inference tensors have no
    version and are read in each call; a compiled graph asserts what it reads when it runs. While a CUDA graph is
    captured a tensor mask raises. Nothing else synchronises.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import scaled_dot_product_attention
    >>> q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).shape
    torch.Size([1, 4, 6, 8])
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        expect_tensor(name, x, *FLOATS)
        if x.dim() < 3:
            raise ValueError(f"{name}: expected (..., heads, sequence, head_dim), got {tuple(x.shape)}")
    expect_number("dropout_p", dropout_p)
    if not known(dropout_p == 0):
        raise ValueError(f"dropout_p: expected 0, got {dropout_p}; the kernels have no dropout: set it to 0")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None with is_causal=True, got both; use KeyRanges.causal(s) & ranges")
    rank = max(query.dim(), key.dim(), value.dim())
    query, key, value = (x if x.dim() == rank else x[(None,) * (rank - x.dim())] for x in (query, key, value))
    if not (_alike(query, key) and _alike(query, value)):
        query, key, value = (_grouped if enable_gqa else _broadcast)(query, key, value)
    shape = (*query.shape[:-1], key.shape[-2])  # of the scores
    q, k, v = (_four_dimensions(x, enable_gqa) for x in (query, key, value))
    ranges: KeyRanges | None
    if is_causal:
        ranges = _causal(q.shape[2], k.shape[2], q.device)
    elif isinstance(attn_mask, Tensor):
        expect_device("attn_mask", attn_mask, query.device, "query")
        ranges = _remembered(attn_mask, shape, enable_gqa)
    else:
        ranges = attn_mask  # attention checks its type
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = attention(q, k, v, ranges, scale=scale, backend=backend).transpose(1, 2)
    return out if query.dim() == 4 else out.reshape(*query.shape[:-1], value.shape[-1])


def _alike(query: Tensor, other: Tensor) -> bool:
    return all(holds(a == b) for a, b in zip(query.shape[:-2], other.shape[:-2]))


def _broadcast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expands all to the same leading dimensions, as torch does; but a single key head, which the kernels take."""
    try:
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        name, other = ("key", key) if key.shape[:-2] != query.shape[:-2] else ("value", value)
        raise ValueError(
            f"{name}: expected {tuple(query.shape[:-2])} before the last two dimensions like query, got "
            f"{tuple(other.shape[:-2])}; fewer key heads want enable_gqa=True"
        ) from None
    single = query.dim() > 3 and known(key.shape[-3] == 1) and known(value.shape[-3] == 1)
    of_keys = (*lead[:-1], 1) if single else lead
    return (
        query.expand(*lead, *query.shape[-2:]),
        key.expand(*of_keys, *key.shape[-2:]),
        value.expand(*of_keys, *value.shape[-2:]),
    )


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expands all to the same dimensions before the heads; gives key and value the same number of heads."""
    try:
        lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        name, other = ("key", key) if key.shape[:-3] != query.shape[:-3] else ("value", value)
        raise ValueError(
            f"{name}: expected {tuple(query.shape[:-3])} before the heads like query, got {tuple(other.shape[:-3])}"
        ) from None
    heads = query.shape[-3]
    if not known(key.shape[-3] == value.shape[-3]):
        for name, x in (("key", key), ("value", value)):
            if not holds(x.shape[-3] > 0) or not holds(heads % x.shape[-3] == 0):
                raise ValueError(f"{name}: expected a number of heads that divides query's {heads}, got {x.shape[-3]}")
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    query, key, value = (x.expand(*lead, *x.shape[-3:]) for x in (query, key, value))
    return query, key, value


def _four_dimensions(x: Tensor, grouped: bool) -> Tensor:
    if x.dim() == 3:
        return x[None] if grouped else x[:, None]
    return x if x.dim() == 4 else x.flatten(0, -4)


def _causal(queries: int, keys: int, device: torch.device) -> KeyRanges:
    """Returns ranges by which query i sees keys 0 .. i; the same ones again where they may be used again."""
    where = reuse(device)
    return _new_causal(queries, keys, device) if where is None else _cached_causal(queries, keys, device, where)


def _new_causal(queries: int, keys: int, device: torch.device, where: Any = None) -> KeyRanges:
    if queries > keys:
        return KeyRanges.window(queries, None, queries - keys, keys, device=device)
    return KeyRanges.causal(keys, device=device)[:, :queries]


_cached_causal = functools.lru_cache(64)(_new_causal)


_masks = Remembered[KeyRanges](256)


def _remembered(mask: Tensor, shape: tuple[int, ...], grouped: bool) -> KeyRanges:
    """Returns what `_read` does; again if the mask, or what it is a view of, has not changed since."""
    if mask.requires_grad:
        raise ValueError("attn_mask: expected requires_grad=False, got True: a learned bias is not a mask")
    if not allows([mask]):
        return _read(mask, shape, grouped)
    if is_captured(mask.device):
        raise ValueError(
            "attn_mask: expected KeyRanges or None while a CUDA graph is captured, got a tensor, which is read on the "
            "host; make KeyRanges.from_dense(mask) before the capture"
        )
    return _masks.get([mask], (shape, grouped), lambda: _read(mask, shape, grouped))


def _read(mask: Tensor, shape: tuple[int, ...], grouped: bool) -> KeyRanges:
    """Returns the mask, broadcast to the scores' shape, as ranges (B or 1, Sq or 1, 4). Synchronises once."""
    expect_tensor("attn_mask", mask, torch.bool, *FLOATS)
    try:
        whole = mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {shape}, got {tuple(mask.shape)}") from None
    whole = _four_dimensions(whole, grouped)  # (B, H, Sq, Sk)
    for dim in range(3):  # what is broadcast is read once
        if whole.stride(dim) == 0 and whole.shape[dim] > 1:
            whole = whole.narrow(dim, 0, 1)
    return KeyRanges.from_dense(whole)
