"""Peers that are packages of their own: which can be imported here, and why the others are not measured.

`pip install illada-kernels[peers]` lists them with the versions that these benchmarks were written against.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from illada_kernels._dispatch import Backend

# module: what it would be measured as
PACKAGES = {
    "flash_attn": "attention: flash-attn 2 (and 4, flash_attn.cute)",
    "flash_attn_interface": "attention: flash-attn 3",
    "liger_kernel": "masked_loss: Liger's fused linear cross-entropy",
    "cut_cross_entropy": "masked_loss: cut-cross-entropy",
    "quack": "masked_loss: quack's cross-entropy",
    "flashinfer": "unmask: FlashInfer's sampling",
    "llama_cpp": "generate: llama.cpp, beside gguf",
    "gguf": "generate: writes models for llama.cpp",
}


def absent() -> dict[str, str]:
    """Returns {module: reason} for every package above that cannot be measured here."""
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


def ours_on(backends: Sequence[Backend], device: str) -> tuple[list[str], dict[str, str]]:
    """Returns our own backends made for a device, most capable first: those to be called by name, and why the others
    cannot."""
    names, absent = [], {}
    for backend in backends:
        if backend.devices is None or device not in backend.devices:
            continue
        reason = backend.available()
        if reason is None:
            names.append(backend.name)
        else:
            absent[backend.name] = reason
    return names, absent
