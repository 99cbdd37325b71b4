"""The config.json of models with Llama's names: all families but LLaDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .families import ARCHITECTURES, DEFAULTS, MODEL_TYPES
from .settings import Settings

if TYPE_CHECKING:
    from ..config import ModelConfig


def read(hf: Settings, family: str) -> dict[str, Any]:
    hf.refuse(mlp_bias=False, use_sliding_window=False, partial_rotary_factor=1.0)
    if hf.get("hidden_act") not in ("silu", "swish", None):
        raise ConfigError(f"config.json: hidden_act = {hf['hidden_act']!r} is not supported, expected 'silu'")
    layers = hf.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise ConfigError(f"config.json: layer_types: expected 'full_attention' alone, got {layers!r}"[:300])
    heads, dim = hf.number("num_attention_heads"), hf.number("hidden_size")
    defaults = DEFAULTS[family]
    fields = {
        "dim": dim,
        "n_layers": hf.number("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": hf.number("num_key_value_heads", heads),
        "head_dim": hf.number("head_dim", dim // max(heads, 1)),
        "ffn_dim": hf.number("intermediate_size"),
        "vocab_size": hf.number("vocab_size"),
        **_rope(hf),
        "norm_eps": hf.number("rms_norm_eps", 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", defaults.get("tie_embeddings", False)),
        "max_seq_len": hf.number("max_position_embeddings", defaults.get("max_seq_len", ...)),
        "init_std": hf.number("initializer_range", 0.02),
    }
    if (fields["rope_scaling"] or {}).get("llama_4_scaling_beta"):  # scales queries from here on
        fields["max_seq_len"] = min(fields["max_seq_len"], fields["rope_scaling"]["original_max_position_embeddings"])
    for name, key in (("qkv_bias", "attention_bias"), ("qk_norm", "qk_norm")):
        if hf.get(key) is not None:
            fields[name] = hf[key]
    return fields


_YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"}
_YARN |= {"mscale", "mscale_all_dim", "llama_4_scaling_beta"}


def _rope(hf: Settings) -> dict[str, Any]:
    """Returns the base of RoPE's angles and their scaling; raises ConfigError for any but YaRN."""
    theta, scaling, said = hf.number("rope_theta", None), None, ""
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ConfigError(f"config.json: {key}: expected null or one object of numbers, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default" if "rope_theta" in rope else None))
        if kind not in ("default", "yarn"):
            raise ConfigError(f"config.json: {key} of type {kind!r} is not supported; remove it to run without")
        other = {name: v for name, v in rope.items() if name not in ("rope_type", "type", "rope_theta")}
        partial = other.pop("partial_rotary_factor", 1.0)
        if partial != 1.0 or (other if kind == "default" else set(other) - _YARN):
            names = "" if kind == "default" else f" and {', '.join(sorted(_YARN))}"
            raise ConfigError(f"config.json: {key}: expected rope_theta{names or ' alone'}, got {rope!r}")
        own, found = (
            Settings(rope).number("rope_theta", theta),
            {"rope_type": kind, **other} if kind == "yarn" else None,
        )
        if (theta is not None and own != theta) or (said and found != scaling):
            raise ConfigError(
                f"config.json: {key}: {rope!r} contradicts {said or 'rope_theta'}; keep the one that is meant"
            )
        theta, scaling, said = own, found, key
    return {"rope_theta": 10000.0 if theta is None else theta, "rope_scaling": scaling}


def write(config: ModelConfig) -> dict[str, Any]:
    block = {"block_size": config.causal_block} if config.family == "sdar" else {}
    defaults = DEFAULTS[config.family]
    own = {"attention_bias": config.qkv_bias, "qk_norm": config.qk_norm}
    implied = {"attention_bias": defaults.get("qkv_bias", False), "qk_norm": defaults.get("qk_norm", False)}
    return {
        "model_type": MODEL_TYPES.get(config.family, config.family),
        "architectures": [ARCHITECTURES[config.family]],
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        **{name: value for name, value in own.items() if value != implied[name]},
        **({"rope_scaling": config.rope_scaling} if config.rope_scaling else {}),
        **block,
    }
