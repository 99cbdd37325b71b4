"""A run's folder: which text, tokenizer, model and settings; made by `illada train`, read by it again and by generate
and eval.

run.json                what was asked for          state.pt, log.jsonl   the training state (state.py)
illada_tokenizer.json   the tokenizer               loss.png              the loss curve
config.json, model.safetensors                      the model, in the form that `checkpoint.load` reads
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import checkpoint
from .config import ModelConfig
from .data import DataError, Document, Windows, read_corpus, split
from .errors import CheckpointError
from .evaluate import stream
from .model import Model
from .state import replace_file
from .tokenizer import FILE, Tokenizer, from_json, load_tokenizer, make_tokenizer
from .train import Source, TrainConfig, Trainer


@dataclass
class Run:
    """Everything about a training run that its folder does not change any more."""

    folder: Path
    data: str | None
    tokenizer: Tokenizer
    model_config: ModelConfig
    train_config: TrainConfig

    @classmethod
    def create(
        cls,
        folder: Path,
        data: str | None,
        tokenizer_spec: str,
        preset: str,
        config: TrainConfig,
        block: int,
        train_documents: list[Document],
    ) -> Run:
        """A new run; the preset's vocabulary and special ids become the tokenizer's, its causal_block `block`."""
        tokenizer = make_tokenizer(tokenizer_spec, train_documents)
        ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "mask_id", "eos_id", "pad_id")}
        model_config = ModelConfig.preset(preset, causal_block=block, **ids)
        if config.length > model_config.max_seq_len:
            raise ValueError(
                f"length: expected at most the preset's max_seq_len = {model_config.max_seq_len}, got {config.length}"
            )
        run = cls(folder, data, tokenizer, model_config, config)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, json.dumps(tokenizer.to_json()).encode())
        replace_file(folder / "run.json", (json.dumps(run.to_json(), indent=2) + "\n").encode())
        return run

    def forget(self) -> None:
        """Takes back what `create` wrote, so that a run that could not begin is not in the way of the next attempt."""
        for name in ("run.json", FILE):
            (self.folder / name).unlink(missing_ok=True)

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "model": dataclasses.asdict(self.model_config),
            "train": dataclasses.asdict(self.train_config),
        }

    @classmethod
    def open(cls, folder: Path) -> Run:
        file = folder / "run.json"
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            tokenizer = from_json(json.loads((folder / FILE).read_text(encoding="utf-8")))
            return cls(folder, saved["data"], tokenizer, ModelConfig(**saved["model"]), TrainConfig(**saved["train"]))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{error.filename} is missing: {folder} holds no run to resume; start one without --resume"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); start again in another folder") from None

    def trainer(self, train_documents: list[Document], device: str) -> Trainer:
        """Fresh weights from the seed, or where the run's state left off."""
        torch.manual_seed(self.train_config.seed)
        model = Model(self.model_config).to(device)
        source, identity = self.source(train_documents)
        return Trainer(model, source, self.train_config, self.folder, identity)

    def source(self, train_documents: list[Document]) -> tuple[Source, str]:
        c = self.train_config
        if c.objective == "sft":
            pairs: Source = Pairs(train_documents, self.tokenizer, c.length, c.batch_size, c.seed)
            return pairs, digest(np.concatenate([row for row, _ in pairs.rows]))  # type: ignore[attr-defined]
        ids = stream(train_documents, self.tokenizer)
        return Windows(ids, c.length, c.batch_size, c.seed), digest(ids)

    def export(self, model: Model) -> None:
        checkpoint.save(model, self.folder)


def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()


def documents(data: str | None) -> tuple[list[Document], list[Document]]:
    """(training, held out)."""
    return split(read_corpus(data))


class Pairs:
    """Fine-tuning data: JSON lines {"prompt": text, "response": text} -> (tokens (B, length), prompt lengths (B,)).

    Rows are prompt, response, then end-of-text ids up to `length`, all of which but the prompt are learned. A pair
    that leaves no room for one answer token is an error naming it; a longer answer is cut."""

    def __init__(self, lines: list[Document], tokenizer: Tokenizer, length: int, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        self.rows: list[tuple[np.ndarray, int]] = []
        for document in lines:
            for number, line in enumerate(document.content.decode("utf-8").splitlines(), 1):
                if line.strip():
                    self.rows.append(self._row(line, f"{document.name}, line {number}", tokenizer, length))
        if not self.rows:
            raise DataError('sft: expected lines like {"prompt": "...", "response": "..."}, found none')

    @staticmethod
    def _row(line: str, where: str, tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, int]:
        try:
            pair = json.loads(line)
            prompt, response = (tokenizer.encode(pair[key].encode()) for key in ("prompt", "response"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{where}: expected {{"prompt": "...", "response": "..."}}, got {line[:60]!r}') from None
        if len(prompt) >= length:
            raise DataError(f"{where}: the prompt has {len(prompt)} tokens, which leaves no room in --length {length}")
        row = np.full(length, tokenizer.eos_id)
        both = np.concatenate([prompt, response])[:length]
        row[: len(both)] = both
        return row, len(prompt)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, at = divmod(index, len(self.rows))
            rng = np.random.Generator(np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64)))
            chosen.append(self.rows[rng.permutation(len(self.rows))[at]])
        return np.stack([row for row, _ in chosen]), np.array([length for _, length in chosen])


def open_model(folder: str, device: str, dtype: str) -> tuple[Model, Tokenizer]:
    """The model and tokenizer in a checkpoint folder: a run's, or one of Hugging Face."""
    model = checkpoint.load(folder, device=device, dtype=getattr(torch, dtype))
    c = model.config
    return model, load_tokenizer(Path(folder), c.vocab_size, c.mask_id, c.eos_id, c.pad_id)


def plot_losses(losses: np.ndarray, file: Path, title: str) -> None:
    """The loss of every step and its running mean, as a PNG. Raises DataError where matplotlib is missing."""
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
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    if len(losses) > 1:
        axes.set_ylim(float(np.quantile(losses, 0.001)) * 0.9, float(np.quantile(losses, 0.98)) * 1.1)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
