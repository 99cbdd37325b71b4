"""Three tokenizers with one face: bytes, byte pairs learned from the training text, any `tokenizers` JSON file.

Ids of the first two: 0 .. 255 bytes, 256 the mask, 257 the end of a text, 258 padding, merges from 259 on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import bpe_files, tokenizer_config
from .byte_pairs import join, learn_merges
from .errors import DataError

if TYPE_CHECKING:
    from .training.data import Document

FILE = "illada_tokenizer.json"
MASK_ID, EOS_ID, PAD_ID, FIRST_MERGE = 256, 257, 258, 259

# A learned token stays within one piece: line breaks and the indentation after them, a word, a run of signs (with or
# without one space before it), or other white space. In code, one token for indentation and for ` =` saves most.
_PIECE = re.compile(rb"\s*\n[ \t]*| ?[A-Za-z0-9_]+| ?[^\sA-Za-z0-9_]+|\s+")


class Tokenizer(Protocol):
    """Bytes to ids and back."""

    mask_id: int
    eos_id: int
    pad_id: int
    bos: tuple[int, ...]  # ids with which a prompt, and a document, begins by default

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: bytes, special: bool = False) -> np.ndarray:
        """Returns token ids, int64, none of them mask_id, eos_id or pad_id.

        special: text that spells a special token's name becomes that token, as chat templates need; otherwise it stays
        text.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; special ids give nothing, broken UTF-8 gives U+FFFD."""

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads back."""


class ByteTokenizer:
    """Bytes, with learned merges if any: id 259 + i stands for the bytes of the two ids in merges[i]."""

    mask_id, eos_id, pad_id = MASK_ID, EOS_ID, PAD_ID
    bos: tuple[int, ...] = ()

    def __init__(self, merges: Sequence[tuple[int, int]] = ()):
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.pieces: list[bytes] = [bytes([i]) for i in range(256)] + [b"", b"", b""]
        for index, (a, b) in enumerate(self.merges):
            if not all(0 <= x < FIRST_MERGE + index for x in (a, b)):
                raise DataError(f"tokenizer: merge {index} joins ids {a} and {b}, which are not defined before it")
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self._rank = {pair: FIRST_MERGE + i for i, pair in enumerate(self.merges)}
        self._known: dict[bytes, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @classmethod
    def learn(
        cls,
        documents: Sequence[Document],
        vocab_size: int,
        sample_bytes: int = 4_000_000,
        progress: Callable[[float], object] = lambda done: None,
    ) -> ByteTokenizer:
        """Learns byte-pair encoding (Sennrich et al., arXiv 1508.07909) from evenly spaced documents.

        Each round joins the most frequent pair of neighbours, ties to the lower ids, and calls `progress` with the
        share of rounds done. Near linear in the text, whatever its words: a few seconds for 4 MB and 2048 ids.
        """
        total = sum(len(d.content) for d in documents)
        stride = max(1, round(total / sample_bytes))
        counts: Counter[bytes] = Counter()
        for document in documents[::stride]:
            counts.update(_PIECE.findall(document.content))
        return cls(learn_merges(counts, FIRST_MERGE, vocab_size - FIRST_MERGE, progress))

    def encode(self, text: bytes, special: bool = False) -> np.ndarray:
        if not self.merges:
            return np.frombuffer(text, np.uint8).astype(np.int64)
        known, ids = self._known, []
        for piece in _PIECE.findall(text):
            if piece in known:
                ids += known[piece]
                continue
            joined = join(piece, self._rank)
            if len(piece) <= 64:  # longer ones hardly ever come again
                known[piece] = joined
            ids += joined
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.pieces[i] if 0 <= i < len(self.pieces) else b"" for i in ids).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes", "merges": self.merges}


class JsonTokenizer:
    """A `tokenizers` JSON file, as Hugging Face models have in tokenizer.json.

    Special ids given as -1 are looked up by their usual names; one that the file does not name gets a row of its own
    behind the vocab.
    """

    def __init__(self, text: str, mask_id: int = -1, eos_id: int = -1, pad_id: int = -1, bos: Sequence[int] = ()):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise DataError(
                "a tokenizers JSON file needs tokenizers: pip install 'illada-kernels[tokenizers]'"
            ) from None
        try:
            self.inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(f"not a tokenizers JSON file ({error})") from None
        self.inner.no_truncation()  # transformers saves these two along, and they would change texts silently
        self.inner.no_padding()
        self.text, self.bos = text, tuple(map(int, bos))
        size = self.inner.get_vocab_size(with_added_tokens=True)
        given = (mask_id, eos_id, pad_id)
        named = (
            ("[MASK]", "<[MASK]>", "<mask>", "<|mdm_mask|>", "<|mask|>"),
            ("</s>", "<|endoftext|>", "[SEP]", "<eos>"),
            ("[PAD]", "<pad>"),
        )
        found = [
            i if i >= 0 else next(filter(lambda x: x is not None, map(self.inner.token_to_id, n)), None)
            for i, n in zip(given, named)
        ]
        for index, value in enumerate(found):
            if value is None:
                found[index], size = size, size + 1
        self.mask_id, self.eos_id, self.pad_id = (int(i) for i in found if i is not None)
        self._size = max(size, *(i + 1 for i in (self.mask_id, self.eos_id, self.pad_id)))

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: bytes, special: bool = False) -> np.ndarray:
        """Returns token ids; raises DataError for text that spells the mask, end-of-text or padding token."""
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"expected UTF-8 text, got byte {text[error.start]:#04x} at {error.start}") from None
        self.inner.encode_special_tokens = not special
        ids = np.array(self.inner.encode(decoded, add_special_tokens=False).ids, dtype=np.int64)
        for name in ("mask_id",) if special else ("mask_id", "eos_id", "pad_id"):
            if (ids == getattr(self, name)).any():
                token = self.inner.id_to_token(getattr(self, name))
                raise DataError(f"the text spells {token}, the token of {name}; take it out, or mark it as special")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        special = (self.mask_id, self.eos_id, self.pad_id)
        size = self.inner.get_vocab_size(with_added_tokens=True)
        return self.inner.decode([i for i in ids if i not in special and i < size], skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        ids = [self.mask_id, self.eos_id, self.pad_id]
        return {"kind": "tokenizers", "json": self.text, "ids": ids, "bos": list(self.bos)}


def from_json(saved: Any) -> Tokenizer:
    """Returns the tokenizer of which `to_json` made `saved`; raises DataError for anything else."""
    kind = saved.get("kind") if isinstance(saved, dict) else None
    try:
        if kind == "bytes":
            return ByteTokenizer([(a, b) for a, b in saved["merges"]])
        if kind == "tokenizers":
            mask, eos, pad = saved["ids"]
            return JsonTokenizer(saved["json"], mask, eos, pad, saved.get("bos", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"tokenizer: damaged ({error})") from None
    raise DataError(f"tokenizer: expected kind 'bytes' or 'tokenizers', got {kind!r}")


def stream(documents: Sequence[Document], tokenizer: Tokenizer, bos: Sequence[int] | None = None) -> np.ndarray:
    """Returns all documents' tokens end to end, int64, each between `bos` and the end-of-text id.

    bos: None is the tokenizer's own, with which prompts begin.
    """
    before = np.array(tokenizer.bos if bos is None else bos, dtype=np.int64)
    pieces = []
    for document in documents:
        try:
            pieces += [before, tokenizer.encode(document.content), np.array([tokenizer.eos_id])]
        except DataError as error:
            raise DataError(f"{document.name}: {error}") from None
    return np.concatenate(pieces)


def make_tokenizer(
    spec: str, documents: Sequence[Document], progress: Callable[[float], object] = lambda done: None
) -> Tokenizer:
    """Returns the tokenizer that `spec` names.

    spec is "bytes", "bpe:N" (byte pairs learned from `documents`, N ids in all), or the path of a tokenizers JSON file.
    Raises DataError for anything else.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        size = int(spec[4:]) if spec[4:].isdecimal() else 0
        if size <= FIRST_MERGE:
            raise DataError(f"tokenizer: expected bpe:N with N above {FIRST_MERGE}, got {spec!r}")
        return ByteTokenizer.learn(documents, size, progress=progress)
    return JsonTokenizer(_read(Path(spec), "bytes, bpe:N or the path of a tokenizers JSON file"))


def load_tokenizer(folder: Path, vocab_size: int, mask_id: int, eos_id: int, pad_id: int) -> Tokenizer:
    """Returns the tokenizer beside a checkpoint.

    Our own file, else tokenizer.json, else vocab.json and merges.txt, else bytes if the vocab has 259 ids. Raises
    DataError where there is none, and for one with ids that the model does not have.
    """
    found = _tokenizer_there(folder, vocab_size, mask_id, eos_id, pad_id)
    largest = max(found.inner.get_vocab().values()) if isinstance(found, JsonTokenizer) else found.vocab_size - 1
    if largest >= vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has ids up to {largest}, the model only below {vocab_size}; they are not of the "
            "same model"
        )
    return found


def _tokenizer_there(folder: Path, vocab_size: int, mask_id: int, eos_id: int, pad_id: int) -> Tokenizer:
    if (folder / FILE).exists():
        try:
            return from_json(json.loads(_read(folder / FILE, "a tokenizer")))
        except DataError as error:
            raise DataError(f"{folder / FILE}: {error}; save the checkpoint again") from None
        except ValueError as error:
            raise DataError(f"{folder / FILE} is not JSON ({error}); save the checkpoint again") from None
    if (folder / "tokenizer.json").exists():
        text = _read(folder / "tokenizer.json", "a tokenizer")
    elif (folder / bpe_files.VOCAB).exists() and (folder / bpe_files.MERGES).exists():
        text = bpe_files.tokenizer_json(folder)
    elif vocab_size == FIRST_MERGE:
        return ByteTokenizer()
    else:
        raise DataError(
            f"{folder} holds no tokenizer: expected {FILE}, tokenizer.json or vocab.json and merges.txt beside it"
        )
    made = JsonTokenizer(text, mask_id, eos_id, pad_id)
    made.bos = tokenizer_config.default_bos(folder, made)
    return made


def _read(file: Path, expected: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"tokenizer: {file} cannot be read ({error.strerror}); expected {expected}") from None
    except UnicodeDecodeError:
        raise DataError(f"tokenizer: {file} is not text; expected {expected}") from None
