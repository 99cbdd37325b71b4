"""The package's errors, each also a ValueError, OSError or RuntimeError. A message says what was expected and came."""

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


class DecodingError(RuntimeError):
    """Raised when positions stay masked: hidden rows are NaN or inf, or the settings leave no token."""


class RankError(RuntimeError):
    """Raised where another rank of the job has died or failed; names it."""
