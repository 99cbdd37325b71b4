"""Reads and writes Hugging Face's config.json, of the families that `ModelConfig` knows.

A setting that changes the numbers is applied or refused. One that is not known is refused if its name says that it may
change them, otherwise named in a warning.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import ModelConfig

FAMILIES = (
    *("illada", "llada", "dream", "sdar", "qwen2", "qwen3", "llama"),
    *("stable_diffcoder", "a2d_qwen2", "a2d_qwen3", "nemotron_labs_diffusion"),
)

# Defaults of a family's published code for what its config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "illada": {"tie_embeddings": True, "mask_id": 5, "max_seq_len": 8192},
    "llada": {"rope_in_fp32": True, "mask_id": 126336, "max_seq_len": 4096, "variable_length": False},
    "dream": {"shifted_logits": True, "qkv_bias": True, "mask_id": 151666, "variable_length": False},
    "sdar": {"qk_norm": True, "norm_in_fp32": True, "causal_block": 4, "mask_id": 151669},
    "qwen2": {"shifted_logits": True, "qkv_bias": True, "causal_block": 1},
    "qwen3": {"shifted_logits": True, "qk_norm": True, "causal_block": 1},
    "llama": {"shifted_logits": True, "causal_block": 1},
    "stable_diffcoder": {"causal_block": 4, "mask_id": 5},
    # Qwen with full attention and the token <|mask|> behind those that its tokenizer had
    "a2d_qwen2": {"qkv_bias": True, "mask_id": 151665, "variable_length": False},
    "a2d_qwen3": {"qk_norm": True, "mask_id": 151669, "variable_length": False},
    "nemotron_labs_diffusion": {"mask_id": 100, "next_token": True},
}
_ARCHITECTURES = {
    "illada": "ILLaDAForCausalLM",
    "llada": "LLaDAModelLM",
    "dream": "DreamModel",
    "sdar": "SDARForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "stable_diffcoder": "StableDiffcoderForCausalLM",
    "a2d_qwen2": "A2DQwen2LMHeadModel",
    "a2d_qwen3": "A2DQwen3LMHeadModel",
    "nemotron_labs_diffusion": "NemotronLabsDiffusionModel",
}
_MODEL_TYPES = {  # where they are not the family's name
    "dream": "Dream",
    "stable_diffcoder": "llama",
    "a2d_qwen2": "a2d-qwen2",
    "a2d_qwen3": "a2d-qwen3",
}
_MIXTURE = re.compile(r"moe|mixtral|llada2|rnd1|diffusion_?gemma", re.IGNORECASE)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Fields of ModelConfig that a config.json may state under their own names, because the family has no name for them.
OWN = ("rope_in_fp32", "norm_in_fp32", "shifted_logits", "causal_block", "forbid_mask", "variable_length", "next_token")

# Settings that change no number of a forward pass. Dropout matters to the published training code alone.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    alibi_bias_max architectures attn_implementation auto_map bos_token_id chunk_size_feed_forward cls_token_id
    cross_attention_hidden_size debug decoder_start_token_id dtype ep_size finetuning_task flash_attention
    fuse_cross_entropy generation_config gradient_checkpointing id2label init_cutoff_factor init_device init_fn
    is_decoder is_encoder_decoder label2id max_window_layers micro_forward mlp_ratio model_type name_or_path
    num_labels output_attentions output_hidden_states precision prefix pretraining_tp problem_type return_dict
    sep_token_id skip_checkpoint sliding_window task_specific_params tie_encoder_decoder tie_word_embeddings
    tokenizer_class torch_dtype torchscript transformers_version unk_token_id use_bfloat16 use_cache use_deepep
    """.split()
)
_MAY_CHANGE_NUMBERS = re.compile(
    r"rope|rotary|yarn|scal|norm|clip|cap|multiplier|sliding|window|layer_types|bias|alibi|expert|moe|quant|attention|attn"
    r"|activation|act_fn|residual|causal|logit|lora|adapter|head|gate"
)

_ON_UNLESS_SAID = re.compile(r"^use_rope|^is_causal$|multiplier")  # 0 and false change the numbers too


class _Settings(dict[str, Any]):
    """A config.json that remembers which keys were read."""

    def __init__(self, hf: dict[str, Any]) -> None:
        super().__init__(hf)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)

    def number(self, name: str, default: Any = ...) -> Any:
        """Returns a number, or the default where the key is missing or null. Raises KeyError if there is none."""
        value = self.get(name)
        if value is None:
            if default is ...:
                raise KeyError(name)
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"config.json: {name}: expected a number, got {value!r}")
        return value

    def flag(self, name: str, default: bool) -> Any:
        """Returns a setting that is true or false: the default where the key is missing, false where it is null."""
        value = self.get(name, default)
        return False if value is None else value

    def refuse(self, **supported: Any) -> None:
        """Raises ConfigError for a key whose value is neither null nor the supported one."""
        for name, value in supported.items():
            if self.get(name) not in (value, None):
                raise ConfigError(f"config.json: {name} = {self[name]!r} is not supported, expected {value!r}")


def read(hf: Any, warn: bool = True) -> dict[str, Any]:
    """Returns the fields of a ModelConfig. Raises ConfigError for what is not supported."""
    if not isinstance(hf, dict):
        raise ConfigError(f"config.json: expected an object, got {type(hf).__name__}")
    family, settings = _family(hf), _Settings(hf)
    try:
        fields = {**_DEFAULTS[family], **(_read_llada if family == "llada" else _read_llama)(settings, family)}
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
    _check_unknown(settings, warn)
    return {**fields, "family": family}


def write(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json in the words of the family's published code."""
    fields = _write_llada(config) if config.family == "llada" else _write_llama(config)
    ids = {f"{name}_token_id": getattr(config, f"{name}_id") for name in ("mask", "pad")}
    eos: Any = [*config.eos_ids] if config.more_eos_ids else config.eos_id
    ids["eos_token_id"] = eos
    if _DEFAULTS.get(config.family, {}).get("causal_block") == 1 and config.causal_block == 0:
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


def _family(hf: dict[str, Any]) -> str:
    architectures = hf.get("architectures") or ()
    if not isinstance(architectures, (list, tuple)):
        raise ConfigError(f"config.json: architectures: expected a list, got {architectures!r}")
    names = [str(hf.get("model_type") or ""), *map(str, architectures)]
    came = ", ".join(filter(None, names)) or "neither model_type nor architectures"
    experts = names[:1] if any(isinstance(hf.get(key), int) and hf[key] > 1 for key in _EXPERTS) else ()
    if named := [*filter(_MIXTURE.search, names), *experts]:
        raise ConfigError(
            f"config.json: {named[0]} is a mixture of experts, which is not supported; expected a dense model"
        )
    known = {name.lower(): family for table in (_MODEL_TYPES, _ARCHITECTURES) for family, name in table.items()}
    known.update((family, family) for family in FAMILIES)
    if names[0] == "llama":  # which Stable-DiffCoder says too
        names = [*names[1:], names[0]]
    for name in map(str.lower, names):
        short = re.sub(r"(modellm|model|forcausallm)$", "", name)  # DreamModel, ILLaDAModelLM
        for candidate in (name, short):
            if candidate in known:
                return known[candidate]
    raise ConfigError(f"config.json: expected one of the types {', '.join(FAMILIES)}, got {came}")


def _read_ids(hf: _Settings) -> dict[str, Any]:
    """Returns the ids that config.json states; mask_id may be left to the family's default."""
    eos = all_eos_ids(hf.get("eos_token_id"), "config.json")
    ids = {"eos_id": eos[0] if eos else -1, "more_eos_ids": tuple(eos[1:]), "pad_id": hf.number("pad_token_id", -1)}
    return ids if "mask_token_id" not in hf else {**ids, "mask_id": hf.number("mask_token_id", -1)}


def _check_unknown(hf: _Settings, warn: bool) -> None:
    unknown = {
        name: value
        for name, value in hf.items()
        if name not in hf.used
        and name not in _HARMLESS
        and "dropout" not in name
        and (value not in (None, False, [], {}, "") or (value is not None and _ON_UNLESS_SAID.search(name)))
    }
    odd = [f"{name} = {value!r}" for name, value in unknown.items() if _MAY_CHANGE_NUMBERS.search(name)]
    if odd:
        raise ConfigError(
            f"config.json: {', '.join(odd)} may change the numbers and is not supported; delete to ignore"
        )
    if unknown and warn:
        warnings.warn(f"config.json: not known here and ignored: {', '.join(unknown)}", stacklevel=4)


# ---- LLaDA -------------------------------------------------------------------------------------------------------

_LLADA_FIXED = {  # what the published code would compute otherwise: written, because its own defaults differ
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
_LLADA_MISSING = {
    "block_type": "sequential",
    "activation_type": "swiglu",
    "layer_norm_type": "default",
    "rope": False,
    "weight_tying": True,
    "max_sequence_length": 1024,
    "embedding_size": 50304,
    "vocab_size": 50257,
}


def _read_llada(hf: _Settings, family: str) -> dict[str, Any]:
    missing = {name: value for name, value in _LLADA_MISSING.items() if name not in hf}
    for name, supported in _LLADA_FIXED.items():
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


def _write_llada(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": [_ARCHITECTURES["llada"]],
        **_LLADA_FIXED,
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


# ---- Llama-like --------------------------------------------------------------------------------------------------


def _read_llama(hf: _Settings, family: str) -> dict[str, Any]:
    hf.refuse(mlp_bias=False, use_sliding_window=False, partial_rotary_factor=1.0)
    if hf.get("hidden_act") not in ("silu", "swish", None):
        raise ConfigError(f"config.json: hidden_act = {hf['hidden_act']!r} is not supported, expected 'silu'")
    layers = hf.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise ConfigError(f"config.json: layer_types: expected 'full_attention' alone, got {layers!r}"[:300])
    heads, dim = hf.number("num_attention_heads"), hf.number("hidden_size")
    defaults = _DEFAULTS[family]
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


def _rope(hf: _Settings) -> dict[str, Any]:
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
            _Settings(rope).number("rope_theta", theta),
            {"rope_type": kind, **other} if kind == "yarn" else None,
        )
        if (theta is not None and own != theta) or (said and found != scaling):
            raise ConfigError(
                f"config.json: {key}: {rope!r} contradicts {said or 'rope_theta'}; keep the one that is meant"
            )
        theta, scaling, said = own, found, key
    return {"rope_theta": 10000.0 if theta is None else theta, "rope_scaling": scaling}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    block = {"block_size": config.causal_block} if config.family == "sdar" else {}
    defaults = _DEFAULTS[config.family]
    own = {"attention_bias": config.qkv_bias, "qk_norm": config.qk_norm}
    implied = {"attention_bias": defaults.get("qkv_bias", False), "qk_norm": defaults.get("qk_norm", False)}
    return {
        "model_type": _MODEL_TYPES.get(config.family, config.family),
        "architectures": [_ARCHITECTURES[config.family]],
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
