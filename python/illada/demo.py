"""`illada demo`: a small model learns Python from Python's own sources, then writes, and fills a hole."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

import torch

from .bench import table
from .decoding.fill import fill_hole
from .decoding.generate import GenerationConfig, generate
from .errors import CheckpointError
from .live import LiveText, ProgressBar
from .model import Model
from .tokenizer import Tokenizer
from .training import runs
from .training.config import TrainConfig
from .training.data import RUN, ngram_bits
from .training.evaluate import bound
from .training.state import FolderLock, replace_file

# Chosen by measurement: docs/measurements/model.md, "Demo training".
SECONDS = 170.0
TOKENIZER = "bpe:16384"
TRAINING = {
    "objective": "block",
    "length": 128,
    "batch_size": 4,
    "options": {"block": 4, "hole_fraction": 0.1},
    "optimizer": "muon",
    "lr": 0.02,
    "adamw_lr": 0.012,
}

PROMPT = 'def get_name(self, name):\n    """Return the'
HOLE = (
    "def read_config(path):\n    try:\n        with open(path, encoding='utf-8') as file:",
    "\n            data = file.read()",
    "\n    except OSError as err:\n        raise ValueError(path) from err\n    return data\n",
)


def demo(out: Path, data: str | None = None, seconds: float | None = None) -> int:
    """Trains, evaluates, generates, fills and times; returns the exit code.

    Writes out/loss.png and out/demo.json; the run stays in out/runs/demo.
    """
    begun = time.monotonic()
    if (out / RUN).exists():
        raise CheckpointError(f"{out} is the folder of a training run; choose another --out")
    with FolderLock(out / "runs" / "demo") as lock:
        return _demo(out, data, seconds, begun, lock)


def _demo(out: Path, data: str | None, seconds: float | None, begun: float, lock: FolderLock) -> int:
    folder = lock.folder
    runs.remove_run(folder)  # an earlier demo's
    (out / "demo.json").unlink(missing_ok=True)  # with `--data` around it, it would be training text
    train_documents, held_out = runs.documents(data, folder)
    size = sum(len(d.content) for d in train_documents)
    _title(f"1  Train on {data or 'the sources of Python itself'}: {len(train_documents)} files, {size / 1e6:.1f} MB")
    config = TrainConfig(seconds=SECONDS if seconds is None else seconds, **TRAINING)  # type: ignore[arg-type]
    run = runs.Run.create(folder, data, TOKENIZER, "demo", config, train_documents)
    trainer = run.trainer(train_documents, "cpu", lock)
    model, tokenizer = trainer.model, run.tokenizer
    print(
        f"{run.model_config.num_parameters / 1e6:.1f} million parameters, {model.config.n_layers} layers of "
        f"{model.config.dim}; "
        f"tokens of {size / len(trainer.source.stream):.1f} bytes on average; {torch.get_num_threads()} threads"  # type: ignore[attr-defined]
    )
    with runs.StopSignals() as stop:
        complete = trainer.run(ProgressBar(), should_stop=lambda: stop.number != 0)
    run.export(model)
    if not complete:
        print(
            f"\nillada: interrupted, saved; go on with: illada train --resume --out {shlex.quote(str(folder))}",
            file=sys.stderr,
        )
        return 128 + stop.number
    runs.plot_losses(trainer.losses, out / "loss.png", "demo: block diffusion on Python's sources")

    _title("2  How well it predicts files it has not seen")
    found, ngrams = bound(model, held_out, tokenizer, length=config.length), ngram_bits(train_documents, held_out)
    print(f"{found.bits_per_byte:.3f} ± {found.standard_error:.3f} bits per byte, at most: the bound of {found.what}")
    print(
        f"{ngrams.unigram:.3f} unigram and {ngrams.bigram:.3f} bigram model of bytes, counted on the same training text"
    )

    _title("3  Write")
    write(model, tokenizer)
    _title("4  Fill a hole in the middle of a function, seeing both sides")
    fill(model, tokenizer)
    _title("5  Each op against plain PyTorch on this machine")
    print(table("cpu", seconds=0.6))
    result = {
        "bits_per_byte": found.bits_per_byte,
        "standard_error": found.standard_error,
        "unigram": ngrams.unigram,
        "bigram": ngrams.bigram,
        "bound": found.what,
        "held_out_bytes": found.bytes,
        "steps": trainer.step,
        "tokens": trainer.step * config.batch_size * config.length,
        "train_seconds": trainer.seconds,
        "seconds": time.monotonic() - begun,
    }
    replace_file(out / "demo.json", (json.dumps(result, indent=2) + "\n").encode())
    print(
        f"\n{result['seconds']:.0f} s. Wrote {out / 'loss.png'} and {out / 'demo.json'}; the model is in {folder}, try:"
    )
    print(f"  illada generate --model {shlex.quote(str(folder))} --prompt 'import ' --temperature 0.7 --live")
    return 0


def write(model: Model, tokenizer: Tokenizer, prompt: str = PROMPT, count: int = 64) -> str:
    """Continues a prompt, live; returns the whole text."""
    ids = tokenizer.encode(prompt.encode()).tolist()
    live = LiveText(tokenizer, len(ids), delay=0.03)
    config = GenerationConfig(max_new_tokens=count, temperature=0.5, seed=1, stop_ids=())
    done = generate(model, [ids], config, live)
    live.finish([*ids, *done.tokens[0]])
    print(f"({sum(done.filled)} tokens in {done.forward_passes} passes)")
    return tokenizer.decode([*ids, *done.tokens[0]])


def fill(model: Model, tokenizer: Tokenizer) -> str:
    """Fills the hole in HOLE, live; returns the text of the hole."""
    before, hole, after = (tokenizer.encode(part.encode()).tolist() for part in HOLE)
    live = LiveText(tokenizer, len(before) + len(after), delay=0.1)
    live.show([*before, *[tokenizer.mask_id] * len(hole), *after])
    middle = fill_hole(model, before, len(hole), after, callback=live.show)
    live.finish([*before, *middle, *after])
    print(f"(it put {tokenizer.decode(middle)!r} where {HOLE[1]!r} had been)")
    return tokenizer.decode(middle)


def _title(text: str) -> None:
    print(f"\n── {text} ──", flush=True)
