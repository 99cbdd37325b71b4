"""LLaDA's config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .families import ARCHITECTURES
from .settings import Settings

if TYPE_CHECKING:
    from ..config import ModelConfig

_FIXED = {  # what the published code would compute otherwise: written, because its own defaults differ
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "rope": True,
    "alibi": False,
    "scale_logits": False,
    "include_bias": False,
}

# What the published configuration class (`ModelConfig` of configuration_llada.py) takes a missing key as; those that
# differ from the models that were released.
_MISSING = {
    "block_type": "sequential",
    "activation_type": "swiglu",
    "layer_norm_type": "default",
    "rope": False,
    "weight_tying": True,
    "max_sequence_length": 1024,
    "embedding_size": 50304,
    "vocab_size": 50257,
}


def read(hf: Settings, family: str) -> dict[str, Any]:
    missing = {name: value for name, value in _MISSING.items() if name not in hf}
    for name, supported in _FIXED.items():
        value = missing.get(name, hf.get(name, supported))
        if value != supported and not (value is None and supported is False):
            said = f"is missing, which LLaDA's code takes as {value!r}," if name in missing else f"= {value!r}"
            raise ConfigError(f"config.json: {name} {said} is not supported, expected {supported!r}")
    hf.update(missing)
    hf.get("attention_layer_norm_with_affine")  # of a norm that is off
    hf.get("vocab_size")  # which embedding_size outranks
    heads, dim = hf.number("n_heads"), hf.number("d_model")
    shared = hf.get("multi_query_attention")
    kv_heads = 1 if shared else heads
    if shared is not None and hf.number("n_kv_heads", kv_heads) != kv_heads:
        raise ConfigError(
            f"config.json: n_kv_heads = {hf['n_kv_heads']} contradicts multi_query_attention = {shared}; keep the one "
            "that is meant"
        )
    return {
        "dim": dim,
        "n_layers": hf.number("n_layers"),
        "n_heads": heads,
        "n_kv_heads": hf.number("n_kv_heads", kv_heads),
        "head_dim": hf.number("head_dim", dim // max(heads, 1)),
        "ffn_dim": hf.number("mlp_hidden_size", None) or hf.number("mlp_ratio") * dim,
        "vocab_size": hf.number("embedding_size", None) or hf.number("vocab_size"),
        "rope_theta": hf.number("rope_theta", 10000.0),
        "rope_in_fp32": hf.flag("rope_full_precision", True),
        "norm_eps": hf.number("rms_norm_eps", 1e-5),
        "tie_embeddings": hf.flag("weight_tying", True),
        "qkv_bias": hf.flag("include_qkv_bias", False),
        "qk_norm": hf.get("qk_norm", False),
        "max_seq_len": hf.number("max_sequence_length"),
        "init_std": hf.number("init_std", 0.02),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": [ARCHITECTURES["llada"]],
        **_FIXED,
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0),
        "d_model": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "mlp_hidden_size": config.ffn_dim,
        "embedding_size": config.vocab_size,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rope_full_precision": config.rope_in_fp32,
        "rms_norm_eps": config.norm_eps,
        "weight_tying": config.tie_embeddings,
        "include_qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "max_sequence_length": config.max_seq_len,
        "init_std": config.init_std,
    }
