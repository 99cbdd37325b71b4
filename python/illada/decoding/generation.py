"""Generation: what `generate` and `fill` return, and where a text stops."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """Holds what `generate` and `fill` return, a list entry per sequence.

    Parameters
    ----------
    tokens : list of list of int
        What was generated, up to the stop token; for `fill` the whole sequences.
    stopped : list of bool
        Whether a stop token was generated, or `stop_when` held.
    passes : list of int
        Forward passes in which the sequence had masks.
    filled : list of int
        Masks that were filled.
    forward_passes : int
        Forward passes of the whole batch.

    Examples
    --------
    >>> from illada import GenerationConfig, Model, ModelConfig, generate
    >>> model = Model(ModelConfig.preset("demo", n_layers=1)).eval()
    >>> done = generate(model, [[72, 105]], GenerationConfig(max_new_tokens=4, stop_ids=()))
    >>> len(done.tokens[0]), done.stopped, done.filled, done.tokens_per_pass
    (4, [False], [4], 1.0)
    """

    tokens: list[list[int]]
    stopped: list[bool]
    passes: list[int]
    filled: list[int]
    forward_passes: int

    @property
    def tokens_per_pass(self) -> float:
        """Returns the tokens filled per forward pass of a sequence, over all sequences."""
        return sum(self.filled) / max(sum(self.passes), 1)


def first_stop(text: list[int], stop_ids: Collection[int]) -> int | None:
    """Returns the place of the first stop token, None without one."""
    return next((i for i, token in enumerate(text) if token in stop_ids), None)


def until_stop(
    texts: list[list[int]], stop_ids: Collection[int], ended: Sequence[bool]
) -> tuple[list[list[int]], list[bool]]:
    """Returns what each text has before its first stop token, and whether it has one or has `ended` without."""
    ends = [first_stop(text, stop_ids) for text in texts]
    return [text[:end] for text, end in zip(texts, ends)], [e is not None or held for e, held in zip(ends, ended)]


def ask(
    stop_when: Callable[[list[int]], bool], running: list[bool], tokens: Tensor, begin: list[int], end: Tensor
) -> list[bool]:
    """Returns which of the sequences that are running end by `stop_when`, which takes tokens[b, begin[b] : end[b]]. The
    host waits for the device."""
    rows = zip(running, tokens.tolist(), begin, end.tolist())
    return [on and bool(stop_when(row[a:b])) for on, row, a, b in rows]
