"""Filling masks in the middle of a text: `fill` for models that see everything, `fill_hole` for block-causal ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from illada_kernels import KeyRanges, TopK, unmask

from ..errors import PromptError
from ..model import Model
from .config import GenerationConfig, Prompts
from .generation import Generation
from .layout import Block
from .loop import BlockLoop, Step, check_filled, left_padded
from .settings import checked, expect_mask, resolve, seeds_of, token_lists


@torch.no_grad()
def fill(
    model: Model,
    sequences: Prompts,
    config: GenerationConfig | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Generation:
    """Fills every mask_id in the sequences, seeing the text on both sides.

    Parameters
    ----------
    model : Model
        One that sees everything (`causal_block` 0).
    sequences : sequence of sequences of int, or int64 (B, n)
        Token ids with mask_id where a token is to be filled in.
    config : GenerationConfig, optional
        `block_length` masks are filled at a time, from the left; None: all at once. `max_new_tokens`, `stop_ids` and
        `variable_length` do not matter.
    callback : callable, optional
        Called with a `Step` after each forward pass.

    Returns
    -------
    Generation
        `tokens` holds the whole sequences.

    Raises
    ------
    PromptError
        As `generate`; for a cache; and for a model that does not see what comes later.
    DecodingError
        As `generate`.

    Notes
    -----
    Synchronises as `generate`, but not per block.

    Examples
    --------
    >>> import torch
    >>> from illada import Model, ModelConfig, fill
    >>> _ = torch.manual_seed(0)
    >>> config = ModelConfig.preset("demo", n_layers=1)
    >>> done = fill(Model(config).eval(), [[72, config.mask_id, 105]])
    >>> len(done.tokens[0]), done.filled
    (3, [1])
    """
    config = checked(config, model.config)
    if model.config.causal_block:
        raise PromptError("fill: expected a model that sees both sides, this one sees no later blocks; use generate")
    if config.cache not in (None, "none"):
        raise PromptError(f"cache: expected none for fill, got {config.cache!r}")
    expect_mask(model.config, "fill")
    rows = token_lists(sequences, model.config, "sequence")
    for b, row in enumerate(rows):
        if len(row) > model.config.max_seq_len:
            raise PromptError(f"sequence {b}: {len(row)} tokens exceed max_seq_len = {model.config.max_seq_len}")
    holes = [[i for i, token in enumerate(row) if token == model.config.mask_id] for row in rows]
    at_once = config.block_length or max([1, *map(len, holes)])
    blocks = -(-max(map(len, holes), default=0) // at_once)
    sampling = resolve(config, model.config, len(rows), at_once, max(blocks, 1))
    if not any(holes):
        return Generation(rows, [False] * len(rows), [0] * len(rows), [0] * len(rows), 0)
    length = max(map(len, rows))
    starts = [length - len(row) for row in rows]
    tokens = left_padded(rows, model, starts, length)
    blank = any(len(row) == len(hole) for row, hole in zip(rows, holes))
    loop = BlockLoop(model, tokens, starts, tokens != model.config.mask_id, sampling, callback)
    for index in range(blocks):
        part = [[start + i for i in h[index * at_once : (index + 1) * at_once]] for h, start in zip(holes, starts)]
        width = max(map(len, part))
        positions = torch.tensor([p + [-1] * (width - len(p)) for p in part], dtype=torch.int64, device=model.device)
        counts, first = list(map(len, part)), blank and index == 0
        loop.run_block(Block(index, positions, counts, (0, length), length, scattered=True, blank=first))
    done = [row[start:] for row, start in zip(tokens.tolist(), starts)]
    check_filled(done, model.config)
    return Generation(done, [False] * len(rows), loop.passes.tolist(), list(map(len, holes)), loop.forward_passes)


@torch.no_grad()
def fill_hole(
    model: Model,
    before: Sequence[int],
    hole_length: int,
    after: Sequence[int],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    callback: Callable[[list[int]], object] | None = None,
) -> list[int]:
    """Returns the tokens between `before` and `after`, from a block-causal model trained with holes.

    The model sees `before`, then `after`, then the hole, each token at its own position, so every token of the hole
    sees both sides. The hole is filled block by block, the most confident token of a block first, one a pass.

    Parameters
    ----------
    model : Model
        One with `causal_block` > 0 that was trained with `training.objectives.hole_order`.
    before, after : sequence of int
        Token ids on the left and right of the hole.
    hole_length : int
    temperature, seed
        As in `illada_kernels.unmask`.
    callback : callable, optional
        Called with the whole text, a list of ids, after each pass.

    Returns
    -------
    list of int
        `hole_length` ids.

    Raises
    ------
    PromptError
        If the text does not fit the model or holds mask_id, or the model sees everything anyway (then use `fill`).
    DecodingError
        If positions stay masked because hidden rows are NaN.
    """
    c, block = model.config, model.config.causal_block
    expect_mask(c, "fill_hole")
    before, after = token_lists([before, after], c, "fill_hole: text")
    if c.mask_id in [*before, *after]:
        raise PromptError(f"fill_hole: expected text without mask_id ({c.mask_id}); the hole alone is filled")
    total = len(before) + hole_length + len(after)
    if not block:
        raise PromptError("fill_hole: expected a block-causal model; use fill for one that sees both sides")
    if hole_length < 1 or total > c.max_seq_len:
        raise PromptError(
            f"fill_hole: expected a hole and at most {c.max_seq_len} tokens, got {hole_length} and {total}"
        )
    start = len(before) + len(after)  # of the hole, in the order in which tokens are seen
    tokens = torch.tensor([[*before, *after, *[c.mask_id] * hole_length]], device=model.device)
    place = [
        *range(len(before)),
        *range(len(before) + hole_length, total),
        *range(len(before), len(before) + hole_length),
    ]
    places = torch.tensor(place, device=model.device)
    seeds = torch.tensor(seeds_of(seed, 1), device=model.device)
    for first in range(start // block * block, total, block):
        end = min(first + block, total)
        candidates = torch.arange(first, end, device=model.device)[None]
        ranges = KeyRanges.block_causal(end, block, device=model.device)
        for step in range(end - max(first, start)):
            hidden = model(tokens[:, :end], ranges, places[:end])
            unmask(
                hidden[:, first:end],
                model.head_weight,
                tokens,
                candidates,
                TopK(1),
                mask_id=c.mask_id,
                temperature=temperature,
                seed=seeds,
                step=step,
            )
            if callback is not None:
                seen = tokens[0].tolist()
                callback([*seen[: len(before)], *seen[start:], *seen[len(before) : start]])
    hole = tokens[0, start:].tolist()
    check_filled([hole], c)
    return hole
