"""Validates arguments: every `expect_*` returns, or raises TypeError or ValueError before anything runs.

Each message reads "name: expected ..., got ...; what to do". Checks read dtypes, shapes, devices, strides and host
numbers, never data, so that none synchronises.

Sizes and numbers may be symbolic: torch.SymInt and SymFloat in an export or make_fx, ints and floats with a symbolic
value under Dynamo. Hence three rules for the code here and for its callers:

- Decide by comparisons inside `holds`, never by `in`, `math.isfinite`, `hasattr` or `float(...)`.
- Ask `is_integer` or `is_number` what a value is, never `isinstance(value, int)`.
- Put a symbolic value into a message only on the way to raising.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

Size = int | str | tuple[int | str, ...] | EllipsisType
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- symbolic values -------------------------------------------------------------------------------------------------


def holds(condition: Any) -> bool:
    """Returns whether a comparison is true, under tracing too.

    A comparison of traced sizes becomes a guard; one that only data can decide becomes an assertion at run time.
    """
    if condition is True:  # of plain numbers: under Dynamo the rest would take 0.4 ms
        return True
    if not isinstance(condition, torch.SymBool) and not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # imports sympy

    if not guard_or_true(condition):
        return False
    torch._check(condition)
    return True


def known(condition: Any) -> bool:
    """Returns whether a comparison is true whatever the traced sizes are: adds neither a guard nor an assertion."""
    if condition is True or condition is False:
        return condition
    if not isinstance(condition, torch.SymBool) and not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def is_integer(value: object) -> bool:
    """Returns whether it is an int, NumPy integer or torch.SymInt, not a bool."""
    return isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, (bool, torch.SymBool))


def is_number(value: object) -> bool:
    """Returns whether it is a real Python, NumPy or symbolic number, not a bool."""
    kinds = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
    return isinstance(value, kinds) and not isinstance(value, (bool, torch.SymBool))


def plain(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Returns a NumPy scalar as a Python number; under Dynamo, which takes it for an array, as a tensor of this
    dtype."""
    if type(value).__module__ != "numpy" or value.ndim > 0:
        return value
    return torch.as_tensor(value, dtype=dtype) if torch.compiler.is_compiling() else value.item()


def shown(value: object) -> str:
    """Returns str(value), for messages: Dynamo has no f-strings of symbolic numbers."""
    text = "{}"
    return text.format(value)


def largest(dtype: torch.dtype = torch.float32) -> float:
    """Returns float64's largest number for float64, else float32's.

    They are constants of the code, because with dynamic=True Dynamo makes the floats of a module symbolic, which no
    message can show and no NaN be compared with.
    """
    return 1.7976931348623157e308 if dtype == torch.float64 else 3.4028234663852886e38


# ---- numbers ---------------------------------------------------------------------------------------------------------


def expect_integer(name: str, value: object, low: int, high: int, *, tensor: bool = False) -> None:
    """Expects an integer in [low, high]; with `tensor` also an integer tensor of shape () or (B,), whose values are not
    read.

    A traced value meets `high` unread: that would narrow what a graph serves, for sizes that no memory holds.
    """
    if tensor and isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}; convert it with .to(torch.int64)")
        _expect_per_sequence(name, value)
        return
    if not is_integer(value):
        what = "an int or an integer tensor" if tensor else "an int"
        raise TypeError(f"{name}: expected {what}, got {_kind(value)}; use int(...) on the host")
    if not holds(value >= low) or known(value > high):  # type: ignore[operator]
        wanted = f"from {low} to {high}" if high < 2**62 or known(value > high) else f"of at least {low}"  # type: ignore[operator]
        raise ValueError(f"{name}: expected an int {wanted}, got {shown(value)}")


def expect_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, tensor: bool = False
) -> None:
    """Expects a finite number in [low, high]; with `tensor` also a floating-point tensor of shape () or (B,), not read.

    A traced number is checked against finite limits alone: whatever reaches an operator has them.
    """
    if tensor and isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}; convert it with .float()")
        _expect_per_sequence(name, value)
        return
    if not is_number(value):
        what = "a number or a floating-point tensor" if tensor else "a number"
        raise TypeError(f"{name}: expected {what}, got {_kind(value)}; use float(...) on the host")
    number: Any = plain(value)
    # A comparison of a traced number with inf would make a graph for each value, one with the largest float a guard.
    traced = torch.compiler.is_compiling() or isinstance(number, (torch.SymInt, torch.SymFloat))
    above = (traced and low == -math.inf) or holds(number >= max(low, -largest(torch.float64)))
    if not (above and ((traced and high == math.inf) or holds(number <= min(high, largest(torch.float64))))):
        limits = [f" of at least {low:g}"] * (low > -math.inf) + [f" of at most {high:g}"] * (high < math.inf)
        raise ValueError(f"{name}: expected a finite number{' and'.join(limits)}, got {shown(value)}")


def _expect_per_sequence(name: str, value: Tensor) -> None:
    if value.dim() > 1:
        raise ValueError(f"{name}: expected a tensor of shape () or (B,), got shape {tuple(value.shape)}")


def expect_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Expects one of a few constants."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def expect_tensor(name: str, value: object, *dtypes: torch.dtype, advice: str = "") -> None:
    """Expects a tensor of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of {_names(dtypes)}, got {_kind(value)}")
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got layout {value.layout}; use .to_dense(), or for nested sequences "
            ".to_padded_tensor(0.0) and KeyRanges.padding or .packed"
        )
    if value.dtype not in dtypes:
        advice = advice or f"convert it with .to({dtypes[0]})"
        raise TypeError(f"{name}: expected {_names(dtypes)}, got {value.dtype}; {advice}")


def expect_shape(name: str, value: Tensor, *sizes: Size, like: str = "", advice: str = "") -> None:
    """Expects a tensor of this shape.

    A size is a number, a name for any number ("B"), or a tuple of alternatives `(batch, 1)`. `...` in the first place
    stands for any leading dimensions. `like` tells where the sizes come from: "to match q (2, 8, 4, 64)".
    """
    shape, rest = value.shape, sizes[1:] if sizes and sizes[0] is ... else sizes
    lead = len(shape) - len(rest)
    if lead == 0 or (lead > 0 and len(rest) < len(sizes)):
        for size, wanted in zip(shape[lead:] if lead else shape, rest):
            if not isinstance(wanted, str) and not _fits(size, wanted):
                break
        else:
            return
    words = ", ".join(map(_size_name, sizes)) + ("," if len(sizes) == 1 else "")
    like, advice = (f" {like}" if like else ""), (f"; {advice}" if advice else "")
    raise ValueError(f"{name}: expected shape ({words}){like}, got {tuple(shape)}{advice}")


def expect_device(name: str, value: Tensor, device: torch.device, like: str = "") -> None:
    """Expects a tensor on the device of `like`."""
    if value.device != device:
        raise ValueError(
            f"{name}: expected device {device}{f' like {like}' if like else ''}, got {value.device}; "
            f'move it with .to("{device}")'
        )


def expect_contiguous(name: str, value: Tensor) -> None:
    """Expects a tensor whose last dimension is contiguous. The other strides are free."""
    dense = value.stride(-1) == 1
    if not (known(dense) or known(value.shape[-1] <= 1) or holds(dense)):
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got strides {tuple(value.stride())}; use .contiguous()"
        )


def expect_per_sequence(name: str, value: object, batch: int, device: torch.device) -> None:
    """Raises unless `value` is a number, or a tensor of shape () or (batch,) on this device."""
    if isinstance(value, Tensor):
        if value.dim() > 0:
            expect_shape(name, value, batch)
        expect_device(name, value, device)


def expect_layout(
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    *sizes: Size,
    device: torch.device | None = None,
    like: str = "",
    contiguous: bool = False,
) -> None:
    """Expects a tensor of one of the dtypes and of this shape, on this device, that of `like`."""
    expect_tensor(name, value, *dtypes)
    assert isinstance(value, Tensor)
    expect_shape(name, value, *sizes, like=f"to match {like}" if like else "")
    if contiguous:
        expect_contiguous(name, value)
    if device is not None:
        expect_device(name, value, device, like)


def split_parameters(batch: int, device: torch.device, *parameters: tuple[str, Any, float, float]) -> list[Any]:
    """Checks numbers that may be tensors of shape () or (batch,), and returns (number, tensor) of each in one list: the
    tensor is None, or the number 0.

    A parameter is (name, value, low, high). It is an integer where low and high are.
    """
    split: list[Any] = []
    for name, value, low, high in parameters:
        if type(value) is type(low) and (value >= low) is True and (value <= high) is True:
            split += [value, None]  # a plain number within its limits: Dynamo takes 5 ms to trace what follows
            continue
        whole = isinstance(low, int) and isinstance(high, int)
        given, value = value, plain(value, torch.int64 if whole else torch.float64)
        if isinstance(value, Tensor) and value is not given:  # a NumPy scalar, under Dynamo
            value = value.to(device)
        if isinstance(low, int) and isinstance(high, int):
            expect_integer(name, value, low, high, tensor=True)
        else:
            expect_number(name, value, low, high, tensor=True)
        if isinstance(value, Tensor):
            expect_per_sequence(name, value, batch, device)
            split += [0, value] if whole else [0.0, value.detach()]
        elif whole:
            split += [torch.sym_int(value), None]
        elif torch.compiler.is_compiling() and holds(value != 0.0):  # as a number it would make a graph for each value
            split += [0.0, torch.ones((), dtype=torch.float32, device=device) * value]
        else:
            split += [torch.sym_float(value), None]
    return split


def cast_for_autocast(device: torch.device, *values: Any) -> list[Any]:
    """Casts floating-point tensors but float64 to autocast's dtype, where autocast is on; returns the rest unchanged.

    Leaves values that are not tensors for the checks to name.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # torch has no autocast for meta
        return list(values)
    dtype = torch.get_autocast_dtype(device.type)

    def is_cast(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64

    return [value.to(dtype) if is_cast(value) else value for value in values]


# ---- words -----------------------------------------------------------------------------------------------------------


def _fits(size: int, wanted: Size) -> bool:
    if not isinstance(wanted, tuple):
        return holds(size == wanted)
    for one in wanted:  # before `holds`, which asserts what only data can decide
        if isinstance(one, str) or known(size == one):
            return True
    return any(holds(size == one) for one in wanted)


def _size_name(size: Size) -> str:
    if isinstance(size, tuple):
        return " or ".join(map(str, size))
    return "..." if size is ... else str(size)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(dict.fromkeys(map(str, dtypes)))


def _kind(value: object) -> str:
    """Returns the type of what came, with the dtype of a tensor."""
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
