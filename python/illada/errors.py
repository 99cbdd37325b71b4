"""The package's errors. Each is a ValueError or OSError too; its message says what was expected and what came."""

from __future__ import annotations


class ConfigError(ValueError):
    """Raised for a model configuration that contradicts itself or that `Model` cannot run."""


class CheckpointError(ValueError):
    """Raised for a checkpoint whose files or tensors are not what its configuration says."""


class CheckpointIOError(CheckpointError, OSError):
    """Raised for a checkpoint that cannot be found, read or written."""


class DataError(ValueError):
    """Raised for a corpus or a tokenizer that cannot be used."""


class PromptError(ValueError):
    """Raised for a prompt or a generation setting that cannot be run with this model."""
