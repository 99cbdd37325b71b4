"""A run's state in shards: each rank writes what it holds, and any number of ranks reads it.

FOLDER/state-NAME/   torch.distributed.checkpoint's files      FOLDER/state.json   which of them is the state

A save writes a new folder; when all ranks are done, the replacement of state.json makes it the state. So a rank that
dies in a save loses nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ...errors import CheckpointError, CheckpointIOError
from ..state import RunState, replace_file
from .layout import on_first

FILE, FORMAT = "state.json", "illada sharded state 1"


class ShardedState(RunState):
    """Reads and writes a run's state.json and shards, with the settings and the identity of its data."""

    def __init__(self, folder: Path, settings: dict[str, Any], identity: str) -> None:
        super().__init__(folder, json.loads(json.dumps(settings)), identity)
        self.folder, self.file = folder, folder / FILE
        if (folder / "state.pt").exists():
            raise CheckpointError(
                f"{folder} holds the state of a run of one process: go on with it without torchrun, or choose another "
                "folder"
            )

    def sweep(self) -> None:
        """Removes what killed saves left."""
        super().sweep()
        on_first(self._remove_others)

    def _remove_others(self) -> None:
        saved = self._read()
        for shards in self.folder.glob("state-*"):
            if saved is None or shards.name != saved["shards"]:
                shutil.rmtree(shards, ignore_errors=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            saved = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{self.file} is damaged ({error}); delete it to start over") from None
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise CheckpointError(f"{self.file} is not a state of this program; delete it, or choose another folder")
        return saved

    def find(self) -> dict[str, Any] | None:
        """Returns what state.json says, None where nothing was saved. Raises CheckpointError as `RunState.load`."""
        saved: dict[str, Any] | None = on_first(self._read)
        if saved is not None:
            self.check(saved)
        return saved

    def read(self, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Reads what `find` found into tensors of the same names and shapes, however they are sharded."""
        shards = self.folder / saved["shards"]
        try:
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(shards))
        except Exception as error:  # a rank's own or, gathered from all of them, a CheckpointException
            raise CheckpointError(f"{shards} is damaged ({_reason(error)}); delete {self.file} to start over") from None

    def write(self, tensors: dict[str, Tensor], **values: Any) -> None:
        """Replaces the state; every rank gives its part of the same tensors."""
        shards = self.folder / f"state-{on_first(lambda: uuid.uuid4().hex[:8])}"
        try:
            writer = dcp.FileSystemWriter(shards, sync_files=True)
            dcp.save(tensors, storage_writer=writer)
        except dcp.CheckpointException as error:
            on_first(lambda: shutil.rmtree(shards, ignore_errors=True))
            kept = ", the previous state is still there" * self.file.exists()
            raise CheckpointIOError(
                f"{shards}: not saved ({_reason(error)}){kept}; free space or save elsewhere"
            ) from None
        on_first(lambda: self._commit(shards, values))

    def _commit(self, shards: Path, values: dict[str, Any]) -> None:
        for folder in (shards, self.folder):
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        saved = {
            "format": FORMAT,
            "settings": self.settings,
            "identity": self.identity,
            "shards": shards.name,
            **values,
        }
        replace_file(self.file, json.dumps(saved).encode())
        self._remove_others()


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # rank -> (exception, traceback)
    if failures:
        rank, failure = next(iter(failures.items()))
        return f"rank {rank}: {failure[0]}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def tensors_of(weights: dict[str, Any], optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Returns weights and moments by names that are the same on any number of ranks, moments of zero where there are
    none yet: an optimizer goes on from those as from none."""
    found: dict[str, Tensor] = {f"model.{name}": weight for name, weight in weights.items()}
    names = {weight: name for name, weight in weights.items()}
    for optimizer in optimizers:
        moments = ("exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("momentum",)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                state = optimizer.state[weight]
                if not state:
                    state.update({moment: torch.zeros_like(weight) for moment in moments})
                    if len(moments) > 1:
                        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                found |= {f"optim.{names[weight]}.{key}": value for key, value in state.items()}
    return found
