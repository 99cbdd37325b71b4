"""Session: the ranks that torchrun started, from the first message between them to the last."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .watch import Watch

SLACK = 3.0  # a collective waits so many times longer than the watch, which knows the rank by name
SECONDS_TO_END = 10.0


def is_launched() -> bool:
    """Returns whether torchrun, or what sets the same variables, has started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def local_device(device: str) -> torch.device:
    """Returns this rank's device: of several GPUs the one of its number on the machine."""
    if torch.device(device).type != "cuda":
        return torch.device(device)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device: rank {os.environ['RANK']} needs GPU {index} of its machine, which has "
            f"{torch.cuda.device_count()}; lower --nproc-per-node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def session(device: torch.device, patience: float) -> Iterator[Watch]:
    """Connects the ranks; inside it errors that come from another rank name it, and those that all find alike are the
    first one's to print."""
    timeout = datetime.timedelta(seconds=SLACK * patience)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    with Watch(patience) as watch:
        try:
            yield watch
        except Exception as error:
            explained = watch.explained(error)
            if watch.leaves_to_first(explained):
                time.sleep(SECONDS_TO_END)  # torchrun ends this rank when the first one has
                os._exit(2)
            raise explained from None
    dist.destroy_process_group()
