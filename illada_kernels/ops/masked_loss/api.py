"""The public functions of masked_loss: they validate, make a Problem and call the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..._checks import (
    FLOATS,
    cast_for_autocast,
    expect_choice,
    expect_contiguous,
    expect_device,
    expect_integer,
    expect_layout,
    expect_number,
    expect_shape,
    expect_tensor,
    holds,
    largest,
    shown,
)
from .op import OPERATOR
from .problem import Problem

REDUCTIONS = ("sum", "mean", "none")


def masked_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "sum",
    head_bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: Sequence[int] = (),
    max_masked: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes the cross-entropy of masked rows against their targets, fused with the LM head.

    The head is applied to the masked hidden rows only. With z = hidden_i @ head_weight.T + head_bias, capped to
    softcap * tanh(z / softcap), -inf at forbidden ids, and A ids allowed:

        lse_i  = log(sum_v exp(z_v))
        loss_i = lse_i - (1 - label_smoothing) * z_target - label_smoothing / A * sum_allowed z_v + z_loss * lse_i**2
        loss   = sum over masked i of weight_i * loss_i

    Parameters
    ----------
    hidden
        (..., D), bfloat16, float16 or float32; float64 on the reference. Any strides with the last dimension
        contiguous.
    head_weight
        (V, D), hidden's dtype or float32; with float32 the matmuls are float32. The last dimension contiguous.
    targets
        (...) int64. Ignored at unmasked rows.
    masked
        (...) bool.
    weight
        (...) float32, default 1. Gets no gradient.
    reduction
        "sum"; "mean", the sum divided by the weights of the masked rows, 0 if there are none; "none", the weighted
        losses (...), 0 where not masked.
    head_bias
        (V,), head_weight's or hidden's dtype, or float32.
    softcap, label_smoothing, z_loss
        As in the formula: a positive normal float32 number or None, a number in [0, 1), a number >= 0.
    forbid
        Ids of probability zero. A masked row whose target is forbidden has loss inf and the gradient of its other
        terms.
    max_masked
        Capacity for masked rows, which frees a GPU call of its host synchronisation. More masked rows than that make
        the loss and all gradients NaN.
    memory_budget
        Bytes that the call may hold beside inputs, output and gradients. Chooses the memory mode from shapes and
        options alone; docs/concepts/memory_modes.md lists modes and defaults.
    backend
        "cuda", "triton", "cpu" or "reference": insists on it. Default: ILLADA_BACKEND, else the first that can.

    Returns
    -------
    Tensor
        The loss, float32 (float64 for float64 inputs). Gradients reach hidden (zero where not masked), head_weight and
        head_bias, each rounded once from float32. The backward may run twice; a second derivative raises. torch.func's
        transforms and forward-mode AD work; forward mode computes in plain PyTorch, on the head in float32.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit together, if weight requires grad, and if a masked row has a target outside
        [0, V). With max_masked on a GPU such a target makes its loss and the reduced loss NaN instead.
    RuntimeError
        If `backend` cannot run the call.

    Notes
    -----
    Under autocast hidden, head_weight and head_bias are cast to its dtype. Under torch.compile on a GPU pass
    max_masked: without it the backward computes all rows.
    Matmuls: 3 or 4 by memory mode; without gradients only the first, by slices of the vocab. A frozen head or hidden
    skips its own. Synchronises once on a GPU, in the forward; never with max_masked, once a first call has uploaded
    `forbid`.
    Source: the objective of LLaDA (arXiv 2502.09992), weight 1/t; z-loss as in PaLM (arXiv 2204.02311).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import masked_loss
    >>> hidden, head = torch.zeros(2, 3, 8), torch.randn(100, 8)
    >>> targets = torch.zeros(2, 3, dtype=torch.int64)
    >>> masked = torch.tensor([[True, False, False], [True, True, False]])
    >>> masked_loss(hidden, head, targets, masked, reduction="mean")  # log(100)
    tensor(4.6052)
    """
    if isinstance(hidden, Tensor):
        hidden, head_weight, head_bias = cast_for_autocast(hidden.device, hidden, head_weight, head_bias)
    plain = not torch.compiler.is_compiling() and _rows_fit(hidden, targets, masked, weight)
    if not (plain and _head_fits(hidden, head_weight, head_bias)):
        check_rows("hidden", hidden, "D", targets, masked, weight)
        check_head(hidden, head_weight, head_bias)
    vocab = head_weight.shape[0]
    if not (plain and _options_fit(reduction, softcap, label_smoothing, z_loss, max_masked, memory_budget, vocab)):
        check_options(reduction, softcap, label_smoothing, z_loss, max_masked, memory_budget, vocab)
    problem = Problem(
        hidden,
        head_weight,
        targets,
        masked,
        weight,
        head_bias,
        reduction,
        None if softcap is None else torch.sym_float(softcap),
        torch.sym_float(label_smoothing),
        torch.sym_float(z_loss),
        forbidden_ids(forbid, vocab),
        None if max_masked is None else torch.sym_int(max_masked),
        None if memory_budget is None else torch.sym_int(memory_budget),
        needs(hidden, head_weight, head_bias),
        backend=backend or "",
    )
    loss: Tensor = OPERATOR(problem)[0]
    return loss


def masked_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "sum",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: Sequence[int] = (),
    max_masked: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes `masked_loss` for a model that already has its logits.

    Formula and all other arguments as in `masked_loss`, z starting from the logits. Logits of unmasked rows are never
    read.

    Parameters
    ----------
    logits
        (..., V), bfloat16, float16 or float32; float64 on the reference.

    Returns
    -------
    Tensor
        The loss, float32. The gradient has the logits' dtype and is zero where not masked.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `masked_loss`.

    Notes
    -----
    Autocast does not touch the logits; everything is computed in float32, as autocast itself does for a
    cross-entropy. Forward: one pass over the masked rows; backward: one pass and the gradient. A few bytes a row are
    kept between. Logits whose rows need more than two strides are copied. Synchronises once on a GPU, in the forward;
    never with max_masked.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import masked_loss_from_logits
    >>> masked_loss_from_logits(torch.zeros(3, 100), torch.tensor([5, 6, -1]), torch.tensor([True, True, False]))
    tensor(9.2103)
    """
    plain = not torch.compiler.is_compiling() and _rows_fit(logits, targets, masked, weight)
    if not plain:
        check_rows("logits", logits, "V", targets, masked, weight)
    vocab = logits.shape[-1]
    if not (plain and _options_fit(reduction, softcap, label_smoothing, z_loss, max_masked, None, vocab)):
        check_options(reduction, softcap, label_smoothing, z_loss, max_masked, None, vocab)
    problem = Problem(
        logits,
        None,
        targets,
        masked,
        weight,
        None,
        reduction,
        None if softcap is None else torch.sym_float(softcap),
        torch.sym_float(label_smoothing),
        torch.sym_float(z_loss),
        forbidden_ids(forbid, vocab),
        None if max_masked is None else torch.sym_int(max_masked),
        None,
        needs(logits, None, None),
        backend=backend or "",
    )
    loss: Tensor = OPERATOR(problem)[0]
    return loss


def needs(*tensors: Tensor | None) -> list[bool]:
    """Returns which gradients there may be. Under torch.func's transforms a wrapped tensor does not tell."""
    if not torch.is_grad_enabled():
        return [False] * 3
    wrapped = not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None
    return [x is not None and (x.requires_grad or wrapped) for x in tensors]


# ---- checks at a glance, of plain tensors and numbers that fit, in a fifth of the time of those in words -------------


def _rows_fit(rows: Tensor, targets: Tensor, masked: Tensor, weight: Tensor | None) -> bool:
    """Returns whether `check_rows` would find nothing. Symbolic, traced and odd things are left to it."""
    if not (type(rows) is type(targets) is type(masked) is Tensor and rows.dtype in FLOATS):
        return False
    shape, device = targets.shape, rows.device
    return (
        rows.shape[:-1] == shape == masked.shape
        and rows.dim() > 0
        and rows.stride(-1) == 1
        and targets.dtype == torch.int64
        and masked.dtype == torch.bool
        and targets.device == device == masked.device
        and (weight is None or _weight_fits(weight, shape, device))
    )


def _weight_fits(weight: Tensor, shape: torch.Size, device: torch.device) -> bool:
    plain = type(weight) is Tensor and weight.dtype == torch.float32 and not weight.requires_grad
    return plain and weight.shape == shape and weight.device == device


def _head_fits(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> bool:
    if type(head_weight) not in (Tensor, Parameter) or head_weight.dtype not in (hidden.dtype, torch.float32):
        return False
    return (
        head_weight.dim() == 2
        and head_weight.shape[1] == hidden.shape[-1]
        and head_weight.stride(1) == 1
        and head_weight.device == hidden.device
        and head_bias is None
    )


LARGEST = largest()  # for `_options_fit`, which is never traced


def _options_fit(
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    max_masked: int | None,
    memory_budget: int | None,
    vocab: int,
) -> bool:
    return (
        type(reduction) is str
        and reduction in REDUCTIONS
        and type(label_smoothing) is type(z_loss) is float
        and 0 <= label_smoothing < 1
        and 0 <= z_loss <= LARGEST
        and vocab >= 1
        and softcap is max_masked is memory_budget is None
    )


# ---- in words --------------------------------------------------------------------------------------------------------


def check_rows(name: str, rows: Tensor, width: str, targets: Tensor, masked: Tensor, weight: Tensor | None) -> None:
    """Checks hidden or logits, and what goes with each row."""
    expect_layout(name, rows, FLOATS, ..., width, contiguous=True)
    beside: list[tuple[str, Tensor, tuple[torch.dtype, ...]]] = [
        ("targets", targets, (torch.int64,)),
        ("masked", masked, (torch.bool,)),
    ]
    if weight is not None:
        beside.append(("weight", weight, (torch.float32,) + (torch.float64,) * (rows.dtype == torch.float64)))
    for key, x, dtypes in beside:
        expect_tensor(key, x, *dtypes)
        expect_shape(key, x, *rows.shape[:-1], like=f"to match the rows of {name}")
        expect_device(key, x, rows.device, name)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight: expected requires_grad=False (it gets no gradient), got True; pass weight.detach()")


def check_head(
    hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, name: str = "head_weight", bias: str = "head_bias"
) -> None:
    width, device = hidden.shape[-1], hidden.device
    expect_tensor(name, head_weight, hidden.dtype, torch.float32)
    expect_shape(name, head_weight, "V", width, like="to match hidden")
    expect_device(name, head_weight, device, "hidden")
    expect_contiguous(name, head_weight)
    if head_bias is not None:
        expect_tensor(bias, head_bias, head_weight.dtype, hidden.dtype, torch.float32)
        expect_shape(bias, head_bias, head_weight.shape[0], like=f"to match {name}")
        expect_device(bias, head_bias, device, "hidden")


def check_options(
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    max_masked: int | None,
    memory_budget: int | None,
    vocab: int,
) -> None:
    expect_choice("reduction", reduction, REDUCTIONS)
    if softcap is not None:
        expect_number("softcap", softcap, 2.0**-126, largest())
    expect_number("label_smoothing", label_smoothing, 0.0, 1.0)
    if not holds(label_smoothing < 1):
        raise ValueError("label_smoothing: expected a number below 1, got 1.0")
    expect_number("z_loss", z_loss, 0.0, largest())
    if max_masked is not None:
        expect_integer("max_masked", max_masked, 0, 2**62)
    if memory_budget is not None:
        expect_integer("memory_budget", memory_budget, 1, 2**62)
    if not holds(vocab >= 1):
        raise ValueError("head_weight or logits: expected a vocab of at least one id, got V = 0")


def forbidden_ids(forbid: Sequence[int], vocab: int) -> tuple[int, ...]:
    try:
        ids = tuple(forbid)
    except TypeError:
        raise TypeError(f"forbid: expected a sequence of ids, got {type(forbid).__name__}; use (id,)") from None
    if not ids:
        return ()
    for one in ids:
        expect_integer("forbid", one, 0, 2**62)
        if not holds(one < vocab):
            raise ValueError(f"forbid: expected ids in [0, {shown(vocab)}), got {shown(one)}")
    if not holds(len(ids) < vocab) and len(set(ids)) == vocab:
        raise ValueError(f"forbid: expected at least one of the {shown(vocab)} ids to stay allowed, got all of them")
    return tuple(torch.sym_int(i) for i in ids)
