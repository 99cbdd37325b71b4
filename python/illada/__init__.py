"""A thin masked-diffusion language model on illada_kernels: `load` a checkpoint, or `illada train` one; `fill` holes.

Importing this package imports neither torch nor illada_kernels; each name below loads what it needs when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Model": "model",
    "ModelConfig": "config",
    "load": "checkpoint",
    "log_likelihood": "likelihood",
    "save": "checkpoint",
    "Decoder": "decoding.decoder",
    "GenerationConfig": "decoding.config",
    "Generation": "decoding.generation",
    "fill": "decoding.fill",
    "generate": "decoding.generate",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DecodingError": "errors",
    "PromptError": "errors",
    "Recorder": "replay",
    "pack": "packing",
    "record": "training.record",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .config import ModelConfig as ModelConfig
    from .decoding.config import GenerationConfig as GenerationConfig
    from .decoding.decoder import Decoder as Decoder
    from .decoding.fill import fill as fill
    from .decoding.generate import generate as generate
    from .decoding.generation import Generation as Generation
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DecodingError as DecodingError
    from .errors import PromptError as PromptError
    from .likelihood import log_likelihood as log_likelihood
    from .model import Model as Model
    from .packing import pack as pack
    from .replay import Recorder as Recorder
    from .training.record import record as record


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'illada' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
