"""vocab.json and merges.txt, which Qwen's and Dream's folders hold instead of a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import DataError

VOCAB, MERGES, _CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"

# How Qwen2 cuts text before pairs are joined: contractions, words, single digits, signs, line breaks, white space.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_json(folder: Path) -> str:
    """Returns the tokenizers JSON of a folder's vocab.json, merges.txt and tokenizer_config.json.

    Raises DataError for files that are damaged and for a tokenizer_class whose way of cutting text is not known.
    """
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise DataError("vocab.json and merges.txt need tokenizers: pip install 'illada-kernels[tokenizers]'") from None
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    config = _read_json(folder / _CONFIG)
    name = str(config.get("tokenizer_class") or "")
    kind = name.removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "DreamTokenizer", "GPT2Tokenizer"):
        raise DataError(
            f"{folder / _CONFIG}: tokenizer_class: expected Qwen2Tokenizer, DreamTokenizer or GPT2Tokenizer with "
            f"{VOCAB} and {MERGES}, got {name!r}; save a tokenizer.json with transformers"
        )
    try:
        made = tokenizers.Tokenizer(models.BPE.from_file(str(folder / VOCAB), str(folder / MERGES)))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{folder}: {VOCAB} and {MERGES} are no byte pairs ({error}); download them again") from None
    made.decoder = decoders.ByteLevel()
    space = bool(config.get("add_prefix_space", False))
    if kind == "GPT2Tokenizer":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    else:
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    for index, token in sorted((int(i), t) for i, t in (config.get("added_tokens_decoder") or {}).items()):
        options = {key: token[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token}
        made.add_tokens([tokenizers.AddedToken(token["content"], special=bool(token.get("special")), **options)])
        if made.token_to_id(token["content"]) != index:
            raise DataError(
                f"{folder / _CONFIG}: added_tokens_decoder: expected {token['content']!r} to have the next id "
                f"{made.token_to_id(token['content'])}, got {index}"
            )
    return str(made.to_str())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); download it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected an object, got {type(found).__name__}")
    return found
