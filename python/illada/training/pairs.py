"""Fine-tuning data: JSON lines of prompt and response, or of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..chat import ChatTemplate
from ..errors import DataError
from ..tokenizer import Tokenizer
from ..tokenizer_config import begun
from .data import Document

_FORM = '{"prompt": "...", "response": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


@dataclass(frozen=True)
class _Row:
    where: str
    prompt: np.ndarray
    response: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


class Pairs:
    """Fine-tuning batches. A row is prompt, response, then end-of-text ids up to `length`; the prompt is not learned.

    A line is {"prompt": text, "response": text}, or {"messages": [...]} that ends with the assistant's: what the chat
    template makes of the others is the prompt. A prompt begins with the tokenizer's BOS, where it has one. Names of
    special tokens become these tokens, as templates need; the mask's is refused.

    Parameters
    ----------
    lines : list of Document
    tokenizer : Tokenizer
    length : int
    batch_size, seed : int
    cut : bool
        Keep the first `length` tokens of a row that is longer; `self.shortened` counts them. Otherwise it is refused.
    template : ChatTemplate, optional
        For messages.

    Raises
    ------
    DataError
        Naming the line: for another form, an empty response, a conversation of one side, a prompt that leaves no room
        for a token, and without `cut` for rows that are longer than `length`.
    """

    def __init__(
        self,
        lines: list[Document],
        tokenizer: Tokenizer,
        length: int,
        batch_size: int,
        seed: int,
        cut: bool = False,
        template: ChatTemplate | None = None,
    ):
        self.batch_size, self.seed, self.length, self.eos_id = batch_size, seed, length, tokenizer.eos_id
        texts = [
            (f"{document.name}, line {number}", line)
            for document in lines
            for number, line in enumerate(document.content.decode("utf-8-sig").split("\n"), 1)
            if line.strip()
        ]
        rows = [_row(where, line, tokenizer, template) for where, line in texts]
        if not rows:
            raise DataError(f"pairs: expected lines like {_FORM}, found none")
        for row in rows:
            if len(row.prompt) >= length:
                raise DataError(
                    f"{row.where}: the prompt has {len(row.prompt)} tokens, which leaves no room in --length {length}"
                )
        long = [row for row in rows if len(row) > length]
        if long and not cut:
            raise DataError(
                f"{long[0].where}: prompt and response have {len(long[0])} tokens, more than --length {length}, "
                f"as have {len(long)} of {len(rows)} lines; give --length {max(map(len, long))}, or --cut to keep "
                "what fits"
            )
        self.shortened = len(long)
        self.rows = [self._filled(row) for row in rows]

    def _filled(self, row: _Row) -> tuple[np.ndarray, int]:
        filled = np.full(self.length, self.eos_id)
        both = np.concatenate([row.prompt, row.response])[: self.length]
        filled[: len(both)] = both
        return filled, len(row.prompt)

    def ids(self) -> np.ndarray:
        """Returns all tokens."""
        return np.concatenate([row for row, _ in self.rows])

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64 tokens (batch_size, length) and prompt lengths (batch_size,)."""
        chosen = [self.rows[i] for i in shuffled(len(self.rows), step, self.batch_size, self.seed)]
        return np.stack([row for row, _ in chosen]), np.array([length for _, length in chosen])


def shuffled(rows: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Returns the rows of a step's batch; each epoch visits all in an order drawn from (seed, epoch)."""
    chosen = []
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(index, rows)
        rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)))
        chosen.append(int(rng.permutation(rows)[at]))
    return chosen


def _row(where: str, line: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> _Row:
    try:
        entry = json.loads(line)
        if "messages" in entry:
            texts = _conversation(where, entry["messages"], template)
        else:
            texts = (entry["prompt"], entry["response"])
        encoded = [text.encode() for text in texts]
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{where}: expected {_FORM}, got {line[:60]!r}") from None
    try:
        prompt, response = (tokenizer.encode(text, special=True) for text in encoded)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not texts[1].strip():
        raise DataError(f"{where}: the response is empty, so there is nothing to learn; leave the line out")
    return _Row(where, np.array(begun(prompt.tolist(), tokenizer.bos), dtype=np.int64), response)


def _conversation(where: str, messages: Any, template: ChatTemplate | None) -> tuple[str, str]:
    """Returns what comes before the assistant's last answer, and that answer with what ends it."""
    if template is None:
        raise DataError(f"{where}: messages need a chat template; start --from a folder that holds one")
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise DataError(f"{where}: expected messages like {_FORM}, got {str(messages)[:60]}")
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles[-1] != "assistant" or "user" not in roles:
        raise DataError(
            f"{where}: expected a conversation of a user and an assistant who speaks last, "
            f"got {', '.join(map(str, roles)) or 'none'}"
        )
    if not str(messages[-1].get("content") or "").strip():
        raise DataError(f"{where}: the assistant's last answer is empty, so there is nothing to learn; leave it out")
    prompt, whole = template.render(messages[:-1]), template.render(messages, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise DataError(f"{where}: the chat template writes the messages before the answer otherwise than with it")
    return prompt, whole[len(prompt) :]
