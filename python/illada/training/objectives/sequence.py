"""Objectives of models in which every token sees its whole document: LLaDA, MDLM, Dream, iLLaDA, and fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from .documents import Packing
from .example import Example
from .noise import CPU, cart_weight, mask_independently, stratified

WEIGHTINGS = ("llada", "mdlm", "cart")


def full_sequence(
    tokens: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    eps: float = 1e-3,
    weighting: str = "llada",
    complementary: bool = False,
    short_fraction: float = 0.0,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns LLaDA's pre-training batch: every token masked with a probability p of its sequence.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
    generator : torch.Generator
    eps : float
        Smallest p: p = (1 - eps) u + eps with u uniform.
    weighting : str
        "llada": 1 / (p * B * S) (arXiv 2502.09992, equation 3). "mdlm": the same with p = max(u, 1 / S) (MDLM, arXiv
        2406.07524, whose -alpha'/(1 - alpha) is 1/t for the linear schedule). "cart": Dream's `cart_weight` / (B * S).
    complementary : bool
        Doubles the batch; the second half is masked where the first is not, with 1 - p for p (LLaDA2.0, Fast-dLLM v2).
        Each half weighs one half, so every token is learned in every step.
    short_fraction : float
        Probability that the whole batch is cut to its first n columns, n uniform on 1 .. S (LLaDA: 0.01), so that the
        model knows short texts too. S is n in the weights then.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`);
        MDLM forbids it, LLaDA and Dream do not.

    Returns
    -------
    Example

    Raises
    ------
    ValueError
        For an unknown weighting.

    Notes
    -----
    With "llada" and "mdlm" the loss's expectation is an upper bound of -log p(x) / S; with "cart" it is not a bound.
    A model with shifted logits (Dream) is scored on its shifted rows.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    tokens = shortened(tokens, short_fraction, generator)
    batch, length = tokens.shape
    u = stratified(batch, generator)[:, None]  # (B, 1)
    p = u.clamp(min=1 / length) if weighting == "mdlm" else (1 - eps) * u + eps
    masked = mask_independently((batch, length), p, generator)
    if complementary:
        rest = (1 - p).clamp(min=eps)
        tokens, masked, p = torch.cat([tokens, tokens]), torch.cat([masked, ~masked]), torch.cat([p, rest])
    weight = cart_weight(masked) if weighting == "cart" else (1 / p).expand_as(tokens)
    shown = tokens.masked_fill(masked, mask_id)
    return Example(shown, tokens, masked, weight / tokens.numel(), forbid_mask=forbid_mask)


def shortened(tokens: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Returns the first n columns of tokens (B, S), n uniform on 1 .. S, with probability `fraction`, else all."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"short_fraction: expected a number from 0 to 1, got {fraction}")
    if fraction > 0 and float(torch.rand((), generator=generator, **CPU)) < fraction:
        return tokens[:, : int(torch.randint(1, tokens.shape[1] + 1, (), generator=generator, device="cpu"))]
    return tokens


def split_windows(batch: int, length: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Returns documents (batch, length) for `packed`: with probability `fraction` a window is two, cut anywhere.

    iLLaDA (arXiv 2606.25331) splits 0.3 of its windows of 8192 tokens, in pre-training and in fine-tuning.
    """
    split = torch.rand(batch, 1, generator=generator, **CPU) < fraction
    if length < 2:
        return torch.zeros(batch, length, dtype=torch.int64, device="cpu")
    cut = torch.randint(1, length, (batch, 1), generator=generator, device="cpu")
    return (split & (torch.arange(length, device="cpu") >= cut)).long()


def packed(
    tokens: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    documents: Tensor | None = None,
    learn: Tensor | None = None,
    per: str = "tokens",
    eps: float = 1e-3,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns iLLaDA's batch: documents packed into rows, each masked with a probability p of its own.

    Parameters
    ----------
    tokens : int64 (B, S)
    mask_id : int
    generator : torch.Generator
    documents : int64 (B, S), optional
        The document of each token: equal ids for neighbours of one document; negative for padding at the end of a row.
        `split_windows` gives iLLaDA's. None: a row is a document.
    learn : bool (B, S), optional
        Tokens that may be masked. None: all, prompts and end-of-text ids too, as iLLaDA does in fine-tuning.
    per : "tokens" or "documents"
        "tokens": weight 1 / (p * tokens to learn in the batch), iLLaDA's global denominator. "documents": 1 / (p *
        tokens to learn in the document * documents), which LLaDA and SDAR use in fine-tuning.
    eps : float
        Smallest p: p = (1 - eps) u + eps with u uniform.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`);
        iLLaDA does not forbid it.

    Returns
    -------
    Example
        A token sees its document, whose positions begin at 0.

    Raises
    ------
    ValueError
        For shapes that differ, padding before a document, or nothing to learn.

    Notes
    -----
    Source: iLLaDA (arXiv 2606.25331, equation 1). The loss's expectation bounds -log p from above, a token or, with
    "documents", a token of the mean document.
    """
    packing = Packing.of(tokens, documents, learn)
    p = ((1 - eps) * stratified(packing.documents, generator) + eps)[packing.number]  # (B, S)
    masked = mask_independently(tuple(tokens.shape), p, generator) & packing.learn  # type: ignore[arg-type]
    weight = 1 / (p * packing.denominator(per))
    positions = None if packing.whole else packing.positions
    shown = tokens.masked_fill(masked, mask_id)
    return Example(shown, tokens, masked, weight, packing.full_ranges(), positions, forbid_mask=forbid_mask)


def sft(
    tokens: Tensor,
    prompt_lengths: Tensor,
    mask_id: int,
    generator: torch.Generator,
    *,
    eps: float = 1e-3,
    forbid_mask: bool | None = None,
) -> Example:
    """Returns LLaDA's fine-tuning batch: prompts are kept, answers masked with probability p.

    Parameters
    ----------
    tokens : int64 (B, S)
        Prompt, answer, then end-of-text ids, which count as answer and are learned too.
    prompt_lengths : int64 (B,)
        At most S - 1; the answer's length is S - prompt_lengths.
    mask_id : int
    generator : torch.Generator
    eps : float
        Smallest p.
    forbid_mask : bool, optional
        Whether the loss gives the mask's logit -inf. None: as the model's family does (`ModelConfig.forbid_mask`).

    Returns
    -------
    Example
        Weight 1 / (p * answer length * B) (arXiv 2502.09992, section 2.3; SDAR normalises the same way).

    Raises
    ------
    ValueError
        If a prompt leaves no answer.
    """
    length = tokens.shape[1]
    if bool((prompt_lengths >= length).any()):
        raise ValueError(f"prompt_lengths: expected at most {length - 1}, so that something is left to learn from")
    learn = torch.arange(length, device="cpu") >= prompt_lengths[:, None]
    return packed(tokens, mask_id, generator, learn=learn, per="documents", eps=eps, forbid_mask=forbid_mask)
