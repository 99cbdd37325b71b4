"""Peers that are packages of their own: which can be imported here, and why the others are not measured."""

from __future__ import annotations

import importlib
import importlib.util

# module: what it would be measured as
PACKAGES = {
    "flash_attn": "attention: flash-attn",
    "liger_kernel": "masked_loss: Liger's fused linear cross-entropy",
    "cut_cross_entropy": "masked_loss: cut-cross-entropy",
    "quack": "masked_loss: quack's cross-entropy",
    "flashinfer": "unmask: FlashInfer's sampling",
}


def absent() -> dict[str, str]:
    """{module: reason} for every package above that cannot be measured here."""
    reasons = {}
    for module in PACKAGES:
        if importlib.util.find_spec(module) is None:
            reasons[module] = "not installed"
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a package built for another torch may raise anything at import
            reasons[module] = f"{type(error).__name__}: {error}"
    return reasons
