"""masked_loss and masked_loss_from_logits as torch operators: which implementation runs, what is kept for the backward.

A forward returns the loss and what it keeps. What the kept tensors hold is the backend's business (head.py,
native.py); their shapes depend on shapes and options only, never on data. The backend is chosen inside the operator,
which torch.compile does not trace. The backward is an operator of its own, without a derivative.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import STALE, Backend, choose, extension
from ..._gpu import UNRUN, cuda_reason, rows_reason, triton_reason
from ..._torch_ops import TorchOp, is_plain
from . import gpu, head, native, reference
from .native import Options
from .rows import RowKernels

HEAD = 6  # hidden, head_weight, targets, masked, weight, head_bias lead the arguments of masked_loss; then come options
ROWS = 4  # logits, targets, masked, weight lead those of masked_loss_from_logits


def _always(_: Any = None) -> None:
    return None


def _no_float64(rows: Tensor) -> str | None:
    return "float64 runs on the reference only" if rows.dtype == torch.float64 else None


def _cuda_reason() -> str | None:
    if (reason := rows_reason()) is not None:
        return reason
    return STALE if cuda_reason() is None and not hasattr(extension()[0], "masked_loss_compact_cuda") else None


_CPU = Backend("cpu", ("cpu",), native.cpu_reason, _no_float64)
_CUDA = Backend("cuda", ("cuda",), _cuda_reason, _no_float64, opt_in=UNRUN)
_TRITON = Backend("triton", ("cuda",), triton_reason, _no_float64, opt_in=UNRUN)
_REFERENCE = Backend("reference", None, _always, _always)
BACKENDS: tuple[Backend, ...] = (_CUDA, _TRITON, _CPU, _REFERENCE)
FROM_LOGITS_BACKENDS: tuple[Backend, ...] = (_CUDA, _TRITON, _CPU, _REFERENCE)


def _chosen(hidden: Tensor, backend: str) -> str:
    return choose("masked_loss", BACKENDS, hidden.device.type, hidden, backend or None)


def _rows_chosen(logits: Tensor, backend: str) -> str:
    return choose("masked_loss_from_logits", FROM_LOGITS_BACKENDS, logits.device.type, logits, backend or None)


GPU = {"cuda": ".cuda", "triton": ".triton"}  # backends that gpu.py runs, and where their KERNELS are


@functools.cache
def row_kernels(backend: str) -> RowKernels:
    kernels: RowKernels = importlib.import_module(GPU[backend], __package__).KERNELS
    return kernels


def check_targets(targets: Tensor, masked: Tensor, vocab: int, max_masked: int | None) -> None:
    """One synchronisation on a GPU; none with max_masked, where a bad target makes the loss NaN instead."""
    if targets.device.type != "cpu" and max_masked is not None:
        return
    bad = (masked & ((targets < 0) | (targets >= vocab))).reshape(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        got = int(targets.reshape(-1)[row])
        raise ValueError(
            f"targets: expected ids in [0, {vocab}) at masked rows, got {got} at row {row} of {bad.numel()}"
        )


def empty_loss(rows: Tensor, masked: Tensor, reduction: str) -> Tensor:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.empty(masked.shape if reduction == "none" else (), dtype=dtype, device=rows.device)


def no_autocast(x: Tensor) -> Any:
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# ---- masked_loss ----


def _forward(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    head_bias: Tensor | None,
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid: Sequence[int],
    max_masked: int | None,
    memory_budget: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(reduction, softcap, label_smoothing, z_loss, tuple(forbid), max_masked)
    needs = (need_hidden, need_weight, need_bias)
    return _compute(
        hidden, head_weight, targets, masked, weight, head_bias, options, memory_budget, needs, backend, trim=False
    )


def _direct(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, head_weight, targets, masked, weight, head_bias, *options, memory_budget = args[:-4]
    needs, backend = args[-4:-1], args[-1]
    return _compute(
        hidden,
        head_weight,
        targets,
        masked,
        weight,
        head_bias,
        Options(*options),
        memory_budget,
        needs,
        backend,
        trim=True,
    )


def _compute(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    head_bias: Tensor | None,
    options: Options,
    memory_budget: int | None,
    needs: head.Needs,
    backend: str,
    trim: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """trim: of what a GPU keeps, only the rows that are masked rather than all that may be."""
    chosen = _chosen(hidden, backend)
    inputs = (hidden, head_weight, targets, masked, weight, head_bias)
    with torch.no_grad(), no_autocast(hidden):
        if chosen in GPU:
            return gpu.forward(row_kernels(chosen), *inputs, options, memory_budget, needs, trim)
        check_targets(targets, masked, head_weight.shape[0], options.max_masked)
        if chosen == "cpu":
            return head.forward(*inputs, options, memory_budget, needs)
        loss = reference.masked_loss(
            hidden, head_weight, targets, masked, weight, head_bias=head_bias, **options._asdict()
        )
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    hidden, head_weight, _, masked, *_ = args
    reduction, *_, max_masked, memory_budget, need_hidden, need_weight, need_bias, backend = args[HEAD:]
    needs = (need_hidden, need_weight, need_bias)
    asked = (hidden, head_weight, masked, reduction, max_masked, memory_budget, needs)
    loss, chosen = empty_loss(hidden, masked, reduction), _chosen(hidden, backend)
    if chosen in GPU:
        return (loss, *gpu.kept_like(gpu.plan(*asked), head_weight, needs))
    shapes = head.kept_shapes(*asked) if chosen == "cpu" else [(0,)] * 3
    return (loss, *(loss.new_empty(shape) for shape in shapes))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:HEAD], *output[1:])
    ctx.options = inputs[HEAD:]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nowhere = (None,) * (HEAD + len(ctx.options))
    if grad_loss is None:
        return nowhere
    *options, need_hidden, need_weight, need_bias, backend = ctx.options
    reduction, max_masked, memory_budget = options[0], options[5], options[6]
    asked = ctx.needs_input_grad
    needs = (need_hidden and asked[0], need_weight and asked[1], need_bias and asked[5])
    saved = ctx.saved_tensors
    ready = None
    if _chosen(saved[0], backend) == "cpu" and not torch.is_grad_enabled() and is_plain((grad_loss, *saved)):
        plan = head.plan(saved[0], saved[1], saved[3], reduction, max_masked, memory_budget, needs)
        ready = head.ready_gradients(grad_loss, saved[0], saved[1], saved[5], saved[HEAD:], plan)
    grads = ready or _masked_loss_bwd(grad_loss, *saved, *options, *needs, backend)
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(grads, needs))
    return (d_hidden, d_weight, None, None, None, d_bias, *nowhere[HEAD:])


def _bwd(
    grad_loss: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    head_bias: Tensor | None,
    kept0: Tensor,
    kept1: Tensor,
    kept2: Tensor,
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid: Sequence[int],
    max_masked: int | None,
    memory_budget: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(reduction, softcap, label_smoothing, z_loss, tuple(forbid), max_masked)
    needs = (need_hidden, need_weight, need_bias)
    inputs, kept = (hidden, head_weight, targets, masked, weight, head_bias), (kept0, kept1, kept2)
    asked = (hidden, head_weight, masked, reduction, max_masked, memory_budget, needs)
    chosen = _chosen(hidden, backend)
    with torch.no_grad(), no_autocast(hidden):
        if chosen in GPU:
            plan = gpu.plan(*asked)
            return gpu.backward(row_kernels(chosen), grad_loss, *inputs, kept, options, plan, needs)
        if chosen == "cpu":
            return head.backward(grad_loss, *inputs, kept, options, head.plan(*asked), needs)
        grads = reference.masked_loss_backward(
            grad_loss, hidden, head_weight, targets, masked, weight, head_bias=head_bias, **options._asdict()
        )
        like = (hidden, head_weight, head_bias)
        d_hidden, d_weight, d_bias = (
            g.to(x.dtype) if need and x is not None else grad_loss.new_empty(0)
            for g, x, need in zip(grads, like, needs)
        )
        return d_hidden, d_weight, d_bias


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_loss, hidden, head_weight, _, _, _, head_bias = args[:7]
    needs = args[-4:-1]
    like = (hidden, head_weight, head_bias)
    return tuple(x.new_empty(x.shape) if need else grad_loss.new_empty(0) for x, need in zip(like, needs))


masked_loss_op = TorchOp("masked_loss", _forward, _fake, _setup_context, _backward, direct=_direct)
_masked_loss_bwd = TorchOp("masked_loss_bwd", _bwd, _bwd_fake)


# ---- masked_loss_from_logits ----


def _rows_forward(
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid: Sequence[int],
    max_masked: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = _rows_chosen(logits, backend)
    options = Options(reduction, softcap, label_smoothing, z_loss, tuple(forbid), max_masked)
    with torch.no_grad(), no_autocast(logits):
        if chosen in GPU:
            return gpu.rows_forward(row_kernels(chosen), logits, targets, masked, weight, options)
        check_targets(targets, masked, logits.shape[-1], max_masked)
        if chosen == "cpu":
            return native.rows_forward(logits, targets, masked, weight, options)
        loss = reference.masked_loss_from_logits(logits, targets, masked, weight, **options._asdict())
        return loss, loss.new_empty(0)


def _rows_fake(*args: Any) -> tuple[Tensor, Tensor]:
    logits, _, masked, _, reduction = args[:5]
    loss, chosen = empty_loss(logits, masked, reduction), _rows_chosen(logits, args[-1])
    if chosen in GPU:
        return loss, gpu.rows_kept(masked, args[-2])
    if chosen == "reference":
        return loss, loss.new_empty(0)
    return loss, torch.empty(native.rows_kept_shape(masked), dtype=torch.float32, device=logits.device)


def _rows_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:ROWS], output[1])
    ctx.options = inputs[ROWS:]


def _rows_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nowhere = (None,) * (ROWS + len(ctx.options))
    if grad_loss is None:
        return nowhere
    return (_from_logits_bwd(grad_loss, *ctx.saved_tensors, *ctx.options), *nowhere[1:])


def _rows_bwd(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None,
    kept: Tensor,
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid: Sequence[int],
    max_masked: int | None,
    backend: str,
) -> Tensor:
    options = Options(reduction, softcap, label_smoothing, z_loss, tuple(forbid), max_masked)
    with torch.no_grad(), no_autocast(logits):
        chosen = _rows_chosen(logits, backend)
        if chosen in GPU:
            return gpu.rows_backward(row_kernels(chosen), grad_loss, logits, targets, masked, weight, kept, options)
        if chosen == "cpu":
            return native.rows_backward(grad_loss, logits, targets, masked, weight, kept, options)
        d_logits = reference.masked_loss_from_logits_backward(
            grad_loss, logits, targets, masked, weight, **options._asdict()
        )
        return d_logits.to(logits.dtype)


def _rows_bwd_fake(grad_loss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


from_logits_op = TorchOp("masked_loss_from_logits", _rows_forward, _rows_fake, _rows_setup_context, _rows_backward)
_from_logits_bwd = TorchOp("masked_loss_from_logits_bwd", _rows_bwd, _rows_bwd_fake)
