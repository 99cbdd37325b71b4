"""Tolerances: how far an op may be from the exact result. Tests, `doctor --selftest` and users' own checks use them.

    |ours - exact| <= 2 * max|plain - exact| + one rounding of max|exact|

`exact` is computed one precision up, `plain` is PyTorch's own result in the dtype of ours: an op may be off by twice
what PyTorch is off. Where PyTorch may be lucky, because a sum cancels or because there are few values, a derived
`extra` is added; each function below gives one, and says what it counts. Importing this imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .key_ranges import KeyRanges

HALF_ULP = torch.finfo(torch.float32).eps / 2  # of 1 in float32: one rounding


def one_precision_up(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the exact result: float32 for 16-bit inputs, float64 otherwise."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def tolerance(plain: Tensor, exact: Tensor) -> float:
    """Returns the largest error allowed: twice that of PyTorch in the same dtype, plus the rounding of the result.

    Parameters
    ----------
    plain
        PyTorch's result; its dtype is the one that results are rounded to.
    exact
        The same result in a higher precision, of the same shape.

    Returns
    -------
    float
        2 max|plain - exact| + eps / 2 max|exact| + the smallest subnormal; 0 for empty tensors.
    """
    if exact.numel() == 0:
        return 0.0
    info = torch.finfo(plain.dtype)
    rounding = info.eps / 2 * exact.abs().max().item() + info.smallest_normal * info.eps
    return 2 * (plain.double() - exact.double()).abs().max().item() + rounding


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor, extra: float = 0.0, name: str = "result") -> None:
    """Raises unless `ours` is as close to `exact` as PyTorch in the same dtype is, up to a factor of two.

    Parameters
    ----------
    ours
        What is checked.
    plain, exact
        See `tolerance`.
    extra
        Added to the tolerance: what a derivation says beyond PyTorch's own error.
    name
        What the message calls `ours`.

    Raises
    ------
    AssertionError
        If the shapes differ, or an element is off by more, NaN included.

    Notes
    -----
    Synchronises with the device.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import attention
    >>> from illada_kernels.testing import assert_close
    >>> q = torch.randn(1, 9, 2, 64, generator=torch.Generator().manual_seed(0))
    >>> def plain(x):
    ...     x = x.transpose(1, 2)
    ...     return torch.nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2)
    >>> assert_close(attention(q, q, q), plain(q), plain(q.double()), name="out")
    """
    if ours.shape != exact.shape:
        raise AssertionError(f"{name}: expected shape {tuple(exact.shape)}, got {tuple(ours.shape)}")
    if exact.numel() == 0:
        return
    limit, error = tolerance(plain, exact) + extra, (ours.double() - exact.double()).abs().max().item()
    if not error <= limit:  # also true for NaN
        raise AssertionError(f"{name}: off by {error:.3g}, at most {limit:.3g} was expected")


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_lse_tolerance(q: Tensor, k: Tensor, scale: float, exact: Tensor) -> float:
    """Returns the largest error of a float32 lse: sqrt(D) roundings of the largest |q||k|, and those of sum and log."""
    finite = exact[exact.isfinite()]
    if finite.numel() == 0:
        return 0.0
    largest = abs(scale) * q.double().norm(dim=-1).max().item() * k.double().norm(dim=-1).max().item()
    return 2 * HALF_ULP * (q.shape[3] ** 0.5 * largest + finite.abs().max().item() + k.shape[1] ** 0.5)


def attention_sums(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, key_ranges: KeyRanges | None, scale: float, dtype: torch.dtype
) -> dict[str, float]:
    """Returns what float32 sums add to the errors of out, dq, dk and dv, about 4 sigma; inputs one precision up.

    u is a rounding of float32. A sum of n terms t in any order is off by up to 2 u sqrt(n) |t|; a p recomputed from a
    rounded lse by u |lse| of itself. delta = sum_d out * dout, of `out` rounded to `dtype`, is off by r = |out * dout|
    (4 roundings of dtype + 2 u sqrt(Dv)), which moves dq by scale * r * p k and dk by scale * p^T (r q): all that is
    left where ds cancels, as it does in a row with one key.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v, dout = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), dout))
    scores = scale * q @ k.mT  # (B, Hq, Sq, Sk)
    if key_ranges is not None:
        scores = scores.masked_fill(~key_ranges.dense()[:, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
    p = (scores - lse).exp()
    out, dp = p @ v, dout @ v.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    u = HALF_ULP
    r = (out * dout).norm(dim=-1, keepdim=True) * (2 * torch.finfo(dtype).eps + 2 * u * v.shape[3] ** 0.5)

    def sums(weights: Tensor, x: Tensor, heads: int) -> Tensor:
        terms = weights.shape[3] * heads
        return 2 * u * (terms**0.5 + lse.abs().amax()) * (weights.square() @ x.square()).sqrt()

    def largest(x: Tensor, heads: int) -> float:
        return heads * x.max().item() if x.numel() else 0.0

    if not p.numel():
        return dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
    return {
        "out": largest(sums(p, v, 1), 1),
        "dq": largest(sums(ds, k, 1) + abs(scale) * r * (p @ k).abs(), 1),
        "dk": largest(sums(ds.mT, q, group) + abs(scale) * p.mT @ (r * q.abs()), group),
        "dv": largest(sums(p.mT, dout, group), group),
    }


# ---- masked_loss -----------------------------------------------------------------------------------------------------


def masked_loss_rounding(
    loss: Tensor,
    scale: Tensor,
    largest_logit: float,
    hidden: Tensor | None = None,
    head_weight: Tensor | None = None,
    kept: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Returns what float32 rounding adds to the errors of loss, dlogits and dbias, and of dhidden and dhead if given.

    `loss` is the exact result; `scale` holds each masked row's factor: weight times upstream gradient, over the sum of
    weights for a mean. The exponential is 2 ulp (4 roundings) off, which moves lse so; lse and the target's logit are
    rounded once each, and so are their difference, the row's factor and the product of both.
    For the gradients, p and 1 are rounded to float32 before they are subtracted. A backend that keeps logits and their
    gradients in 16 bits (`kept`) rounds both: a rounding of z moves p by up to |z| / 2 roundings. The matmul behind
    them multiplies by head_weight or hidden.
    """
    norm = scale.double().norm().item()
    row = (4 + 2 * largest_logit) * norm
    largest_loss = loss.abs().max().item() if loss.numel() else 0.0
    eps = 2 * HALF_ULP
    if kept != torch.float32:
        eps += torch.finfo(kept).eps / 2 * (1 + largest_logit / 2)
    largest = scale.abs().max().item() if scale.numel() else 0.0
    extra = {"loss": HALF_ULP * (row + 3 * largest_loss), "dlogits": eps * largest, "dbias": eps * norm}
    if hidden is not None and head_weight is not None:
        extra["dhidden"] = eps * norm * head_weight.abs().max().item()
        extra["dhead"] = eps * norm * hidden.abs().max().item()
    return extra


# ---- unmask ----------------------------------------------------------------------------------------------------------


def unmask_confidence_tolerance(confidence: str, vocab: int, spread: float = 20.0) -> tuple[float, float]:
    """Returns (rtol, atol) between two float32 confidences of the same logits.

    An exponential is 2 ulp (4 roundings) off in numerator and in sum, and z = (l - top) * scale rounds twice, which
    moves exp(z) by 2 roundings of |z|; ids with |z| > spread weigh too little to matter. Both sides may err so. A
    margin subtracts from 1. An entropy, log of the sum less sum p z, errs by the sum's relative error, and by that
    times log V.
    """
    relative = 2 * (2 * 4 + 2 * spread) * HALF_ULP
    if confidence == "neg_entropy":
        return 0.0, relative * (1 + max(vocab, 2).bit_length() * 0.6932)
    return relative, 4 * HALF_ULP
