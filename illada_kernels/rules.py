"""Which of the proposed tokens `unmask` commits (TopK, Threshold, Factor, EntropyBound), and what it revises (Edit,
Remask).

Every number may instead be a tensor on the device of the call, of shape () or (B,): then nothing is read back to the
host, a new value means no recompilation under torch.compile, and each sequence may have its own. Numbers are checked
here; tensors cannot be without a synchronisation, so what a bad value in one does is said in each class.

r = 1, 2, ... ranks the masked candidates of a sequence by falling confidence c, ties to the lowest position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Integer = int | Tensor
Number = float | Tensor

# As csrc/include/illada/api.h numbers them.
TOP_K, THRESHOLD, FACTOR, ENTROPY_BOUND, ENTROPY_BOUND_INCLUSIVE = range(5)
NO_REVISION, EDIT, REMASK, REMASK_BY_SCORES = range(4)
PROBABILITY, MARGIN, NEG_ENTROPY, RANDOM = range(4)  # places in CONFIDENCES
CONFIDENCES = ("probability", "margin", "neg_entropy", "random")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raises unless `value` is an int in [low, high] or an integer tensor of shape () or (B,)."""
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype.is_complex or str(value.dtype) == "torch.bool":
            raise TypeError(f"{name}: expected an integer tensor, got {value.dtype}; convert it with .to(torch.int64)")
        if value.ndim > 1:
            raise ValueError(f"{name}: expected a tensor of shape () or (B,), got shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int or an integer tensor, got {type(value).__name__}")
    elif not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: expected an int from {low} to {high}, got {value}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises unless `value` is a finite number in [low, high] or a floating-point tensor of shape () or (B,)."""
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}; convert it with .float()")
        if value.ndim > 1:
            raise ValueError(f"{name}: expected a tensor of shape () or (B,), got shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number or a floating-point tensor, got {type(value).__name__}")
    elif not (low <= value <= high and math.isfinite(value)):  # type: ignore[operator]
        bounds = (
            f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}" if low > -math.inf else ""
        )
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value}")


@dataclass(frozen=True, eq=False)
class TopK:
    """Commit the k most confident; all of them where fewer are left. k: int >= 0, or an integer tensor () or (B,),
    where a negative value counts as 0. LLaDA's schedule (generate.py)."""

    k: Integer

    def __post_init__(self) -> None:
        check_integer("TopK.k", self.k, 0, 2**62)


@dataclass(frozen=True, eq=False)
class Threshold:
    """Commit every candidate with c >= tau (compared in float32), and always the most confident. tau within the range
    of the confidence: 0 to 1, or at most 0 for "neg_entropy"; a NaN in a tensor commits the most confident alone.
    Fast-dLLM."""

    tau: Number

    def __post_init__(self) -> None:
        check_number("Threshold.tau", self.tau, -math.inf, math.inf)


@dataclass(frozen=True, eq=False)
class Factor:
    """Commit the longest prefix of ranks with c_r >= 1 - f / (r + 1), computed in float32; rank 1 always. f >= 0; a NaN
    in a tensor commits rank 1 alone. Fast-dLLM (arXiv 2505.22618), algorithm "factor"."""

    f: Number

    def __post_init__(self) -> None:
        check_number("Factor.f", self.f, 0, math.inf)


@dataclass(frozen=True, eq=False)
class EntropyBound:
    """Rank by rising entropy, whatever the confidence, and commit while the sum of the entropies (nats) of the earlier
    ranks is <= gamma; `inclusive` counts the candidate's own entropy too (SDAR). Rank 1 always. gamma >= 0; a NaN or a
    negative value in a tensor commits rank 1 alone. Ben-Hamu et al., arXiv 2505.24857."""

    gamma: Number
    inclusive: bool = False

    def __post_init__(self) -> None:
        check_number("EntropyBound.gamma", self.gamma, 0, math.inf)


Rule = TopK | Threshold | Factor | EntropyBound


@dataclass(frozen=True, eq=False)
class Edit:
    """Replace the token of a candidate that already holds one by the most probable token (no noise), where the two
    differ and that token's probability under softmax(l / confidence_temperature) is >= tau. Edits do not count against
    the rule. LLaDA2.1."""

    tau: Number

    def __post_init__(self) -> None:
        check_number("Edit.tau", self.tau, 0, 1)


@dataclass(frozen=True, eq=False)
class Remask:
    """Return to mask_id the n candidates of lowest score among those that held a token when the call began, ties to the
    lowest position. `scores` (B, K) float32, one per candidate, for example its confidence when it was committed; a NaN
    never returns. None: the probability that the model now gives the held token under softmax(l /
    confidence_temperature), 0 for a token outside the vocabulary. n: int >= 0 or an integer tensor () or (B,). ReMDM
    (arXiv 2503.00307)."""

    n: Integer = 1
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        check_integer("Remask.n", self.n, 0, 2**62)
        if self.scores is not None and not isinstance(self.scores, Tensor):
            raise TypeError(
                f"Remask.scores: expected a float32 tensor (B, K) or None, got {type(self.scores).__name__}"
            )


Revision = Edit | Remask


def flatten_rule(rule: Rule) -> tuple[int, Tensor | None, float]:
    """(kind, tensor, number): what an operator's schema can carry. The number counts where the tensor is None."""
    if isinstance(rule, TopK):
        return TOP_K, *_split(rule.k)
    if isinstance(rule, Threshold):
        return THRESHOLD, *_split(rule.tau)
    if isinstance(rule, Factor):
        return FACTOR, *_split(rule.f)
    if isinstance(rule, EntropyBound):
        return ENTROPY_BOUND_INCLUSIVE if rule.inclusive else ENTROPY_BOUND, *_split(rule.gamma)
    raise TypeError(f"rule: expected TopK, Threshold, Factor or EntropyBound, got {type(rule).__name__}")


def flatten_revision(revise: Revision | None) -> tuple[int, Tensor | None, float, Tensor | None]:
    """(kind, tensor, number, scores)."""
    if revise is None:
        return NO_REVISION, None, 0.0, None
    if isinstance(revise, Edit):
        return EDIT, *_split(revise.tau), None
    if isinstance(revise, Remask):
        return REMASK if revise.scores is None else REMASK_BY_SCORES, *_split(revise.n), revise.scores
    raise TypeError(f"revise: expected Edit, Remask or None, got {type(revise).__name__}")


def _split(value: float | Tensor) -> tuple[Tensor | None, float]:
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))
