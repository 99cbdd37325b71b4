"""Reads what a function's code looks up, writes and imports from its bytecode: names, not values."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple

_STARTS = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"))
_BETWEEN = frozenset(("CACHE", "EXTENDED_ARG", "NOP", "PUSH_NULL"))


class Names(NamedTuple):
    """Holds what code, and the code within it, looks up and writes."""

    chains: tuple[tuple[str, ...], ...]  # ("torch", "nn", "functional", "softmax"): a global or free name, attributes
    imports: tuple[str, ...]
    all: frozenset[str]  # every name, attribute and string, where no chain says what belongs to what
    stored: frozenset[str]  # globals that the code assigns or deletes


@functools.lru_cache(4096)
def names_of(code: types.CodeType) -> Names:
    """Returns the names of code, and of the code within it."""
    chains: list[list[str]] = []
    imports, every, stored = [], set(code.co_names), set()
    current: list[str] | None = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in _STARTS:
            chains.append(current := [instruction.argval])
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and current is not None:
            current.append(instruction.argval)
        elif name not in _BETWEEN:
            current = None
        if name == "IMPORT_NAME":
            imports.append(instruction.argval)
        elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            stored.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = names_of(constant)
            chains += map(list, inner.chains)
            imports += inner.imports
            every |= inner.all
            stored |= inner.stored
        elif isinstance(constant, str):
            every.add(constant)
    return Names(tuple(dict.fromkeys(map(tuple, chains))), tuple(imports), frozenset(every), frozenset(stored))


OTHERWISE = ""  # what `read_of_class` says where a class is compared, written to or kept


@functools.lru_cache(4096)
def read_of_class(code: types.CodeType) -> frozenset[str]:
    """Returns what a method's code reads of type(x), x.__class__ and super(), attributes by name, and OTHERWISE for
    other uses, but of the types of its arguments and for types that are only written into a text."""
    return _read_of_class(code, code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])


def _read_of_class(code: types.CodeType, arguments: tuple[str, ...]) -> frozenset[str]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in (*_BETWEEN, "PRECALL")]
    found: set[str] = set()
    for i, step in enumerate(steps):
        after, is_super = -1, step.argval == "super"
        if step.opname == "LOAD_SUPER_ATTR":
            found.add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == "__class__":
            after = i + 1
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in ("type", "super"):
            after = next((j for j in range(i + 1, min(i + 8, len(steps))) if steps[j].opname.startswith("CALL")), i) + 1
            given = steps[i + 1 : after - 1]  # what is loaded for the call
            if not is_super and len(given) == 1 and given[0].opname.startswith("LOAD_FAST"):
                after = -1 if given[0].argval in arguments else after
        if 0 <= after < len(steps) and not steps[after].opname.startswith(("FORMAT_", "CONVERT_")):
            attribute = steps[after].opname in ("LOAD_ATTR", "LOAD_METHOD")
            found.add(steps[after].argval if attribute else "__init__" if is_super else OTHERWISE)
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            found |= _read_of_class(one, ())
    return frozenset(found)
