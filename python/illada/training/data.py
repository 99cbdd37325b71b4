"""Corpora, their split by file, n-gram baselines, and batches that are a function of (seed, step)."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError

# Folders that the default corpus leaves out: not the library's own source, not installed everywhere (Debian), or tables
# written by a program.
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


RUN = "run.json"  # what marks the folder of a training run


@dataclass(frozen=True)
class Document:
    """A text and its name: the file's path in the corpus, with "/" between folders."""

    name: str
    content: bytes


def read_corpus(path: str | Path | None = None, leave_out: Path | None = None) -> list[Document]:
    """Returns the documents of a file, or of every UTF-8 file in a folder sorted by name.

    None stands for the sources of Python's standard library. In a folder, binary, empty and hidden files are skipped,
    and so are `leave_out` and the folders of training runs, because a run writes text into its own. Raises DataError if
    nothing is left.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not _NOT_SOURCE.intersection(f.relative_to(root).parts)]
        return _documents(
            root, files, "the standard library's sources were not found here: give a file or folder with --data"
        )
    root = Path(path)
    if root.is_file():
        content = root.read_bytes()
        if not content.strip():
            raise DataError(f"{root} is empty: give a file or folder of UTF-8 text")
        if not is_text(content):
            raise DataError(f"{root} is not UTF-8 text (a binary file?): give a file or folder of UTF-8 text")
        return [Document(root.name, content)]
    if not root.exists():
        raise DataError(f"{root} does not exist: give a file or folder of UTF-8 text")
    files = list(_files(root, leave_out.resolve() if leave_out else None))
    return _documents(
        root,
        files,
        f"{root} holds no UTF-8 text ({len(files)} files, all empty or binary): give another file or folder",
    )


def _files(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not (entry / RUN).is_file() and entry.resolve() != leave_out:
                yield from _files(entry, leave_out)
        elif entry.is_file():
            yield entry


def _documents(root: Path, files: list[Path], nothing: str) -> list[Document]:
    documents = []
    for file in sorted(files):
        content = file.read_bytes()
        if content.strip() and is_text(content):
            documents.append(Document(file.relative_to(root).as_posix(), content))
    if not documents:
        raise DataError(nothing)
    return documents


def is_text(content: bytes) -> bool:
    """Returns whether content is UTF-8 without a zero byte, by which `git` and `grep` know a binary file."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def split(documents: Sequence[Document], held_out: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Returns (training, held out), by a hash of each file's name so that a file keeps its side when others change.

    Where that leaves a side empty (few files), the last `held_out` of the longest document's lines are held out. Raises
    DataError if that is one line.
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        name = document.name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
        share = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") / 2**32
        sides[share < held_out].append(document)
    if all(sides):
        return sides
    longest = max(documents, key=lambda d: len(d.content))
    lines = longest.content.splitlines(keepends=True)
    cut = min(len(lines) - 1, round(len(lines) * (1 - held_out)))
    if cut < 1:
        raise DataError(f"{longest.name} has one line only, so nothing can be held out: give more text")
    train = [d for d in documents if d is not longest] + [Document(longest.name, b"".join(lines[:cut]))]
    return train, [Document(longest.name + " (end)", b"".join(lines[cut:]))]


@dataclass(frozen=True)
class NgramBits:
    """Bits per byte on held-out text of byte n-gram models counted on the training text."""

    unigram: float
    bigram: float


def ngram_bits(train: Sequence[Document], held_out: Sequence[Document]) -> NgramBits:
    """Returns the bits of a unigram model (one pseudo-count per byte) and a bigram model.

    The bigram is p(b | a) = (n(a, b) + p(b)) / (n(a) + 1); a text's first byte follows a zero byte.
    """
    singles, pairs = np.zeros(256), np.zeros((256, 256))
    for previous, current in map(_pairs, train):
        singles += np.bincount(current, minlength=256)
        pairs += np.bincount(previous.astype(np.int64) * 256 + current, minlength=65536).reshape(256, 256)
    unigram = (singles + 1) / (singles + 1).sum()
    bigram = (pairs + unigram) / (pairs.sum(1, keepdims=True) + 1)
    bits = np.zeros(2)
    for previous, current in map(_pairs, held_out):
        bits -= np.log2(unigram[current]).sum(), np.log2(bigram[previous, current]).sum()
    bits /= sum(len(d.content) for d in held_out)
    return NgramBits(float(bits[0]), float(bits[1]))


def _pairs(document: Document) -> tuple[np.ndarray, np.ndarray]:
    current = np.frombuffer(document.content, np.uint8)
    return np.concatenate([np.zeros(1, np.uint8), current[:-1]]), current


class Windows:
    """Batches of `length` tokens cut from one long stream; step i's batch is a function of (seed, i).

    Epoch e cuts the stream at a random offset and visits all windows in random order, both drawn from (seed, e), so a
    resumed run sees what it would have seen. A stream shorter than two windows is repeated.
    """

    def __init__(self, stream: np.ndarray, length: int, batch_size: int, seed: int):
        if not len(stream):
            raise DataError("stream: expected at least one token, got none")
        if len(stream) < 2 * length:
            stream = np.tile(stream, -(-2 * length // len(stream)))
        self.stream, self.length, self.batch_size, self.seed = stream, length, batch_size, seed
        self.per_epoch = (len(stream) - length) // length  # a random offset below `length` always leaves this many
        self._epoch = -1
        self._starts = np.zeros(0, np.int64)

    def ids(self) -> np.ndarray:
        """Returns all tokens."""
        return self.stream

    def batch(self, step: int) -> np.ndarray:
        """Returns int64 (batch_size, length)."""
        first = step * self.batch_size
        starts = [self._start(first + i) for i in range(self.batch_size)]
        return np.stack([self.stream[s : s + self.length] for s in starts]).astype(np.int64)

    def _start(self, index: int) -> int:
        epoch, at = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.Philox(key=np.array([self.seed % 2**64, epoch], np.uint64)))
            self._starts = rng.integers(self.length) + self.length * rng.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._starts[at])
