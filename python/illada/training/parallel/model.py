"""ShardedModel: a model's weights over the ranks of a layout, and its loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from illada_kernels import distributed, masked_loss

from ...checkpoint import Stored, read_config
from ...config import ModelConfig
from ...model import Kernels, Layer, Model, RMSNorm, init_weight
from .. import lora
from .layout import Ranks
from .share import Share


class Parts(nn.Module):
    """The rows of a fused matmul as Linears of their own, on the meta device."""

    def __init__(self, fused: nn.Linear, **rows: int) -> None:
        super().__init__()
        for name, count in rows.items():
            self.add_module(name, nn.Linear(fused.in_features, count, fused.bias is not None, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs side by side."""
        return torch.cat([part(x) for part in self.children()], -1)


class SharedNorm(RMSNorm):
    """A norm whose weight serves each rank's own heads: its gradient is the sum of theirs."""

    def __init__(self, norm: RMSNorm, group: dist.ProcessGroup) -> None:
        super().__init__(len(norm.weight), norm.eps, norm.in_fp32)
        self.weight, self.group = norm.weight, group

    def forward(self, x: Tensor, kernels: Kernels = None) -> Tensor:
        return self.normalized(x, _Shared.apply(self.weight, self.group), kernels)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class ShardedModel(nn.Module):
    """A model over the ranks of a layout, without weights yet: `fill` them.

    Parameters
    ----------
    config : ModelConfig
    ranks : Ranks
    dtype : torch.dtype
        Of the arithmetic; weights, their gradients and sums over ranks are float32.
    adapters : int, optional
        Rank of adapters (`lora.add`), which alone are trained. Matrices stay fused then, because no state holds them;
        tensor must be 1.
    """

    def __init__(
        self, config: ModelConfig, ranks: Ranks, dtype: torch.dtype = torch.float32, adapters: int | None = None
    ) -> None:
        super().__init__()
        self.ranks, self.config, self.dtype, self.adapters = ranks, config, dtype, adapters
        self.moved: Callable[[], object] = lambda: None  # called for each weight that is filled or gathered
        self.model = model = Model(config, device="meta", dtype=torch.float32)
        if adapters is not None:
            lora.add(model, adapters)
        else:
            self._split_matmuls()
        if ranks.layout.tensor > 1:
            self._share_matmuls()
        if ranks.layout.context > 1:
            ring = functools.partial(distributed.attention, group=ranks.context_group)
            for layer in model.layers:
                layer.mix = ring  # type: ignore[assignment]
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if dtype != torch.float32:
            policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for module in (*model.layers, self):
            fully_shard(module, mesh=ranks.mesh["shard"], mp_policy=policy)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # weights of the loss already hold the whole batch's denominator
            module.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(self, "hidden")
        self.to_empty(device=ranks.device)

    def _split_matmuls(self) -> None:
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            q, k, v = (heads * self.config.head_dim for heads in layer.heads)
            layer.qkv_proj = Parts(layer.qkv_proj, q=q, k=k, v=v)  # type: ignore[assignment]
            layer.gate_up_proj = Parts(  # type: ignore[assignment]
                layer.gate_up_proj, gate=self.config.ffn_dim, up=self.config.ffn_dim
            )

    def _share_matmuls(self) -> None:
        tensor, mesh = self.ranks.layout.tensor, self.ranks.mesh["tensor"]
        whole = Replicate()
        plan: dict[str, ParallelStyle] = {
            "embed": RowwiseParallel(input_layouts=whole),
            "layers.*.o_proj": RowwiseParallel(),
            "layers.*.down_proj": RowwiseParallel(),
        }
        for fused in ("qkv_proj", "gate_up_proj"):  # one sum of the gradients of all parts
            plan[f"layers.*.{fused}"] = PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole)
        for part in ("qkv_proj.q", "qkv_proj.k", "qkv_proj.v", "gate_up_proj.gate", "gate_up_proj.up"):
            plan[f"layers.*.{part}"] = ColwiseParallel()
        if self.model.lm_head is not None:
            plan["lm_head"] = ColwiseParallel()
        parallelize_module(self.model, mesh, plan, src_data_rank=None)
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.heads = tuple(heads // tensor for heads in layer.heads)  # type: ignore[assignment]
            for name in ("q_norm", "k_norm"):
                if isinstance(norm := getattr(layer, name), RMSNorm):
                    setattr(layer, name, SharedNorm(norm, mesh.get_group()))

    def forward(self, share: Share) -> Tensor:
        """Returns this rank's part of the weighted sum, a float32 scalar; the ranks of a tensor group have the same."""
        hidden = self.model(share.tokens, share.key_ranges, share.positions, shift=False)
        x = hidden.flatten(0, 1)[share.rows]  # (N, D)
        masked = torch.ones_like(share.targets, dtype=torch.bool)
        options: dict[str, Any] = {"forbid": share.forbid, "max_masked": len(x)}
        if self.ranks.layout.tensor == 1:
            return masked_loss(x, self.model.head_weight, share.targets, masked, share.weight, **options)
        head, vocab = self.head()
        return distributed.masked_loss(x, head, share.targets, masked, share.weight, **vocab, **options)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Returns the hidden rows (B, S, dim) of `Model.forward`; layers share no sequence for it (context = 1)."""
        return self.model(tokens)

    def head(self) -> tuple[Tensor, dict[str, Any]]:
        """Returns this rank's rows of the LM head and the vocab's arguments of `illada_kernels.distributed`.

        Only after `forward` or `hidden`, until weights change: there the head is gathered over the ranks of a shard.
        """
        weight, vocab = self.model.head_weight, self.config.vocab_size
        assert isinstance(weight, DTensor)
        start = -(-vocab // self.ranks.layout.tensor) * self.ranks.tensor  # torch.chunk's, as DTensor shards
        group = self.ranks.mesh.get_group("tensor")
        return weight.to_local(), {"vocab_start": start, "vocab_size": vocab, "group": group}

    # ---- weights ----------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, DTensor]:
        """Returns the sharded parameters by their names here, which are the same on any number of ranks."""
        root: Any = self
        root.reshard()  # after a forward without a backward they lie whole
        return dict(self.model.named_parameters())  # type: ignore[arg-type]

    def trained(self) -> dict[str, DTensor]:
        """Returns those of `weights` that are trained: all of them, or the adapters."""
        return {name: weight for name, weight in self.weights().items() if weight.requires_grad}

    def places(self) -> dict[str, list[tuple[int, DTensor]]]:
        """Returns for each weight of `Model` the parameters that hold its rows, each with its first row."""
        found: dict[str, list[tuple[int, DTensor]]] = {}
        for name, parameter in self.weights().items():
            if ".lora_" in name:
                continue
            name = name.replace(".base_layer.", ".")
            path, _, kind = name.rpartition(".")
            parent = path.rpartition(".")[0]
            fused = isinstance(self.model.get_submodule(parent), Parts) if parent else False
            rows = found.setdefault(f"{parent}.{kind}" if fused else name, [])
            rows.append((sum(len(p) for _, p in rows), parameter))
        return found

    @torch.no_grad()
    def fill(self, tensors: Iterable[tuple[str, int, Tensor]]) -> None:
        """Takes (weight of `Model`, first row, rows), as `checkpoint.Stored` yields: each rank copies what it holds."""
        places = self.places()
        for name, start, tensor in tensors:
            self.moved()
            for first, parameter in places[name]:
                last = first + len(parameter)
                if start < last and first < start + len(tensor):
                    put(tensor[max(first - start, 0) : last - start], max(start - first, 0), parameter)

    def load(self, folder: Path) -> None:
        """Takes the weights of a Hugging Face folder, one tensor at a time. Raises as `checkpoint.load`."""
        stored = Stored(folder, read_config(folder))
        self.fill(stored)
        stored.check_tied(whole(self.weights()["embed.weight"]))

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Draws the weights that a seed gives one process."""
        torch.manual_seed(seed)
        shapes = Model(self.config, device="meta").named_parameters()

        def drawn() -> Iterator[tuple[str, int, Tensor]]:
            for name, weight in shapes:
                full = torch.empty(weight.shape, dtype=torch.float32)
                init_weight(self.config, name, full)
                yield name, 0, full

        self.fill(drawn())

    @torch.no_grad()
    def draw_adapters(self, seed: int) -> None:
        """Draws the adapters that a seed gives one process."""
        assert self.adapters is not None
        torch.manual_seed(seed)
        weights = self.weights()
        for name, full in lora.drawn(self.config, self.adapters, self.dtype):
            self.moved()
            weights[name].to_local().copy_(local_part(full, weights[name]))

    @torch.no_grad()
    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights of `Model`, whole, one at a time; every rank takes part."""
        for name, rows in self.places().items():
            self.moved()
            yield name, torch.cat([whole(parameter) for _, parameter in rows])

    @torch.no_grad()
    def gathered_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the adapters as `gathered` does the weights."""
        for name, weight in self.trained().items() if self.adapters is not None else ():
            yield name, whole(weight)


def put(rows: Tensor, at: int, parameter: DTensor) -> None:
    """Copies what this rank holds of `rows`, those of a parameter from row `at` on."""
    local = parameter.to_local()
    if len(rows) == len(parameter):
        local.copy_(local_part(rows, parameter))
        return
    mesh = parameter.device_mesh  # a fused matrix: no tensor ranks share it
    begin = -(-len(parameter) // mesh.size()) * mesh.get_local_rank()  # torch.chunk's, as FSDP2 shards
    low, high = max(at, begin), min(at + len(rows), begin + len(local))
    if low < high:
        local[low - begin : high - begin] = rows[low - at : high - at]


def local_part(full: Tensor, parameter: DTensor) -> Tensor:
    """Returns the rows and columns of `full` that this rank holds of a parameter: of its tensor part, FSDP2's rows."""
    mesh = parameter.device_mesh
    for name in reversed(mesh.mesh_dim_names or ()):
        axis = (mesh.mesh_dim_names or ()).index(name)
        placement = parameter.placements[axis]
        dim = 0 if name == "shard" else placement.dim if isinstance(placement, Shard) else None
        if dim is not None:
            pieces = full.chunk(mesh.size(axis), dim)
            at = mesh.get_local_rank(axis)
            full = pieces[at] if at < len(pieces) else full.narrow(dim, 0, 0)
    return full


def whole(parameter: DTensor) -> Tensor:
    """Returns the full tensor; every rank takes part. The opposite of `local_part`."""
    if parameter.device_mesh.ndim > 1:  # first FSDP2's rows of a tensor part, then the parts
        parameter = parameter.redistribute(placements=[Replicate(), parameter.placements[1]])
    return parameter.full_tensor()
