"""Exchanges tensors between the ranks of a process group inside an operator: row statistics, sums of gradients.

An operator knows its group by name, because that is what a schema can hold. The ranks of a group hold consecutive
pieces of the vocab in their order. All of them make the same calls with the same rows, so that they communicate alike.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_named(name: str) -> dist.ProcessGroup:
    """Returns the process group of that name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def gathered(group: str, tensor: Tensor) -> Tensor:
    """Returns the tensors of all ranks, which have one shape, in order of ranks: (ranks, ...)."""
    members = group_named(group)
    out = tensor.new_empty(members.size(), *tensor.shape)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    all_gather(out.view(-1), tensor.contiguous().view(-1), group=members)
    return out


def gathered_pieces(group: str, tensor: Tensor, start: int, size: int, total: int) -> Tensor:
    """Returns `gathered`, once it holds that the ranks' pieces, here start .. start + size, make up 0 .. total.

    They travel with the tensor, float32 or float64. On a CPU pieces that do not fit raise ValueError on every rank; on
    a GPU, where nothing may be read back, they make the result NaN.
    """
    flat = tensor.new_empty(2 + tensor.numel())
    flat[0], flat[1] = start, size
    flat[2:] = tensor.reshape(-1)
    out = gathered(group, flat)
    starts, sizes = out[:, 0], out[:, 1]
    ends = sizes.cumsum(0)
    fit = ((starts == ends - sizes).all() & (ends[-1] == total))[None]
    values = out[:, 2:].view(len(out), *tensor.shape)
    if tensor.device.type == "cpu":
        if not bool(fit):
            pieces = ", ".join(f"[{int(s)}, {int(s + n)})" for s, n in zip(starts, sizes))
            raise ValueError(
                f"vocab_start: expected pieces of the head that follow each other from id 0 to vocab_size = {total}, "
                f"in order of ranks, got {pieces}"
            )
        return values
    return torch.where(fit, values, torch.nan)


def add_over_ranks(group: str, tensor: Tensor) -> None:
    """Replaces a tensor by its sum over all ranks."""
    dist.all_reduce(tensor, group=group_named(group))
