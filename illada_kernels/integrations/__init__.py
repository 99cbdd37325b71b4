"""Knows other libraries and other people's models: a module each, which imports that library only when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["patch", "unpatch"]

if TYPE_CHECKING:
    from .remote_code import patch as patch
    from .remote_code import unpatch as unpatch


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".remote_code", __name__), name)
