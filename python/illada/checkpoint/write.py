"""Writes a model as a Hugging Face folder. Atomic: what was there stays loadable until the new weights are on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import hf_config
from ..config import ModelConfig
from ..errors import CheckpointError, CheckpointIOError, ConfigError
from ..hf_config import all_eos_ids
from ..model import Model, named_weights
from ..tensor_names import Entry, entries
from .files import (
    CONFIG,
    GENERATION,
    INDEX,
    SINGLE,
    check_dtype,
    folder_of,
    import_safetensors,
    read_json,
    weight_files,
)
from .read import read_config


def save(
    model: Model, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Writes the model as a Hugging Face folder that `load` reads back; other files in it stay.

    In a generation_config.json that is there, ids that the model has changed are changed too.

    Parameters
    ----------
    model : Model
    path : str or path
    dtype : torch.dtype, optional
        Of the stored weights. None: the model's.
    max_shard_bytes : int
        Size of a file of weights.

    Raises
    ------
    TypeError, ValueError
        For a model, path, dtype or max_shard_bytes that is none.
    CheckpointIOError
        If writing fails; the previous checkpoint then stays.
    CheckpointError
        If the model is packed or wrapped, the folder holds a model of another shape, or a weight would be NaN or inf.

    Notes
    -----
    Weights are written under new names and flushed to disk. Then one step makes them the checkpoint: the rename of the
    single file; with several files the rename of the index, or the removal of a single file that was there. Where it
    raises, a folder that was not there is not there. Memory: one shard on the host.

    Examples
    --------
    >>> import os, tempfile
    >>> from illada import Model, ModelConfig, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Model(ModelConfig.preset("demo", n_layers=1)), folder)
    ...     sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
    """
    check_dtype(dtype)
    folder = folder_of(path)
    if not isinstance(config := getattr(model, "config", None), ModelConfig):
        raise TypeError(f"model: expected a Model, got {type(model).__name__}; unwrap it first")
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected an integer of at least 1, got {max_shard_bytes!r}")
    new: list[Path] = []  # folders that are made here
    written: list[Path] = []
    done = False
    try:
        new += [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        check_target(folder, config)
        _write(folder, model, dtype, max_shard_bytes, written)
        done = True
    except CheckpointError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointIOError(f"{folder}: not saved ({reason}); free space or save elsewhere") from error
    finally:
        for file in written:
            file.unlink(missing_ok=True)
        for one in [] if done else new:
            with contextlib.suppress(OSError):  # not made, or somebody else has put a file into it
                one.rmdir()


def check_target(folder: Path, config: ModelConfig) -> None:
    """Raises CheckpointError over a model of another shape, because no order of renames would then be atomic."""
    if not (folder / CONFIG).exists():
        return
    try:
        there = set(entries(read_config(folder)))
    except (CheckpointError, ConfigError):
        there = set()
    if there != set(entries(config)):
        raise CheckpointError(f"{folder} holds a model of another shape; save elsewhere, or delete it first")


def _write(folder: Path, model: Model, dtype: torch.dtype | None, limit: int, written: list[Path]) -> None:
    """Writes all files and makes them the checkpoint. `written` names those that are not part of it yet."""
    shards = list(_shards(model.config, dtype or model.dtype, limit))
    unique, parameters = uuid.uuid4().hex[:8], named_weights(model)
    if strange := [e.parameter for shard in shards for e in shard if e.parameter not in parameters]:
        raise CheckpointError(
            f"model: expected the parameters of a Model, got none named {strange[0]}; unwrap it first, "
            "or save it before `pack`"
        )
    names = [f"model-{unique}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    config, generation = folder / f"config-{unique}.json", folder / f"generation-{unique}.json"
    written += [config, generation]
    _write_json(config, _with_dtype(model.config.to_hf(), dtype or model.dtype))
    if beside := _generation_beside(folder, model.config):
        _write_json(generation, beside)
    mode = config.stat().st_mode & 0o777
    for name, shard in zip(names, shards):
        written.append(folder / name)
        tensors = {e.name: _stored(parameters[e.parameter], e, dtype or model.dtype) for e in shard}
        _write_shard(folder / name, tensors)
        (folder / name).chmod(mode)  # safetensors makes files that only their owner can read
        _flush(folder / name)
    old = [file for file in (*_shards_there(folder), *_killed_saves(folder)) if file not in written]
    if beside:
        generation.replace(folder / GENERATION)
    if len(shards) == 1:
        config.replace(folder / CONFIG)
        (folder / names[0]).replace(folder / SINGLE)
        old.append(folder / INDEX)
    else:
        index = folder / f"index-{unique}.json"
        written.append(index)
        weight_map = {e.name: name for name, shard in zip(names, shards) for e in shard}
        total = sum(_bytes(e, dtype or model.dtype) for shard in shards for e in shard)
        _write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        config.replace(folder / CONFIG)
        index.replace(folder / INDEX)
        # The single file is read before an index: while it stands, it is the checkpoint.
        (folder / SINGLE).unlink(missing_ok=True)
        written.clear()
    _flush(folder)
    for file in old:
        file.unlink(missing_ok=True)


def _shards(config: ModelConfig, dtype: torch.dtype, limit: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    for entry in entries(config):
        if shard and sum(_bytes(e, dtype) for e in shard) + _bytes(entry, dtype) > limit:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _bytes(entry: Entry, dtype: torch.dtype) -> int:
    return dtype.itemsize * torch.Size(entry.shape).numel()


def _stored(parameter: Tensor, entry: Entry, dtype: torch.dtype) -> Tensor:
    tensor = parameter.detach()[entry.start : entry.stop].to("cpu", dtype).contiguous()
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{entry.name}: it has NaN or inf in {str(dtype).removeprefix('torch.')}, nothing was saved; "
            "save it in a dtype of larger range, or mend the model"
        )
    return tensor


def _with_dtype(hf: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns config.json with the dtype of the stored weights, under the name it has there already."""
    return {**hf, "dtype" if "dtype" in hf else "torch_dtype": str(dtype).removeprefix("torch.")}


def _generation_beside(folder: Path, config: ModelConfig) -> dict[str, Any] | None:
    """Returns the folder's generation_config.json with the configuration's ids where it says others, else None."""
    if not (folder / GENERATION).exists():
        return None
    there = read_json(folder / GENERATION)
    before = ModelConfig(**hf_config.read(config.hf, warn=False)) if config.hf else None
    new = dict(there) if isinstance(there, dict) else {}
    if set(all_eos_ids(new.get("eos_token_id"), GENERATION)) - set(config.eos_ids):
        new["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    for key, name in (("pad_token_id", "pad_id"), ("mask_token_id", "mask_id")):
        value = getattr(config, name)
        if new.get(key) is not None and (value >= 0 if before is None else getattr(before, name) != value):
            new[key] = None if value < 0 else value
    return new if new != there else None


def _write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    safetensors = import_safetensors()
    try:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from None


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _flush(file)


def _shards_there(folder: Path) -> set[Path]:
    """Returns the shards that the index names and those that an interrupted save left."""
    shards = set(folder.glob("model-????????-?????-of-?????.safetensors"))
    try:
        return shards | set(weight_files(folder)) - {folder / SINGLE}
    except CheckpointError:
        return shards


def _killed_saves(folder: Path) -> list[Path]:
    """Returns the configurations and indices that interrupted saves left."""
    names = re.compile(r"(config|generation|index)-[0-9a-f]{8}\.json")
    return [file for file in folder.glob("*-*.json") if names.fullmatch(file.name)]


def _flush(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
