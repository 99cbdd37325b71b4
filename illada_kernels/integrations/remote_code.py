"""Puts our ops into a model whose code calls torch's functions by name: LLaDA, iLLaDA, Dream, SDAR and their like.

    from illada_kernels.integrations import patch, unpatch
    patch(model)

Remote code cannot be edited, and replacing torch's functions would reach every model in the process. `patch` finds the
methods of the model's modules whose code names a function that it replaces, and gives each of these modules its own
copy of the method, in whose globals that name means ours. Nothing else changes, and nothing is added to a call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import scaled_dot_product_attention
from ..ops.masked_loss import masked_loss_from_logits

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' own way to choose attention


def patch(model: torch.nn.Module, *, loss: bool = True) -> list[str]:
    """Makes the attention of `model`, and the loss where its code computes one, run on our ops.

    Parameters
    ----------
    model : torch.nn.Module
        Of any class. Each method of its modules that calls `scaled_dot_product_attention` calls ours; with `loss`, each
        that calls `cross_entropy` or `CrossEntropyLoss` computes it by `masked_loss_from_logits`. A model that takes
        its attention from transformers' interface is switched to attn_implementation="illada".
    loss : bool

    Returns
    -------
    list of str
        "module.method" of what was replaced.

    Raises
    ------
    ValueError
        If no attention was found; says what was looked for.

    Notes
    -----
    Masks, dropouts and biases that `scaled_dot_product_attention` refuses raise in the forward. Patching twice changes
    nothing. `unpatch` restores every attribute.

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
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if _KEPT in vars(model):
        return list(vars(model)[_KEPT].replaced)
    kept = _Kept()
    wanted: dict[Any, Any] = {F.scaled_dot_product_attention: scaled_dot_product_attention}
    if loss:
        wanted |= {F.cross_entropy: cross_entropy, torch.nn.CrossEntropyLoss: CrossEntropyLoss}
    found: set[str] = set()
    by_interface = False
    for path, module in model.named_modules():
        for name, function in _methods(type(module)):
            by_interface |= _asks_interface(function)
            copy = _copy(function, wanted, found)
            if copy is not None:
                kept.replace(module, name, types.MethodType(copy, module), f"{path}.{name}".lstrip("."))
    if by_interface and hasattr(model, "set_attn_implementation"):
        from . import transformers as illada

        illada.register()
        kept.implementation = str(vars(model)["config"]._attn_implementation)
        model.set_attn_implementation("illada")  # type: ignore[operator]
        kept.replaced.append('attn_implementation="illada"')
        found.add(INTERFACE)
    if not found & {"scaled_dot_product_attention", INTERFACE}:
        kept.restore(model)
        raise ValueError(
            f"model: found no attention in {type(model).__name__}: no method of its modules calls "
            "scaled_dot_product_attention by that name, and none asks transformers' attention interface. Call "
            "illada_kernels.attention in its attention's forward"
        )
    vars(model)[_KEPT] = kept
    return list(kept.replaced)


def unpatch(model: torch.nn.Module) -> None:
    """Restores every attribute that `patch` changed. A model that is not patched is left as it is."""
    kept = vars(model).pop(_KEPT, None)
    if kept is not None:
        kept.restore(model)


_KEPT = "_illada_patch"


class _Kept:
    """What a patch changed: attributes of instances, which hide the methods of their classes."""

    def __init__(self) -> None:
        self.methods: list[tuple[torch.nn.Module, str, bool, Any]] = []  # module, name, whether it was there, what
        self.replaced: list[str] = []
        self.implementation: str | None = None

    def replace(self, module: torch.nn.Module, name: str, method: Any, path: str) -> None:
        self.methods.append((module, name, name in vars(module), vars(module).get(name)))
        vars(module)[name] = method
        self.replaced.append(path)

    def restore(self, model: Any) -> None:
        for module, name, was_there, before in reversed(self.methods):
            if was_there:
                vars(module)[name] = before
            else:
                vars(module).pop(name, None)
        if self.implementation is not None:
            model.set_attn_implementation(self.implementation)


def _methods(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Each method that an instance of the class has, but torch's own and those of transformers' base classes, which
    handle the attention interface in every model, whether it asks it or not."""
    seen = set()
    for base in kind.__mro__:
        if base is torch.nn.Module:
            return
        if base.__module__ in ("transformers.modeling_utils", "transformers.generation.utils"):
            continue
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and name not in seen:
                yield name, value
            seen.add(name)


def _names(code: types.CodeType) -> set[str]:
    """Names that code and the functions within it look up."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)


def _copy(function: types.FunctionType, wanted: dict[Any, Any], found: set[str]) -> types.FunctionType | None:
    """Returns the function with globals in which the wanted names mean ours, in what it decorates too; None if nothing
    names them. Adds the names to `found`."""
    theirs = {one.__name__: one for one in wanted}
    changed = {}
    for name in (names := _names(function.__code__)):
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType) and names & theirs.keys():
            replacement = _module(value, tuple(wanted.items()))
            if replacement is not value:
                changed[name] = replacement
                found |= names & theirs.keys()
        elif name in theirs and value is theirs[name]:
            changed[name] = wanted[value]
            found.add(name)
    closure = []
    for cell in function.__closure__ or ():
        inner = _content(cell)
        copy = _copy(inner, wanted, found) if isinstance(inner, types.FunctionType) and inner is not function else None
        closure.append(cell if copy is None else types.CellType(copy))
    if not changed and all(a is b for a, b in zip(closure, function.__closure__ or ())):
        return None
    scope = {**function.__globals__, **changed}
    scope.pop("__name__", None)  # torch.compile would look names up in the module of that name
    new = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, tuple(closure))
    new.__kwdefaults__ = function.__kwdefaults__
    vars(new).update(vars(function))
    return new


def _asks_interface(function: types.FunctionType) -> bool:
    """Whether it, or what it decorates, names transformers' attention interface."""
    inner = [_content(cell) for cell in function.__closure__ or ()]
    return INTERFACE in _names(function.__code__) or any(
        _asks_interface(f) for f in inner if isinstance(f, types.FunctionType) and f is not function
    )


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


@functools.cache
def _module(module: types.ModuleType, wanted: tuple[tuple[Any, Any], ...]) -> types.ModuleType:
    """A copy of torch, torch.nn or torch.nn.functional that holds ours; any other module itself."""
    if module not in (torch, torch.nn, F):
        return module
    copy = types.ModuleType(module.__name__)
    vars(copy).update(vars(module))
    for theirs, ours in wanted:
        name = theirs.__name__
        if vars(module).get(name) is theirs:
            setattr(copy, name, ours)
    for name in ("nn", "functional"):
        inner = vars(module).get(name)
        if isinstance(inner, types.ModuleType):
            setattr(copy, name, _module(inner, wanted))
    return copy


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy by `masked_loss_from_logits`, float32 whatever the logits are.

    Class weights, probabilities as targets and the old arguments go to torch. The mean of no token is NaN, as in torch.
    """
    plain = weight is None and size_average is None and reduce is None
    if not plain or target.dtype != torch.int64 or input.dim() not in (1, 2) or target.dim() != input.dim() - 1:
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    masked = target != ignore_index
    how = "sum" if reduction == "mean" else reduction
    loss = masked_loss_from_logits(input, target, masked, reduction=how, label_smoothing=label_smoothing)
    return (loss / masked.sum() if reduction == "mean" else loss).to(input.dtype)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss by `cross_entropy` above."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
