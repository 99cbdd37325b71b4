"""Devices by name, checked before anything is loaded onto one."""

from __future__ import annotations

from typing import Any

import torch


def usable(device: Any, meta: bool = False) -> torch.device:
    """Returns the device; raises ValueError for one that is not known or cannot be used here, with torch's reason.

    `meta`: takes torch's device without memory as well.
    """
    try:
        found = torch.device(device)
        if not (meta and found.type == "meta"):
            torch.zeros(1, device=found).tolist()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device: {device} cannot be used ({reason}); name one that torch has here, such as cpu"
        ) from None
    return found
