"""Objectives by name: what `illada train --objective`, TrainConfig, the saved state, the guide and the tests read.

Importing this file imports neither torch nor the objectives, so that `illada train --help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .objectives import Example
    from .trajectories import States


@dataclass(frozen=True)
class Batch:
    """Clean tokens of a step, and what an objective has to know beside its options."""

    tokens: Tensor  # (B, S) int64
    learn: Tensor | None  # (B, S) bool, tokens that may be masked; None: all
    mask_id: int
    vocab_size: int
    generator: torch.Generator
    done: float  # share of the run that is over
    states: States | None = None  # of recorded trajectories


@dataclass(frozen=True)
class Option:
    """Says what an option of one or several objectives may be: its flag is --name."""

    help: str
    kind: type = float
    low: float = 0.0
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    pair: bool = False  # two numbers
    optional: bool = False  # None: what the model says

    def check(self, name: str, value: Any) -> Any:
        """Returns the value; raises ValueError for one that the option cannot have."""
        if self.optional and value is None:
            return value
        if self.pair:
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise ValueError(f"{name}: expected two numbers, got {value!r}")
            low, high = (self._number(name, part) for part in value)
            if not low <= high > 0:
                raise ValueError(f"{name}: expected the least before the largest, which is above 0, got {list(value)}")
            return [low, high]
        if self.choices or self.kind is bool:
            choices = self.choices or (True, False)
            if not isinstance(value, self.kind) or value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
            return value
        return self._number(name, value)

    @property
    def _range(self) -> str:
        return f"{self.low:g} to {self.high:g}" if self.high < float("inf") else f"{self.low:g} on"

    def _number(self, name: str, value: Any) -> Any:
        kinds: Any = int if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not self.low <= value <= self.high:
            what = "an integer" if self.kind is int else "a number"
            raise ValueError(f"{name}: expected {what} from {self._range}, got {value!r}")
        return self.kind(value)


OPTIONS = {
    "forbid_mask": Option("take the mask's logit out of the loss (default: as the family does)", bool, optional=True),
    "weighting": Option("what a masked token weighs", str, choices=("llada", "mdlm", "cart")),
    "complementary": Option("each batch with its inverse masks too", bool),
    "eps": Option("smallest probability of a mask", low=1e-6, high=1.0),
    "short_fraction": Option("batches that are cut short, LLaDA 0.01", high=1.0),
    "split_fraction": Option("windows that are cut into two", high=1.0),
    "hole_fraction": Option("windows that learn to fill a hole (without --pairs 0.2 from the command line)", high=1.0),
    "per": Option("what the loss is a mean of", str, choices=("tokens", "documents")),
    "block": Option("tokens of a block (default: the checkpoint's, else 4)", int, low=1, optional=True),
    "noise": Option(
        "what has a noise level: a block's masks counted, its probability, a document's; all: masks alone",
        str,
        choices=("count", "block", "document", "all"),
    ),
    "levels": Option("least and largest noise level", high=1.0, pair=True),
    "causal": Option("rows that see no later token of their block", str, choices=("clean", "both")),
    "diffusion": Option("factor of the masked tokens' loss, I-DLM 1"),
    "autoregressive": Option("factor of the next tokens' loss, I-DLM 0.2"),
    "anchors": Option("draft blocks of a window", int, low=1),
    "gamma": Option("the k-th token of a draft weighs exp(-(k - 1) / gamma)", low=1e-6),
    "edited": Option("largest share of tokens that are edited", high=1.0),
    "edits_from": Option("share of the run from which on tokens are edited", high=1.0),
    "rate": Option("visible tokens that are replaced", high=1.0),
    "replaced": Option("factor of the replaced tokens' loss"),
    "scored": Option("every mask of a state, or those that its pass committed", str, choices=("all", "next")),
    "passes": Option("part of each trajectory whose states are shown", high=1.0, pair=True),
}


@dataclass(frozen=True)
class Objective:
    """An entry of `OBJECTIVES`.

    Parameters
    ----------
    make : callable
        Takes a `Batch` and every option by name; returns the `Example`.
    what : str
        A few words, for `--help`.
    loss, mask, source : str
        Cells of the guide's table: the formula, what sees what, and where both come from.
    options : mapping
        Options with their defaults; each is one of `OPTIONS`.
    sees : str
        What the trained model's tokens see: "all", "blocks" or "past" (causal_block 0, block or 1).
    answers : str
        Whether data may be prompts with answers, of which answers alone are learned: "no", "may" or "must". "recorded":
        they must be trajectories, as `illada record` writes them.
    sampler : str, optional
        Of `illada generate`, where its default does not fit.
    """

    make: Callable[..., Example]
    what: str
    loss: str
    mask: str
    source: str
    options: Mapping[str, Any]
    sees: str = "all"
    answers: str = "may"
    sampler: str | None = None

    def causal_block(self, block: int | None) -> int:
        """Returns the model's causal_block when blocks have `block` tokens."""
        return {"all": 0, "blocks": block or 4, "past": 1}[self.sees]


def checked(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of an objective, defaults filled in; raises ValueError for what is none of it."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")
    known = OBJECTIVES[name].options
    for option in options:
        if option not in known:
            homes = [other for other, entry in OBJECTIVES.items() if option in entry.options]
            if not homes:
                raise ValueError(f"options: expected some of {', '.join(known)} for {name}, got {option!r}")
            flag = option.replace("_", "-")
            raise ValueError(f"{option}: it is for --objective {' or '.join(homes)} only; leave out --{flag}")
    return {option: OPTIONS[option].check(option, value) for option, value in {**known, **options}.items()}


# ---- how each is made from a batch -----------------------------------------------------------------------------------


def _full(b: Batch, **options: Any) -> Example:
    from .objectives import full_sequence

    return full_sequence(b.tokens, b.mask_id, b.generator, **options)


def _packed(b: Batch, split_fraction: float, **options: Any) -> Example:
    from .objectives import packed, split_windows

    batch, length = b.tokens.shape
    documents = split_windows(batch, length, split_fraction, b.generator)
    return packed(b.tokens, b.mask_id, b.generator, documents=documents, learn=b.learn, **options)


def _sft(b: Batch, **options: Any) -> Example:
    from .objectives import packed

    return packed(b.tokens, b.mask_id, b.generator, learn=b.learn, per="documents", **options)


def _block(b: Batch, hole_fraction: float, levels: tuple[float, float], **options: Any) -> Example:
    from .objectives import block_diffusion, hole_order

    batch, length = b.tokens.shape
    order = hole_order(batch, length, hole_fraction, b.generator) if hole_fraction > 0 else None
    return block_diffusion(b.tokens, b.mask_id, b.generator, order=order, learn=b.learn, clip=levels, **options)


def _joint(b: Batch, levels: tuple[float, float], **options: Any) -> Example:
    from .objectives import joint

    return joint(b.tokens, b.mask_id, b.generator, learn=b.learn, clip=levels, **options)


def _anchor_blocks(b: Batch, anchors: int, **options: Any) -> Example:
    from .objectives import anchor_blocks

    return anchor_blocks(b.tokens, b.mask_id, b.generator, count=anchors, learn=b.learn, **options)


def _seed_diffusion(b: Batch, edited: float, **options: Any) -> Example:
    from .objectives import seed_diffusion

    return seed_diffusion(b.tokens, b.mask_id, b.vocab_size, b.generator, done=b.done, most=edited, **options)


def _token_to_token(b: Batch, rate: float, replaced: float, levels: tuple[float, float], **options: Any) -> Example:
    from .objectives import block_diffusion, token_to_token

    made = block_diffusion(b.tokens, b.mask_id, b.generator, clip=levels, learn=b.learn, **options)
    return token_to_token(made, b.mask_id, b.vocab_size, b.generator, rate=rate, weight=replaced, learn=b.learn)


def _uniform_canvas(b: Batch, **options: Any) -> Example:
    from .objectives import uniform_canvas

    return uniform_canvas(b.tokens, b.mask_id, b.vocab_size, b.generator, learn=b.learn, **options)


def _trajectory(b: Batch, **options: Any) -> Example:
    from .objectives import trajectory

    assert b.states is not None
    return trajectory(b.tokens, mask_id=b.mask_id, generator=b.generator, **b.states.tensors(), **options)


def _block_trajectory(b: Batch, **options: Any) -> Example:
    from .objectives import block_trajectory

    assert b.states is not None
    return block_trajectory(b.tokens, b.states.tensors()["order"], b.mask_id, b.generator, **options)


_LEVELS = (1e-3, 1.0)

OBJECTIVES = {
    "full": Objective(
        _full,
        "LLaDA, MDLM, Dream: masks anywhere",
        "mean over B S tokens of CE / t at masks; with cart, of w CE",
        "each sees all",
        "LLaDA (arXiv 2502.09992, eq. 3), MDLM (2406.07524), Dream (2508.15487, section 3)",
        {"weighting": "llada", "complementary": False, "short_fraction": 0.0, "eps": 1e-3, "forbid_mask": None},
        answers="no",
    ),
    "packed": Objective(
        _packed,
        "iLLaDA: windows split at random",
        "sum of CE / t at masks, over the batch's tokens to learn",
        "each sees its piece",
        "iLLaDA (arXiv 2606.25331, eq. 1)",
        {"split_fraction": 0.3, "per": "tokens", "eps": 1e-3, "forbid_mask": None},
    ),
    "sft": Objective(
        _sft,
        "LLaDA's fine-tuning: prompts kept",
        "mean over answers of CE / t at masks, over the answer's length",
        "each sees all",
        "LLaDA (arXiv 2502.09992, section 2.3)",
        {"eps": 1e-3, "forbid_mask": None},
        answers="must",
    ),
    "block": Objective(
        _block,
        "BD3-LM, SDAR, LLaDA2.0: [noisy ; clean] in blocks",
        "mean of CE / t at masks, t a block's or a document's",
        "noisy: its block and clean blocks before; clean: blocks up to its own",
        "BD3-LM (arXiv 2503.09573), SDAR, LLaDA2.0",
        {
            "block": None,
            "noise": "count",
            "levels": _LEVELS,
            "complementary": False,
            "per": "tokens",
            "hole_fraction": 0.0,
            "forbid_mask": None,
        },
        sees="blocks",
    ),
    "joint": Objective(
        _joint,
        "Nemotron-Labs-Diffusion, I-DLM: masked and next tokens in one pass",
        "0.3 mean of CE / t at masks + mean of CE of the next token on clean rows",
        "noisy: its block (I-DLM: up to itself) and all clean before; clean: causal",
        "Nemotron-Labs-Diffusion (arXiv 2607.05722), I-DLM (2604.11035)",
        {
            "block": None,
            "causal": "clean",
            "diffusion": 0.3,
            "autoregressive": 1.0,
            "noise": "block",
            "levels": _LEVELS,
            "forbid_mask": None,
        },
        sees="past",
        sampler="self-speculation",
    ),
    "anchor_blocks": Objective(
        _anchor_blocks,
        "DFlash: a drafter of blocks behind anchors",
        "mean of exp(-(k - 1) / gamma) CE of the k-th token behind an anchor",
        "draft: its block and the context before its anchor; context: causal",
        "DFlash (arXiv 2602.06036)",
        {"block": None, "anchors": 8, "gamma": 7.0, "forbid_mask": None},
        sees="past",
        sampler="draft",
    ),
    "seed_diffusion": Objective(
        _seed_diffusion,
        "Seed Diffusion: masks, in the end edits too",
        "mean of CE / t at masks; from 0.8 of the run on, + mean of CE of edited texts",
        "each sees all",
        "Seed Diffusion (arXiv 2508.02193)",
        {"edited": 0.1, "edits_from": 0.8, "eps": 1e-3, "forbid_mask": None},
        answers="no",
    ),
    "token_to_token": Objective(
        _token_to_token,
        "LLaDA2.1: blocks with masks and replaced tokens",
        "mean of CE / t at masks + sum of CE at replaced tokens, over tokens to learn",
        "as block",
        "LLaDA2.1's report",
        {"block": None, "noise": "block", "levels": _LEVELS, "rate": 0.1, "replaced": 1.0, "forbid_mask": None},
        sees="blocks",
        sampler="llada2.1",
    ),
    "uniform_canvas": Objective(
        _uniform_canvas,
        "DiffusionGemma: random tokens for masks",
        "mean of CE at all tokens of canvases whose share t is random",
        "canvas: itself and all clean before; clean: causal",
        "transformers' models/diffusion_gemma",
        {"block": None, "per": "tokens", "forbid_mask": None},
        sees="past",
        sampler="canvas",
    ),
    "trajectory": Objective(
        _trajectory,
        "Seed Diffusion's constrained order, distillation towards fewer passes: states of a sampler",
        "mean of T / m CE at the m masks of a state, T tokens in all; next: of n CE at what its pass, of n, commits",
        "each sees all that was there",
        "Seed Diffusion (arXiv 2508.02193), d3LLM's blog",
        {"scored": "all", "passes": (0.0, 1.0), "forbid_mask": None},
        answers="recorded",
    ),
    "block_trajectory": Objective(
        _block_trajectory,
        "trajectory, for models with blocks",
        "as trajectory, T, m and n a block's",
        "as block",
        "as trajectory",
        {"block": None, "scored": "all", "passes": (0.0, 1.0), "forbid_mask": None},
        sees="blocks",
        answers="recorded",
    ),
}


def table() -> str:
    """Returns the guide's table of objectives, in Markdown."""
    lines = ["| `--objective` | loss | what sees what | source | options |", "|---|---|---|---|---|"]
    for name, entry in OBJECTIVES.items():
        options = ", ".join(f"`--{option.replace('_', '-')}`" for option in entry.options if option != "forbid_mask")
        lines.append(f"| `{name}` | {entry.loss} | {entry.mask} | {entry.source} | {options} |")
    return "\n".join(lines) + "\n"
