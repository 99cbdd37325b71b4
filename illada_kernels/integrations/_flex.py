"""Replaces torch's flex_attention for `patch`: the same arguments, our attention.

A BlockMask is read into KeyRanges: eagerly once, and remembered while the BlockMask lives and nothing that its mask
function reads has changed. Around a function that is compiled by itself, as SDAR's, the mask is read before the
graph is entered. A graph of a whole model reads it in each layer and asserts that it fits; KeyRanges in place of
the BlockMask spare that.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, create_mask
from torch.nn.attention.flex_attention import flex_attention as theirs

from .._bounds import refuse, runs
from .._remembered import crc
from .._streams import is_captured
from .._torch_ops import is_plain, is_traced
from ..key_ranges import KeyRanges
from ..ops.attention import attention
from ._first_run import unwatched
from ._rewrite import held

NAME = "flex_attention"
_LARGEST = 1 << 30  # torch's block size of a mask that has no blocks, whatever the lengths
_PAIRS = 1 << 26  # of a mask that are read at a time: their int32 tensors take 256 MiB each
_RANGES = "_illada_ranges"  # of a copy of a BlockMask that a graph is given


def wanted() -> dict[str, tuple[Any, Any]]:
    """Returns {name: (theirs, ours)}."""
    return {NAME: (theirs, flex_attention)}


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | KeyRanges | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Computes attention of query (B, Hq, Sq, D) to key and value (B or 1, Hkv, Sk, D).

    `kernel_options` choose among torch's kernels and say nothing here.
    """
    if score_mod is not None:
        came = getattr(score_mod, "__name__", type(score_mod).__name__)
        raise ValueError(
            f"score_mod: expected None in a patched model, as nothing changes scores here, got {came}; write a mask as "
            "mask_mod, or unpatch the model"
        )
    if return_aux is not None and (return_lse or return_aux.max_scores):
        raise ValueError(
            f"return_aux: expected AuxRequest(lse=...) without return_lse, got {return_aux}, return_lse={return_lse}; "
            "max_scores are not computed: leave them out, or unpatch the model"
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected (batch, heads, sequence, head_dim), got shape {tuple(x.shape)}")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"key: expected {query.shape[1]} heads like query, got {key.shape[1]}; set enable_gqa=True")
    if query.shape[0] != key.shape[0] == 1:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    sizes = Sizes(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    ranges = None if block_mask is None else _ranges(block_mask, sizes)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out, lse = attention(q, k, v, ranges, scale=scale, return_lse=True)
    out = out.transpose(1, 2)
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def outside(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled function; before its graph is entered, BlockMasks among its arguments are read.

    The graph gets copies that carry their ranges, which fit the (B, H, S, D) tensors among the arguments.
    """

    @functools.wraps(compiled, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        with unwatched():
            given = [*args, *kwargs.values()]
            tensors = [x for x in given if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()]
            args = tuple(_with_ranges(value, tensors) for value in args)
            kwargs = {name: _with_ranges(value, tensors) for name, value in kwargs.items()}
            return compiled(*args, **kwargs)

    return call


def _with_ranges(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, BlockMask) or _has_no_blocks(value):
        return value
    fit = [x for x in tensors if x.shape[2] in value.shape[-2:]]
    if not fit:  # queries and keys are made in the graph, and the mask is read there
        return value
    sizes = Sizes(max(x.shape[0] for x in fit), max(x.shape[1] for x in fit), *value.shape[-2:])
    twin = copy.copy(value)
    setattr(twin, _RANGES, (sizes, _ranges(value, sizes)))
    return twin


# ---- masks -----------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Holds the sizes of the scores, (batch, heads, queries, keys)."""

    batch: int
    heads: int
    queries: int
    keys: int


_masks: weakref.WeakKeyDictionary[BlockMask, tuple[Sizes, list[tuple[Any, ...]], KeyRanges]] = (
    weakref.WeakKeyDictionary()
)


def _ranges(block_mask: BlockMask | KeyRanges, sizes: Sizes) -> KeyRanges:
    """Returns the mask as ranges; those that it carries, or again those that it had, if they are still right."""
    if isinstance(block_mask, KeyRanges):
        return block_mask
    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: expected a BlockMask, KeyRanges or None, got {type(block_mask).__name__}")
    if not _has_no_blocks(block_mask) and block_mask.shape[-2:] != sizes[2:]:
        raise ValueError(
            f"block_mask: expected one for {sizes.queries} queries and {sizes.keys} keys, got shape "
            f"{tuple(block_mask.shape)}; make it with create_block_mask for these lengths"
        )
    carried = getattr(block_mask, _RANGES, None)
    if carried is not None and carried[0] == sizes:
        ranges: KeyRanges = carried[1]
        return ranges
    if torch.compiler.is_compiling() or is_traced():
        return _read(block_mask, sizes)
    if is_captured(block_mask.kv_indices.device):
        raise ValueError(
            "block_mask: expected KeyRanges or None while a CUDA graph is captured, got a BlockMask, which is read on "
            "the host; make KeyRanges before the capture"
        )
    state = _state(block_mask)
    if state is None:
        return _read(block_mask, sizes)
    before = _masks.get(block_mask)
    if before is None or before[0] != sizes or not _same(before[1], state):
        before = _masks[block_mask] = sizes, state, _read(block_mask, sizes)
    return before[2]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b and x == y for (a, *x), (b, *y) in zip(one, other))


def _state(block_mask: BlockMask) -> list[tuple[Any, ...]] | None:
    """Returns what decides the mask: each object that its function reads, and of tensors the version and the CRC-32.

    None if something can change unseen: inference tensors, tensors that are more than memory, and what `held` does not
    look into.
    """
    parts = held(block_mask.mask_mod)
    if parts is None or any(part is block_mask for part in parts):  # which could then never be freed
        return None
    state: list[tuple[Any, ...]] = []
    for part in [*(getattr(block_mask, name) for name in _BLOCKS), *parts]:
        if isinstance(part, Tensor):
            if not is_plain([part]) or part.is_inference():
                return None
            state.append((part, part._version, crc(part)))
        else:
            state.append((part,))
    return state


_BLOCKS = ("BLOCK_SIZE", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def _has_no_blocks(block_mask: BlockMask) -> bool:
    return all(size == _LARGEST for size in block_mask.BLOCK_SIZE)


def _read(block_mask: BlockMask, sizes: Sizes) -> KeyRanges:
    """Returns ranges (B or 1, Sq, 4) of the pairs that torch's kernels attend to: those of full blocks, and of other
    blocks where the mask function says so. Synchronises once; a graph asserts.
    """
    compiling = torch.compiler.is_compiling()
    rows = sizes.queries if compiling else max(_PAIRS // max(sizes.batch * sizes.keys, 1), 1)
    parts = [
        _rows(block_mask, sizes, start, min(rows, sizes.queries - start))
        for start in ((0,) if compiling else range(0, max(sizes.queries, 1), rows))
    ]
    bounds, count = (torch.cat(some, 1) if len(some) > 1 else some[0] for some in zip(*parts, strict=True))
    expected = "block_mask: expected at most two runs of allowed keys a query, the same for all heads"
    refuse((count > 2) | (count < 0), count, expected, _came)
    return KeyRanges(bounds, sizes.keys)


def _came(batch: int, row: int, count: int) -> str:
    what = "heads that differ" if count < 0 else f"{count} runs"
    return f"batch entry {batch}, query {row} has {what}; reorder the keys, or unpatch the model"


def _rows(block_mask: BlockMask, sizes: Sizes, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Returns bounds (B or 1, rows, 4) and numbers of runs (B or 1, rows), -1 where heads differ."""
    function, device = block_mask.mask_mod, block_mask.kv_indices.device

    def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return function(b, h, q + start, k)

    mask = create_mask(shifted, sizes.batch, sizes.heads, rows, sizes.keys, device)  # (B, H, rows, Sk)
    for dim in range(2):  # what a function does not look at has a stride of 0
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    row = torch.arange(start, start + rows, device=device)[:, None] // block_mask.BLOCK_SIZE[0]
    key = torch.arange(sizes.keys, device=device) // block_mask.BLOCK_SIZE[1]
    blocks = max(math.ceil(sizes.keys / block_mask.BLOCK_SIZE[1]), 1)
    mask = mask & _grid(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)[..., row, key]
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        mask = mask | _grid(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)[..., row, key]
    bounds, count = runs(mask[:, 0])
    if mask.shape[1] > 1:
        count = torch.where((mask != mask[:, :1]).any(3).any(1), -1, count)
    return bounds, count


def _grid(number: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Returns the blocks that are listed, the first `number` (B, H, rows) of indices (B, H, rows, n), as bool (B, H,
    rows, blocks)."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
    grid = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return grid.scatter(-1, torch.where(listed, indices, blocks).long(), True)[..., :blocks]
