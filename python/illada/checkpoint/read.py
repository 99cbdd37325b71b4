"""Reads and writes Hugging Face folders: config.json and safetensors, one file or shards with an index.

A folder is complete or refused: missing, unexpected and wrongly shaped tensors are listed in one error. Saving is
atomic: what was there stays loadable until the new weights are on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .. import hf_config
from ..config import ModelConfig
from ..devices import usable
from ..errors import CheckpointError, CheckpointIOError, ConfigError
from ..hf_config import all_eos_ids
from ..model import Model, named_weights
from ..tensor_names import Entry, entries, head_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"


# ---- load --------------------------------------------------------------------------------------------------------


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
        For a config.json of a model that is not supported, and for overrides that are no fields of ModelConfig.
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
    _check_dtype(dtype)
    folder = _folder(path)
    device = usable(device, meta=True)
    config = read_config(folder, **overrides)
    stored = Stored(folder, config)
    model = Model(config, device="meta").to(dtype or stored.dtype).to_empty(device=device)
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
        self.files = {file: _header(file) for file in _weight_files(folder)}
        self.found = {name: (file, info) for file, infos in self.files.items() for name, info in infos.items()}
        expected = {entry.name: entry for entry in entries(config)}
        self.tied = _tied_head(config)
        self.embed = next(iter(expected.values()))
        if self.tied in self.found and self.embed.name not in self.found:  # some tools store the other of the two names
            self.embed = dataclasses.replace(self.embed, name=self.tied)
            expected = {self.tied: self.embed, **dict(list(expected.items())[1:])}
        _compare(folder, expected, self.found, also_allowed={self.tied} if self.tied else set())
        self.expected = expected
        self.dtype = _DTYPES[self.found[self.embed.name][1]["dtype"]]

    def __iter__(self) -> Iterator[tuple[str, int, Tensor]]:
        for file in self.files:
            for name, tensor in _tensors(file):
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


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in _DTYPES.values():
        names = ", ".join(map(str, _DTYPES.values()))
        raise TypeError(f"dtype: expected None or one of {names}, got {dtype!r}")


def _folder(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a folder's path, a str or os.PathLike, got {type(path).__name__}")
    return Path(path)


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
    folder = _folder(path)
    config = ModelConfig.from_hf(_read_json(folder / CONFIG))
    if not (folder / GENERATION).exists():
        return config
    generation = _read_json(folder / GENERATION)
    if not isinstance(generation, dict):
        raise ConfigError(f"{GENERATION}: expected an object, got {type(generation).__name__}")
    eos = dict.fromkeys([*config.eos_ids, *all_eos_ids(generation.get("eos_token_id"), GENERATION)])
    return dataclasses.replace(config, eos_id=next(iter(eos), -1), more_eos_ids=tuple(eos)[1:])


def _read_json(file: Path) -> Any:
    if not file.parent.is_dir():
        raise CheckpointIOError(
            f"{file.parent} is not a folder on this machine; expected one with {CONFIG} and *.safetensors; "
            "download a model of a hub first"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointIOError(f"{file} is missing; a checkpoint folder holds {CONFIG} and *.safetensors") from None
    except OSError as error:
        raise CheckpointIOError(f"{file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download or save it again") from None


def _weight_files(folder: Path) -> list[Path]:
    """Returns the files to read: the single file if there is one, else those of the index, as transformers does."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        other = sorted(f.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for f in folder.glob(kind))
        hint = f"; {other[0]} is of another format, convert it to safetensors" if other else ""
        raise CheckpointIOError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}{hint}")
    index = _read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(f"{folder / INDEX}: expected an object with weight_map, a file name for each tensor")
    files = sorted(set(names.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{folder / INDEX}: expected plain file names, got {outside[0]!r}")
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise CheckpointIOError(f"{folder}: {len(missing)} of {len(files)} shards missing: {', '.join(missing)}")
    return [folder / name for name in files]


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Returns name -> {dtype, shape, data_offsets} of a safetensors file; raises CheckpointError if it is cut short."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 <= length <= size - 8:
                raise CheckpointError(f"{file} is not a safetensors file, or cut short at {size} bytes; get it again")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointIOError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        infos = {name: info for name, info in json.loads(text).items() if name != "__metadata__"}
        needed = 8 + length + max((info["data_offsets"][1] for info in infos.values()), default=0)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        raise CheckpointError(f"{file}: the header is damaged; get the file again") from None
    if size < needed:
        raise CheckpointError(f"{file} is cut short: {size} bytes of {needed}; get the file again")
    unknown = sorted({str(info.get("dtype")) for info in infos.values()} - set(_DTYPES))
    if unknown:
        raise CheckpointError(f"{file}: dtype {', '.join(unknown)} is not supported; convert it to BF16 or F32")
    return infos


def _tied_head(config: ModelConfig) -> str:
    """Returns the name under which a tied checkpoint may hold the head as well, or "" where it is not tied."""
    if not config.tie_embeddings:
        return ""
    return head_name(config)


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
    tensor = next(t for n, t in _tensors(file, only=name) if n == name)
    return tensor.shape == weight.shape and torch.equal(tensor.to(weight), weight)


def _tensors(file: Path, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    safetensors = _safetensors()
    try:
        with open(file, "rb") as opened, safetensors.safe_open(_readable(file, opened), framework="pt") as stream:
            for name in [only] if only else stream.keys():
                yield name, stream.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); get the file again") from None


def _readable(file: Path, opened: BinaryIO) -> str:
    """Returns a path that safetensors can open, which takes only names of UTF-8."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return f"/dev/fd/{opened.fileno()}"
    return str(file)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("checkpoints need safetensors: pip install 'illada-kernels[model]'") from None
    return safetensors


# ---- save --------------------------------------------------------------------------------------------------------


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
    """
    _check_dtype(dtype)
    folder = _folder(path)
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
    there = _read_json(folder / GENERATION)
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
    safetensors = _safetensors()
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
        return shards | set(_weight_files(folder)) - {folder / SINGLE}
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
