"""Kernels for masked-diffusion language models: bidirectional attention, masked-token loss, parallel unmasking.

Importing this package imports neither torch nor the compiled extension; each name below loads what it needs when
first used. Where torch is imported, before or after, the operators are registered with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._registration import register, register_with_torch

__version__ = "0.1.0"

_HOMES = {
    "attention": "ops.attention",
    "scaled_dot_product_attention": "ops.attention",
    "masked_loss": "ops.masked_loss",
    "masked_loss_from_logits": "ops.masked_loss",
    "unmask": "ops.unmask",
    "unmask_from_logits": "ops.unmask",
    "Unmasked": "ops.unmask",
    "KeyRanges": "key_ranges",
    "TopK": "rules",
    "Threshold": "rules",
    "Factor": "rules",
    "EntropyBound": "rules",
    "Renoise": "rules",
    "Edit": "rules",
    "Remask": "rules",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .key_ranges import KeyRanges as KeyRanges
    from .ops.attention import attention as attention
    from .ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
    from .ops.masked_loss import masked_loss as masked_loss
    from .ops.masked_loss import masked_loss_from_logits as masked_loss_from_logits
    from .ops.unmask import Unmasked as Unmasked
    from .ops.unmask import unmask as unmask
    from .ops.unmask import unmask_from_logits as unmask_from_logits
    from .rules import Edit as Edit
    from .rules import EntropyBound as EntropyBound
    from .rules import Factor as Factor
    from .rules import Remask as Remask
    from .rules import Renoise as Renoise
    from .rules import Threshold as Threshold
    from .rules import TopK as TopK


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'illada_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    register()  # for a torch that this import imported
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_torch()
