"""attention as an `attn_implementation` of Hugging Face transformers (4.57 and 5.x).

    from illada_kernels.integrations import transformers as illada
    illada.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="illada")

Masks of models are built as the bounds of KeyRanges, from the arguments where they are causal, bidirectional, sliding
windows, packed or padded, else from the mask's function evaluated once. They travel as a `MaskBounds`, since
transformers hands on four-dimensional tensors untouched.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._bounds import refuse, runs
from .._streams import reuse
from ..key_ranges import KeyRanges
from ..ops.attention import attention, scaled_dot_product_attention

__all__ = ["attention_forward", "mask_bounds", "register"]

MaskFunction = Callable[..., Any]  # (batch, head, query, key) indices -> bool


def register(name: str = "illada") -> None:
    """Makes attn_implementation=`name` known to transformers: its attention function and its mask function.

    Parameters
    ----------
    name : str
        May be registered again.

    Raises
    ------
    ImportError
        If transformers is missing or older than 4.57.

    Examples
    --------
    >>> from illada_kernels.integrations import transformers as illada
    >>> illada.register()  # then AutoModel.from_pretrained(folder, attn_implementation="illada")
    """
    try:
        masking = _masking()
        modeling = importlib.import_module("transformers.modeling_utils")
        masking.AttentionMaskInterface.register(name, mask_bounds)
        modeling.AttentionInterface.register(name, attention_forward)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"register: expected transformers >= 4.57 ({error}); pip install -U transformers") from None
    _names.add(name)


_names: set[str] = set()
_loaded: list[Any] = []


def _masking() -> Any:
    """Returns transformers' file of mask functions. A compiled graph would break at an import."""
    if not _loaded:
        _loaded.append(importlib.import_module("transformers.masking_utils"))
    return _loaded[0]


_COMPUTES = 'the model computes with its mask, use "sdpa" or "eager" for it'


class MaskBounds(Tensor):
    """The bounds of KeyRanges, int32 (B or 1, 1, Sq, 4), where transformers expects a mask.

    A class of its own, because an int32 mask of four keys has the same shape. Slices, copies and moves keep the class.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.clone())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Names the reason where a model computes with its mask and torch finds that shapes do not fit, as Doge's."""
        if torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs)
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # out of memory, a lost device, an operator that is missing
                raise
            raise ValueError(
                "attention_mask: expected code that hands on what the mask function returned, int32 (B or 1, 1, Sq, "
                f"4), got {func.__name__} of it ({error}): {_COMPUTES}"
            ) from error


def ranges_of(mask: MaskBounds, num_keys: int) -> KeyRanges:
    """Returns the ranges; raises ValueError where code has computed something else from the bounds."""
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != 4:
        raise ValueError(
            f"attention_mask: expected what the mask function returned, int32 (B or 1, 1, Sq, 4), got {mask.dtype} "
            f"{tuple(mask.shape)}: {_COMPUTES}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        bounds = mask[:, 0]
    return KeyRanges(bounds, num_keys)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """Computes attention for transformers: the function that `register` registers.

    Parameters
    ----------
    module : torch.nn.Module
        The layer, of which `config` and `is_causal` are looked at.
    query : (B, Hq, Sq, D)
    key, value : (B, Hkv, Sk, D)
    attention_mask : Tensor or None
        What `mask_bounds` built, or a 4-D mask, bool or additive, that the user gave. None: is_causal decides.
    scaling, dropout, is_causal
        As transformers gives them. A dropout other than 0 raises.
    **unsupported
        What else transformers hands to an attention function.

    Returns
    -------
    tuple
        (out (B, Sq, Hq, D), None): there are no attention weights.

    Raises
    ------
    ValueError
        For a dropout, and for what changes scores: softcap, sinks, position biases, head masks.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.integrations.transformers import attention_forward
    >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    >>> attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)[0].shape
    torch.Size([1, 6, 4, 8])
    """
    for argument in ("softcap", "s_aux", "position_bias", "head_mask", "alibi"):
        if unsupported.get(argument) is not None:
            came = type(unsupported[argument]).__name__
            raise ValueError(f'{argument}: expected None, as nothing is added to scores here, got {came}; use "eager"')
    if unsupported.get("output_attentions"):
        raise ValueError('output_attentions: expected False, attention weights are never stored; use "eager"')
    config = getattr(module, "config", None)
    used = getattr(config, "_attn_implementation", None)
    if attention_mask is None and used is not None and used not in _names:
        raise ValueError(
            f"attention_mask: got None from attn_implementation={used!r}, for which no mask function is registered, so "
            f"that padding would be lost; use illada_kernels.integrations.transformers.register({used!r})"
        )
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        is_causal = bool(is_causal) and query.shape[2] > 1  # one query is the last: it sees all keys
    else:
        is_causal = False
    if isinstance(attention_mask, MaskBounds) and dropout == 0:
        ranges = ranges_of(attention_mask, key.shape[2])  # straight to the op, whose layout is the result's
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return attention(q, k, v, ranges, scale=scaling), None
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    out = scaled_dot_product_attention(
        query, key, value, mask, dropout_p=dropout, is_causal=is_causal, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def mask_bounds(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    *,
    cache_position: Tensor | None = None,
    **_: Any,
) -> MaskBounds:
    """Returns the bounds of KeyRanges over kv_length keys, (B or 1, 1, Sq, 4): the mask function of `register`.

    Parameters
    ----------
    batch_size : int
    q_length, kv_length, q_offset, kv_offset, cache_position
        Queries stand at q_offset + i, keys at kv_offset + j. transformers 4.57 gives cache_position (Sq,) instead of
        q_length and q_offset.
    mask_function
        transformers' closure over index tensors; None is causal.
    attention_mask : (B, kv_offset + kv_length or less) bool, optional
        True where a token is real; missing ones at the end are padding.
    device : torch.device or str
        Of the bounds; with cache_position that tensor's.

    Notes
    -----
    Synchronises once where there is padding, or where the closure is not one that is known; else, and compiled, never.
    Where nothing but numbers decides, the same bounds are returned again: do not write to them.

    Examples
    --------
    >>> from illada_kernels.integrations.transformers import mask_bounds
    >>> mask_bounds(1, q_length=2, kv_length=3, q_offset=1).tolist()  # causal, one key cached
    [[[[0, 2, 2, 2], [0, 3, 3, 3]]]]
    """
    masking = _masking()
    function = masking.causal_mask_function if mask_function is None else mask_function
    padding = _padding(attention_mask, kv_length, kv_offset)
    parts = _parts(function, masking)
    numbers = parts is not None and all(kind != "packed" for kind, _ in parts)
    if numbers and padding is None and cache_position is None and isinstance(q_offset, int):
        device = torch.device(device)
        if (where := reuse(device)) is not None:
            return _same_bounds(tuple(parts or ()), q_length or 0, q_offset - kv_offset, kv_length, device, where)
    if cache_position is not None:
        queries = cache_position
        device = queries.device
    else:
        queries = torch.arange(q_length, device=device) + q_offset  # type: ignore[arg-type]
    bounds = None if parts is None else _bounds(parts, queries - kv_offset, kv_length, padding)
    if bounds is not None:
        return bounds[:, None].as_subclass(MaskBounds)
    index = (
        torch.arange(batch_size, device=device)[:, None, None, None],
        torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device),
        queries[None, None, :, None],
        (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :],
    )
    allowed = function(*index).expand(batch_size, -1, len(queries), kv_length)
    ranges = KeyRanges.from_dense(allowed if padding is None else allowed & padding[:, None, None])
    return ranges.bounds[:, None].as_subclass(MaskBounds)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Returns the real keys, bool (B, kv_length)."""
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    whole = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
    return whole[:, kv_offset : kv_offset + kv_length].bool()


def _parts(function: MaskFunction, masking: Any) -> list[tuple[str, Any]] | None:
    """Returns the parts whose intersection a mask function is, (kind, its number or tensor) each; None if one is not
    known, as no closure is under torch.compile, which cannot read it."""
    if function is masking.causal_mask_function:
        return [("causal", None)]
    if function is getattr(masking, "bidirectional_mask_function", None):
        return []
    if torch.compiler.is_compiling() or getattr(function, "__module__", None) != masking.__name__:
        return None
    maker = function.__qualname__.partition(".")[0]
    cells = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))
    if maker == "and_masks":
        parts = [_parts(part, masking) for part in cells["mask_functions"]]
        return None if None in parts else [one for part in parts for one in part or ()]
    kinds = {
        "sliding_window_overlay": ("window", "sliding_window"),
        "sliding_window_bidirectional_overlay": ("both sides", "sliding_window"),
        "packed_sequence_mask_function": ("packed", "packed_sequence_mask"),
    }
    if maker not in kinds or kinds[maker][1] not in cells:
        return None
    return [(kinds[maker][0], cells[kinds[maker][1]])]


@functools.lru_cache(64)
def _same_bounds(
    parts: tuple[tuple[str, Any], ...], queries: int, first: int, keys: int, device: torch.device, where: Any
) -> MaskBounds:
    """Returns bounds (1, 1, queries, 4) that depend on no tensor, which all steps of a shape share."""
    with torch.inference_mode(False):  # for training too
        position = torch.arange(first, first + queries, device=device)
        bounds = _bounds(list(parts), position, keys, None)
    assert bounds is not None
    return bounds[:, None].as_subclass(MaskBounds)


def _bounds(parts: list[tuple[str, Any]], position: Tensor, keys: int, padding: Tensor | None) -> Tensor | None:
    """Returns bounds (B or 1, Sq, 4), the intersection of all parts. None if the real keys have more than one gap; a
    compiled graph asserts that they have not.

    position: (Sq,), of the queries among the keys.
    """
    position = position[None]  # (1, Sq)
    low, high = torch.zeros_like(position), torch.full_like(position, keys)
    for kind, value in parts:
        if kind == "causal":
            high = torch.minimum(high, position + 1)
        elif kind == "window":
            low = torch.maximum(low, position - value + 1)
        elif kind == "both sides":
            low, high = torch.maximum(low, position - value), torch.minimum(high, position + value + 1)
        else:  # ids (B, S) that rise from document to document; queries and keys are the same tokens
            ids = value.contiguous()
            low = torch.maximum(low, torch.searchsorted(ids, ids))
            high = torch.minimum(high, torch.searchsorted(ids, ids, right=True))
    ranges = [(low, high)]
    if padding is not None:
        real, count = runs(padding[:, None])  # (B, 1, 4)
        if torch.compiler.is_compiling():
            expected = "attention_mask: expected at most two runs of real tokens in a sequence of a compiled model"
            refuse(count > 2, count, expected, lambda b, s, found: f"got {found} in sequence {b}")
        elif bool((count > 2).any()):
            return None
        pairs = real[..., :2], real[..., 2:]
        ranges = [(torch.maximum(low, pair[..., 0]), torch.minimum(high, pair[..., 1])) for pair in pairs]
    bounds: list[Tensor] = []
    for low, high in ranges:
        low = low.clamp(0, keys)
        bounds += [low, torch.maximum(high.clamp(0, keys), low)]
    if padding is None:
        bounds += [bounds[1], bounds[1]]
    return torch.stack(torch.broadcast_tensors(*bounds), -1).to(torch.int32)
