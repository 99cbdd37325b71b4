"""Puts our ops into a model whose code calls torch's functions by name: LLaDA, iLLaDA, Dream, SDAR and their like.

    from illada_kernels.integrations import patch, unpatch
    patch(model)

Remote code cannot be edited, and replacing torch's functions would reach every model in the process. `patch` finds the
methods whose code leads to a function that it replaces, and gives the modules that have them copies of these methods,
in which the name means ours: as attributes, so that type(module) stays what it is, or, where an attribute would not be
looked at (properties, super(), class methods), in a subclass. Nothing else changes, and nothing is added to a call.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import _flash_attn, _flex, _stand_ins
from ._code import OTHERWISE, names_of, read_of_class
from ._first_run import FirstRun
from ._rewrite import INTERFACE, Rewriter

ATTENTION = "scaled_dot_product_attention"


def patch(model: torch.nn.Module, *, loss: bool = True) -> list[str]:
    """Makes the attention of `model`, and the loss where its code computes one, run on our ops.

    Parameters
    ----------
    model : torch.nn.Module
        Of any class, compiled or not. Each method and attribute of its modules that leads to torch's
        `scaled_dot_product_attention` leads to ours: by any name, through helper functions, attributes, properties,
        base classes and imports inside a function; torch's `flex_attention` too, also within a function that
        torch.compile made, and flash-attn's `flash_attn_func` and `flash_attn_varlen_func`, where that package is
        imported. With `loss`, each that leads to `cross_entropy` or
        `CrossEntropyLoss` computes it by `masked_loss_from_logits`. Layers that take their attention from transformers'
        interface are switched to attn_implementation="illada"; where they share a configuration with layers that call
        torch by name, and so want torch's masks, the interface's "sdpa" becomes ours instead.
    loss : bool

    Returns
    -------
    list of str
        "module.method" of what was replaced.

    Raises
    ------
    ValueError
        If no attention was found; says what was looked for. If code to be replaced uses a global that functions of its
        file assign, because a copy would not see that. If a module needs a subclass and its code compares or writes to
        its own class. The model is then as it was.

    Warns
    -----
    RuntimeWarning
        After the first eager forward, if torch's or flash-attn's function ran in it all the same (a call that no name
        leads to, or torch.nn.MultiheadAttention), with file and line, or if none of ours did. A compiled forward is
        not watched.

    Notes
    -----
    Masks, dropouts and biases that `scaled_dot_product_attention` refuses raise in the forward. Patching twice changes
    nothing. `unpatch` restores every attribute. copy.deepcopy gives a patched model. A module's copy.copy would run
    with the weights of the module it was made of: unpatch the model before that, and before pickling it. Copied methods
    see the globals of their files as these were when `patch` was called. A patched module is in a cycle with its
    methods, so that its memory is freed only by Python's garbage collector; `unpatch` breaks the cycle.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.integrations import patch, unpatch
    >>> class Attention(torch.nn.Module):
    ...     def forward(self, q, k, v):
    ...         return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> model = torch.nn.Sequential(Attention())
    >>> patch(model)
    ['0.forward']
    >>> unpatch(model)
    """
    model = _inner(model)
    unpatch(model)
    wanted: dict[str, Any] = {ATTENTION: (F.scaled_dot_product_attention, _stand_ins.scaled_dot_product_attention)}
    wanted |= _flash_attn.wanted() | _flex.wanted()
    attends = frozenset(wanted)
    if loss:
        wanted["cross_entropy"] = F.cross_entropy, _stand_ins.cross_entropy
        wanted["CrossEntropyLoss"] = torch.nn.CrossEntropyLoss, _stand_ins.CrossEntropyLoss
    interface = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)

    def around(compiled: Any, names: frozenset[str]) -> Any:
        return _flex.outside(compiled) if attends & names else compiled

    rewriter, both = (Rewriter(wanted, interface, key, around) for key in (None, "sdpa"))
    reached = {path: _reached(module, rewriter) for path, module in model.named_modules()}
    asking = {path for path, names in reached.items() if INTERFACE in names}
    if not asking and not any(attends & names for names in reached.values()):
        raise ValueError(
            f"model: found no attention in {type(model).__name__}: no method or attribute of its modules leads to "
            f"torch's {ATTENTION} or flex_attention or flash-attn's flash_attn_func, and none asks transformers' "
            "attention interface. Call illada_kernels.attention in its attention's forward"
        )
    configs = _configs(model)
    by_name = {id(configs[path]) for path, names in reached.items() if ATTENTION in names and configs[path] is not None}
    keeps = {path for path in asking if configs[path] is None or id(configs[path]) in by_name}
    rewriters = {path: both if path in keeps else rewriter for path in reached}
    classes: dict[Any, Any] = {}
    for path, module in model.named_modules():  # all classes before anything is changed, because a class may refuse
        key = type(module), id(rewriters[path])
        if key not in classes:
            classes[key] = _changes(type(module), rewriters[path])
    replaced: list[str] = []
    switched: list[str] = []
    parts = {}
    try:
        for path, module in model.named_modules():
            if names := _replace(module, rewriters[path], classes[type(module), id(rewriters[path])]):
                parts[path] = module
                replaced += [f"{path}.{name}".lstrip(".") for name in names]
            if path in asking and configs[path] is not None:
                switched += _switch(module, configs[path], "sdpa" if path in keeps else "illada")
    except ValueError:  # of an attribute
        unpatch(model)
        raise
    _kept(model).first_run = FirstRun(model, parts, loss)
    return [*replaced, *dict.fromkeys(switched)]


def unpatch(model: torch.nn.Module) -> None:
    """Restores every attribute that `patch` changed, in this module and all within it.

    Parameters
    ----------
    model : torch.nn.Module
        One that is not patched is left as it is.

    Raises
    ------
    ValueError
        If a module got yet another class since: undo that first. Nothing is restored then.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels.integrations import patch, unpatch
    >>> class Attention(torch.nn.Module):
    ...     def forward(self, q, k, v):
    ...         return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> model = Attention()
    >>> replaced = patch(model)
    >>> unpatch(model)
    >>> vars(model).keys() == vars(Attention()).keys()
    True
    """
    model = _inner(model)
    patched = [(path, module) for path, module in model.named_modules() if _KEPT in vars(module)]
    for path, module in patched:
        kept = _kept(module)
        if type(module) is not kept.ours:
            raise ValueError(
                f"model: expected the class that patch gave {path or 'the model'}, got {type(module).__name__} of "
                f"{type(module).__module__}; undo what changed it after patch (fully_shard, parametrize), then unpatch"
            )
        for name, function in kept.methods.items():
            if getattr(vars(module).get(name), "__func__", None) is not function:
                raise ValueError(
                    f"model: expected {f'{path}.{name}'.lstrip('.')} to be what patch made of it, got another; undo "
                    "what wrapped it after patch (accelerate), then unpatch"
                )
    for _, module in patched:
        kept = vars(module).pop(_KEPT)
        object.__setattr__(module, "__class__", kept.theirs)
        for name in (*kept.methods, *kept.added):
            del vars(module)[name]
        vars(module).update(kept.attributes)
        if kept.config is not None:
            kept.config._attn_implementation_internal = kept.implementation
        if kept.first_run is not None:
            kept.first_run.stop()


_KEPT = "_illada_patch"


class _Kept:
    """Holds what a patch changed in one module."""

    def __init__(self, kind: type) -> None:
        self.theirs = self.ours = kind
        self.attributes: dict[str, Any] = {}
        self.methods: dict[str, types.FunctionType] = {}  # that are attributes of the module while it is patched
        self.added: tuple[str, ...] = ()
        self.config: Any = None
        self.implementation: str | None = None  # of config, before
        self.first_run: FirstRun | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        new = object.__new__(_Kept)
        memo[id(self)] = new
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickle.PicklingError("the model is patched by illada_kernels; unpatch the model before pickling it")


def _kept(module: torch.nn.Module) -> _Kept:
    kept: _Kept = vars(module).setdefault(_KEPT, _Kept(type(module)))
    return kept


def _inner(model: Any) -> torch.nn.Module:
    """Returns the module that torch.compile wraps, or the model itself."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while isinstance(inner := model._modules.get("_orig_mod"), torch.nn.Module):
        model = inner
    return model


# ---- what to replace -------------------------------------------------------------------------------------------------

_PLAIN = frozenset(vars(torch.nn.Module()))
_RUN_ALREADY = ("__init__", "__new__", "__init_subclass__")
_OF_TRANSFORMERS = ("transformers.modeling_utils", "transformers.generation.utils")  # they name what models use


def _members(kind: type) -> Iterator[tuple[type, str, Any]]:
    """Yields (class, name, value) of what the class and its bases up to torch.nn.Module hold, but what has run.

    Of transformers' own bases only the property loss_function, where the class asks it.
    """
    asks_loss = False
    for base in kind.__mro__:
        if base is torch.nn.Module:
            return
        for name, value in vars(base).items():
            if base.__module__ in _OF_TRANSFORMERS:
                if name == "loss_function" and asks_loss:
                    yield base, name, value
            elif name not in _RUN_ALREADY:
                if isinstance(value, types.FunctionType):
                    code = getattr(inspect.unwrap(value), "__code__", None)
                    asks_loss |= code is not None and "loss_function" in names_of(code).all
                yield base, name, value


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _PLAIN and name != _KEPT}


def _reached(module: torch.nn.Module, rewriter: Rewriter) -> set[str]:
    """Returns the wanted names that anything of the module leads to."""
    found: set[str] = set()
    for _, _, value in _members(type(module)):
        found |= rewriter.reaches(value, member=True)
    for value in _attributes(module).values():
        found |= rewriter.reaches(value)
    return found


def _configs(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the configuration of transformers that each module has, or the module around it; None without."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = vars(module).get("config")
        around = found.get(path.rpartition(".")[0]) if path else None
        found[path] = own if hasattr(own, "_attn_implementation_internal") else around
    return found


# ---- replacing -------------------------------------------------------------------------------------------------------


class _Changes(NamedTuple):
    """Says what a class needs: methods as attributes of its instances, or a subclass."""

    ours: type
    methods: dict[str, Any]
    names: list[str]


def _replace(module: torch.nn.Module, rewriter: Rewriter, changes: _Changes) -> list[str]:
    """Gives the module its methods or its subclass, and its attributes. Returns the names of all of them."""
    changed = {name: rewriter.replaced(value) for name, value in _attributes(module).items()}
    changed = {name: value for name, value in changed.items() if value is not vars(module)[name]}
    methods = {name: value for name, value in changes.methods.items() if name not in vars(module)}  # else it is hidden
    names = [name for name in changes.names if name in methods or not changes.methods]
    if not names and not changed:
        return []
    kept = _kept(module)
    kept.attributes = {name: vars(module)[name] for name in changed}
    vars(module).update(changed)
    kept.ours, kept.methods = changes.ours, methods
    object.__setattr__(module, "__class__", changes.ours)
    vars(module).update({name: types.MethodType(function, module) for name, function in methods.items()})
    if methods:
        kept.added = (_REPLICATE,)
        vars(module)[_REPLICATE] = functools.partial(_replica, module)
    return [*names, *changed]


_REPLICATE = "_replicate_for_data_parallel"


def _replica(module: torch.nn.Module) -> torch.nn.Module:
    """Does what torch.nn.DataParallel asks of a module; the replica's methods are its own."""
    replica: torch.nn.Module = getattr(type(module), _REPLICATE)(module)
    for name, function in _kept(module).methods.items():
        vars(replica)[name] = types.MethodType(function, replica)
    return replica


def _changes(kind: type, rewriter: Rewriter) -> _Changes:
    """Returns what replaces the members of a class that lead to something wanted.

    A base whose members are replaced in a subclass gets a subclass of its own that stands before it in the order of
    resolution, so that super() finds it there.
    """
    changed: dict[type, dict[str, Any]] = {}
    found: set[str] = set()
    plain = True
    for base, name, value in _members(kind):
        new = rewriter.replaced(value, member=True)
        if new is not value:
            changed.setdefault(base, {})[name] = new
            plain &= name not in found and isinstance(value, types.FunctionType) and not name.startswith("__")
        found.add(name)
    if not changed:
        return _Changes(kind, {}, [])
    every = {name: value for members in reversed(changed.values()) for name, value in members.items()}
    own = changed.pop(kind, {})
    names = list(dict.fromkeys([*own, *(name for members in changed.values() for name in members)]))
    reads = {function: read_of_class(function.__code__) for function in _functions(kind)}
    if plain and not any(every.keys() & read for read in reads.values()):
        return _Changes(kind, every, names)
    if using := [function for function, read in reads.items() if OTHERWISE in read]:
        raise ValueError(
            f"model: {using[0].__module__}.{using[0].__qualname__} compares or writes to the module's own class, and "
            f"{', '.join(names)} of {kind.__name__} can only be replaced in a subclass; compare with isinstance, write "
            "to the class by its name"
        )
    bases = (kind, *(_derived(base, (base,), members) for base, members in changed.items()))
    return _Changes(_derived(kind, bases, own), {}, names)


def _functions(kind: type) -> Iterator[types.FunctionType]:
    """Yields the functions of a class and its bases, but those of libraries and what has run."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "transformers", "builtins", "abc"):
            continue
        for name, value in vars(base).items():
            parts = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
            for one in parts if name not in _RUN_ALREADY else ():
                if isinstance(one := inspect.unwrap(one) if callable(one) else one, types.FunctionType):
                    yield one


def _derived(kind: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    how = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    # what pickle says that it cannot find
    how["__qualname__"] = f"{kind.__qualname__} as patched by illada_kernels (unpatch the model before pickling it)"
    return type(kind)(kind.__name__, bases, {**how, **members})


def _switch(module: torch.nn.Module, config: Any, name: str) -> list[str]:
    """Sets the attention of a configuration of transformers, and keeps what it was. Returns what to say."""
    from . import transformers as illada

    illada.register()
    if config._attn_implementation_internal in (name, "illada"):
        return []
    kept = _kept(module)
    kept.config, kept.implementation = config, config._attn_implementation_internal
    config._attn_implementation_internal = name
    return [f'attn_implementation="{name}"']
