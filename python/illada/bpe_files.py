"""vocab.json and merges.txt, which Qwen's and Dream's folders hold instead of a tokenizer.json."""

from __future__ import annotations

from pathlib import Path

from . import tokenizer_config
from .errors import DataError

VOCAB, MERGES = "vocab.json", "merges.txt"

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

    config = tokenizer_config.read(folder)
    name = str(config.get("tokenizer_class") or "")
    kind = name.removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "DreamTokenizer", "GPT2Tokenizer"):
        raise DataError(
            f"{folder / tokenizer_config.FILE}: tokenizer_class: expected Qwen2Tokenizer, DreamTokenizer or "
            f"GPT2Tokenizer with {VOCAB} and {MERGES}, got {name!r}; save a tokenizer.json with transformers"
        )
    try:
        made = tokenizers.Tokenizer(models.BPE.from_file(str(folder / VOCAB), str(folder / MERGES)))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{folder}: {VOCAB} and {MERGES} hold no byte pairs ({error}); download them again") from None
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
                f"{folder / tokenizer_config.FILE}: added_tokens_decoder: expected {token['content']!r} to have the "
                f"next id {made.token_to_id(token['content'])}, got {index}"
            )
    return str(made.to_str())
