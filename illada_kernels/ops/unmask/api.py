"""unmask and unmask_from_logits: docstrings, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..._checks import FLOATS, cast_for_autocast, expect_layout
from ...rules import Edit, Remask, Rule
from .checks import LogitBias, Options, check_head, checked
from .op import OPERATOR


class Unmasked(NamedTuple):
    """Holds what one step proposed, committed and left.

    Attributes
    ----------
    proposal
        (B, K) int64: a token for each candidate, -1 where there is none.
    confidence
        (B, K) float32: -inf where there is no proposal.
    committed
        (B, K) bool: written into tokens, by the rule or as an edit.
    remaining
        (B,) int32: candidates that are masked now; under `Renoise` those that were not accepted.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import TopK, unmask_from_logits
    >>> tokens, positions = torch.tensor([[9, 9]]), torch.arange(2)[None]
    >>> out = unmask_from_logits(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), tokens, positions, TopK(1), mask_id=9)
    >>> out.proposal, out.committed, out.remaining
    (tensor([[0, 1]]), tensor([[ True, False]]), tensor([1], dtype=torch.int32))
    """

    proposal: Tensor
    confidence: Tensor
    committed: Tensor
    remaining: Tensor


def unmask(
    hidden: Tensor,
    head_weight: Tensor,
    tokens: Tensor,
    positions: Tensor,
    rule: Rule,
    *,
    mask_id: int,
    confidence: str = "probability",
    order: str = "confidence",
    rank_temperature: float | Tensor = 0.0,
    temperature: float | Tensor = 0.0,
    confidence_temperature: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    forbid: Sequence[int] | None = None,
    defer: Sequence[int] = (),
    logit_bias: LogitBias | None = None,
    revise: Edit | Remask | None = None,
    frozen: Tensor | None = None,
    noise_positions: Tensor | None = None,
    head_bias: Tensor | None = None,
    backend: str | None = None,
) -> Unmasked:
    """Runs one decoding step of a masked-diffusion language model from hidden states, in place on `tokens`.

    Proposes a token and a confidence at every masked candidate, and commits those that `rule` picks:

        l_v = hidden . head_weight_v + head_bias_v + logit_bias_v    float32, -inf where v is in `forbid`
        proposal = argmax_v l_v + temperature * g_v    g: Gumbel noise; ties to the lowest id; v not truncated
        p_v = softmax(l / confidence_temperature)_v    no noise

    docs/concepts/decoding.md describes each part: candidates, confidences, rules, revision, noise.

    Parameters
    ----------
    hidden
        (B, K, D), the K candidate rows of each sequence, float32, bfloat16 or float16; float64 on the reference. Any
        strides with the last dimension contiguous.
    head_weight
        (V, D), hidden's dtype or float32.
    tokens
        (B, L) int64, written in place.
    positions
        (B, K) int64, where the candidates stand in `tokens`; distinct within a sequence. A position below 0 or from L
        on is not a candidate. Duplicates stay in range; which of them is written is not defined.
    rule
        Which masked candidates commit, ranked by falling confidence, ties to the lowest position: `TopK`, `Threshold`
        or another rule. `Renoise`: which of all candidates are accepted; the others become noise.
    mask_id
        The mask token. A candidate that holds another token takes part only under `revise`.
    confidence
        "probability" of the proposal, "margin" of the two largest p, "neg_entropy" in nats, "random" in [0, 1], or
        "sampled", which thresholds meet at any temperature T: the smaller of max p and exp((l_x - max l) / T).
    order
        "confidence" ranks by falling confidence; "left" by position, for sequential decoding.
    rank_temperature
        Ranks by confidence + rank_temperature * Gumbel noise: drawing without replacement from
        softmax(confidence / rank_temperature), Dream's alg_temp. A number >= 0, or a floating-point tensor () or (B,).
    temperature, confidence_temperature
        Numbers >= 0, or floating-point tensors () or (B,). Temperature 0 draws no noise.
    seed
        An int or 0-d tensor s gives sequence b the seed s + b; a (B,) int64 tensor gives each its own.
    step
        Counter of the noise, in [0, 2**32); must change from call to call.
    top_k, top_p, min_p
        Truncate what the noise may draw from, in this order, as Hugging Face's processors do after the temperature: the
        top_k ids of largest l; of these the fewest of largest l whose softmax(l / temperature) sums to top_p; of these
        the ids with softmax(l / temperature) at least min_p times its maximum. Equal logits are kept or dropped
        together. The confidence stays that of the untruncated distribution. Each None, a number (top_k >= 1, the others
        in [0, 1]) or a tensor () or (B,), in which top_k <= 0, top_p >= 1 and min_p <= 0 truncate nothing.
    forbid
        Ids that are never proposed and have p = 0. None: (mask_id,); (): none.
    defer
        Ids, for example of end-of-text tokens. Candidates that propose one rank after all others of the sequence, so
        that they commit only where all others do.
    logit_bias
        (ids, values) added to every row: sequences, or int64 and float32 tensors (n,). Repeated ids add up; in a
        tensor, ids outside [0, V) are ignored.
    revise
        `Edit` replaces tokens that were committed before, `Remask` takes some back.
    frozen
        (B, L) bool: positions that never change.
    noise_positions
        (B, K) int64: the noise's counter in place of `positions`.
    head_bias
        (V,), hidden's dtype or float32.
    backend
        "cuda", "triton", "cpu" or "reference": insists on it. Default: ILLADA_BACKEND, else the first that can.

    Returns
    -------
    Unmasked
        (proposal, confidence, committed, remaining), not differentiable. A row that takes no part has proposal -1,
        confidence -inf and committed False, whatever its hidden row holds, NaN or inf included. So has a row with a
        NaN or +inf logit, or with every id at -inf.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device, stride or number.
    RuntimeError
        If `backend` cannot run the call.

    Notes
    -----
    Noise depends on (seed, step, position, token id) alone, whatever the batch, the order of candidates or the backend.
    Under autocast hidden, head_weight and head_bias are cast to its dtype; logits are accumulated and kept in float32.
    Memory: without truncation (rows, V) logits are never stored; at most about 60 MB beside inputs and outputs on a CPU
    for D <= 4096. With top_k, top_p or min_p a CPU holds the logits of as many rows at a time as fit 32 MiB, at least
    one. A GPU holds those of 128 rows at most, twice where cuBLAS computes them.
    Never synchronises, except that a logit_bias of sequences is copied to the device in each call.
    Source: LLaDA's generate.py (ML-GSAI/LLaDA).

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import TopK, unmask
    >>> head = torch.eye(5)  # the token that hidden points at
    >>> hidden = torch.tensor([[[0.0, 3, 0, 0, 0], [0, 0, 9, 0, 0]]])
    >>> tokens = torch.tensor([[0, 4, 4]])  # 4 is the mask
    >>> unmask(hidden, head, tokens, torch.tensor([[1, 2]]), TopK(1), mask_id=4).proposal
    tensor([[1, 2]])
    >>> tokens  # the surer of the two was committed
    tensor([[0, 4, 2]])
    """
    expect_layout("hidden", hidden, FLOATS, "B", "K", "D", contiguous=True)
    hidden, head_weight, head_bias = cast_for_autocast(hidden.device, hidden, head_weight, head_bias)
    check_head(hidden, head_weight, head_bias)
    options = Options(
        mask_id,
        confidence,
        order,
        rank_temperature,
        temperature,
        confidence_temperature,
        seed,
        step,
        top_k,
        top_p,
        min_p,
        forbid,
        defer,
        logit_bias,
        revise,
        frozen,
        noise_positions,
    )
    source = "hidden", hidden, head_weight, head_bias, head_weight.shape[0]
    return Unmasked(*OPERATOR(checked(*source, tokens, positions, rule, options, backend)))


def unmask_from_logits(
    logits: Tensor,
    tokens: Tensor,
    positions: Tensor,
    rule: Rule,
    *,
    mask_id: int,
    confidence: str = "probability",
    order: str = "confidence",
    rank_temperature: float | Tensor = 0.0,
    temperature: float | Tensor = 0.0,
    confidence_temperature: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    forbid: Sequence[int] | None = None,
    defer: Sequence[int] = (),
    logit_bias: LogitBias | None = None,
    revise: Edit | Remask | None = None,
    frozen: Tensor | None = None,
    noise_positions: Tensor | None = None,
    backend: str | None = None,
) -> Unmasked:
    """Runs `unmask` for a model that already has its logits.

    All other arguments, results and errors as in `unmask`.

    Parameters
    ----------
    logits
        (B, K, V), one row per candidate, float32, bfloat16 or float16; float64 on the reference. Never written to.

    Notes
    -----
    Each logit of a row that takes part is read once, a few times with top_k, top_p or min_p; nothing is copied.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import Threshold, unmask_from_logits
    >>> logits = torch.tensor([[[0.0, 3, 0, 0, 0], [0, 0, 9, 0, 0]]])
    >>> tokens = torch.tensor([[0, 4, 4]])  # 4 is the mask
    >>> unmask_from_logits(logits, tokens, torch.tensor([[1, 2]]), Threshold(0.8), mask_id=4).remaining
    tensor([0], dtype=torch.int32)
    """
    expect_layout("logits", logits, FLOATS, "B", "K", "V", contiguous=True)
    options = Options(
        mask_id,
        confidence,
        order,
        rank_temperature,
        temperature,
        confidence_temperature,
        seed,
        step,
        top_k,
        top_p,
        min_p,
        forbid,
        defer,
        logit_bias,
        revise,
        frozen,
        noise_positions,
    )
    source = "logits", logits, None, None, logits.shape[2]
    return Unmasked(*OPERATOR(checked(*source, tokens, positions, rule, options, backend)))
