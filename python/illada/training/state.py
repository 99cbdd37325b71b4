"""A training run's state on disk: one file, replaced atomically, and a log of one JSON line per step."""

from __future__ import annotations

import io
import json
import os
import uuid
from pathlib import Path
from typing import Any, TextIO

import torch

from ..errors import CheckpointError, CheckpointIOError

_FORMAT = "illada training state 1"


class RunState:
    """Reads and writes folder/state.pt and folder/log.jsonl of a run with these settings and this identity of data."""

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str):
        self.file, self.log = folder / "state.pt", folder / "log.jsonl"
        self.settings, self.identity = settings, identity
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointIOError(f"{folder} cannot be made: {error.strerror}; choose another folder") from None

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Returns what was saved, or None where nothing was.

        Raises CheckpointError for a file that is damaged, foreign, or of another run.
        """
        if not self.file.exists():
            return None
        try:
            saved = torch.load(self.file, map_location=device, weights_only=True)
        except Exception as error:  # arbitrary bytes make the unpickler raise anything
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.file} is damaged ({first}); delete it to start over") from None
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise CheckpointError(
                f"{self.file} is not a training state of this program; delete it, or choose another folder"
            )
        if saved["identity"] != self.identity:
            raise CheckpointError(
                f"{self.file} was trained on other data or another model; give the same, or choose another folder"
            )
        settings = self.settings
        other = [
            f"{k} {saved['settings'].get(k)!r} instead of {v!r}"
            for k, v in settings.items()
            if saved["settings"].get(k) != v
        ]
        if other:
            raise CheckpointError(
                f"{self.file} has other settings: {'; '.join(other)}; give the same, or choose another folder"
            )
        return saved

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
            f"{file}: not saved ({error.strerror or error}), the previous one is still there; "
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
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
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
