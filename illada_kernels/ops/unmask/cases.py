"""Named shapes of unmask, and what a case costs: read by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    count: int  # candidates per sequence, K
    vocab: int
    dim: int
    mask_id: int

    @property
    def rows(self) -> int:
        return self.batch * self.count


LLADA = Shape("llada_8x32", 8, 32, 126464, 1024, 126336)  # eight sequences, a block of 32 each
LLADA_ONE = Shape("llada_1x256", 1, 256, 126464, 1024, 126336)  # one sequence, all of its 256 new tokens
DREAM = Shape("dream_1x64", 1, 64, 152064, 1024, 151666)
# Options by name, with noise: a small and a large set kept, and all three at once.
TRUNCATIONS: dict[str, dict[str, float]] = {
    "top_k50": {"top_k": 50},
    "top_k1000": {"top_k": 1000},
    "top_p0.9": {"top_p": 0.9},
    "min_p0.05": {"min_p": 0.05},
    "top_k_top_p_min_p": {"top_k": 200, "top_p": 0.9, "min_p": 0.02},
}
# Options of what is sure and of the ranks, which draw from all ids.
RANKED: dict[str, dict[str, Any]] = {
    "sampled": {"confidence": "sampled"},
    "deferred": {"defer": (2, 11)},
    "perturbed": {"rank_temperature": 0.5},
    "left": {"order": "left"},
}
SMALL = (
    Shape("one_id", 1, 1, 1, 3, 5),
    Shape("odd", 3, 5, 37, 7, 36),
    Shape("segment_less_one", 2, 3, 2047, 8, 2046),
    Shape("segment", 1, 4, 2048, 8, 0),
    Shape("segments_and_one", 2, 2, 4097, 8, 4096),
)


def flops(shape: Shape) -> float:
    """Counts those of the product with the head; the rest is a few per logit."""
    return 2.0 * shape.rows * shape.vocab * shape.dim


def logit_bytes(shape: Shape, itemsize: int) -> float:
    """Counts each logit once, read."""
    return float(shape.rows * shape.vocab * itemsize)


def head_bytes(shape: Shape, itemsize: int) -> float:
    """Counts the head and the hidden rows once each, read."""
    return float((shape.vocab + shape.rows) * shape.dim * itemsize)
