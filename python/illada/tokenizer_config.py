"""tokenizer_config.json: special tokens by their roles, and the ids with which a text begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

FILE = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "cls_token", "sep_token")
# Classes that heed add_bos_token; the others follow tokenizer.json alone. Without that file GPT-2 heeds it too.
_HEED = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")


def read(folder: Path) -> dict[str, Any]:
    """Returns the file's content, {} where there is none; raises DataError for one that is damaged."""
    if not (folder / FILE).exists():
        return {}
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / FILE} cannot be read ({error}); download it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{folder / FILE}: expected an object, got {type(found).__name__}")
    return found


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Returns special tokens by the names that chat templates use, such as "bos_token"."""
    named = ((role, config.get(role)) for role in _ROLES)
    return {role: token.get("content", "") if isinstance(token, dict) else token for role, token in named if token}


def special_id(folder: Path, tokenizer: Tokenizer, role: str) -> int | None:
    """Returns the id of a special token that the folder names, None where it does not."""
    name, inner = special_tokens(read(folder)).get(role), getattr(tokenizer, "inner", None)
    return None if not isinstance(name, str) or inner is None else inner.token_to_id(name)


# ---- BOS -----------------------------------------------------------------------------------------------------------


def default_bos(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids that the folder's tokenizer puts before a text when it is asked for special tokens.

    As transformers 5: what the post-processor of tokenizer.json writes, whose tokens behind the text are left out. A
    class that heeds add_bos_token follows that, as in transformers 4, where the file states it.
    """
    config = read(folder)
    stated, kind = config.get("add_bos_token"), str(config.get("tokenizer_class") or "").removesuffix("Fast")
    heeds = kind in _HEED or (kind == "GPT2Tokenizer" and not (folder / "tokenizer.json").exists())
    if isinstance(stated, bool) and heeds:
        named = special_id(folder, tokenizer, "bos_token")
        return (named,) if stated and named is not None else ()
    processor = tokenizer.inner.post_processor  # type: ignore[attr-defined]
    return _before_text(json.loads(processor.__getstate__())) if processor is not None else ()


def _before_text(processor: dict[str, Any]) -> tuple[int, ...]:
    """Returns the ids that a post-processor of `tokenizers`, as JSON, puts before a single text."""
    if processor["type"] == "Sequence":
        return tuple(
            i for one in reversed(processor["processors"]) for i in _before_text(one)
        )  # the last one is outside
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return (int(processor["cls"][1]),)
    ids: list[int] = []
    for piece in processor["single"] if processor["type"] == "TemplateProcessing" else ():
        if "Sequence" in piece:
            break
        ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(ids)


def bos_of(folder: Path, tokenizer: Tokenizer, add: bool | None) -> list[int]:
    """Returns the ids before a prompt: none, or BOS. None: what the tokenizer does by itself.

    Raises DataError where BOS is asked for and the folder names none.
    """
    if add is None:
        return list(tokenizer.bos)
    if not add or tokenizer.bos:
        return list(tokenizer.bos) if add else []
    if (named := special_id(folder, tokenizer, "bos_token")) is None:
        raise DataError(
            f"add_bos_token: expected a bos_token in {folder / FILE} that the tokenizer holds, there is none; leave it "
            "out, or write the token into the prompt"
        )
    return [named]


def begun(ids: Sequence[int], bos: Sequence[int]) -> list[int]:
    """Returns ids that begin with BOS; what begins with it already, as many chat templates do, stays."""
    return [*ids] if [*ids[: len(bos)]] == [*bos] else [*bos, *ids]
