"""Named shapes of masked_loss, what each costs, plain PyTorch beside it: read by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """`rows` hidden states, `masked` of them masked, at random places; `fits`: memory_budget as a share of the float32
    logits of all rows, None for the default."""

    name: str
    rows: int
    masked: int
    dim: int
    vocab: int
    fits: float | None = None

    @property
    def memory_budget(self) -> int | None:
        return None if self.fits is None else int(self.fits * 4 * self.rows * self.vocab)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns hidden, head_weight, targets, masked and weight in 1 .. 1000, logits of unit variance."""
        g = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(self.rows, self.dim, generator=g, device=device).to(dtype)
        head_weight = (torch.randn(self.vocab, self.dim, generator=g, device=device) * self.dim**-0.5).to(dtype)
        targets = torch.randint(self.vocab, (self.rows,), generator=g, device=device)
        masked = torch.rand(self.rows, generator=g, device=device).argsort() < self.masked
        weight = 1 / torch.rand(self.rows, generator=g, device=device).clamp_min(1e-3)
        return hidden, head_weight, targets, masked, weight


def flops(case: Case) -> float:
    """Counts three products over the masked rows: logits, and the gradients of hidden and head_weight."""
    return 6.0 * case.masked * case.dim * case.vocab


def bytes(case: Case, dtype: torch.dtype) -> float:
    """Counts head and hidden, read, and their gradients, written, once each."""
    return 2.0 * (case.vocab + case.rows) * case.dim * dtype.itemsize


CPU_CASES = (
    Case("half_of_1k_v32k_eighth", 1024, 512, 1024, 32768, 1 / 8),
    Case("half_of_1k_v32k_half", 1024, 512, 1024, 32768, 1 / 2),
    Case("half_of_1k_v32k", 1024, 512, 1024, 32768),
    Case("few_of_1k_v32k", 1024, 51, 1024, 32768),
    Case("most_of_1k_v8k", 1024, 973, 512, 8192),
)
GPU_CASES = tuple(
    Case(f"{name}_of_8k_v{vocab // 1000}k", 8192, rows, 4096, vocab)
    for vocab in (126464, 155136)
    for name, rows in (("few", 410), ("half", 4096), ("most", 7782))
)


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def plain(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Returns what a user would write: the logits of the masked rows in the inputs' dtype, F.cross_entropy in
    float32."""
    return plain_from_logits(F.linear(hidden[masked], head_weight, bias), targets, masked, weight, **options)


def plain_from_logits(
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    weight: Tensor,
    *,
    reduction: str = "sum",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    forbid: tuple[int, ...] = (),
) -> Tensor:
    """Returns the loss by torch's own functions. `logits`: (rows, V), of the masked rows alone."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    allowed = torch.ones(z.shape[1], dtype=torch.bool, device=z.device)
    if forbid:
        allowed[list(forbid)] = False
        z = z.masked_fill(~allowed, -torch.inf)
    losses = F.cross_entropy(z, targets[masked], reduction="none")
    if label_smoothing:
        mean = z.masked_fill(~allowed, 0).sum(1) / allowed.sum()
        losses = (1 - label_smoothing) * losses + label_smoothing * (z.logsumexp(1) - mean)
    if z_loss:
        losses = losses + z_loss * z.logsumexp(1) ** 2
    losses = losses * weight[masked]
    if reduction == "none":
        return losses.new_zeros(masked.shape).masked_scatter(masked, losses)
    return losses.sum() / weight[masked].sum().clamp_min(1e-30) if reduction == "mean" else losses.sum()
