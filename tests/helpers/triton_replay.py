"""Makes Triton's interpreter quick: what triton.language decides about an operation is decided once.

An operation of triton.language looks at types and constants alone, because a compiler has no data, and calls a builder
for what is to be done: a splat, a cast, an addition. The interpreter does so again at every use, and most of its time
goes by before its builder calls numpy. Here the calls of the builder are noted at the first use with these types and
constants, and written down as a function for the next ones. For elementwise operations it calls numpy as the builder
does, without copies of what is broadcast; for all else, as loads and stores, the builder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="no triton")

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Plan = Callable[[list[tl.tensor]], Any]
HANDLES = (interpreter.TensorHandle, interpreter.BlockPointerHandle, interpreter.TensorDescHandle)
CONSTANT = ("get_", "create_make_range")  # how calls begin that make constants
INNER = ("binary_op", "ternary_op", "unary_op", "cast_impl")  # what create_add and the like call, and nothing else
_constants: dict[Any, tl.tensor] = {}


class Unknown(Exception):
    """What is neither a tensor nor a constant, so that nothing can be said about the next use."""


class Handle(interpreter.TensorHandle):
    """One whose type is known to hold its data."""

    def __init__(self, data: Any, dtype: tl.dtype) -> None:
        self.data, self.dtype, self.attr = data, dtype, None

    def set_attr(self, key: str, value: Any) -> None:
        self.attr = {**(self.attr or {}), key: value}


# ---- what is known of a call -----------------------------------------------------------------------------------------
@functools.cache
def replayed(member: Callable[..., Any], overflow: bool) -> Callable[..., Any]:
    """The builtin `member` of triton.language, as a kernel calls it. `overflow`: as the builder's options say."""
    plans: dict[tuple[Any, ...], Plan | None] = {}
    semantic, tensor = interpreter.interpreter_semantic, tl.tensor

    def call(*args: Any, **kwargs: Any) -> Any:
        if "_semantic" in kwargs:  # one builtin calls another
            return member(*args, **kwargs)
        tensors: list[tl.tensor] = []
        parts: list[Any] = []
        try:
            for value in args:
                if type(value) is tensor:
                    tensors.append(value)
                    parts.append(value.type.name)
                else:
                    parts.append(_part(value, tensors))
            for name, value in kwargs.items():
                parts += name, _part(value, tensors)
        except Unknown:
            return member(*args, **kwargs, _semantic=semantic)
        key = tuple(parts)
        if key not in plans:
            result, plans[key] = _record(member, args, kwargs)
            return result
        plan = plans[key]
        return plan(tensors) if plan else member(*args, **kwargs, _semantic=semantic)

    return call


def assigned(value: Any, check_type: bool = True) -> Any:
    """The interpreter's to_tensor, which it calls for whatever is assigned: constants are made once."""
    if type(value) is tl.tensor:
        return value
    if type(value) not in (bool, int, float):
        return TritonSemantic.to_tensor(interpreter.interpreter_semantic, value, check_type)
    key = _part(value, [])
    if key not in _constants:
        _constants[key] = TritonSemantic.to_tensor(interpreter.interpreter_semantic, value, check_type)
        _constants[key].handle.data.flags.writeable = False
    return _constants[key]


def _part(value: Any, tensors: list[tl.tensor]) -> Any:
    """Of a call's key: a constant, or the type of a tensor, which is appended to `tensors`."""
    kind = type(value)
    if kind is tl.tensor:
        tensors.append(value)
        return value.type.name
    if kind in (int, str, bool, NoneType):
        return kind, value
    if kind is float:
        return kind, value.hex()  # tells zeros apart
    if kind is tl.constexpr:
        return kind, _part(value.value, tensors)
    if kind in (list, tuple, tl.tuple):
        return kind, *(_part(one, tensors) for one in value)
    if kind is slice:
        return kind, *(_part(one, tensors) for one in (value.start, value.stop, value.step))
    if isinstance(value, tl.dtype):
        return tl.dtype, value.name
    raise Unknown


# ---- what the builder is called for ----------------------------------------------------------------------------------
class Recorder:
    """Passes all on to the interpreter's builder, and notes the calls; of calls within calls the outer, or that of
    INNER which is all it does."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(interpreter.interpreter_builder, name)
        if not callable(found):
            return found
        function = getattr(found, "__func__", None)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = len(self.calls)
            result = function(self, *args, **kwargs) if function else found(*args, **kwargs)
            inner = self.calls[before:]
            if len(inner) != 1 or inner[0][0] not in INNER or inner[0][3] is not result:
                self.calls[before:] = [(name, args, kwargs, result)]
            return result

        return call


def _record(member: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Plan | None]:
    """What `member` returns, and its plan; none if it returns what the builder has not made."""
    tensors: list[tl.tensor] = []
    args, kwargs = _apart(args, tensors), {name: _apart(value, tensors) for name, value in kwargs.items()}
    builder = Recorder()
    result = member(*args, **kwargs, _semantic=TritonSemantic(builder))
    for one in result if isinstance(result, tuple) else (result,):
        if isinstance(one, tl.tensor) and isinstance(one.handle, interpreter.TensorHandle):
            one.handle.dtype = one.type.scalar  # the builder gives a comparison the type of what is compared
    try:
        return result, _Writer(tensors).plan(builder.calls, result)
    except Unknown:
        return result, None


def _apart(value: Any, tensors: list[tl.tensor]) -> Any:
    """A copy in which every tensor has a handle of its own, so that handles tell tensors apart."""
    if type(value) is tl.tensor:
        value = copy.copy(value)
        value.handle = copy.copy(value.handle)
        tensors.append(value)
    elif type(value) in (list, tuple):
        value = type(value)(_apart(one, tensors) for one in value)
    elif type(value) is tl.tuple:
        value = tl.tuple([_apart(one, tensors) for one in value])
    elif type(value) is tl.constexpr:  # times a tensor is one too
        value = tl.constexpr(_apart(value.value, tensors))
    return value


# ---- the function that does it again ---------------------------------------------------------------------------------
@dataclass
class Node:
    """A handle of the first use. `array` and `handle`: how the function calls them, once it has them."""

    first: Any
    array: str = ""
    handle: str = ""
    source: Node | None = None  # what it is, broadcast
    constant: bool = False


class _Writer:
    def __init__(self, tensors: list[tl.tensor]) -> None:
        self.tensors = tensors
        self.nodes = {id(x.handle): Node(x.handle, handle=f"t[{i}].handle") for i, x in enumerate(tensors)}
        self.space: dict[str, Any] = {
            "builder": interpreter.interpreter_builder,
            "new": object.__new__,
            "tensor": tl.tensor,
            "Handle": Handle,
        }
        self.lines: list[str] = []

    def plan(self, calls: list[tuple[str, Any, Any, Any]], result: Any) -> Plan:
        for name, args, kwargs, made in calls:
            if not kwargs and hasattr(self, f"_{name}"):
                getattr(self, f"_{name}")(made, *args)
            elif not name.startswith(CONSTANT):
                self.as_before(name, args, kwargs, made)
            elif isinstance(made, HANDLES):  # rather than a type
                self.constant(made)
        returned = self.returned(result)
        exec("\n    ".join(["def replay(t):", *self.lines, f"return {returned}"]), self.space)
        return self.space["replay"]

    def line(self, expression: str) -> str:
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def keep(self, value: Any) -> str:
        name = f"k{len(self.space)}"
        self.space[name] = value
        return name

    def constant(self, first: Any) -> None:
        first.data.flags.writeable = False
        self.nodes[id(first)] = Node(first, self.keep(first.data), self.keep(first), constant=True)

    def node(self, first: Any) -> Node:
        if id(first) not in self.nodes:
            raise Unknown
        return self.nodes[id(first)]

    def array(self, node: Node) -> str:
        if not node.array and node.source:
            node.array = self.line(f"{self.keep(np.broadcast_to)}({self.array(node.source)}, {node.first.data.shape})")
        elif not node.array:
            node.array = self.line(f"{node.handle}.data")
        return node.array

    def handle(self, node: Node) -> str:
        node.handle = node.handle or self.line(f"Handle({self.array(node)}, {self.keep(node.first.dtype)})")
        return node.handle

    # -- calls
    def as_before(self, name: str, args: Any, kwargs: Any, made: Any) -> None:
        given = [self.argument(value) for value in args] + [f"{k}={self.argument(v)}" for k, v in kwargs.items()]
        called = self.line(f"builder.{name}({', '.join(given)})")
        for index, one in enumerate(made if isinstance(made, tuple) else ()):
            self.nodes[id(one)] = Node(one, handle=f"{called}[{index}]")
        self.nodes[id(made)] = Node(made, handle=called)

    def argument(self, value: Any) -> str:
        if isinstance(value, HANDLES):
            return self.handle(self.node(value))
        if isinstance(value, (list, tuple)) and any(isinstance(one, HANDLES) for one in value):
            return f"[{', '.join(self.argument(one) for one in value)}]"
        return self.keep(value)

    def _create_splat(self, made: Any, _: Any, of: Any) -> None:
        self.broadcast(made, of)

    def _create_broadcast(self, made: Any, of: Any, _: Any) -> None:
        self.broadcast(made, of)

    def broadcast(self, made: Any, of: Any) -> None:
        if self.node(of).constant:
            self.constant(made)
        else:
            self.nodes[id(made)] = Node(made, source=self.node(of))

    def _create_expand_dims(self, made: Any, of: Any, _: Any) -> None:
        self.elementwise(made, f"{{}}.reshape({made.data.shape})", of)

    def _binary_op(self, made: Any, a: Any, b: Any, op: Any) -> None:
        self.operation(made, op, a, b)

    def _ternary_op(self, made: Any, a: Any, b: Any, c: Any, op: Any) -> None:
        self.operation(made, op, a, b, c)

    def _unary_op(self, made: Any, a: Any, op: Any) -> None:
        self.operation(made, op, a)

    def _cast_impl(self, made: Any, of: Any, to: Any) -> None:
        if tl.bfloat16 in (of.dtype.scalar, to.scalar):
            self.as_before("cast_impl", (of, to), {}, made)
        else:
            self.elementwise(made, f"{{}}.astype({self.keep(made.data.dtype)})", of)

    def _create_addptr(self, made: Any, pointer: Any, offset: Any) -> None:
        size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
        offsets = f"{{}}.astype({self.keep(np.dtype(np.uint64))})"
        self.elementwise(made, f"{{}} + {f'{size} * ' if size > 1 else ''}{offsets}", pointer, offset)

    def operation(self, made: Any, op: Any, *args: Any) -> None:
        if op(*(x.data.reshape(-1)[:1] for x in args)).dtype != made.data.dtype:
            raise Unknown  # the builder has narrowed it
        self.elementwise(made, f"{self.keep(op)}({', '.join('{}' for _ in args)})", *args)

    def elementwise(self, made: Any, expression: str, *args: Any) -> None:
        """Of what is broadcast its source, if the result has its shape even so."""
        nodes = [self.node(x) for x in args]
        if all(node.constant for node in nodes):
            return self.constant(made)
        sources = nodes
        if len(nodes) > 1:
            sources = [node.source or node for node in nodes]
            if np.broadcast_shapes(*(node.first.data.shape for node in sources)) != made.data.shape:
                sources = nodes
        self.nodes[id(made)] = Node(made, self.line(expression.format(*(self.array(node) for node in sources))))

    # -- the result
    def returned(self, value: Any) -> str:
        if type(value) is tuple:
            return f"({''.join(self.returned(one) + ', ' for one in value)})"
        if value is None or isinstance(value, (tl.constexpr, tl.dtype)):
            return self.keep(value)
        if type(value) is not tl.tensor:
            raise Unknown
        for number, tensor in enumerate(self.tensors):
            if value is tensor:
                return f"t[{number}]"
        if value.handle is None or (isinstance(value.handle, HANDLES) and self.node(value.handle).constant):
            return self.keep(value)
        made, handle = self.line("new(tensor)"), self.handle(self.node(value.handle))
        parts = {name: self.keep(part) for name, part in vars(value).items() if name != "handle"}
        self.lines += [f"{made}.{name} = {part}" for name, part in {"handle": handle, **parts}.items()]
        return made
