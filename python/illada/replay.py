"""Records a generation pass by pass and shows it as one self-contained HTML page, or in a notebook."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

import torch

from .decoding.config import Prompts
from .decoding.loop import Step
from .tokenizer import Tokenizer


class Recorder:
    """Collects passes: `generate`'s callback. In a notebook it shows itself.

    Copies a pass's tokens to the host, so it waits for the device in every pass.

    Parameters
    ----------
    tokenizer : Tokenizer
        Of `illada.tokenizer`; shows ids as text.
    prompts : list of list of int, or integer Tensor (B, length)
        Those that `generate` is given.

    Examples
    --------
    >>> import torch
    >>> from illada import GenerationConfig, Model, ModelConfig, Recorder, generate
    >>> from illada.tokenizer import ByteTokenizer
    >>> model = Model(ModelConfig.preset("demo", n_layers=1)).eval()
    >>> recorder = Recorder(ByteTokenizer(), [[72, 105]])
    >>> done = generate(model, [[72, 105]], GenerationConfig(max_new_tokens=4, stop_ids=()), recorder)
    >>> len(recorder.passes), "<script>" in recorder.page()
    (4, True)
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts) -> None:
        self.tokenizer, self.prompts = tokenizer, [[int(token) for token in prompt] for prompt in prompts]
        self.pieces: dict[int, str] = {}
        self.passes: list[list[dict[str, Any]]] = []  # of each pass, of each sequence that changed
        self.before = [list(prompt) for prompt in self.prompts]

    def __call__(self, step: Step) -> None:
        if len(step.starts) != len(self.prompts):
            raise ValueError(f"prompts: expected those of {len(step.starts)} sequences, got {len(self.prompts)}")
        columns = torch.nn.functional.pad(step.positions, (0, 1), value=-1).tolist()
        sure = step.confidence.tolist()
        changes: list[dict[str, Any]] = []
        for b, (row, start) in enumerate(zip(step.tokens.tolist(), step.starts)):
            now = [self.tokenizer.mask_id if token < 0 else token for token in row[start:]]  # -1: the model has no mask
            old = self.before[b] + [self.tokenizer.mask_id] * (len(now) - len(self.before[b]))
            at = {column - start: sure[b][k] for k, column in enumerate(columns[b][:-1]) if column >= 0}
            for i, (was, token) in enumerate(zip(old, now)):
                if was != token:
                    kind = "taken back" if token == self.tokenizer.mask_id else "filled"
                    kind = "revised" if self.tokenizer.mask_id not in (was, token) else kind
                    changes.append({"row": b, "at": i, "token": token, "kind": kind, "sure": _number(at.get(i))})
                    self.piece(token)
            self.before[b] = now
        self.passes.append(changes)

    def piece(self, token: int) -> str:
        """Returns a token's text. A part of a character is shown as its bytes."""
        if token not in self.pieces:
            mask = token == self.tokenizer.mask_id
            text = "░" if mask else self.tokenizer.decode([token])
            self.pieces[token] = text if "\ufffd" not in text and text else f"‹{token}›"
        return self.pieces[token]

    def record(self) -> dict[str, Any]:
        """Returns what the page plays: pieces, prompts, lengths, changes of each pass."""
        for prompt in self.prompts:
            for token in prompt:
                self.piece(token)
        self.piece(self.tokenizer.mask_id)
        return {
            "mask": self.tokenizer.mask_id,
            "pieces": self.pieces,
            "prompts": self.prompts,
            "lengths": [len(row) for row in self.before],
            "passes": self.passes,
        }

    def page(self) -> str:
        """Returns the page: HTML, style, script and record in one text, which needs no network."""
        # Within a script element `<` could end it, so it is escaped the way JSON allows.
        record = json.dumps(self.record(), ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
        return resources.files(__package__).joinpath("replay.html").read_text("utf-8").replace("__RECORD__", record)

    def _repr_html_(self) -> str:
        source = html.escape(self.page(), quote=True)
        return f'<iframe srcdoc="{source}" style="width:100%;height:420px;border:0"></iframe>'


def _number(value: float | None) -> float | None:
    """Returns a confidence for JSON, which knows no infinity."""
    return None if value is None or not abs(value) < float("inf") else round(value, 4)
