"""The row operations of masked_loss (row_kernels.py) in plain torch: what the CUDA and Triton kernels are compared
with, and what runs the orchestration of gpu.py on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from illada_kernels.ops.masked_loss.row_kernels import SCALE_OVER_POWER, SCALE_TIMES_GRAD, Formula, Rows, rows_of


def live(rows: Rows) -> Tensor:
    return rows.start + torch.arange(len(rows.index)) < rows.info[0]


def overflow(rows: Rows) -> Tensor:
    return rows.info[0] > rows.capacity


def bad(rows: Rows, vocab: int) -> Tensor:
    return (rows.targets < 0) | (rows.targets >= vocab)


def allowed_ids(formula: Formula) -> Tensor:
    allowed = torch.ones(formula.vocab, dtype=torch.bool)
    if formula.forbid is not None:
        allowed[formula.forbid] = False
    return allowed


def powers(scale: Tensor) -> Tensor:
    """min(1, 2^floor(log2(scale))); 1 where that is not a normal number."""
    power = torch.exp2(torch.frexp(scale)[1].float() - 1)
    normal = scale.isfinite() & (scale.abs() >= torch.finfo(torch.float32).tiny)
    return torch.where(normal, power.clamp(max=1), 1)


class TorchRows:
    """Computes in float32 like the kernels, in the order in which torch does."""

    def compact(
        self, masked: Tensor, targets: Tensor, weight: Tensor | None, vocab: int, mean: bool, capacity: int
    ) -> Rows:
        rows = rows_of(capacity, masked.numel(), capacity, masked.device)
        flat, t = masked.reshape(-1), targets.reshape(-1)
        index = torch.argsort(~flat, stable=True)[:capacity]
        kept = flat[index]
        w = torch.ones(masked.numel()) if weight is None else weight.reshape(-1)
        denominator = torch.where(flat, w, 0).double().sum() if mean else torch.ones((), dtype=torch.float64)
        rows.index.copy_(torch.where(kept, index, 0))
        rows.targets.copy_(torch.where(kept, t[index], 0))
        rows.scale.copy_(torch.where(kept, (w[index].double() / denominator).float(), 0))
        rows.slot.copy_(torch.where(flat, flat.cumsum(0) - 1, -1))
        wrong = flat & ((t < 0) | (t >= vocab))
        first = torch.where(wrong, torch.arange(len(wrong)), len(wrong)).amin() if len(wrong) else 0
        rows.info[0] = flat.sum()
        rows.info[1] = torch.where(wrong.any(), first, -1)
        rows.scale.copy_(torch.where(overflow(rows), torch.nan, rows.scale))
        return rows

    def gather(self, x: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        if len(rows.index) == 0:
            return
        picked = x.reshape(len(rows.slot), x.shape[-1])[rows.index.long()].float()
        picked = picked if factors is None else picked * factors[:, None]
        out.copy_(torch.where(live(rows)[:, None], picked, 0))

    def scatter(self, dx: Tensor, rows: Rows, out: Tensor, factors: Tensor | None = None) -> None:
        here = (rows.slot >= 0) & (rows.slot < len(dx))
        out.zero_()
        if len(dx):
            scaled = dx if factors is None else dx * factors[:, None]
            out.copy_(torch.where(here[:, None], scaled[rows.slot.clamp(0, len(dx) - 1).long()], 0))
        out.copy_(torch.where(overflow(rows), torch.nan, out.float()))

    def factors(self, rows: Rows, what: int, grad_loss: Tensor | None, out: Tensor) -> None:
        power = powers(rows.scale)
        f = {SCALE_TIMES_GRAD: rows.scale, SCALE_OVER_POWER: rows.scale / power}.get(what, power)
        if grad_loss is not None and len(rows.index):
            f = f * (grad_loss if grad_loss.dim() == 0 else grad_loss.reshape(-1)[rows.index.long()])
        out.copy_(torch.where(live(rows), f, 0))

    def z(self, logits: Tensor, first: int, formula: Formula) -> tuple[Tensor, Tensor]:
        """(capped, its slope), float32."""
        x = logits.float()
        if formula.bias is not None:
            x = x + formula.bias[first : first + x.shape[1]]
        if formula.softcap == 0:
            return x, torch.ones_like(x)
        t = torch.tanh(x / formula.softcap)
        return formula.softcap * t, (1 - t) * (1 + t)

    def compacted(self, logits: Tensor, rows: Rows, by_slot: bool) -> Tensor:
        if not by_slot:
            return logits
        flat = logits.reshape(len(rows.slot), logits.shape[-1])
        return flat[rows.index.long()] if len(flat) else flat

    def stats(
        self, logits: Tensor, first: int, rows: Rows, state: Tensor, formula: Formula, by_slot: bool = False
    ) -> None:
        z, _ = self.z(self.compacted(logits, rows, by_slot), first, formula)
        width = z.shape[1]
        allowed = allowed_ids(formula)[first : first + width]
        counted = allowed if formula.label_smoothing else torch.zeros_like(allowed)
        total = torch.where(counted, z, 0).double().sum(1).float()
        z = torch.where(allowed, z, -torch.inf)
        before = state if first else torch.tensor([-torch.inf, 0, -torch.inf, 0]).expand(len(z), 4)
        high = torch.maximum(before[:, 0], z.amax(1))
        shift = torch.where(high == -torch.inf, 0, high)
        sums = before[:, 1] * torch.exp(before[:, 0] - shift) + torch.exp(z - shift[:, None]).sum(1)
        here = (rows.targets >= first) & (rows.targets < first + width)
        at = z.gather(1, (rows.targets - first).clamp(0, width - 1)[:, None])[:, 0]
        new = torch.stack((high, sums, torch.where(here, at, before[:, 2]), before[:, 3] + total), 1)
        state.copy_(torch.where(live(rows)[:, None], new, state))

    def dlogits(
        self,
        logits: Tensor,
        out: Tensor,
        first: int,
        rows: Rows,
        state: Tensor,
        scale: Tensor,
        formula: Formula,
        by_slot: bool = False,
    ) -> None:
        z, slope = self.z(self.compacted(logits, rows, by_slot), first, formula)
        n, width = z.shape
        allowed = allowed_ids(formula)
        high, total = state[:n, 0], state[:n, 1]
        factor = scale * (1 + 2 * formula.z_loss * (high + total.log())) / total
        target = rows.targets[:, None] == torch.arange(first, first + width)
        d = factor[:, None] * torch.exp(z - high[:, None])
        d = d - scale[:, None] * (formula.label_smoothing / int(allowed.sum()) + target * (1 - formula.label_smoothing))
        d = torch.where(allowed[first : first + width], d * slope, 0)
        d = torch.where((scale.isnan() | bad(rows, formula.vocab))[:, None], torch.nan, d)
        d = torch.where(live(rows)[:, None], d, 0)
        if by_slot:
            everywhere = torch.zeros(out.shape)
            here = rows.index.long()[live(rows)]
            everywhere[here] = d[: len(here)]
            d = torch.where(overflow(rows), torch.nan, everywhere)
        out.copy_(d)

    def gradients(self, logits: Tensor, rows: Rows, state: Tensor, scale: Tensor, formula: Formula) -> None:
        self.stats(logits, 0, rows, state, formula)
        self.dlogits(logits, logits, 0, rows, state, scale, formula)

    def losses(self, state: Tensor, rows: Rows, formula: Formula, out: Tensor) -> None:
        high, total, at_target, sum_z = state[: len(rows.index)].unbind(1)
        smoothing, allowed = formula.label_smoothing, int(allowed_ids(formula).sum())
        loss = total.log() + (1 - smoothing) * (high - at_target)
        if smoothing:
            loss = loss + smoothing * (high - sum_z / allowed)
        if formula.z_loss:
            loss = loss + formula.z_loss * (high + total.log()) ** 2
        loss = torch.where(bad(rows, formula.vocab), torch.nan, loss) * rows.scale
        loss = torch.where(live(rows), loss, 0)
        if out.dim() == 0:
            out.copy_(loss.double().sum())
        else:
            out.zero_()
            here = rows.index.long()[live(rows)]
            out[here] = loss[: len(here)]
        out.copy_(torch.where(overflow(rows), torch.nan, out))


def product_on_cpu(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """_matmul.product where torch has no product of half-precision matrices with a float32 result."""
    result = a.float() @ b.float()
    out.copy_(out.float() + result if accumulate else result)
