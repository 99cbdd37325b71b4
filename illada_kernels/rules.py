"""Says which of the proposed tokens `unmask` commits (TopK, Threshold, Factor, EntropyBound, Renoise) and what it
revises (Edit, Remask).

Every number may instead be a tensor on the device of the call, of shape () or (B,): then nothing is read back to the
host, a new value means no recompilation under torch.compile, and each sequence may have its own. Numbers are checked
here; tensors cannot be without a synchronisation, so each class says what a bad value in one does.

r = 1, 2, ... ranks the masked candidates of a sequence by falling confidence c, ties to the lowest position. The
options `order`, `rank_temperature` and `defer` of `unmask` change the ranks, not c; a rule commits a prefix of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import expect_integer, expect_number, largest, plain

Integer = int | Tensor
Number = float | Tensor

# Numbered as in csrc/include/illada/api.h.
TOP_K, THRESHOLD, FACTOR, ENTROPY_BOUND, ENTROPY_BOUND_INCLUSIVE, RENOISE = range(6)
NO_REVISION, EDIT, REMASK, REMASK_BY_SCORES = range(4)
PROBABILITY, MARGIN, NEG_ENTROPY, RANDOM, SAMPLED = range(5)  # places in CONFIDENCES
CONFIDENCES = ("probability", "margin", "neg_entropy", "random", "sampled")
BY_CONFIDENCE, FROM_LEFT = range(2)  # places in ORDERS
ORDERS = ("confidence", "left")

MOST = 2**62  # of counts: far above any number of candidates, and sums of two fit 64 bits


@dataclass(frozen=True, eq=False)
class TopK:
    """Commits the k most confident candidates; all of them where fewer are left.

    Parameters
    ----------
    k : int, or integer Tensor () or (B,)
        At least 0; a negative value in a tensor counts as 0.

    Notes
    -----
    Source: LLaDA's schedule (ML-GSAI/LLaDA, generate.py).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import TopK, unmask_from_logits
    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # p of the best ids: 0.95, 0.73, 0.5
    >>> tokens, positions = torch.full((1, 3), 9), torch.arange(3)[None]
    >>> unmask_from_logits(logits, tokens, positions, TopK(2), mask_id=9).committed
    tensor([[ True,  True, False]])
    """

    k: Integer

    def __post_init__(self) -> None:
        expect_integer("TopK.k", plain(self.k), 0, MOST, tensor=True)


@dataclass(frozen=True, eq=False)
class Threshold:
    """Commits every candidate with confidence c >= tau, compared in float32, and always the first `at_least` ranks.

    Parameters
    ----------
    tau : float, or floating-point Tensor () or (B,)
        Within the range of the confidence: 0 to 1, or at most 0 for "neg_entropy". A NaN in a tensor commits the first
        `at_least` ranks alone.
    at_least : int, or integer Tensor () or (B,)
        This many ranks are committed whatever their confidence. At least 0; a negative value in a tensor counts as 0.

    Notes
    -----
    Source: Fast-dLLM (arXiv 2505.22618); at_least: SDAR's dynamic sampler.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Threshold, unmask_from_logits
    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # p of the best ids: 0.95, 0.73, 0.5
    >>> tokens, positions = torch.full((1, 3), 9), torch.arange(3)[None]
    >>> unmask_from_logits(logits, tokens, positions, Threshold(0.9), mask_id=9).committed
    tensor([[ True, False, False]])
    """

    tau: Number
    at_least: Integer = 1

    def __post_init__(self) -> None:
        expect_number("Threshold.tau", plain(self.tau, torch.float64), tensor=True)
        expect_integer("Threshold.at_least", plain(self.at_least), 0, MOST, tensor=True)


@dataclass(frozen=True, eq=False)
class Factor:
    """Commits the longest prefix of ranks with c_r >= 1 - f / (r + 1), computed in float32; rank 1 always.

    Parameters
    ----------
    f : float, or floating-point Tensor () or (B,)
        At least 0. A NaN in a tensor commits rank 1 alone.

    Notes
    -----
    Source: Fast-dLLM (arXiv 2505.22618), algorithm "factor".

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Factor, unmask_from_logits
    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # p of the best ids: 0.95, 0.73, 0.5
    >>> tokens, positions = torch.full((1, 3), 9), torch.arange(3)[None]
    >>> unmask_from_logits(logits, tokens, positions, Factor(1.0), mask_id=9).committed
    tensor([[ True,  True, False]])
    """

    f: Number

    def __post_init__(self) -> None:
        expect_number("Factor.f", plain(self.f, torch.float64), 0, tensor=True)


@dataclass(frozen=True, eq=False)
class EntropyBound:
    """Commits by rising entropy while the entropies of the earlier ranks sum to at most gamma; rank 1 always.

    Ranks by entropy whatever the confidence.

    Parameters
    ----------
    gamma : float, or floating-point Tensor () or (B,)
        At least 0, in nats. A NaN or a negative value in a tensor commits rank 1 alone.
    inclusive : bool
        The sum counts the candidate's own entropy too (SDAR).

    Notes
    -----
    Source: Ben-Hamu et al. (arXiv 2505.24857).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import EntropyBound, unmask_from_logits
    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # p of the best ids: 0.95, 0.73, 0.5
    >>> tokens, positions = torch.full((1, 3), 9), torch.arange(3)[None]
    >>> unmask_from_logits(logits, tokens, positions, EntropyBound(0.5), mask_id=9).committed
    tensor([[ True,  True, False]])
    """

    gamma: Number
    inclusive: bool = False

    def __post_init__(self) -> None:
        expect_number("EntropyBound.gamma", plain(self.gamma, torch.float64), 0, tensor=True)


@dataclass(frozen=True, eq=False)
class Renoise:
    """Writes every candidate, whatever token it holds: what `EntropyBound(gamma)` accepts, and noise at all others.

    For models without a mask token, whose canvas starts as random tokens. An accepted candidate gets its proposal;
    the others get a token drawn uniformly from [0, V). No candidate is left as it was, except bad rows, which are never
    written. `unmask` then returns as proposal the most probable token (what the model would emit now), as committed
    what was accepted, and as remaining the number of candidates that were not.

    Parameters
    ----------
    gamma : float, or floating-point Tensor () or (B,)
        At least 0, in nats. A NaN or a negative value in a tensor accepts rank 1 alone.

    Notes
    -----
    With confidence="neg_entropy" and confidence_temperature equal to the temperature, -confidence.mean(1) is the mean
    entropy by which DiffusionGemma stops. Takes no `revise`: it writes held tokens already.
    Source: DiffusionGemma (transformers, generation_diffusion_gemma.py).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Renoise, unmask_from_logits
    >>> logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    >>> tokens, positions = torch.tensor([[2, 2]]), torch.arange(2)[None]
    >>> out = unmask_from_logits(logits, tokens, positions, Renoise(0.0), mask_id=-1)
    >>> out.proposal, out.committed, int(tokens[0, 0])
    (tensor([[0, 1]]), tensor([[ True, False]]), 0)
    """

    gamma: Number

    def __post_init__(self) -> None:
        expect_number("Renoise.gamma", plain(self.gamma, torch.float64), 0, tensor=True)


Rule = TopK | Threshold | Factor | EntropyBound | Renoise


@dataclass(frozen=True, eq=False)
class Edit:
    """Replaces the token of a candidate that already holds one by the most probable token, if that is clear enough.

    That token, found without noise, must differ, and have a probability of at least tau under softmax(l /
    confidence_temperature). Edits do not count against the rule.

    Parameters
    ----------
    tau : float, or floating-point Tensor () or (B,)
        0 to 1.

    Notes
    -----
    Source: LLaDA2.1.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Edit, TopK, unmask_from_logits
    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])  # p of the best ids: 0.95, 0.73
    >>> tokens, positions = torch.tensor([[1, 0]]), torch.arange(2)[None]
    >>> _ = unmask_from_logits(logits, tokens, positions, TopK(0), mask_id=9, revise=Edit(0.9))
    >>> tokens
    tensor([[0, 0]])
    """

    tau: Number

    def __post_init__(self) -> None:
        expect_number("Edit.tau", plain(self.tau, torch.float64), 0, 1, tensor=True)


@dataclass(frozen=True, eq=False)
class Remask:
    """Returns to mask_id the n candidates of lowest score among those that held a token when the call began.

    Ties go to the lowest position.

    Parameters
    ----------
    n : int, or integer Tensor () or (B,)
        At least 0.
    scores : Tensor, float32, (B, K), optional
        One per candidate, for example its confidence when it was committed; a NaN never returns. None: the probability
        that the model now gives the held token under softmax(l / confidence_temperature), 0 for a token outside the
        vocab.

    Notes
    -----
    Source: ReMDM (arXiv 2503.00307).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Remask, TopK, unmask_from_logits
    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    >>> tokens, positions = torch.tensor([[0, 0]]), torch.arange(2)[None]
    >>> _ = unmask_from_logits(logits, tokens, positions, TopK(0), mask_id=9, revise=Remask(1))
    >>> tokens
    tensor([[0, 9]])
    """

    n: Integer = 1
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        expect_integer("Remask.n", plain(self.n), 0, MOST, tensor=True)
        if self.scores is not None and not isinstance(self.scores, Tensor):
            raise TypeError(
                f"Remask.scores: expected a float32 tensor (B, K) or None, got {type(self.scores).__name__}; "
                "use torch.tensor(...)"
            )


Revision = Edit | Remask


Parameter = tuple[str, Number, float, float]  # name, value, low, high
UNUSED: tuple[Parameter, Parameter] = (("number", 0.0, 0.0, 0.0), ("count", 0, 0, 0))


def flatten_rule(rule: Rule, confidence: str) -> tuple[int, Parameter, Parameter]:
    """Returns (kind, number, least). The first `least` ranks are committed whatever the number says."""
    one: Parameter = ("least", 1, 1, 1)
    if isinstance(rule, TopK):
        return TOP_K, UNUSED[0], ("TopK.k", rule.k, 0, MOST)
    if isinstance(rule, Threshold):
        low, high = (-largest(), 0.0) if confidence == "neg_entropy" else (0.0, 1.0)
        tau: Parameter = (f'Threshold.tau with confidence="{confidence}"', rule.tau, low, high)
        return THRESHOLD, tau, ("Threshold.at_least", rule.at_least, 0, MOST)
    if isinstance(rule, Factor):
        return FACTOR, ("Factor.f", rule.f, 0.0, largest()), one
    if isinstance(rule, EntropyBound):
        kind = ENTROPY_BOUND_INCLUSIVE if rule.inclusive else ENTROPY_BOUND
        return kind, ("EntropyBound.gamma", rule.gamma, 0.0, largest()), one
    if isinstance(rule, Renoise):
        return RENOISE, ("Renoise.gamma", rule.gamma, 0.0, largest()), one
    raise TypeError(
        f"rule: expected TopK, Threshold, Factor, EntropyBound or Renoise, got {type(rule).__name__}; for k tokens use "
        "TopK(k)"
    )


def flatten_revision(revise: Revision | None) -> tuple[int, Parameter, Parameter, Tensor | None]:
    """Returns (kind, number, count, scores)."""
    if revise is None:
        return NO_REVISION, *UNUSED, None
    if isinstance(revise, Edit):
        return EDIT, ("Edit.tau", revise.tau, 0.0, 1.0), UNUSED[1], None
    if isinstance(revise, Remask):
        kind = REMASK if revise.scores is None else REMASK_BY_SCORES
        return kind, UNUSED[0], ("Remask.n", revise.n, 0, MOST), revise.scores
    raise TypeError(f"revise: expected Edit, Remask or None, got {type(revise).__name__}; use Edit(tau) or Remask(n)")
