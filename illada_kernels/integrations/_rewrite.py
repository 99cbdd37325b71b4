"""Copies functions so that names in their code mean something else; what they were copied from stays as it is.

A name is followed through globals, attributes of modules, closures, defaults, imports inside a function, and the helper
functions, partials, properties and tables of functions that it leads to. Functions of torch are not followed.
"""

from __future__ import annotations

import builtins
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ._code import names_of

INTERFACE = "the attention interface"  # what `Rewriter.reaches` calls a table
LARGEST = 1000  # entries of a dict, list or tuple that is looked into


class Rewriter:
    """Replaces the values of `wanted`, {name: (theirs, ours)}, in what is given to `replaced`.

    `table`: a mapping class. Its instances are INTERFACE to `reaches`; with `key`, they have that entry replaced.
    `around`: given each copy that torch.compile made and the names that it leads to, returns what to call instead.
    """

    def __init__(
        self,
        wanted: Mapping[str, tuple[Any, Any]],
        table: type | None = None,
        key: str | None = None,
        around: Callable[[Any, frozenset[str]], Any] | None = None,
    ) -> None:
        self.wanted = {id(theirs): (name, ours) for name, (theirs, ours) in wanted.items()}
        self.table, self.key, self.around = table, key, around
        # by ids, with the values, so that the ids are not used again
        self._reached: dict[tuple[int, bool], tuple[Any, frozenset[str]]] = {}
        self._copies: dict[int, tuple[Any, Any]] = {}

    def reaches(self, value: Any, member: bool = False) -> frozenset[str]:
        """Returns the wanted names that a value leads to. `member`: of a class, so that torch's count as well."""
        if id(value) in self.wanted:
            return frozenset((self.wanted[id(value)][0],))
        key = id(value), member
        if key not in self._reached:
            seen, found, left = {id(value)}, set(), [value]
            while left:
                one = left.pop()
                if self.table is not None and isinstance(one, self.table):
                    found.add(INTERFACE)
                    continue
                for part in self._parts(one, member and one is value):
                    if id(part) in self.wanted:
                        found.add(self.wanted[id(part)][0])
                    elif id(part) not in seen:
                        seen.add(id(part))
                        left.append(part)
            self._reached[key] = value, frozenset(found)
        return self._reached[key][1]

    def replaced(self, value: Any, member: bool = False) -> Any:
        """Returns the value, or a copy that leads to ours."""
        if id(value) in self.wanted:
            return self.wanted[id(value)][1]
        if not self.reaches(value, member) - ({INTERFACE} if self.key is None else set()):
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = value, self._copy(value)
        return self._copies[id(value)][1]

    def _parts(self, value: Any, member: bool) -> Iterator[Any]:
        """Yields what a value holds or its code names."""
        kind = type(value)
        if (inner := _compiled(value)) is not None:
            yield inner
        elif kind is types.FunctionType:
            if member or not _is_library(value):
                yield from self._named(value)
        elif kind in (types.MethodType, staticmethod, classmethod):
            yield value.__func__
        elif kind is functools.partial:
            yield from (value.func, *value.args, *value.keywords.values())
        elif kind is functools.cached_property:
            yield value.func
        elif kind is property:
            yield from (part for part in (value.fget, value.fset, value.fdel) if part is not None)
        elif kind is dict and len(value) <= LARGEST:
            yield from value.values()
        elif kind in (list, tuple) and len(value) <= LARGEST:
            yield from value

    def _named(self, function: types.FunctionType) -> Iterator[Any]:
        names = names_of(function.__code__)
        cells = dict(zip(function.__code__.co_freevars, map(_content, function.__closure__ or ())))
        for name, *attributes in names.chains:
            value = cells[name] if name in cells else function.__globals__.get(name)
            while isinstance(value, types.ModuleType) and attributes:
                value = vars(value).get(attributes.pop(0))
            yield from _members(value, names.all) if isinstance(value, types.ModuleType) else (value,)
        for module in _imported(function):
            yield from _members(module, names.all)
        yield from (value for name, value in cells.items() if name != "__class__")
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if (inner := _compiled(value)) is not None:
            new = _compiled_as(value, self.replaced(inner))
            if self.around is None or vars(value).get("_torchdynamo_disable"):
                return new
            return self.around(new, self.reaches(value))
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(self.replaced(value.__func__), value.__self__)
        if kind in (staticmethod, classmethod):
            return kind(self.replaced(value.__func__))
        if kind is functools.partial:
            arguments = map(self.replaced, value.args)
            keywords = {name: self.replaced(one) for name, one in value.keywords.items()}
            return functools.partial(self.replaced(value.func), *arguments, **keywords)
        if kind is functools.cached_property:
            return functools.cached_property(self.replaced(value.func))
        if kind is property:
            get, set_, delete = map(self.replaced, (value.fget, value.fset, value.fdel))
            return property(get, set_, delete, value.__doc__)
        if kind is dict:
            return {name: self.replaced(one) for name, one in value.items()}
        if kind in (list, tuple):
            return kind(map(self.replaced, value))
        if self.key is None or self.key not in value:
            return value
        table = type(value)()
        vars(table).update({name: one.copy() for name, one in vars(value).items()})
        table[self.key] = self.replaced(value[self.key], member=True)
        return table

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Returns a copy with globals of its own, which cannot follow what functions write into theirs."""
        code, names = function.__code__, names_of(function.__code__)
        used = names.stored | {chain[0] for chain in names.chains}
        if shared := sorted(used & _written(function.__globals__)):
            raise ValueError(
                f"model: {function.__module__}.{function.__qualname__} uses the global {shared[0]}, which functions of "
                "its file write: a patched copy would not see that. Keep it in an attribute of a module, or pass it on"
            )
        scope, cells = dict(function.__globals__), tuple(types.CellType() for _ in code.co_freevars)
        scope.pop("__name__", None)  # torch.compile would look names up in the module of that name
        imports_ours = any(self._module(module, names.all) is not module for module in _imported(function))
        if imports_ours:
            scope["__builtins__"] = {**vars(builtins), "__import__": self._import(function, names.all)}
        new = types.FunctionType(_fresh(code), scope, function.__name__, None, cells)
        self._copies[id(function)] = function, new  # before the rest, which may lead back here
        for name in names.all & scope.keys():
            scope[name] = self._in_code(scope[name], names.all)
        for name, cell, old in zip(code.co_freevars, cells, function.__closure__ or ()):
            if (value := _content(old)) is not _EMPTY:
                cell.cell_contents = value if name == "__class__" else self._in_code(value, names.all)
        new.__defaults__ = None if function.__defaults__ is None else tuple(map(self.replaced, function.__defaults__))
        keywords = function.__kwdefaults__
        new.__kwdefaults__ = keywords and {name: self.replaced(one) for name, one in keywords.items()}
        for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
            setattr(new, name, getattr(function, name))
        vars(new).update(vars(function))
        return torch.compiler.disable(new) if imports_ours else new  # Dynamo imports by itself

    def _in_code(self, value: Any, names: frozenset[str]) -> Any:
        return self._module(value, names) if isinstance(value, types.ModuleType) else self.replaced(value)

    def _module(self, module: types.ModuleType, names: frozenset[str], above: tuple[Any, ...] = ()) -> Any:
        """Returns a copy of the module in which these names are replaced; the module itself where nothing is."""
        if module in above:
            return module
        changed = {}
        for name in names & vars(module).keys():
            value = vars(module)[name]
            inner = isinstance(value, types.ModuleType)
            new = self._module(value, names, (*above, module)) if inner else self.replaced(value)
            if new is not value:
                changed[name] = new
        if not changed:
            return module
        copy = types.ModuleType(module.__name__)
        vars(copy).update(vars(module), **changed)
        return copy

    def _import(self, function: types.FunctionType, names: frozenset[str]) -> Callable[..., Any]:
        """Returns an __import__ that gives modules in which these names are replaced."""

        def ours(name: str, _: Any = None, local: Any = None, some: Any = (), level: int = 0) -> Any:
            return self._module(builtins.__import__(name, function.__globals__, local, some, level), names)

        return ours


_FIXED: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_FIXED += (types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def held(function: Any) -> list[Any] | None:
    """Returns the objects that a function's result may depend on: what it closes over, has as defaults and names, and
    what these hold. None if they are more than LARGEST, or if one is of a kind that is not looked into."""
    walker, found, left, seen = Rewriter({}), [], [function], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        found.append(one)
        kind = type(one)
        if len(found) > LARGEST or (kind in (dict, list, tuple) and len(one) > LARGEST):
            return None
        if isinstance(one, torch.Tensor) or kind in _FIXED:
            continue
        if kind is types.FunctionType:
            left += map(_content, one.__closure__ or ()) if _is_library(one) else walker._parts(one, True)
        elif kind is types.MethodType:
            left += [one.__func__, one.__self__]
        elif isinstance(one, type):
            left += _of_class(one)
        elif kind in (dict, list, tuple, functools.partial, property, staticmethod, classmethod):
            left += walker._parts(one, True)
        elif hasattr(one, "__dict__"):
            left += [kind, *vars(one).values()]
        elif kind is not object:
            return None
    return found


def _of_class(kind: type) -> list[Any]:
    """Returns what a class and its bases hold, but those of libraries and what Python calls by itself."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("builtins", "torch")]
    names = ((name, value) for base in bases for name, value in vars(base).items())
    return [value for name, value in names if name == "__call__" or not name.startswith("__")]


def _fresh(code: types.CodeType) -> types.CodeType:
    """Returns equal code that is not the same, otherwise graphs that torch.compile made of the original would run."""
    inner = (_fresh(one) if isinstance(one, types.CodeType) else one for one in code.co_consts)
    return code.replace(co_consts=tuple(inner))


def _written(scope: dict[str, Any]) -> set[str]:
    """Returns the globals that functions and methods of a file assign."""
    found: set[str] = set()
    for value in list(scope.values()):
        members = list(vars(value).values()) if isinstance(value, type) else [value]
        for one in members:
            one = getattr(one, "__func__", one)
            for part in (one.fget, one.fset, one.fdel) if isinstance(one, property) else (one,):
                if isinstance(part, types.FunctionType) and part.__globals__ is scope:
                    found |= names_of(part.__code__).stored
    return found


_EMPTY = object()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _EMPTY


def _compiled(value: Any) -> Any:
    """Returns what torch.compile or torch.compiler.disable made a function of; None for other values."""
    return vars(value).get("_torchdynamo_orig_callable") if type(value) is types.FunctionType else None


def _compiled_as(function: types.FunctionType, new: Any) -> Any:
    """Returns `new` under what torch made `function` with, its backend and options."""
    cells = dict(zip(function.__code__.co_freevars, map(_content, function.__closure__ or ())))
    if callable(context := cells.get("self")):
        return context(new)
    return torch.compiler.disable(new) if vars(function).get("_torchdynamo_disable") else torch.compile(new)


def _is_library(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in ("torch", __name__.partition(".")[0])


def _imported(function: types.FunctionType) -> list[types.ModuleType]:
    """Returns the modules that the function's code imports, of those that are loaded; relative names are tried from
    each package around it."""
    package = (function.__module__ or "").split(".")
    around = ["", *(".".join(package[:n]) + "." for n in range(1, len(package) + 1))]
    found = (sys.modules.get(start + name) for name in names_of(function.__code__).imports if name for start in around)
    return [module for module in found if module is not None]


def _members(module: types.ModuleType, names: frozenset[str], above: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yields what has one of these names in a module, or in a module that it holds under such a name."""
    for name in names & vars(module).keys():
        value = vars(module)[name]
        if not isinstance(value, types.ModuleType):
            yield value
        elif value not in above:
            yield from _members(value, names, (*above, module))
