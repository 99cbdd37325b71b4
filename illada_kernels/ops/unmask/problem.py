"""The validated call of unmask: what the operator's schema is made of, and what every backend takes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import rules

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # proposal, confidence, committed, remaining

FLOAT32_MAX = torch.finfo(torch.float32).max
# T * g stays finite for every Gumbel value: they are below 45.
HIGHEST_TEMPERATURE = 2.0**120
# Beyond this its reciprocal is not a normal float32, and times -inf it would be NaN.
HIGHEST_CONFIDENCE_TEMPERATURE = 2.0**126
# z = (l - max l) / Tc below which exp(z) is not a normal float32 and an id does not count in the entropy.
LEAST_SHIFTED = -87.3
# Bits of `needs`, as in api.h: the sums and maxima of a row that a call asks for.
# NO_DRAW: the CPU draws later; TOP_ID: on GPUs, the id of the largest logit.
NEEDS_ENTROPY, NEEDS_SECOND, NEEDS_HELD, NEEDS_NO_DRAW, NEEDS_TOP_ID = 1, 2, 4, 8, 16
# Bits of `truncate`: the options that were given.
BY_TOP_K, BY_TOP_P, BY_MIN_P = 1, 2, 4


class Problem(NamedTuple):
    """A parameter is its tensor, of shape () or (B,), or where that is None its number."""

    source: Tensor  # (B, K, D) hidden rows, or (B, K, V) logits where head_weight is None
    head_weight: Tensor | None  # (V, D), or with a group this rank's rows of it
    head_bias: Tensor | None  # (V,)
    tokens: Tensor  # (B, L) int64, written in place
    positions: Tensor  # (B, K) int64
    mask_id: int
    confidence: int  # a kind of rules.py, as rule, revise and order
    rule: int
    revise: int
    order: int
    number: float  # of the rule
    number_tensor: Tensor | None
    least: int  # ranks that the rule always commits
    least_tensor: Tensor | None
    tau: float  # of Edit
    tau_tensor: Tensor | None
    remasked: int  # n of Remask
    remasked_tensor: Tensor | None
    rank_temperature: float
    rank_temperature_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    confidence_temperature: float
    confidence_temperature_tensor: Tensor | None
    seed: int
    seed_tensor: Tensor | None
    step: int
    step_tensor: Tensor | None
    truncate: int  # bits BY_TOP_K, BY_TOP_P, BY_MIN_P
    top_k: int
    top_k_tensor: Tensor | None
    top_p: float
    top_p_tensor: Tensor | None
    min_p: float
    min_p_tensor: Tensor | None
    forbid: Sequence[int]
    defer: Sequence[int]
    bias_ids: Tensor | None
    bias_values: Tensor | None
    scores: Tensor | None  # (B, K) float32, of Remask
    frozen: Tensor | None  # (B, L) bool
    noise_positions: Tensor | None  # (B, K) int64
    group: str = ""  # the process group whose ranks share the vocab (illada_kernels.distributed); "": not shared
    vocab_start: int = 0  # the id of the first row of head_weight and head_bias, which are this rank's
    vocab_size: int = 0  # ids of all ranks
    backend: str = ""

    @property
    def op(self) -> str:
        """Returns the public function's name: the selftest lets each in by itself."""
        return "unmask_from_logits" if self.head_weight is None else "unmask"

    @property
    def vocab(self) -> int:
        """Returns the number of ids; with a group that of all ranks."""
        if self.group:
            return self.vocab_size
        return self.source.shape[2] if self.head_weight is None else self.head_weight.shape[0]

    @property
    def by_entropy(self) -> bool:
        """Returns whether the rule ranks by rising entropy."""
        return self.rule in (rules.ENTROPY_BOUND, rules.ENTROPY_BOUND_INCLUSIVE, rules.RENOISE)

    @property
    def is_reranked(self) -> bool:
        """Returns whether ranks may differ from those by confidence, or entropy, and position."""
        perturbed = self.rank_temperature_tensor is not None or self.rank_temperature > 0
        return perturbed or self.order != rules.BY_CONFIDENCE or len(self.defer) > 0

    @property
    def noisy(self) -> bool:
        return self.temperature_tensor is not None or self.temperature > 0

    @property
    def truncation(self) -> int:
        """Returns the bits of `truncate` that can change a proposal: none where no noise is drawn."""
        return self.truncate if self.noisy else 0

    @property
    def needs_whole_rows(self) -> bool:
        """Returns whether no single pass over a row's logits can draw: the mass of top_p counts from the largest one
        down. top_k and min_p need only the largest logits and the best scores among them."""
        return bool(self.truncation & BY_TOP_P)

    def needs(self) -> int:
        entropy = NEEDS_ENTROPY if self.by_entropy or self.confidence == rules.NEG_ENTROPY else 0
        second = NEEDS_SECOND if self.confidence == rules.MARGIN else 0
        held = NEEDS_HELD if self.revise == rules.REMASK else 0
        return entropy | second | held | (NEEDS_TOP_ID if self.rule == rules.RENOISE else 0)

    def is_empty(self) -> bool:
        """Returns whether there is no candidate or no token."""
        return self.positions.numel() == 0 or self.tokens.numel() == 0

    def nothing(self) -> Outputs:
        """Returns the outputs of a call in which no candidate takes part."""
        shape, device = self.positions.shape, self.positions.device
        return (
            torch.full(shape, -1, dtype=torch.int64, device=device),
            torch.full(shape, -torch.inf, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape[:1], dtype=torch.int32, device=device),
        )

    def new_outputs(self) -> Outputs:
        """Returns outputs that are not filled."""
        new, shape = self.positions.new_empty, self.positions.shape
        return (
            new(shape),
            new(shape, dtype=torch.float32),
            new(shape, dtype=torch.bool),
            new(shape[:1], dtype=torch.int32),
        )
