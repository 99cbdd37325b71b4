"""Layout: how many ranks share what; Ranks: this rank's place in it, and whom it talks to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...config import ModelConfig
from ..config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Says how many ranks share batches (data), sequences (context) and matmuls (tensor); the product is the world."""

    data: int
    context: int
    tensor: int

    @classmethod
    def of(cls, world: int, tensor: int, context: int, model: ModelConfig, train: TrainConfig) -> Layout:
        """Returns the layout of a world; raises ValueError for one that does not divide what it shares."""
        for name, count in (("tensor_parallel", tensor), ("context_parallel", context)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1 rank, got {count}")
        if world % (tensor * context):
            raise ValueError(
                f"world size: expected a multiple of tensor_parallel * context_parallel = {tensor * context}, got "
                f"{world}; choose --nproc-per-node accordingly"
            )
        data = world // (tensor * context)
        if train.lora is not None and tensor > 1:
            raise ValueError(
                "lora: expected tensor_parallel 1, because an adapter's matrix A serves q, k and v, which tensor ranks "
                f"share, got {tensor}; leave out --tensor-parallel: ranks that share the batch hold 1/n of the weights"
            )
        for what, count in (("heads", model.n_heads), ("key heads", model.n_kv_heads), ("ffn columns", model.ffn_dim)):
            if count % tensor:
                raise ValueError(f"tensor_parallel: expected a divisor of the model's {count} {what}, got {tensor}")
        if -(-model.vocab_size // tensor) * (tensor - 1) >= model.vocab_size:
            raise ValueError(f"tensor_parallel: {tensor} ranks leave one of them no id of {model.vocab_size}")
        if train.batch_size % data:
            raise ValueError(
                f"batch_size: expected a multiple of the {data} data-parallel ranks, got {train.batch_size}"
            )
        if train.batch_size // data < train.accumulate:
            raise ValueError(
                f"accumulate: expected at most the {train.batch_size // data} sequences of a rank, got "
                f"{train.accumulate}"
            )
        return cls(data, context, tensor)


@dataclass(frozen=True)
class Ranks:
    """Holds this rank's place in a layout, and whom it talks to."""

    layout: Layout
    mesh: DeviceMesh  # (shard, tensor), shard = data * context
    context_group: dist.ProcessGroup
    device: torch.device

    @classmethod
    def connect(cls, layout: Layout, device: torch.device) -> Ranks:
        """Makes the groups; every rank of the world calls it."""
        shards, tensor, context = layout.data * layout.context, layout.tensor, layout.context
        mesh = init_device_mesh(device.type, (shards, tensor), mesh_dim_names=("shard", "tensor"))
        mine: Any = None
        for first in range(0, shards, context):
            for column in range(tensor):
                members = [(first + i) * tensor + column for i in range(context)]
                group = dist.new_group(members)
                mine = group if dist.get_rank() in members else mine
        return cls(layout, mesh, mine, device)

    @property
    def shard(self) -> int:
        return self.mesh.get_local_rank("shard")

    @property
    def tensor(self) -> int:
        return self.mesh.get_local_rank("tensor")

    @property
    def data(self) -> int:
        return self.shard // self.layout.context

    @property
    def context(self) -> int:
        return self.shard % self.layout.context

    def total(self, value: Tensor) -> Tensor:
        """Returns the sum over the ranks that have parts of the batch."""
        dist.all_reduce(value, group=self.mesh.get_group("shard"))
        return value


def on_first(call: Callable[[], T]) -> T:
    """Returns on every rank what the call returns on the first one, or raises there what it raises."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = call()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def same(value: float) -> float:
    """Returns the first rank's number on every rank."""
    tensor = torch.tensor(value, dtype=torch.float64, device="cpu")
    dist.broadcast(tensor, 0)
    return float(tensor)


def any_rank(condition: bool) -> bool:
    """Returns whether it holds on any rank."""
    tensor = torch.tensor(int(condition), device="cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor)
