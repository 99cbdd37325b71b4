"""masked_loss: cross-entropy on masked tokens only, fused with the LM head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._dispatch import requested
from .op import BACKENDS, FROM_LOGITS_BACKENDS, from_logits_op, masked_loss_op

__all__ = ["BACKENDS", "FROM_LOGITS_BACKENDS", "masked_loss", "masked_loss_from_logits"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        As in the formula: a positive number or None, a number in [0, 1), a number >= 0.
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
        head_bias, each rounded once from float32. The backward may run twice; a second derivative raises.

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
    device_type = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # torch has no autocast for meta
        dtype = torch.get_autocast_dtype(device_type)
        hidden, head_weight = _autocast(hidden, dtype), _autocast(head_weight, dtype)
        head_bias = None if head_bias is None else _autocast(head_bias, dtype)
    _check_rows("hidden", hidden, "D", targets, masked, weight)
    vocab = _check_head(hidden, head_weight, head_bias)
    options = _check_options(reduction, softcap, label_smoothing, z_loss, forbid, max_masked, vocab)
    if memory_budget is not None and (not _is_int(memory_budget) or memory_budget <= 0):
        raise ValueError(f"memory_budget: expected a positive number of bytes or None, got {memory_budget!r}")
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, head_weight, head_bias)]
    return masked_loss_op(
        hidden, head_weight, targets, masked, weight, head_bias, *options, memory_budget, *needs, requested(backend)
    )[0]


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
    _check_rows("logits", logits, "V", targets, masked, weight)
    options = _check_options(reduction, softcap, label_smoothing, z_loss, forbid, max_masked, logits.shape[-1])
    return from_logits_op(logits, targets, masked, weight, *options, requested(backend))[0]


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


def _is_int(x: object) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def _check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(dict.fromkeys(map(str, dtypes)))}, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected to be on {like.device} as the first argument, got {x.device}")


def _check_contiguous_rows(name: str, x: Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected the last dimension contiguous, got strides {tuple(x.stride())}; call .contiguous()"
        )


def _check_rows(name: str, rows: Tensor, width: str, targets: Tensor, masked: Tensor, weight: Tensor | None) -> None:
    """hidden or logits, and what goes with each row."""
    _check_tensor(name, rows, _FLOATS)
    if rows.dim() < 1:
        raise ValueError(f"{name}: expected shape (..., {width}), got a scalar")
    _check_contiguous_rows(name, rows)
    lead = rows.shape[:-1]
    _check_tensor("targets", targets, (torch.int64,), rows)
    _check_tensor("masked", masked, (torch.bool,), rows)
    beside = {"targets": targets, "masked": masked}
    if weight is not None:
        _check_tensor(
            "weight", weight, (torch.float32, torch.float64) if rows.dtype == torch.float64 else (torch.float32,), rows
        )
        if weight.requires_grad:
            raise ValueError(
                "weight: expected requires_grad=False (it gets no gradient), got True; pass weight.detach()"
            )
        beside["weight"] = weight
    for key, x in beside.items():
        if x.shape != lead:
            raise ValueError(f"{key}: expected shape {tuple(lead)}, as {name}'s first dimensions, got {tuple(x.shape)}")


def _check_head(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> int:
    """The vocabulary size."""
    _check_tensor("head_weight", head_weight, (hidden.dtype, torch.float32), hidden)
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"head_weight: expected shape (V, {hidden.shape[-1]}), got {tuple(head_weight.shape)}")
    _check_contiguous_rows("head_weight", head_weight)
    vocab = head_weight.shape[0]
    if head_bias is not None:
        _check_tensor("head_bias", head_bias, (head_weight.dtype, hidden.dtype, torch.float32), hidden)
        if head_bias.shape != (vocab,):
            raise ValueError(f"head_bias: expected shape ({vocab},), got {tuple(head_bias.shape)}")
    return vocab


def _check_options(
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    forbid: Sequence[int],
    max_masked: int | None,
    vocab: int,
) -> tuple[str, float | None, float, float, list[int], int | None]:
    """The options as the operator takes them: forbid sorted and without repetition."""
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction: expected 'sum', 'mean' or 'none', got {reduction!r}")
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap: expected a positive number or None, got {softcap!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing!r}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a number >= 0, got {z_loss!r}")
    if max_masked is not None and (not _is_int(max_masked) or max_masked < 0):
        raise ValueError(f"max_masked: expected an int >= 0 or None, got {max_masked!r}")
    if vocab < 1:
        raise ValueError("head_weight or logits: expected a vocabulary of at least one id, got V = 0")
    bad = [i for i in forbid if not _is_int(i) or not 0 <= i < vocab]
    if bad:
        raise ValueError(f"forbid: expected ids in [0, {vocab}), got {bad[0]!r}")
    ids = sorted(set(forbid))
    if len(ids) == vocab:
        raise ValueError(f"forbid: expected at least one of the {vocab} ids to stay allowed, got all of them")
    return (
        reduction,
        None if softcap is None else float(softcap),
        float(label_smoothing),
        float(z_loss),
        ids,
        max_masked,
    )
