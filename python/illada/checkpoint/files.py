"""Reads the files of a Hugging Face folder: JSON, the list of weights, headers and tensors of safetensors."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError, CheckpointIOError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES.values():
        names = ", ".join(map(str, DTYPES.values()))
        raise TypeError(f"dtype: expected None or one of {names}, got {dtype!r}")


def folder_of(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a folder's path, a str or os.PathLike, got {type(path).__name__}")
    return Path(path)


def read_json(file: Path) -> Any:
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


def weight_files(folder: Path) -> list[Path]:
    """Returns the files to read: the single file if there is one, else those of the index, as transformers does."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        other = sorted(f.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for f in folder.glob(kind))
        hint = f"; {other[0]} is of another format, convert it to safetensors" if other else ""
        raise CheckpointIOError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}{hint}")
    index = read_json(folder / INDEX)
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


def read_header(file: Path) -> dict[str, dict[str, Any]]:
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
    unknown = sorted({str(info.get("dtype")) for info in infos.values()} - set(DTYPES))
    if unknown:
        raise CheckpointError(f"{file}: dtype {', '.join(unknown)} is not supported; convert it to BF16 or F32")
    return infos


def read_tensors(file: Path, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    safetensors = import_safetensors()
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


def import_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("checkpoints need safetensors: pip install 'illada-kernels[model]'") from None
    return safetensors
