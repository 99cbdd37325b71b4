"""Reads a model from a Hugging Face folder. Missing, unexpected and wrongly shaped tensors are listed in one error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..devices import usable
from ..errors import CheckpointError, ConfigError
from ..hf_config import all_eos_ids
from ..model import Model, allocate
from ..tensor_names import Entry, entries, head_name
from .files import (
    CONFIG,
    DTYPES,
    GENERATION,
    check_dtype,
    folder_of,
    read_header,
    read_json,
    read_tensors,
    weight_files,
)


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Model:
    """Returns the model in a Hugging Face folder, in evaluation mode.

    Parameters
    ----------
    path : str or path
    device : torch.device or str
    dtype : torch.dtype, optional
        None: that of the stored embedding.
    **overrides
        Fields of ModelConfig that replace what config.json says: `load(path, mask_id=151669, causal_block=32)`.

    Returns
    -------
    Model

    Raises
    ------
    TypeError, ValueError
        For a path that is none, a dtype that is not stored, a device that cannot be used here.
    CheckpointIOError
        (an OSError) For files that are missing or cannot be read.
    ConfigError
        For a config.json of a model that is not supported, and for overrides that are not fields of ModelConfig.
    CheckpointError
        For tensors that are not exactly those of config.json.

    Notes
    -----
    Supported are the dense models of `illada.hf_config.FAMILIES`, by their published names of architectures and
    tensors. Files that could run code (pickles) are refused. Memory: the model and one tensor.

    Examples
    --------
    >>> import tempfile
    >>> from illada import Model, ModelConfig, load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Model(ModelConfig.preset("demo", n_layers=1)), folder)
    ...     model = load(folder, max_seq_len=512)
    >>> model.config.max_seq_len
    512
    """
    check_dtype(dtype)
    folder = folder_of(path)
    device = usable(device, meta=True)
    config = read_config(folder, **overrides)
    stored = Stored(folder, config)
    model = Model(config, device="meta").to(dtype or stored.dtype)
    allocate(model, device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, start, tensor in stored:
            parameters[name][start : start + len(tensor)].copy_(tensor)
    stored.check_tied(parameters["embed.weight"])
    return model.eval()


class Stored:
    """The tensors in a Hugging Face folder, known to be exactly those of the config; the errors are those of `load`.

    Iterating yields (name of the parameter of `Model`, row at which it begins there, tensor) once, on the CPU.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.files = {file: read_header(file) for file in weight_files(folder)}
        self.found = {name: (file, info) for file, infos in self.files.items() for name, info in infos.items()}
        expected = {entry.name: entry for entry in entries(config)}
        self.tied = head_name(config) if config.tie_embeddings else ""  # may be stored as well
        self.embed = next(iter(expected.values()))
        if self.tied in self.found and self.embed.name not in self.found:  # some tools store the other of the two names
            self.embed = dataclasses.replace(self.embed, name=self.tied)
            expected = {self.tied: self.embed, **dict(list(expected.items())[1:])}
        _compare(folder, expected, self.found, also_allowed={self.tied} if self.tied else set())
        self.expected = expected
        self.dtype = DTYPES[self.found[self.embed.name][1]["dtype"]]

    def __iter__(self) -> Iterator[tuple[str, int, Tensor]]:
        for file in self.files:
            for name, tensor in read_tensors(file):
                entry = self.expected.get(name)
                if entry is not None:
                    yield entry.parameter, entry.start, tensor

    def check_tied(self, embedding: Tensor) -> None:
        """Raises CheckpointError for a head that is stored beside the embedding, is tied to it, and differs."""
        tied, embed = self.tied, self.embed
        if tied in self.found and tied != embed.name and not _same_as(self.found[tied][0], tied, embedding):
            raise CheckpointError(
                f"{self.folder}: {tied} differs from {embed.name} although {CONFIG} ties them; set tie_word_embeddings "
                "to false"
            )


def read_config(path: str | os.PathLike[str], **overrides: Any) -> ModelConfig:
    """Returns the configuration in a checkpoint folder, with all end-of-text ids of generation_config.json too.

    Fields in `overrides` replace what the files say. Raises CheckpointIOError, CheckpointError or ConfigError.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"hf", "family"}
    if unknown := sorted(set(overrides) - known):
        raise ConfigError(f"load: {', '.join(unknown)}: expected fields of ModelConfig, {', '.join(sorted(known))}")
    config = _stored_config(path)
    return dataclasses.replace(config, **overrides) if overrides else config


def _stored_config(path: str | os.PathLike[str]) -> ModelConfig:
    folder = folder_of(path)
    config = ModelConfig.from_hf(read_json(folder / CONFIG))
    if not (folder / GENERATION).exists():
        return config
    generation = read_json(folder / GENERATION)
    if not isinstance(generation, dict):
        raise ConfigError(f"{GENERATION}: expected an object, got {type(generation).__name__}")
    eos = dict.fromkeys([*config.eos_ids, *all_eos_ids(generation.get("eos_token_id"), GENERATION)])
    return dataclasses.replace(config, eos_id=next(iter(eos), -1), more_eos_ids=tuple(eos)[1:])


def _compare(folder: Path, expected: dict[str, Entry], found: dict[str, Any], also_allowed: set[str]) -> None:
    missing = [name for name in expected if name not in found]
    buffers = (".rotary_emb.inv_freq",)
    unexpected = [n for n in found if n not in expected and n not in also_allowed and not n.endswith(buffers)]
    wrong = [
        f"{name} {tuple(found[name][1]['shape'])} instead of {entry.shape}"
        for name, entry in expected.items()
        if name in found and tuple(found[name][1]["shape"]) != entry.shape
    ]
    if missing and unexpected:
        for prefix in ("_orig_mod.", "module.", "base_model.model.", "model."):
            if {name.removeprefix(prefix) for name in found} >= set(expected):
                raise CheckpointError(
                    f"{folder}: the names of its tensors begin with {prefix!r}, which a wrapper of the model added; "
                    "save the model inside it"
                )
    if missing or unexpected or wrong:
        kinds = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
        parts = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds if names]
        raise CheckpointError(f"{folder}: the tensors are not those of {CONFIG}: {'; '.join(parts)}")


def _same_as(file: Path, name: str, weight: Tensor) -> bool:
    tensor = next(t for n, t in read_tensors(file, only=name) if n == name)
    return tensor.shape == weight.shape and torch.equal(tensor.to(weight), weight)
