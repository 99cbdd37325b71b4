"""Watches the first eager forward of a patched model, and warns where torch's functions ran in it all the same."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from . import _stand_ins

ATTENTION = frozenset(
    ("scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward", "_native_multi_head_attention")
    + ("_transformer_encoder_layer_fwd",)
)
_FLASH = frozenset(("_flash_attn_forward", "_flash_attn_varlen_forward"))  # flash-attn's operators
_PACKAGE = __name__.partition(".")[0]
_TORCH = os.path.dirname(torch.__file__) + os.sep


class FirstRun:
    """Hooks of the whole model and of the modules in which something was replaced.

    Whichever runs first is watched to its end, and again until it was the whole model. A compiled or traced forward is
    not watched.
    """

    def __init__(self, model: torch.nn.Module, parts: dict[str, torch.nn.Module], loss: bool) -> None:
        self.model = type(model).__name__
        self.watched = ATTENTION | ({"cross_entropy"} if loss else set())
        self.running: dict[int, tuple[str, _Seen]] = {}  # of each thread
        self.handles: dict[str, tuple[Any, Any]] = {}
        for path, part in {"": model, **parts}.items():
            before = part.register_forward_pre_hook(functools.partial(self._enter, path), prepend=True)
            after = part.register_forward_hook(functools.partial(self._leave, path), always_call=True)
            self.handles[path] = before, after

    def stop(self, path: str = "") -> None:
        """Removes the hooks of a part, or all for the whole model."""
        for one in list(self.handles) if path == "" else [path]:
            for handle in self.handles.pop(one, ()):
                handle.remove()

    def _enter(self, path: str, module: torch.nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        if threading.get_ident() not in self.running:
            seen = _Seen(self.watched)
            self.running[threading.get_ident()] = path, seen
            seen.__enter__()

    def _leave(self, path: str, module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.compiler.is_compiling() or self.running.get(threading.get_ident(), ("?",))[0] != path:
            return
        seen = self.running.pop(threading.get_ident())[1]
        seen.__exit__(None, None, None)
        if outputs is None:  # it raised
            return
        self.stop(path)
        said = [
            f"{'flash-attn' if name in _FLASH else 'torch'}'s {name} ran at {', '.join(sorted(at))}"
            for name, at in sorted(seen.places.items())
        ]
        if path == "" and not seen.ours:
            said.append("none of our attention ran")
        if said:
            warnings.warn(
                f"patch: in the first forward of {path or self.model} {' and '.join(said)}; call "
                "illada_kernels.scaled_dot_product_attention there, or keep torch's",
                RuntimeWarning,
                stacklevel=2,
            )


def unwatched() -> contextlib.AbstractContextManager[Any]:
    """Returns a context for a compiled function that leads to our attention; its graph would be one of the watched
    first forward, and compiled again for the second."""
    seen = _get_current_function_mode()
    if not isinstance(seen, _Seen):
        return contextlib.nullcontext()
    seen.ours = True
    return _pop_mode_temporarily()


class _Seen(TorchFunctionMode):
    """Notes where torch's functions are called."""

    def __init__(self, watched: frozenset[str]) -> None:
        super().__init__()
        self.watched = watched
        self.places: dict[str, set[str]] = {}
        self.ours = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # of a function within the model
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").partition(".")[0]
        if sys._getframe(1).f_code is flex_attention.__code__:  # which is not shown to modes, as what it calls is
            name = "flex_attention"
        if getattr(func, "namespace", "") == _PACKAGE:
            self.ours |= name == "attention"
        elif name in self.watched or name.startswith("_scaled_dot_product") or name in _FLASH:
            frame: Any = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
                frame = frame.f_back
            if frame is not None and frame.f_code.co_filename != _stand_ins.__file__:  # that goes to torch on purpose
                place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                self.places.setdefault(name, set()).add(place)
        return func(*args, **(kwargs or {}))
