"""What unmask checks before anything runs: dtypes, shapes, devices and strides, never data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...rules import check_integer

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LogitBias = tuple[Tensor | Sequence[int], Tensor | Sequence[float]]


def expect(ok: bool, name: str, expected: str, got: Tensor) -> None:
    if not ok:
        came = f"{tuple(got.shape)} {got.dtype} on {got.device} with strides {got.stride()}"
        raise ValueError(f"{name}: expected {expected}, got {came}")


def expect_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name}: expected {names}, got {tensor.dtype}; convert it with .to({allowed[0]})")


def check_source(name: str, source: Tensor) -> None:
    expect_dtype(name, source, *LOGIT_DTYPES)
    expect(source.ndim == 3, name, "three dimensions (B, K, D) or (B, K, V)", source)
    expect(source.stride(2) == 1 or source.shape[2] < 2, name, "a contiguous last dimension: .contiguous()", source)


def check_head(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
    dim = hidden.shape[2]
    expect_dtype("head_weight", head_weight, hidden.dtype, torch.float32)
    expect(head_weight.ndim == 2 and head_weight.shape[1] == dim, "head_weight", f"shape (V, {dim})", head_weight)
    contiguous = head_weight.stride(1) == 1 or dim < 2
    expect(contiguous, "head_weight", "a contiguous last dimension: .contiguous()", head_weight)
    if head_bias is not None:
        expect_dtype("head_bias", head_bias, hidden.dtype, torch.float32)
        expect(head_bias.shape == head_weight.shape[:1], "head_bias", f"shape ({head_weight.shape[0]},)", head_bias)
    for name, tensor in (("head_weight", head_weight), ("head_bias", head_bias)):
        if tensor is not None:
            expect(tensor.device == hidden.device, name, f"a tensor on {hidden.device}, where hidden is", tensor)


def cast_for_autocast(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = hidden.device.type
    if hidden.is_meta or not torch.is_autocast_enabled(kind):  # torch has no autocast for meta
        return hidden, head_weight, head_bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(x: Tensor) -> Tensor:  # what is no tensor of floats is left for check_head to name
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(hidden), cast(head_weight), None if head_bias is None else cast(head_bias)


def check_tokens(name: str, source: Tensor, tokens: Tensor) -> None:
    expect_dtype("tokens", tokens, torch.int64)
    batch = source.shape[0]
    expect(tokens.ndim == 2 and tokens.shape[0] == batch, "tokens", f"shape ({batch}, L) to go with {name}", tokens)
    length = tokens.shape[1]
    expect(length < 2**31, "tokens", "fewer than 2**31 columns", tokens)
    contiguous = tokens.stride(1) == 1 or length < 2
    expect(contiguous, "tokens", "a contiguous last dimension, as they are written in place", tokens)
    apart = batch < 2 or tokens.stride(0) >= length
    expect(apart, "tokens", "rows that do not overlap, as they are written in place: .clone()", tokens)
    expect(tokens.device == source.device, "tokens", f"a tensor on {source.device}, where {name} is", tokens)


def check_like(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """An optional tensor of known dtype, shape and device."""
    if tensor is not None:
        expect_dtype(name, tensor, dtype)
        expect(tuple(tensor.shape) == tuple(shape), name, f"shape {tuple(shape)}", tensor)
        expect(tensor.device == device, name, f"a tensor on {device}", tensor)


def check_parameter(name: str, value: object, source: Tensor) -> None:
    """A parameter that may be a tensor of shape () or (B,); its dtype and its number of dimensions are checked."""
    if isinstance(value, Tensor):
        batch = source.shape[0]
        expect(value.ndim == 0 or value.shape[0] == batch, name, f"shape () or ({batch},)", value)
        expect(value.device == source.device, name, f"a tensor on {source.device}", value)


def check_forbid(forbid: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    if isinstance(forbid, Tensor):
        raise TypeError("forbid: expected a sequence of ints, got a tensor; use logit_bias=(ids, values of -inf)")
    for i in forbid:
        check_integer("forbid", i, 0, vocabulary - 1)
    return tuple(forbid)


def split_bias(
    logit_bias: LogitBias | None, vocabulary: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if logit_bias is None:
        return None, None
    if not isinstance(logit_bias, tuple | list) or len(logit_bias) != 2:
        raise TypeError(f"logit_bias: expected (ids, values), got {type(logit_bias).__name__}")
    ids, values = logit_bias
    if not isinstance(ids, Tensor):
        for i in ids:
            check_integer("logit_bias ids", i, 0, vocabulary - 1)
        ids = torch.tensor(list(ids), dtype=torch.int64, device=device)
    if not isinstance(values, Tensor):
        values = torch.tensor(list(values), dtype=torch.float32, device=device)
    expect(ids.ndim == 1, "logit_bias ids", "shape (n,)", ids)
    check_like("logit_bias ids", ids, torch.int64, ids.shape, device)
    check_like("logit_bias values", values, torch.float32, ids.shape, device)
    return ids.detach(), values.detach()
