"""Reads and writes Hugging Face's config.json, of the families that `ModelConfig` knows.

A setting that changes the numbers is applied or refused. One that is not known is refused if its name says that it may
change them, otherwise named in a warning.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from . import llada, llama
from .families import DEFAULTS, family_of
from .families import FAMILIES as FAMILIES
from .settings import Settings, check_unknown

if TYPE_CHECKING:
    from ..config import ModelConfig

# Fields of ModelConfig that a config.json may state under their own names, because the family has no name for them.
OWN = ("rope_in_fp32", "norm_in_fp32", "shifted_logits", "causal_block", "forbid_mask", "variable_length", "next_token")


def read(hf: Any, warn: bool = True) -> dict[str, Any]:
    """Returns the fields of a ModelConfig. Raises ConfigError for what is not supported."""
    if not isinstance(hf, dict):
        raise ConfigError(f"config.json: expected an object, got {type(hf).__name__}")
    family, settings = family_of(hf), Settings(hf)
    try:
        fields = {**DEFAULTS[family], **_words(family).read(settings, family)}
        fields.update(_read_ids(settings))
        if family == "sdar" and settings.get("block_size") is not None:
            fields["causal_block"] = settings["block_size"]
        if fields.get("causal_block") == 1 and settings.get("is_causal") is False:
            fields["causal_block"] = 0  # as transformers 5 reads it
        if family == "nemotron_labs_diffusion":  # the others are how it was trained
            settings.refuse(dlm_paradigm="bidirectional")
            settings.used |= {"block_size", "dlm_loss_weight", "ar_loss_weight", "dp_varying_mask_ratio"}
        fields.update({name: settings[name] for name in OWN if name in hf})
    except KeyError as missing:
        raise ConfigError(f"config.json: {missing} is missing, and a {family} model needs it") from None
    check_unknown(settings, warn)
    return {**fields, "family": family}


def write(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json in the words of the family's published code."""
    fields = _words(config.family).write(config)
    ids = {f"{name}_token_id": getattr(config, f"{name}_id") for name in ("mask", "pad")}
    eos: Any = [*config.eos_ids] if config.more_eos_ids else config.eos_id
    ids["eos_token_id"] = eos
    if DEFAULTS.get(config.family, {}).get("causal_block") == 1 and config.causal_block == 0:
        fields["is_causal"] = False
    return {**fields, **{name: None if value == -1 else value for name, value in ids.items()}}


def with_rope(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns hf with the configuration's scaling of RoPE, under the key that hf has."""
    if config.family == "llada":
        return hf
    others = {name: value for name, value in hf.items() if name not in ("rope_scaling", "rope_parameters")}
    if isinstance(hf.get("rope_parameters"), dict):
        scaling = config.rope_scaling or {"rope_type": "default"}
        return {**others, "rope_parameters": {**scaling, "rope_theta": config.rope_theta}}
    return {**others, "rope_scaling": config.rope_scaling}


def all_eos_ids(value: Any, where: str) -> list[int]:
    """Returns the ids of an eos_token_id, which may be null, an int or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"{where}: eos_token_id: expected an id or a list of ids, got {value!r}")
    return list(dict.fromkeys(i for i in ids if i >= 0))


def _read_ids(hf: Settings) -> dict[str, Any]:
    """Returns the ids that config.json states; mask_id may be left to the family's default."""
    eos = all_eos_ids(hf.get("eos_token_id"), "config.json")
    ids = {"eos_id": eos[0] if eos else -1, "more_eos_ids": tuple(eos[1:]), "pad_id": hf.number("pad_token_id", -1)}
    return ids if "mask_token_id" not in hf else {**ids, "mask_id": hf.number("mask_token_id", -1)}


def _words(family: str) -> ModuleType:
    """Returns the module that reads and writes the family's words."""
    return llada if family == "llada" else llama
