"""Generation: what `generate` and `fill` return."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """What `generate` and `fill` return, a list entry per sequence.

    Parameters
    ----------
    tokens : list of list of int
        What was generated, up to the stop token; for `fill` the whole sequences.
    stopped : list of bool
        Whether a stop token was generated.
    passes : list of int
        Forward passes in which the sequence had masks.
    filled : list of int
        Masks that were filled.
    forward_passes : int
        Forward passes of the whole batch.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    passes: list[int]
    filled: list[int]
    forward_passes: int

    @property
    def tokens_per_pass(self) -> float:
        """Tokens filled per forward pass of a sequence, over all sequences."""
        return sum(self.filled) / max(sum(self.passes), 1)
