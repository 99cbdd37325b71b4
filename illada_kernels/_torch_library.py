"""Registers functions with torch.library, torch.autograd and torch's counter of flops; maps calls under vmap.

What _torch_ops.py needs once for each operator, or under a transform; nothing that a plain call passes through.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def register(
    name: str,
    kinds: dict[str, Any],
    outputs: int,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...],
) -> Any:
    """Registers illada_kernels::<name> with one argument a field."""

    def implementation(*arguments: Any) -> Any:
        return kernel(*arguments)

    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=k) for n, k in kinds.items()]
    returned = Tensor if outputs == 1 else tuple.__class_getitem__((Tensor,) * outputs)
    implementation.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    op = torch.library.custom_op(f"{__package__}::{name}", implementation, mutates_args=mutates)
    op.register_fake(fake)
    return op


def function(name: str, forward: Any, setup_context: Any, **rules: Any) -> Any:
    members = {"forward": forward, "setup_context": setup_context, **rules}
    return type(f"{name}_function", (torch.autograd.Function,), {k: staticmethod(f) for k, f in members.items()})


_FLOPS: dict[str, Callable[..., int]] = {}  # operators whose formulas torch's counter does not have yet


def count_flops(name: str, count: Callable[..., int]) -> None:
    _FLOPS[name] = lambda *arguments, out_val=None, **_: count(*arguments)


def tell_flop_counter() -> None:
    """Registers the formulas once somebody has imported torch.utils.flop_counter, which imports Triton."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or not _FLOPS:
        return
    formulas = {getattr(getattr(torch.ops, str(__package__)), name): formula for name, formula in _FLOPS.items()}
    counter.flop_registry.update(formulas)
    for mode in _get_current_dispatch_mode_stack():  # each has copied the registry
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if registry is not None:
            registry.update(formulas)
    _FLOPS.clear()


def active_transforms() -> tuple[bool, bool]:
    """Returns whether torch.func differentiates here, and whether it vectorises. Dynamo runs this while it traces."""
    kinds = torch._C._functorch.TransformType
    active = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    return not active.isdisjoint((kinds.Grad, kinds.Jvp)), kinds.Vmap in active


active_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def vmap(
    call: Callable[..., Any],
    size: int,
    in_dims: Sequence[Any],
    arguments: Sequence[Any],
    kept: Sequence[int] | None,
) -> tuple[Any, Any]:
    """Runs `size` calls: one after another if `kept` is None, else as one with a batch `size` times as large.

    kept: places of tensors that stay as they are if they have no mapped dimension and a batch of 1.
    """
    mapped = [isinstance(x, Tensor) and dim is not None for x, dim in zip(arguments, in_dims)]

    def nth(n: int) -> Any:
        return call(*(x.select(dim, n) if some else x for x, dim, some in zip(arguments, in_dims, mapped)))

    if kept is None:
        each = [nth(n) for n in range(size)]
        if not isinstance(each[0], tuple):
            return torch.stack(each), 0
        return tuple(torch.stack(parts) for parts in zip(*each)), (0,) * len(each[0])
    folded = [x.movedim(dim, 0) if some else x for x, dim, some in zip(arguments, in_dims, mapped)]
    tensors = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    first = next(i for i in tensors if i not in kept)
    batch = folded[first].shape[1 if mapped[first] else 0]
    for i in tensors:
        if not mapped[i]:
            if i in kept and folded[i].shape[0] == 1:
                continue
            folded[i] = folded[i].expand(size, *folded[i].shape)
        folded[i] = folded[i].expand(size, batch, *folded[i].shape[2:]).flatten(0, 1)
    outputs = call(*folded)
    many = isinstance(outputs, tuple)
    outputs = outputs if many else (outputs,)
    dims = tuple(None if x.shape == (0,) else 0 for x in outputs)
    unfolded = tuple(x if d is None else x.unflatten(0, (size, batch)) for x, d in zip(outputs, dims))
    return (unfolded, dims) if many else (unfolded[0], dims[0])
