"""Muon for the matrices of the layers, AdamW for everything else.

Muon (K. Jordan 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal matrix;
the step is lr * sqrt(max(1, rows / columns)). This one computes in the parameter's dtype, because
torch.optim.Muon's bfloat16 is eight times slower than float32 on a CPU without bfloat16 units (measured at 256 x 256).
Matrices that are fused in a parameter (q, k, v; gate, up) are taken one by one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..model import Model, named_weights

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic Newton-Schulz step, chosen for a steep slope at zero


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Returns about U V^T of matrix = U S V^T, (m, n) or a batch of them; singular values end in 0.7 .. 1.2."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        if x.dim() == 3:
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Uncompiled:
    """An optimizer's methods as torch has written them. It hides them from its compiler, and for that imports it at the
    first call, which takes a second."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Uncompiled, torch.optim.AdamW):
    """Torch's."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(Uncompiled, torch.optim.Optimizer):
    """Muon over groups {"params": matrices, "splits": row counts of the matrices stacked in each of them}."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "splits": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates all matrices. Those of one shape go together, because small GEMMs cost more by call than by work."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ahead = self._momentum(parameter, parameter.grad, group["momentum"])
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    rows = group["splits"] or [parameter.shape[0]]
                    for target, matrix in zip(parameter.split(rows), ahead.split(rows)):
                        by_shape[matrix.shape].append((target, matrix, group["lr"]))
        for (rows, columns), matrices in by_shape.items():
            updates = orthogonalize(torch.stack([matrix for _, matrix, _ in matrices]))
            for (target, _, lr), update in zip(matrices, updates):
                target.sub_(update, alpha=lr * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, parameter: Tensor, gradient: Tensor, decay: float) -> Tensor:
        """Returns Nesterov's momentum."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - decay)
        return gradient.lerp(state["momentum"], decay)


def optimizers(
    model: Model, name: str, lr: float, adamw_lr: float, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Returns [Muon at lr, AdamW at adamw_lr for embeddings, norms and biases], or for "adamw" one AdamW at lr."""
    if name not in ("muon", "adamw"):
        raise ValueError(f"optimizer: expected 'muon' or 'adamw', got {name!r}")
    if name == "adamw":
        return [adamw([p for p in model.parameters() if p.requires_grad], lr, weight_decay)]
    c = model.config
    stacked = {
        "qkv_proj": [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim],
        "gate_up_proj": [c.ffn_dim, c.ffn_dim],
    }
    groups: dict[str, list[Tensor]] = {"": [], **{kind: [] for kind in stacked}}
    rest = []
    for path, parameter in named_weights(model).items():
        kind = next((k for k in stacked if k in path), "")
        if path.startswith("layers.") and parameter.dim() == 2:
            groups[kind].append(parameter)
        else:
            rest.append(parameter)
    muon = Muon([{"params": groups[k], "splits": stacked.get(k)} for k in groups], lr, weight_decay=weight_decay)
    return [muon, adamw(rest, adamw_lr, 0.0)]


@contextlib.contextmanager
def checkpointed(model: Model, enabled: bool) -> Iterator[None]:
    """Lets layers save less: inside it a layer saves its input alone and the backward, which must be inside too, runs
    the layer again."""
    layers = list(model.layers) if enabled else []
    own = [vars(layer).get("forward") for layer in layers]  # a compiled one
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def compile_layers(model: Model) -> None:
    """Compiles each layer by torch.compile, in place, on its first use."""
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)


def adamw(parameters: Iterable[Any], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
