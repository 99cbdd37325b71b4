"""`bound`: an upper bound on a model's bits per byte of a text, by the objective it was trained with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from illada_kernels import KeyRanges

from ..decoding.settings import expect_mask, token_list
from ..errors import DataError
from ..model import Model
from ..tokenizer import Tokenizer, stream
from .data import Document
from .objectives import Example, mask_count, previous_rows, stratified


@dataclass(frozen=True)
class Bound:
    """An estimate of an upper bound of -log2 p(text) / bytes."""

    bits_per_byte: float
    standard_error: float  # of the mean over windows, noise of the masks included
    what: str  # which bound it is
    tokens: int
    bytes: int


def first_bytes(documents: Sequence[Document], limit: int | None) -> list[Document]:
    """Returns the first `limit` bytes of the documents; the one that crosses the limit is cut at a character."""
    if limit is None:
        return list(documents)
    if limit < 0:
        raise ValueError(f"max_bytes: expected at least 0, got {limit}")
    kept: list[Document] = []
    for document in documents:
        if len(document.content) > limit:
            return [*kept, Document(document.name, document.content[:limit].decode("utf-8", "ignore").encode())]
        kept.append(document)
        limit -= len(document.content)
    return kept


@torch.no_grad()
def bound(
    model: Model,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    draws: int = 1,
    max_bytes: int | None = None,
    rows_per_pass: int = 4096,
    seed: int = 0,
    next_token: bool = False,
    bos: Sequence[int] | None = None,
) -> Bound:
    """Estimates an upper bound on the bits per byte of documents, each with an end-of-text token that counts too.

    Parameters
    ----------
    model : Model
    documents : sequence of Document
    tokenizer : Tokenizer
    length : int
        Tokens in a window. The last window is completed by tokens that do not count.
    draws : int
        Masks per window that are averaged; their numbers of masked tokens are stratified over windows.
    max_bytes : int, optional
        Measure only the first bytes.
    rows_per_pass : int
        Hidden rows of one forward pass, which bounds the memory.
    seed : int
    next_token : bool
        Score each token on the clean row before it, under a causal mask, as self-speculation reads them: for models of
        the joint objectives, whose masks are not what decides. No mask is drawn, and the bound is exact.
    bos : sequence of int, optional
        Ids before each document, which are given: never masked, never counted. None: the tokenizer's own.

    Returns
    -------
    Bound

    Raises
    ------
    DataError
        If there is no text, or the tokenizer does not give it back, because tokens of a text that has lost something
        bound nothing.
    ValueError
        For a length or a number of draws that is too small, and next_token of a model that sees everything.
    PromptError
        For a model that needs a mask token and has none, and for a bos that is not ids of its vocab.
    ArithmeticError
        For a loss that is not finite.

    Notes
    -----
    A model that sees everything: n of a window's tokens are masked, n uniform on 1 .. length, each masked token's
    cross-entropy times length / n (LLaDA, arXiv 2502.09992, equation 6). A block-causal model: n of the b tokens of
    each block, given all clean tokens before it in the window, whose first half is only context (BD3-LM, arXiv
    2503.09573, equation 7). Either is at least -log2 p(documents) / bytes in expectation over the masks, p being the
    distribution that decoding draws from, which never proposes the mask.
    """
    block = model.config.causal_block
    if next_token and not (block or model.config.next_token):
        raise ValueError("next_token: expected a model with a causal mode, this one sees everything; leave it out")
    if model.config.autoregressive and model.config.mask_id < 0:
        next_token = True  # which is the same there, and needs no mask
    if not next_token:
        expect_mask(model.config, "a bound")
    block = 1 if next_token else block
    scored = length // 2 // block * block if block else length
    if scored < 1:
        shortest = f"two blocks of {block}" if block else "1"
        raise ValueError(f"length: expected at least {shortest}, got {length}")
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    documents = first_bytes(documents, max_bytes)
    size = sum(len(d.content) for d in documents)
    if not size:
        raise DataError("there is no text to evaluate on")
    _check_lossless(documents, tokenizer)
    before = token_list(tokenizer.bos if bos is None else bos, model.config, "bos")
    pieces = [stream([document], tokenizer, before) for document in documents]
    ids, given = np.concatenate(pieces), np.concatenate([np.arange(len(piece)) < len(before) for piece in pieces])
    windows = _windows(ids, given, length, scored, tokenizer.eos_id)
    nats = np.zeros(len(windows[0]))
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    for _ in range(draws):
        made = (
            _next_tokens(*windows[:2], scored, rows_per_pass)
            if next_token
            else _examples(*windows, model, scored, rows_per_pass, generator)
        )
        for rows, example in made:
            losses = example.to(model.device).loss(model, reduction="none", forbid_mask=True)
            nats[rows] += losses.double().sum(1).cpu().numpy() / draws
    model.train(was_training)
    if not np.isfinite(nats).all():
        raise ArithmeticError("the model's loss on this text is not finite; check its weights for NaN and inf")
    bits = nats / math.log(2)
    error = bits.std(ddof=1) * math.sqrt(len(bits)) / size if len(bits) > 1 else float("nan")
    what = f"block diffusion, blocks of {block}" if block else f"full-sequence masked diffusion, windows of {length}"
    what = "next tokens of the causal mode" if next_token else what
    return Bound(float(bits.sum() / size), float(error), what, int((~given).sum()), size)


def _check_lossless(documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    for document in documents:
        text = document.content.decode("utf-8")
        back = tokenizer.decode(stream([document], tokenizer, ())[:-1].tolist())
        if back != text:
            at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
            raise DataError(
                f"{document.name}: the tokenizer does not give the text back, from character {at} on: "
                f"{text[at : at + 20]!r} became {back[at : at + 20]!r}; bits per byte need a tokenizer without loss"
            )


def _windows(
    ids: np.ndarray, given: np.ndarray, length: int, scored: int, eos_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (W, length) tokens whose last `scored` columns cover ids once, and two (W, scored) bool of these columns:
    which count, and which are given. Fillers are neither."""
    context = length - scored
    count = -(-len(ids) // scored)
    filler = np.resize(ids, count * scored - len(ids))
    padded = np.concatenate([np.full(context, eos_id), ids, filler])
    tokens = np.stack([padded[i * scored : i * scored + length] for i in range(count)])
    counts, shown = (np.pad(x, (0, len(filler))).reshape(count, scored) for x in (~given, given))
    return torch.from_numpy(tokens), torch.from_numpy(counts), torch.from_numpy(shown)


def _examples(
    tokens: Tensor,
    counts: Tensor,
    given: Tensor,
    model: Model,
    scored: int,
    rows_per_pass: int,
    generator: torch.Generator,
) -> Iterator[tuple[slice, Example]]:
    """Yields batches of windows: `scored` noisy rows each, in block-causal models followed by the clean window.

    Tokens that are given keep their places in the draw and lose their masks: what is left of a random order of all
    tokens is a random order of the others, so weights stay block / n.
    """
    block, length = model.config.causal_block or scored, tokens.shape[1]
    level = stratified(len(tokens) * (scored // block), generator)
    number = (level * block).long().clamp(max=block - 1) + 1  # masks in each block of each window
    masked = mask_count(number, block, generator).view(len(tokens), scored) & ~given
    weight = (block / number.float()).repeat_interleave(block).view(len(tokens), scored)
    masked_targets, clean = tokens[:, length - scored :], tokens
    noisy = masked_targets.masked_fill(masked, model.config.mask_id)
    key_ranges = positions = previous = None
    if model.config.causal_block:
        positions = torch.cat(
            [torch.arange(length - scored, length, device="cpu"), torch.arange(length, device="cpu")]
        )[None]
        key_ranges = noisy_tail(length, scored, block)
        previous = previous_rows(scored, block, clean=length)  # context, then the scored tokens
    batch = max(1, rows_per_pass // (scored + (length if key_ranges is not None else 0)))
    for start in range(0, len(tokens), batch):
        rows = slice(start, start + batch)
        shown = noisy[rows] if key_ranges is None else torch.cat([noisy[rows], clean[rows]], dim=1)
        counted = masked[rows] & counts[rows]
        yield rows, Example(shown, masked_targets[rows], counted, weight[rows], key_ranges, positions, previous)


def _next_tokens(tokens: Tensor, counts: Tensor, scored: int, rows_per_pass: int) -> Iterator[tuple[slice, Example]]:
    """Yields batches of clean windows, whose last `scored` tokens are scored on the rows before them."""
    length = tokens.shape[1]
    rows = torch.arange(length - scored - 1, length - 1, device="cpu")
    batch = max(1, rows_per_pass // length)
    for start in range(0, len(tokens), batch):
        some = slice(start, start + batch)
        shown, counted = tokens[some], counts[some]
        weight = torch.ones(counted.shape, dtype=torch.float32, device="cpu")
        ranges = KeyRanges.causal(length, device="cpu")
        yield some, Example(shown, shown[:, length - scored :], counted, weight, ranges, None, rows, rows)


def noisy_tail(length: int, scored: int, block: int) -> KeyRanges:
    """Returns the ranges of [last `scored` tokens noisy ; all `length` tokens clean].

    A noisy row sees its own noisy block and the clean blocks before it; a clean row the clean blocks up to its own.
    """
    row = torch.arange(scored, device="cpu") // block * block
    context = length - scored
    noisy = torch.stack([row, row + block, torch.full_like(row, scored), scored + context + row], dim=-1)
    clean_end = scored + KeyRanges.block_causal(length, block, device="cpu").bounds[0, :, 1]
    start = torch.full_like(clean_end, scored)
    clean = torch.stack([start, clean_end, clean_end, clean_end], dim=-1)
    return KeyRanges(torch.cat([noisy.to(torch.int32), clean])[None], scored + length)
