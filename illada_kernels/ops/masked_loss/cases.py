"""Named shapes of masked_loss, what each costs, plain PyTorch beside it, the numerics bar: for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

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
        """hidden, head_weight, targets, masked and weight in 1 .. 1000, logits of unit variance."""
        g = torch.Generator(device).manual_seed(seed)
        hidden = torch.randn(self.rows, self.dim, generator=g, device=device).to(dtype)
        head_weight = (torch.randn(self.vocab, self.dim, generator=g, device=device) * self.dim**-0.5).to(dtype)
        targets = torch.randint(self.vocab, (self.rows,), generator=g, device=device)
        masked = torch.rand(self.rows, generator=g, device=device).argsort() < self.masked
        weight = 1 / torch.rand(self.rows, generator=g, device=device).clamp_min(1e-3)
        return hidden, head_weight, targets, masked, weight


def flops(case: Case) -> float:
    """Three products over the masked rows: logits, and the gradients of hidden and head_weight."""
    return 6.0 * case.masked * case.dim * case.vocab


def bytes(case: Case, dtype: torch.dtype) -> float:
    """Head and hidden read, their gradients written, once each."""
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


# ---- plain PyTorch, and the bar --------------------------------------------------------------------------------------


def plain(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, masked: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What a user would write: the logits of the masked rows in the inputs' dtype, F.cross_entropy in float32."""
    logits = F.linear(hidden[masked], head_weight, bias)
    losses = F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), targets[masked], reduction="none"
    )
    return (losses * weight[masked]).sum()


def bar(peer: Tensor, exact: Tensor) -> float:
    """How far from `exact` (one precision up) an element may be: twice what PyTorch in the same dtype is off, and the
    rounding of the result."""
    error = (peer.double() - exact.double()).abs().max() if exact.numel() else torch.zeros(())
    size = exact.double().abs().max() if exact.numel() else torch.zeros(())
    return float(2 * error + torch.finfo(peer.dtype).eps / 2 * size)
