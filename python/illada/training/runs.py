"""A run's folder, made by `illada train` and read by every other command.

run.json                data, model, settings       state.pt, log.jsonl   the training state (state.py)
illada_tokenizer.json   the tokenizer               loss.png              the loss curve
config.json, model.safetensors                      the model, as `checkpoint.load` reads it
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checkpoint
from ..chat import ChatTemplate, load_chat_template
from ..config import ModelConfig
from ..errors import CheckpointError, DataError
from ..model import Model
from ..tokenizer import FILE, Tokenizer, from_json, load_tokenizer, make_tokenizer, stream
from . import lora
from .config import TrainConfig
from .data import RUN, Document, Windows, read_corpus, split
from .loader import Source
from .pairs import Pairs
from .registry import OBJECTIVES
from .state import FolderLock, make_folder, replace_file
from .trainer import Trainer
from .trajectories import Trajectories


@dataclass
class Run:
    """A training run: what stays the same from its first step to its last."""

    folder: Path
    data: str | None
    tokenizer: Tokenizer
    model_config: ModelConfig
    train_config: TrainConfig
    start_from: str | None = None  # the checkpoint folder whose weights it begins with; None: drawn from the seed
    eval_data: str | None = None  # what is held out; None: some of `data`

    @classmethod
    def create(
        cls,
        folder: Path,
        data: str | None,
        tokenizer_spec: str,
        preset: str,
        config: TrainConfig,
        train_documents: list[Document],
        progress: Callable[[float], object] = lambda done: None,
        start_from: str | None = None,
        eval_data: str | None = None,
    ) -> Run:
        """Makes a run's folder. The model is the preset with the tokenizer's vocab and ids.

        With `start_from`, a checkpoint's folder, model and tokenizer are those there. What a token sees is the
        objective's choice.
        Raises CheckpointError for a folder with another run or a checkpoint, which would be overwritten or shadowed,
        and ValueError for a model without a mask or a window that it cannot hold.
        """
        if there := [file.name for file in _run_files(folder)]:
            raise CheckpointError(
                f"{folder} holds {', '.join(there)} already; choose another folder, or empty it first"
            )
        if start_from is None:
            tokenizer = make_tokenizer(tokenizer_spec, train_documents, progress)
            ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "mask_id", "eos_id", "pad_id")}
            model_config = ModelConfig.preset(preset, **ids)
        else:
            c = model_config = checkpoint.read_config(start_from)
            if c.mask_id < 0:
                raise ValueError(
                    f"from: expected a model with a mask token, but {start_from} has none; set mask_id in it"
                )
            tokenizer = load_tokenizer(Path(start_from), c.vocab_size, c.mask_id, c.eos_id, c.pad_id)
        if config.length > model_config.max_seq_len:
            raise ValueError(
                f"length: expected at most the model's max_seq_len = {model_config.max_seq_len}, got {config.length}"
            )
        entry, block = OBJECTIVES[config.objective], config.options.get("block")
        if "block" in config.options:
            own, least = model_config.causal_block, 1 if entry.sees == "blocks" else 2
            block = block or (own if own >= least else 4)
            config = dataclasses.replace(config, options={**config.options, "block": block})
        following = entry.sampler == "self-speculation"
        model_config = dataclasses.replace(model_config, causal_block=entry.causal_block(block), next_token=following)
        run = cls(folder, data, tokenizer, model_config, config, start_from, eval_data)
        make_folder(folder)
        replace_file(folder / FILE, json.dumps(tokenizer.to_json()).encode())
        run.write()
        return run

    def write(self) -> None:
        """Replaces run.json."""
        replace_file(self.folder / RUN, (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def forget(self) -> None:
        """Removes what `create` wrote, otherwise a run that could not begin would be in the way of the next attempt."""
        for name in (RUN, FILE):
            (self.folder / name).unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of run.json."""
        return {
            "data": self.data,
            "from": self.start_from,
            "eval_data": self.eval_data,
            "model": dataclasses.asdict(self.model_config),
            "train": dataclasses.asdict(self.train_config),
        }

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Reads a run's folder; raises CheckpointError if it holds none."""
        file = folder / RUN
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            model, train = ModelConfig(**saved["model"]), TrainConfig(**saved["train"])
            data, start_from, eval_data = saved["data"], saved["from"], saved.get("eval_data")
            file = folder / FILE
            tokenizer = from_json(json.loads(file.read_text(encoding="utf-8")))
            return cls(folder, data, tokenizer, model, train, start_from, eval_data)
        except FileNotFoundError as error:
            hint = f"{folder} holds no run to resume; start one without --resume"
            if _run_files(folder):
                hint = "put it back, or start again in another folder"
            raise CheckpointError(f"{error.filename} is missing: {hint}") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); start again in another folder") from None

    def trainer(
        self,
        train_documents: list[Document],
        device: str,
        lock: FolderLock | None = None,
        held_out: list[Document] | None = None,
        **more: Any,
    ) -> Trainer:
        """Returns a trainer with the weights of `start_from`, else from the seed, or where the saved state left off.

        held_out: documents for `eval_every`. more: as in `Trainer`. Raises CheckpointError if the folder holds a model
        that could not be replaced by the trained one.
        """
        checkpoint.check_target(self.folder, self.model_config)
        c = self.train_config
        torch.manual_seed(c.seed)
        if self.start_from is not None and (c.lora or not (self.folder / "state.pt").exists()):
            # With adapters the rest is frozen, so that no update is lost to rounding.
            dtype = torch.bfloat16 if c.lora and c.dtype == "bfloat16" else torch.float32
            model = checkpoint.load(self.start_from, device=device, dtype=dtype)
            model.config = self.model_config  # another causal_block
        else:
            model = Model(self.model_config).to(device)
        if c.lora:
            lora.add(model, c.lora)
        source, identity = self.source(train_documents)
        if c.eval_every is not None:
            more["held_out"] = self.source(held_out or [])[0]
        return Trainer(model, source, c, self.folder, identity, lock, **more)

    def source(self, train_documents: list[Document]) -> tuple[Source, str]:
        """Returns the batches and a digest of their tokens, by which a resumed run knows its data."""
        c = self.train_config
        if c.pairs:
            template = _template(self.start_from)
            pairs = Pairs(train_documents, self.tokenizer, c.length, c.batch_size, c.seed, c.cut, template)
            return pairs, digest(pairs.ids())
        if OBJECTIVES[c.objective].answers == "recorded":
            end, block = self.tokenizer.eos_id, self.model_config.causal_block
            made = Trajectories(train_documents, c.length, c.batch_size, c.seed, end, block, c.cut)
            return made, digest(made.everything())
        ids = stream(train_documents, self.tokenizer)
        return Windows(ids, c.length, c.batch_size, c.seed), digest(ids)

    def export(self, model: Model) -> None:
        """Writes the model's weights into the folder; adapters to `adapter` there, and merged into `model`."""
        if self.train_config.lora:
            lora.save(model, self.folder, self.start_from)
            lora.merge(model)
        checkpoint.save(model, self.folder)


def _template(folder: str | None) -> ChatTemplate | None:
    """Returns the chat template in a checkpoint's folder, None where there is none."""
    try:
        return None if folder is None else load_chat_template(Path(folder))
    except DataError:
        return None


def digest(ids: np.ndarray) -> str:
    """Returns the SHA-256 of token ids."""
    return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()


def documents(data: str | None, leave_out: Path | None = None) -> tuple[list[Document], list[Document]]:
    """Returns (training, held out) documents of a corpus."""
    return split(read_corpus(data, leave_out))


def _run_files(folder: Path) -> list[Path]:
    """Returns the files of a run or of a checkpoint in a folder."""
    names = {RUN, FILE, "state.pt", "log.jsonl", "loss.png", "config.json", "tokenizer.json"}
    weights = (".safetensors", ".safetensors.index.json")
    return sorted(f for f in folder.glob("*") if f.name in names or f.name.endswith(weights))


def remove_run(folder: Path) -> None:
    """Removes a run's files from its folder, and nothing from a folder that holds no run."""
    if (folder / RUN).exists():
        for file in _run_files(folder):
            file.unlink()


class StopSignals:
    """A context in which SIGINT and SIGTERM set `number` instead of raising, so that the current step can be saved.

    A second SIGINT raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def open_model(folder: str, device: str, dtype: str, **overrides: Any) -> tuple[Model, Tokenizer]:
    """Returns the model and tokenizer in a checkpoint folder, a run's or one of Hugging Face.

    dtype: a name, or "auto", that of the stored weights. overrides: as in `illada.load`.
    """
    stored = None if dtype == "auto" else getattr(torch, dtype)
    model = checkpoint.load(folder, device=device, dtype=stored, **overrides)
    c = model.config
    return model, load_tokenizer(Path(folder), c.vocab_size, c.mask_id, c.eos_id, c.pad_id)


def plot_losses(losses: np.ndarray, file: Path, title: str) -> None:
    """Draws the loss of every step and its running mean, as a PNG. Raises DataError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise DataError("the loss curve needs matplotlib: pip install 'illada-kernels[model]'") from None
    steps = np.arange(1, len(losses) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    axes.plot(steps, losses, color="#9bb7d4", linewidth=0.6, label="each step")
    window = max(1, len(losses) // 50)
    if len(losses) >= window:
        mean = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], mean, color="#1f4e79", linewidth=1.6, label=f"mean of {window}")
    title = title.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")  # any folder's name, no formula
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    if len(losses) > 1:
        axes.set_ylim(float(np.quantile(losses, 0.001)) * 0.9, float(np.quantile(losses, 0.98)) * 1.1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
