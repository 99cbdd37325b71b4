"""Makes a room's `Problem` a torch operator, with two ways in.

Called with plain eager tensors an `Operator` runs the backend directly, through a torch.autograd.Function where a
gradient is wanted (1 to 10 us). Everything else (torch.compile, export, dispatch and function modes, a profiler, tensor
subclasses) goes through the registered `torch.library` operator `illada_kernels::<name>` (about 23 us), whose schema is
made of the fields of the Problem. torch.func's transforms and forward-mode AD take the autograd.Function, which has the
rules that they ask for.

    room/problem.py     class Problem(NamedTuple): the validated call; the last field is backend: str = ""
    room/<backend>.py   available() and supports(problem): None, or why not
                        forward(problem) -> outputs; never one of its inputs
                        backward(problem, *upstream, *saved, needs) -> one gradient for each field of `Derivative.of`
"""

from __future__ import annotations

import threading
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch
from ._torch_library import active_transforms, count_flops, function, register, tell_flop_counter, vmap

_PLAIN_KEYS: dict[str, set[int]] = {"meta": set()}  # device type -> dispatch keys of plain tensors; meta: none is plain
_PLAIN_STATES: set[int] = set()  # dispatch keys that a thread adds where nothing watches


def _learn_plain_keys(device: torch.device) -> None:
    """Learns the keys of ordinary and of inference tensors, in a thread of its own: modes and transforms that may be
    active here do not reach it."""

    def learn() -> None:
        keys = set()
        for inference in (False, True):
            with torch.inference_mode(inference):
                keys.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
                _PLAIN_STATES.add(torch._C._dispatch_tls_local_include_set().raw_repr())
        _PLAIN_KEYS[device.type] = keys

    thread = threading.Thread(target=learn)
    thread.start()
    thread.join()


_learn_plain_keys(torch.device("cpu"))  # other devices when a tensor of theirs comes, so that importing starts no GPU


def is_watched() -> bool:
    """Returns whether something must see the operator: compiler, trace, mode, transform, forward-mode AD, profiler."""
    return is_traced() or torch.autograd._profiler_enabled()


def is_traced() -> bool:
    """Returns what `is_watched` does, but for a profiler, which changes nothing."""
    return _is_below() or torch.autograd.forward_ad._current_level >= 0


def _is_below() -> bool:
    """Returns whether something is active that sees what a Function's forward does: compiler, trace, mode,
    transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_STATES
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None  # torch.jit.trace does not see what a kernel writes
    )


def is_plain(values: Sequence[Any]) -> bool:
    """Returns whether the tensors among `values` are strided, in memory and nothing more: not batched, functional,
    lazily negated, zero, nested, fake, nor of a subclass.

    Raises RuntimeError for a tensor whose storage was freed, which would otherwise end the process.
    """
    for x in values:
        if isinstance(x, Tensor):
            if type(x) not in (Tensor, torch.nn.Parameter):
                return False
            if (device := x.device.type) not in _PLAIN_KEYS:
                _learn_plain_keys(x.device)
            if torch._C._dispatch_keys(x).raw_repr() not in _PLAIN_KEYS[device]:
                return False
            if x.untyped_storage().nbytes() == 0:
                _check_storage([x])
    return True


def _check_storage(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        if x.untyped_storage().nbytes() == 0 and x.numel() > 0:
            raise RuntimeError(
                f"a tensor of shape {tuple(x.shape)} has lost its storage (it was resized to 0, as FSDP does with "
                "parameters that are not gathered); gather it before the call, and keep it until the backward has run"
            )


def _is_transformed() -> bool:
    """Returns whether a transform of torch.func or forward-mode AD is active."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


class Derivative(NamedTuple):
    """Says how an operator is differentiated, once.

    of: the fields of the Problem that get a gradient.
    upstream: how many of the outputs, the first ones, have an upstream gradient.
    saves: the outputs that the backward is given.
    jvp(problem, outputs, tangents) -> tangents of the first `upstream` outputs, from one tangent or None for each field
    of `of`; `outputs` are those of `saves`.
    """

    of: tuple[str, ...]
    upstream: int
    saves: tuple[int, ...]
    jvp: Callable[[Any, tuple[Tensor, ...], tuple[Tensor | None, ...]], tuple[Tensor, ...]]


class Operator:
    """One torch operator, called with a validated Problem.

    Parameters
    ----------
    problem : the room's Problem, a NamedTuple whose field types torch.library can read.
    fake : problem -> outputs, their shapes and dtypes without data.
    outputs : their number.
    flops : (problem, needs) -> floating-point operations, for torch.utils.flop_counter; needs is None for the forward,
        else which gradients a backward computes.
    mutates : fields written in place; such an operator has no derivative.
    folds : every tensor has the batch as its first dimension, so that vmap folds into it; else vmap loops. Names the
        fields whose batch may be 1 instead.
    """

    def __init__(
        self,
        name: str,
        problem: type[Any],
        backends: tuple[_dispatch.Backend, ...],
        fake: Callable[[Any], Any],
        outputs: int,
        flops: Callable[[Any, Sequence[bool] | None], int],
        derivative: Derivative | None = None,
        mutates: tuple[str, ...] = (),
        folds: tuple[str, ...] | None = None,
    ) -> None:
        self.name, self.problem, self.backends, self.fake = name, problem, backends, fake
        self.outputs, self.derivative, self.folds = outputs, derivative, folds
        kinds = typing.get_type_hints(problem)
        self.fields = tuple(kinds)
        self.written = [i for i, field in enumerate(self.fields) if field in mutates]
        self.op = register(name, kinds, outputs, self._kernel, lambda *a: fake(problem(*a)), mutates)
        self.flops = flops
        count_flops(name, lambda *a: flops(problem(*a), None))
        if derivative is not None:
            self.differentiated = [self.fields.index(field) for field in derivative.of]
            self.bwd = _Backward(self, derivative, kinds)
            self.op.register_autograd(self._backward, setup_context=self._setup_context)
            rules = {"backward": self._backward, "jvp": self._jvp, "vmap": self._vmap}
            self.function = function(name, self._forward, self._setup_context, **rules)

    def __call__(self, problem: Any) -> Any:
        """Runs the call. problem.backend: the one that the user insists on, or ""."""
        if is_watched():
            return self._watched(problem)
        if not is_plain(problem):
            return self.op(*self._with_backend(problem, problem.backend or _dispatch.environment()))
        backend = self.choose(problem)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in problem):
            if self.derivative is None:  # the dispatcher attaches the node that says so
                return self.op(*problem)
            return self.function.apply(*self._with_backend(problem, _dispatch.Resolved(backend.name)))
        for i in self.written:  # as the dispatcher does: autograd must notice that a tensor it saved has changed
            if not problem[i].is_inference():
                torch.autograd.graph.increment_version(problem[i])
        return self._direct(backend, problem)

    def _watched(self, problem: Any) -> Any:
        if torch.compiler.is_compiling():  # the operator itself reads ILLADA_BACKEND, when it runs
            differentiates, vectorises = active_transforms()
            if vectorises and self.derivative is None:
                raise self._no_transforms()
            if differentiates:  # torch drops the tangents of a custom operator without a word
                raise NotImplementedError(
                    f"{self.name}: torch.func.grad and jvp cannot be traced through a custom operator; apply them "
                    "outside of the compiled function, or compile without fullgraph, which leaves this to eager mode"
                )
            return self.op(*problem)
        tell_flop_counter()
        problem = self._with_backend(problem, problem.backend or _dispatch.environment())
        if not _is_transformed():
            return self.op(*problem)
        if self.derivative is None:
            return self._refuse_transforms(problem)
        return self.function.apply(*problem)

    def _refuse_transforms(self, problem: Any) -> Any:
        tensors = [x for x in problem if isinstance(x, Tensor)]
        dual = any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors)
        if dual or torch._C._functorch.maybe_current_level() is not None:
            raise self._no_transforms()
        return self.op(*problem)

    def _no_transforms(self) -> NotImplementedError:
        return NotImplementedError(
            f"{self.name}: has no derivative and writes in place, so torch.func's transforms and forward-mode AD "
            "cannot pass through it; call it outside of them, on tensors without tangents (.detach())"
        )

    def choose(self, problem: Any) -> _dispatch.Backend:
        """Returns the backend that runs the problem, or raises with every backend's reason."""
        if type(problem.backend) is _dispatch.Resolved:
            return next(backend for backend in self.backends if backend.name == problem.backend)
        device = next(x for x in problem if isinstance(x, Tensor)).device.type
        return _dispatch.choose(getattr(problem, "op", self.name), self.backends, device, problem, problem.backend)

    def _with_backend(self, problem: Any, name: str) -> Any:
        return problem if name is problem.backend else self.problem(*problem[:-1], name)

    def _direct(self, backend: _dispatch.Backend, problem: Any) -> Any:
        module = backend.module()
        return getattr(module, "direct", module.forward)(problem)

    def _kernel(self, *arguments: Any) -> Any:
        """Implements the registered operator."""
        problem = self.problem(*arguments)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if tensors[0].is_meta:
            return self.fake(problem)
        _check_storage(tensors)
        return self.choose(problem).module().forward(problem)

    def _forward(self, *arguments: Any) -> Any:
        """Runs the autograd.Function's forward. Under nested transforms the tensors are still wrapped, a level down."""
        if type(arguments[-1]) is _dispatch.Resolved:  # __call__ has looked at everything
            return self._run(arguments)
        if torch._C._functorch.maybe_current_level() is not None:
            return self.function.apply(*arguments)
        if _is_below() or not is_plain(arguments):
            return self.op(*arguments)
        return self._kernel(*arguments)

    def _run(self, arguments: Sequence[Any]) -> Any:
        problem = self.problem(*arguments)
        return self._direct(self.choose(problem), problem)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self.derivative is not None
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.set_materialize_grads(False)  # an unused output then costs nothing
        ctx.mark_non_differentiable(*outputs[self.derivative.upstream :])
        saved = [outputs[i] for i in self.derivative.saves]
        for i, x in reversed(tuple(enumerate(inputs))):
            if isinstance(x, Tensor):  # autograd saves no inference tensors; only data may be copied for it
                saved.insert(0, x.clone() if x.is_inference() and i not in self.differentiated else x)
        ctx.save_for_backward(*saved)
        if _is_transformed():
            ctx.save_for_forward(*saved)
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def _restore(self, ctx: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Returns (the Problem, the saved outputs)."""
        tensors = iter(ctx.saved_tensors)
        problem = self.problem(*(next(tensors) if x is None else x[0] for x in ctx.rest))
        return problem, tuple(tensors)

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert self.derivative is not None
        everywhere: list[Tensor | None] = [None] * len(self.fields)
        upstream = grads[: self.derivative.upstream]
        if all(g is None for g in upstream):
            return tuple(everywhere)
        needs = [ctx.needs_input_grad[i] for i in self.differentiated]
        for i, gradient, need in zip(self.differentiated, self.bwd(upstream, *self._restore(ctx), needs), needs):
            everywhere[i] = gradient if need else None
        return tuple(everywhere)

    def _jvp(self, ctx: Any, *tangents: Tensor | None) -> Any:
        assert self.derivative is not None
        of = tuple(tangents[i] for i in self.differentiated)
        levels = torch._C._functorch.get_interpreter_stack() or ()
        if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
            raise NotImplementedError(  # torch gives no tangents to what runs here, so that they would be zero
                f"{self.name}: has no second derivative in forward mode (jvp of jvp, jacfwd of jacfwd); "
                "torch.func.grad of jvp works"
            )
        first = self.derivative.jvp(*self._restore(ctx), of)
        outputs = (*first, *(None for _ in range(self.outputs - len(first))))
        return outputs if self.outputs > 1 else outputs[0]

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        kept = None if self.folds is None else [self.fields.index(field) for field in self.folds]
        return vmap(self.function.apply, info.batch_size, in_dims, arguments, kept)


class _Backward:
    """The operator `<name>_bwd`: upstream gradients, saved outputs, the Problem's fields, and which gradients are
    needed. It has no derivative of its own, so that a double backward raises."""

    def __init__(self, operator: Operator, derivative: Derivative, kinds: dict[str, Any]) -> None:
        self.operator, self.derivative = operator, derivative
        upstream = {f"grad_{i}": Tensor | None for i in range(derivative.upstream)}
        saved = {f"saved_{i}": Tensor for i in derivative.saves}
        self.first = len(upstream) + len(saved)
        kinds = {**upstream, **saved, **kinds, "wanted": Sequence[bool]}
        name = f"{operator.name}_bwd"
        self.op = register(name, kinds, len(derivative.of), self._kernel, self._fake, ())
        count_flops(name, lambda *a: operator.flops(operator.problem(*a[self.first : -1]), a[-1]))
        rules = {"backward": self._refuse, "jvp": self._refuse, "vmap": self._vmap}
        self.function = function(name, self._forward, lambda ctx, inputs, output: None, **rules)

    def __call__(
        self, upstream: Sequence[Tensor | None], problem: Any, saved: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        arguments = (*upstream, *saved, *problem, list(needs))
        if is_watched():
            transformed = not torch.compiler.is_compiling() and _is_transformed()
            result = self.function.apply(*arguments) if transformed else self.op(*arguments)
        elif torch.is_grad_enabled() or not is_plain(arguments):
            result = self.op(*arguments)
        else:
            return self._run(arguments)
        return result if isinstance(result, tuple) else (result,)

    def _run(self, arguments: Sequence[Any]) -> Sequence[Tensor | None]:
        problem = self.operator.problem(*arguments[self.first : -1])
        module = self.operator.choose(problem).module()
        return module.backward(problem, *arguments[: self.first], needs=arguments[-1])

    def _kernel(self, *arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if tensors[0].is_meta:
            return self._fake(*arguments)
        _check_storage(tensors)
        return self._as_tensors(arguments, self._run(arguments))

    def _as_tensors(self, arguments: Sequence[Any], grads: Sequence[Tensor | None]) -> Any:
        """Returns a new tensor each: empty where not needed, a copy where a backend handed over what it kept."""
        given = [x for x in arguments if isinstance(x, Tensor)]
        like = given[0]
        new = [
            like.new_empty(0) if g is None or not need else g.clone() if any(g is x for x in given) else g
            for g, need in zip(grads, arguments[-1])
        ]
        return tuple(new) if len(new) > 1 else new[0]

    def _fake(self, *arguments: Any) -> Any:
        like = next(x for x in arguments if isinstance(x, Tensor))
        of = [arguments[self.first + i] for i in self.operator.differentiated]
        new = [x.new_empty(x.shape) if need else like.new_empty(0) for x, need in zip(of, arguments[-1])]
        return tuple(new) if len(new) > 1 else new[0]

    def _forward(self, *arguments: Any) -> Any:
        if torch._C._functorch.maybe_current_level() is not None:
            return self.function.apply(*arguments)
        if _is_below() or not is_plain(arguments):
            return self.op(*arguments)
        return self._as_tensors(arguments, self._run(arguments))

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        folds = self.operator.folds
        kept = None if folds is None else [self.first + self.operator.fields.index(field) for field in folds]
        return vmap(self.function.apply, info.batch_size, in_dims, arguments, kept)

    def _refuse(self, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{self.operator.name}: is differentiable once; its backward has no derivative")
