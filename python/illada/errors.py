"""The model's own errors: each is a ValueError or OSError too, and says what came, what was expected, what to do."""

from __future__ import annotations


class ConfigError(ValueError):
    """A model configuration that contradicts itself, or that this model cannot run."""


class CheckpointError(ValueError):
    """A checkpoint whose files or tensors are not what its configuration says."""


class CheckpointIOError(CheckpointError, OSError):
    """A checkpoint that cannot be found, read or written."""


class PromptError(ValueError):
    """A prompt, or a generation setting, that cannot be run with this model."""
