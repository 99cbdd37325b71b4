"""Checks what all ops over ranks need."""

from __future__ import annotations

import torch.distributed as dist

from .._checks import expect_integer


def check_piece(rows: int, vocab_start: int, vocab_size: int) -> None:
    expect_integer("vocab_size", vocab_size, 1, 2**24)  # they cross ranks as float32
    expect_integer("vocab_start", vocab_start, 0, vocab_size - 1)
    if not 1 <= rows <= vocab_size - vocab_start:
        raise ValueError(
            f"local_head: expected 1 to {vocab_size - vocab_start} rows, as vocab_start = {vocab_start} of vocab_size "
            f"= {vocab_size} leaves, got {rows}"
        )


def members_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Returns the group, all ranks for None; raises ValueError where this rank is in none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group: expected torch.distributed to be initialised, it is not; start with torchrun and call "
            "torch.distributed.init_process_group()"
        )
    members = dist.group.WORLD if group is None else group
    if not isinstance(members, dist.ProcessGroup):  # also for a rank that is not in the group
        raise ValueError(f"group: expected a ProcessGroup that this rank is in, got {members!r}")
    return members


def group_name(group: dist.ProcessGroup | None) -> str:
    """Returns the name by which an operator finds `members_of`."""
    return str(members_of(group).group_name)
