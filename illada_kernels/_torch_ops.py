"""How a room becomes a torch operator: one set of functions, two ways in.

A `TorchOp` owns an implementation, a fake (shapes only), and optionally a backward. Called with plain eager tensors it
runs the implementation directly, through a torch.autograd.Function where a gradient is wanted (about 1 to 10 us); under
torch.compile, functorch, a dispatch or function mode, or with tensor subclasses it goes through the registered
`torch.library` operator `illada_kernels::<name>` (about 23 us), whose schema is inferred from type hints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_plain(args: Sequence[Any]) -> bool:
    """True if nothing watches: eager, no mode, no functorch level, no forward-mode AD, no trace, only plain tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace does not see what a kernel writes
        return False
    tensors = [a for a in args if isinstance(a, Tensor)]
    return all(type(a) in (Tensor, torch.nn.Parameter) and not a.is_neg() for a in tensors)  # a lazy minus sign


class TorchOp:
    """One operator.

    forward(*args) -> Tensor or tuple of tensors, with type hints that torch.library can read; never returns its inputs.
    fake(*args): the same shapes and dtypes, no data.
    setup_context(ctx, inputs, output), backward(ctx, *grads) -> one entry per argument: as torch's register_autograd.
    mutates: names of arguments written in place (then there is no backward).
    direct: takes the place of forward where the dispatcher is skipped; what it keeps may be smaller than fake says.

    A backward calls a second TorchOp (`<name>_bwd`) on ctx.saved_tensors: under create_graph those require grad, that
    operator has no backward of its own, and so a double backward raises instead of being silently wrong.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        mutates: tuple[str, ...] = (),
        direct: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.forward = name, direct or forward
        self.written = [i for i, name in enumerate(inspect.signature(forward).parameters) if name in mutates]
        self.op = torch.library.custom_op(f"illada_kernels::{name}", forward, mutates_args=mutates)
        self.op.register_fake(fake)
        self.function: type[torch.autograd.Function] | None = None
        if backward is not None and setup_context is not None:
            self.op.register_autograd(backward, setup_context=setup_context)
            self.function = _autograd_function(name, self.forward, setup_context, backward)

    def __call__(self, *args: Any) -> Any:
        if not is_plain(args):
            return self.op(*args)
        wants_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if wants_grad and self.function is not None:
            return self.function.apply(*args)
        if wants_grad:  # no backward exists: let the dispatcher attach the node that says so
            return self.op(*args)
        for i in self.written:  # as the dispatcher does: autograd must notice that a tensor it saved has changed
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return self.forward(*args)


def _autograd_function(
    name: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    return type(
        f"{name}_function",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )
