"""Small models whose expected losses are sums over all corruptions, and the mean over many draws beside them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from illada.config import ModelConfig
from illada.model import Model
from illada.training.objectives import Example
from torch import Tensor

from illada_kernels import KeyRanges

VOCAB, MASK = 6, 4
TEXT = torch.tensor([3, 0, 2, 1, 5, 2])
DRAWS = 4000
LEVELS = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # midpoints, error below 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(shifted: bool = False, seed: int = 3, **changes) -> Model:
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "ffn_dim": 24, "init_std": 0.4}
    ids = {"vocab_size": VOCAB, "mask_id": MASK, "eos_id": 5, "pad_id": 5, "forbid_mask": False}
    torch.manual_seed(seed)
    return Model(ModelConfig.preset("demo", **{**shape, **ids, **changes}, shifted_logits=shifted)).eval()


def ce(model: Model, shown: list[int], targets: list[int], allowed: Tensor | None = None) -> Tensor:
    """Cross-entropies (S,) of the targets when the model is shown `shown`, by a plain forward pass."""
    ranges = None if allowed is None else KeyRanges.from_dense(allowed[None])
    with torch.no_grad():
        logits = model(torch.tensor([shown]), ranges)[0] @ model.head_weight.T
    return -logits.double().log_softmax(-1)[torch.arange(len(shown)), torch.tensor(targets)]


def block_ce(model: Model, before: list[int], noisy: list[int], clean: list[int], block: int, causal=None) -> Tensor:
    """Cross-entropies of a block's tokens after clean text, without a second copy of anything."""
    s, n = len(before) + len(noisy), len(before)
    row, key = torch.arange(s)[:, None], torch.arange(s)
    allowed = key < (row // block + 1) * block if causal is None else key <= row
    allowed[n:] = (key <= row[n:]) if causal == "both" else True
    return ce(model, before + noisy, before + clean, allowed)[n:]


def subsets(size: int):
    return itertools.product([False, True], repeat=size)


def masked_sum(score: Callable[[list[bool]], Tensor], size: int, levels: Tensor, weight: Tensor) -> float:
    """E over levels t and masks of sum over masked of weight(t) * score(mask): masks of size n have one coefficient."""
    total = 0.0
    for mask in subsets(size):
        n = sum(mask)
        if n:
            coefficient = (levels**n * (1 - levels) ** (size - n) * weight).mean()
            total += float(coefficient * score(list(mask))[torch.tensor(mask)].sum())
    return total


def hide(text: list[int], mask: list[bool]) -> list[int]:
    return [MASK if m else x for x, m in zip(text, mask)]


def whole_bound(model: Model, text: list[int], levels: Tensor, prompt: int = 0) -> float:
    """E of sum over masked of CE / t, in which the first `prompt` tokens are never masked."""
    free = len(text) - prompt
    return masked_sum(
        lambda mask: ce(model, hide(text, [False] * prompt + mask), text)[prompt:], free, levels, 1 / levels
    )


def check(made: Example, model: Model, exact: float, sequences: int = DRAWS) -> None:
    """The mean over many draws of one text in a batch is `exact`, within 4 standard errors, which are below 3%."""
    with torch.no_grad():
        losses = made.loss(model, "none").double().sum(1).view(-1, sequences).sum(0) * sequences
    error = float(losses.std()) / sequences**0.5
    assert error < 0.03 * exact, (error, exact)
    assert abs(float(losses.mean()) - exact) < 4 * error + 1e-6, (float(losses.mean()), exact, error)


def repeated(length: int) -> Tensor:
    return TEXT[:length].expand(DRAWS, length).clone()


def above(eps: float, levels: Tensor = LEVELS) -> Tensor:
    return eps + (1 - eps) * levels


def blocks_bound(model, text, block, levels, weight, causal=None, prompt=0) -> float:
    """E of the weighted sum over masked tokens of all blocks."""
    total = 0.0
    for start in range(0, len(text), block):
        before, clean = text[:start], text[start : start + block]
        kept = max(0, min(prompt - start, len(clean)))

        def score(mask, before=before, clean=clean, kept=kept):
            noisy = hide(clean, [False] * kept + mask)
            return block_ce(model, before, noisy, clean, block, causal)[kept:]

        total += masked_sum(score, len(clean) - kept, levels, weight)
    return total


def edits_mean(model: Model, text: list[int]) -> float:
    """E of the mean CE when none or one of three tokens is inserted, deleted or substituted (most = 2/3)."""
    ids, exact = [i for i in range(VOCAB) if i != MASK], 0.0

    def mean(shown: list[int]) -> float:
        return float(ce(model, (shown + [MASK] * 3)[:3], text).mean())

    exact += mean(text) / 2
    for at in range(4):
        exact += sum(mean([*text[:at], new, *text[at:]]) for new in ids) / len(ids) / 4 / 6
    for at in range(3):
        exact += mean(text[:at] + text[at + 1 :]) / 3 / 6
        exact += sum(mean([*text[:at], new, *text[at + 1 :]]) for new in ids) / len(ids) / 3 / 6
    return exact


def canvases_mean(model: Model, text: list[int], causal: str | None) -> float:
    """E of the mean CE over all canvases of two tokens of which a uniform share is replaced by uniform ids."""
    ids, exact = [i for i in range(VOCAB) if i != MASK], 0.0
    for start in range(0, len(text), 2):
        clean = text[start : start + 2]
        for canvas in itertools.product(ids, repeat=2):
            chance = torch.ones_like(LEVELS)
            for shown, x in zip(canvas, clean):
                chance = chance * (LEVELS / len(ids) + (1 - LEVELS) * (shown == x))
            losses = block_ce(model, text[:start], list(canvas), clean, 2, causal)
            exact += float(chance.mean() * losses.sum()) / len(text)
    return exact


def anchors_mean(model: Model, text: list[int]) -> float:
    """E of the loss of blocks of three behind anchors, weights 1 and exp(-1/2), which sum to 1 in each block."""
    weight, places, exact = torch.exp(-torch.arange(2).double() / 2), len(text) - 2, 0.0
    for anchor in range(places):
        losses = block_ce(model, text[:anchor], [text[anchor], MASK, MASK], text[anchor : anchor + 3], 1, "clean")
        exact += float((losses[1:] * weight).sum() / weight.sum()) / places
    return exact


def next_token_mean(model: Model, text: list[int]) -> float:
    """The mean CE of the next token on causal rows."""
    with torch.no_grad():
        logits = model(torch.tensor([text]), KeyRanges.causal(len(text)), shift=False)[0] @ model.head_weight.T
    return -float(logits.double().log_softmax(-1)[range(len(text) - 1), text[1:]].mean())


def tensors(made: Example) -> list[Tensor]:
    values = (getattr(made, field.name) for field in dataclasses.fields(made))
    return [v.bounds if isinstance(v, KeyRanges) else v for v in values if v is not None]
