"""A training run's state on disk: one file, replaced atomically, and a log of one JSON line per step."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..errors import CheckpointError, CheckpointIOError

_FORMAT = "illada training state 1"


class FolderLock:
    """Keeps other trainers out of a run's folder, those of other processes too, inside a `with` or until `release`.

    Raises CheckpointError if the folder is in use, CheckpointIOError if it cannot be made. A folder that it made and
    that is empty in the end is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.descriptor, self.made = folder, -1, not folder.exists()

    def __enter__(self) -> FolderLock:
        make_folder(self.folder)
        self.descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                self.release()
                raise CheckpointError(
                    f"{self.folder} is in use by another training run; wait until it ends, or choose another folder"
                ) from None
            warnings.warn(f"{self.folder} cannot be locked ({error.strerror}): start one run a folder", stacklevel=3)
        return self

    def release(self) -> None:
        """Lets others in. Does nothing where the lock is not held."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            if self.made and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents; raises CheckpointIOError if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointIOError(f"{folder} cannot be made: {error.strerror}; choose another folder") from None


# A run may be resumed with other values of these, for a rate that was too high is seen only in training.
CHANGEABLE = ("lr", "adamw_lr")


class RunState:
    """Reads and writes folder/state.pt and folder/log.jsonl of a run with these settings and this identity of data."""

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str):
        self.file, self.log = folder / "state.pt", folder / "log.jsonl"
        self.settings, self.identity = settings, identity
        make_folder(folder)

    def version(self) -> tuple[int, int] | None:
        """Returns what tells one saved state from another, None where there is none."""
        try:
            found = self.file.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino

    def expect_room(self, needed: int) -> None:
        """Raises CheckpointIOError where the disk has no room for a save of so many bytes."""
        disk = shutil.disk_usage(self.file.parent)
        if disk.free < needed and disk.total > 0:  # 0: a file system that does not say
            raise CheckpointIOError(
                f"{self.file.parent}: a save takes {needed / 1e6:.1f} MB, but {disk.free / 1e6:.1f} MB are free; free "
                "space or save elsewhere"
            )

    def sweep(self) -> None:
        """Removes what killed saves left. Only for the one who holds the folder's lock."""
        for file in self.file.parent.iterdir():
            if re.fullmatch(r"\.(state\.pt|run\.json|log\.jsonl|illada_tokenizer\.json)\.[0-9a-f]{8}", file.name):
                file.unlink(missing_ok=True)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Returns what was saved, or None where nothing was.

        Raises CheckpointError for a file that is damaged, foreign, or of another run.
        """
        if not self.file.exists():
            return None
        try:
            saved = torch.load(self.file, map_location=device, weights_only=True)
        except Exception as error:  # arbitrary bytes make the unpickler raise anything
            first = str(error).partition("\n")[0].partition(". ")[0]  # torch goes on to say how to load what it refused
            reason = first or type(error).__name__
            raise CheckpointError(f"{self.file} is damaged ({reason}); delete it to start over") from None
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise CheckpointError(
                f"{self.file} is not a training state of this program; delete it, or choose another folder"
            )
        self.check(saved)
        return saved

    def check(self, saved: dict[str, Any]) -> None:
        """Raises CheckpointError for a state of other data or other settings."""
        if saved["identity"] != self.identity:
            raise CheckpointError(
                f"{self.file} was trained on other data or another model; give the same, or choose another folder"
            )
        settings = self.settings
        other = [
            f"{k} {saved['settings'].get(k)!r} instead of {v!r}"
            for k, v in settings.items()
            if saved["settings"].get(k) != v and k not in CHANGEABLE
        ]
        if other:
            raise CheckpointError(
                f"{self.file} has other settings: {'; '.join(other)}; give the same, or choose another folder"
            )

    def check_shapes(self, saved: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for saved weights of another model."""
        there, here = ({name: tuple(w.shape) for name, w in weights.items()} for weights in (saved, model))
        other = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if other:
            raise CheckpointError(
                f"{self.file} is of another model: {other[0]} is {there.get(other[0], 'missing')} there and "
                f"{here.get(other[0], 'missing')} here, {len(other)} tensors differ; give the same model, or choose "
                "another folder"
            )

    def save(self, state: dict[str, Any]) -> None:
        """Replaces state.pt."""
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, "settings": self.settings, "identity": self.identity, **state}, buffer)
        replace_file(self.file, buffer.getvalue())


def replace_file(file: Path, content: bytes) -> None:
    """Writes beside the file, flushes to disk, renames and flushes the folder, so `file` is whole at every moment."""
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(beside, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointIOError(
            f"{file}: not saved ({error.strerror or error}){', the previous one is still there' * file.exists()}; "
            "free space or save elsewhere"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def append_line(stream: TextIO, line: str) -> None:
    """Appends a line and flushes it, so that a kill loses at most the line being written."""
    stream.write(line + "\n")
    stream.flush()


def cut_log(file: Path, steps: int) -> list[dict[str, Any]]:
    """Cuts the log back to its first `steps` lines, those that the state knows; returns their entries."""
    try:
        lines = [line + "\n" for line in file.read_text(encoding="utf-8").split("\n")[:-1]][:steps]
    except FileNotFoundError:
        lines = []
    if len(lines) < steps:
        raise CheckpointError(
            f"{file} holds {len(lines)} of the {steps} steps of state.pt beside it; delete both to start over"
        )
    try:
        entries = [json.loads(line) for line in lines]
    except ValueError:
        raise CheckpointError(f"{file} is damaged; delete it and state.pt to start over") from None
    replace_file(file, "".join(lines).encode())
    return entries
