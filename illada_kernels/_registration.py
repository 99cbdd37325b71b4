"""Registers the operators and KeyRanges with torch once this package and torch are both imported, in either order.

torch.export.load, torch.load and torch.ops look them up by name, in programs that call no function of this package.
This file imports no torch: if torch comes later, a finder on sys.meta_path registers right after torch has run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from .ops import OPS


def register() -> None:
    """Imports what registers itself. Warns instead of raising: this may run inside the user's `import torch`."""
    for name in ("key_ranges", *(f"ops.{room}" for room in dict.fromkeys(OPS.values()))):
        try:
            importlib.import_module(f".{name}", __package__)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{__package__}.{name} is not registered with torch: {reason}", stacklevel=2)


def register_with_torch() -> None:
    """Registers now if torch is there, else when it is imported."""
    if "torch" in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTorch())


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch as the other finders do, and registers once it has run. Leaves nothing behind in torch."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: importlib.abc.Loader) -> None:
        own = getattr(loader, "__dict__", None)
        if not isinstance(own, dict):  # a loader that is a class; the first use of a public name registers
            return

        def run(module: ModuleType) -> None:
            del own["exec_module"]  # which leaves that of the loader's class
            loader.exec_module(module)
            sys.meta_path.remove(self)
            if not any(_is_half_imported(name) for name in list(sys.modules)):
                register()

        own["exec_module"] = run


def _is_half_imported(name: str) -> bool:
    """Returns whether a module of this package is what imports torch: then the first use of a public name registers."""
    spec = getattr(sys.modules[name], "__spec__", None) if name.startswith(f"{__package__}.") else None
    return getattr(spec, "_initializing", False)
