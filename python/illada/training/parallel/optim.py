"""Optimizers of sharded weights, and the norm of their gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..optim import Muon, adamw, orthogonalize
from .layout import Ranks
from .model import ShardedModel, local_part, whole


def optimizers(model: ShardedModel, name: str, lr: float, adamw_lr: float, weight_decay: float) -> list[Any]:
    """Returns what `training.optim.optimizers` gives one process, over sharded weights."""
    weights = model.trained()
    if name == "adamw":
        return [adamw(by_mesh(weights.values()), lr, weight_decay)]
    matrices = [w for path, w in weights.items() if path.startswith("layers.") and w.dim() == 2]
    rest = [w for path, w in weights.items() if not (path.startswith("layers.") and w.dim() == 2)]
    return [ShardedMuon(matrices, lr, weight_decay=weight_decay), adamw(by_mesh(rest), adamw_lr, 0.0)]


class ShardedMuon(Muon):
    """Muon of sharded matrices. Every rank gathers and orthogonalizes all of them, and keeps its part of each update.

    The arithmetic is not shared out: at 8B weights take AdamW.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all matrices."""
        by_shape: dict[torch.Size, list[tuple[DTensor, Tensor]]] = defaultdict(list)
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                ahead = self.momentum(parameter, group["momentum"])
                parameter.to_local().mul_(1 - group["lr"] * group["weight_decay"])
                by_shape[parameter.shape].append((parameter, ahead))
        for (rows, columns), matrices in by_shape.items():
            updates = orthogonalize(torch.stack([matrix for _, matrix in matrices]))
            for (parameter, _), update in zip(matrices, updates):
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                parameter.to_local().sub_(local_part(update, parameter), alpha=scale)

    def momentum(self, parameter: DTensor, decay: float) -> Tensor:
        """Returns Nesterov's momentum, whole."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        held, gradient = state["momentum"].to_local(), parameter.grad.to_local()  # type: ignore[union-attr]
        held.lerp_(gradient, 1 - decay)
        ahead = DTensor.from_local(
            gradient.lerp(held, decay),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return whole(ahead)


@torch.no_grad()
def clip(parameters: Iterable[Tensor], most: float, ranks: Ranks) -> None:
    """Scales gradients as torch.nn.utils.clip_grad_norm_, by the norm over all ranks."""
    grads: list[DTensor] = [p.grad for p in parameters if p.grad is not None]  # type: ignore[misc]
    squares = torch.zeros(2, dtype=torch.float32, device=ranks.device)  # of shards on tensor ranks, of the others
    for grad in grads:
        shared = grad.device_mesh.ndim > 1
        squares[int(not shared)] += grad.to_local().float().square().sum()
    dist.all_reduce(squares[:1], group=ranks.mesh.get_group("tensor"))
    factor = (most / (ranks.total(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.to_local().mul_(factor)


def by_mesh(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Returns parameter groups in which all DTensors have one mesh, because a fused step takes no others."""
    groups: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        groups.setdefault(parameter.device_mesh.ndim, []).append(parameter)
    return [{"params": group} for group in groups.values()]
