"""log_likelihood: how likely a model finds continuations, all in packed passes without padding."""

from __future__ import annotations

import dataclasses
import hashlib
import numbers
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .decoding.config import Prompts
from .decoding.settings import expect_mask, guidance_of, token_lists
from .errors import PromptError
from .model import Model
from .scoring import Draw, Scorer, Text, continued
from .training.objectives import mask_count

METHODS = ("monte_carlo", "confidence", "autoregressive")


@torch.no_grad()
def log_likelihood(
    model: Model,
    contexts: Prompts,
    continuations: Prompts,
    method: str = "monte_carlo",
    samples: int = 128,
    rows_per_pass: int = 4096,
    seed: int = 0,
    guidance: float = 0.0,
    forbid_mask: bool | None = None,
) -> Tensor:
    """Returns log p(continuation | context) for each pair, or the score that stands for it.

    Parameters
    ----------
    model : Model
    contexts, continuations : sequence of sequences of int
        Token ids, as many contexts as continuations, rows of any lengths. A context may be empty.
    method : str
        "monte_carlo": LLaDA's estimate, a lower bound in expectation. "confidence": iLLaDA's score, which reveals the
        continuation's tokens in the order in which the model is sure of them. "autoregressive": the exact probability
        of the continuation read from left to right; models with `next_token` have each token scored on the clean row
        before it, under a causal mask. For other models with `causal_block` 1 all three are the same, and
        autoregressive ones need no mask token.
    samples : int
        Masks that "monte_carlo" draws for each continuation, their numbers of masked tokens stratified.
    rows_per_pass : int
        Hidden rows of one forward pass, which bounds the memory. One sequence may take more.
    seed : int
        Masks depend on the seed and on the pair's tokens.
    guidance : float
        Weight of classifier-free guidance, at least 0, as in `GenerationConfig`. Doubles the rows.
    forbid_mask : bool, optional
        Whether the mask's logit is -inf. None: what the model's configuration says, as published for its family.

    Returns
    -------
    Tensor (N,) float64
        Nats; 0 for an empty continuation. A value does not depend on the other pairs, up to rounding.

    Raises
    ------
    PromptError
        For ids outside the vocab, mask ids, pairs longer than max_seq_len, settings that cannot be, and models that
        lack the mask token that these need.

    Notes
    -----
    With T tokens of which n are masked, n uniform on 1 .. T, "monte_carlo" averages -T/n times the cross-entropy of the
    masked tokens (LLaDA, arXiv 2502.09992, equation 6). "confidence": starting from T masks, T times: add the largest
    log-probability of a right token among the masked positions and reveal that token (iLLaDA, arXiv 2606.25331).
    Block-causal models do either within each block, which sees the tokens before it; nothing stands behind a
    continuation. Forward passes: "monte_carlo" `samples` of the sequence, block-causal models one of context and
    continuation and `samples` of the continuation; the others T of the sequence.
    Synchronises once a forward pass. Memory: the hidden rows of one pass; logits as in `masked_loss`.

    Examples
    --------
    >>> import torch
    >>> from illada import Model, ModelConfig, log_likelihood
    >>> _ = torch.manual_seed(0)
    >>> model = Model(ModelConfig.preset("demo", n_layers=1)).eval()
    >>> nats = log_likelihood(model, [[72, 101], [72]], [[108, 108, 111], [105]], samples=8)
    >>> nats.shape, bool((nats < 0).all())
    (torch.Size([2]), True)
    """
    if not isinstance(model, Model):
        raise PromptError(f"model: expected a Model, got {type(model).__name__}")
    if method not in METHODS:
        raise PromptError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("samples", samples), ("rows_per_pass", rows_per_pass)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PromptError(f"{name}: expected an integer of at least 1, got {value!r}")
    weight = guidance_of(guidance)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise PromptError(f"seed: expected an integer, got {seed!r}")
    if forbid_mask is not None and not isinstance(forbid_mask, bool):
        raise PromptError(f"forbid_mask: expected True, False or None, got {forbid_mask!r}")
    config = read_as(model.config, method)
    if weight:
        expect_mask(config, "guidance")
    texts = _texts(config, contexts, continuations, method)
    scorer = Scorer(model, rows_per_pass, weight, forbid_mask, config)
    total = np.zeros(len(texts))
    if method == "confidence":
        for index, _, loss in scorer.reveal(texts, scorer.losses, best=lambda loss: loss):
            total[index] -= loss
        return torch.from_numpy(total)
    random = method == "monte_carlo"
    made = ((text, _random(text, samples, int(seed)) if random else _left_to_right(text)) for text in texts)
    for part, losses in scorer.losses(scorer.parts(made)):
        total[part.text.index] -= losses @ part.weight
    return torch.from_numpy(total)


@torch.no_grad()
def is_greedy(
    model: Model,
    contexts: Prompts,
    continuations: Prompts,
    rows_per_pass: int = 4096,
    method: str = "monte_carlo",
) -> list[bool]:
    """Returns whether greedy decoding, one token a pass, would give each continuation from as many masks.

    A pair is left at the first token that differs, which for most is in the first pass. `method`: as in
    `log_likelihood`; with "autoregressive" models with `next_token` decode from left to right.
    """
    config = read_as(model.config, method)
    texts = _texts(config, contexts, continuations, "greedy decoding")
    right = [True] * len(texts)
    scorer = Scorer(model, rows_per_pass, config=config)
    for index, matches, _ in scorer.reveal(texts, scorer.proposals, best=lambda confidence: -confidence):
        right[index] &= matches
    return right


# ---- pairs and what is masked --------------------------------------------------------------------------------------


def longest_pair(config: ModelConfig) -> int:
    """Returns how many tokens fit; where each is predicted from the row before it, the last one needs no row."""
    return config.max_seq_len + config.autoregressive


def read_as(config: ModelConfig, method: str) -> ModelConfig:
    """Returns the configuration that says which rows are read: with clean causal rows that of a shifted model."""
    if method != "autoregressive" or not config.next_token:
        return config
    return dataclasses.replace(config, causal_block=1, shifted_logits=True)


def _texts(config: ModelConfig, contexts: Prompts, continuations: Prompts, what: str) -> list[Text]:
    if not config.autoregressive:
        expect_mask(config, what)
    before, after = token_lists(contexts, config, "context"), token_lists(continuations, config, "continuation")
    if len(before) != len(after):
        raise PromptError(f"continuations: expected {len(before)}, one for each context, got {len(after)}")
    texts = []
    for index, (context, continuation) in enumerate(zip(before, after)):
        for name, ids in (("context", context), ("continuation", continuation)):
            if config.mask_id in ids:
                raise PromptError(f"{name} {index}: expected no mask_id ({config.mask_id}), it holds one")
        if continuation and not context and config.mask_id < 0:
            raise PromptError(f"context {index}: expected a token at least, for no mask predicts the first one here")
        first, size = len(context), len(context) + len(continuation)
        if size > longest_pair(config) - (config.autoregressive and not context):
            raise PromptError(
                f"context {index}: {first} tokens and a continuation of {len(continuation)} exceed max_seq_len = "
                f"{config.max_seq_len}; cut the context"
            )
        block = config.causal_block
        starts = range(first // block * block, size, block) if block else [0]
        blocks = [(start, min(start + block, size) if block else size) for start in starts if first < size]
        texts.append(Text(index, np.array(context + continuation, dtype=np.int64), first, blocks))
    return texts


def _random(text: Text, samples: int, seed: int) -> Iterator[Draw]:
    """Yields LLaDA's masks: n_i = 1 + (k + floor(i T / samples)) mod T of T tokens, k drawn once from 0 .. T - 1."""
    key = hashlib.sha256(f"{seed} {text.context} {text.tokens.tolist()}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
    for start, stop in text.blocks:
        positions = continued(text, start, stop)
        size, drawn = len(positions), samples if len(positions) > 1 else 1
        shift = torch.randint(size, (), generator=generator, device="cpu")
        counts = 1 + (shift + torch.arange(drawn, device="cpu") * size // drawn) % size
        for count, row in zip(counts.tolist(), mask_count(counts, size, generator).numpy()):
            yield Draw(start, stop, positions[row], positions[row], size / count / drawn)


def _left_to_right(text: Text) -> Iterator[Draw]:
    for start, stop in text.blocks:
        positions = continued(text, start, stop)
        for i in range(len(positions)):
            yield Draw(start, stop, positions[i:], positions[i : i + 1])
