"""ModelConfig: the shape of a Llama-like encoder, presets of published models, Hugging Face config.json in and out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

FAMILIES = ("illada", "llada", "dream", "sdar", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer with RMSNorm, grouped-query attention, RoPE and SwiGLU.

    Parameters
    ----------
    dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size : int
    rope_theta : float
    rope_in_fp32 : bool
        Rotate queries and keys in float32 (LLaDA), otherwise in their own dtype. Angles are always float32.
    norm_eps : float
    tie_embeddings, qkv_bias, qk_norm : bool
    max_seq_len : int
    mask_id, eos_id, pad_id : int
        -1: the model has no such token.
    shifted_logits : bool
        Row i predicts token i + 1 (Dream, autoregressive models).
    causal_block : int
        What a token sees: 0 everything; n all blocks of n tokens up to its own (SDAR); 1 itself and what came before.
    family : str
        One of `FAMILIES`; names the checkpoint's tensors.
    init_std : float
        Standard deviation of fresh weights.

    Raises
    ------
    ConfigError
        For values that contradict each other.

    Examples
    --------
    >>> from illada import ModelConfig
    >>> ModelConfig.preset("LLaDA-8B").num_parameters
    8015581184
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float = 10000.0
    rope_in_fp32: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_seq_len: int = 4096
    mask_id: int = -1
    eos_id: int = -1
    pad_id: int = -1
    shifted_logits: bool = False
    causal_block: int = 0
    family: str = "illada"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: expected an int of at least 1, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads: expected a multiple of n_kv_heads = {self.n_kv_heads}, got {self.n_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: expected an even number (RoPE turns pairs), got {self.head_dim}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigError(f"{name}: expected a positive number, got {value!r}")
        for name in ("mask_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or not -1 <= value < self.vocab_size:
                raise ConfigError(f"{name}: expected -1 (none) or an id below {self.vocab_size}, got {value!r}")
        if self.mask_id >= 0 and self.mask_id in (self.eos_id, self.pad_id):
            raise ConfigError(f"mask_id: expected an id of its own, got {self.mask_id}, which is eos_id or pad_id too")
        if not isinstance(self.causal_block, int) or self.causal_block < 0:
            raise ConfigError(f"causal_block: expected 0 (full) or a block length, got {self.causal_block!r}")
        if self.family not in FAMILIES:
            raise ConfigError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """Returns a published model's configuration with fields replaced: `preset("iLLaDA-8B", n_layers=2)`."""
        by_name = {known.lower(): config for known, config in PRESETS.items()}
        if name.lower() not in by_name:
            raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return dataclasses.replace(by_name[name.lower()], **changes)

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        bias = self.head_dim * (self.n_heads + 2 * self.n_kv_heads) * self.qkv_bias
        layer = attention + bias + 2 * self.head_dim * self.qk_norm + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return self.n_layers * layer + self.dim + self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads a parsed config.json. Raises ConfigError for a model type or a setting that is not supported."""
        if not isinstance(hf, dict):
            raise ConfigError(f"config.json: expected an object, got {type(hf).__name__}")
        family = _family(hf)
        read = _read_llada if family == "llada" else _read_llama
        try:
            fields = {**_FAMILY_DEFAULTS[family], **read(hf), "family": family}
        except KeyError as missing:
            raise ConfigError(f"config.json: {missing} is missing, and a {family} model needs it") from None
        return cls(**{name: _plain(value) for name, value in fields.items()})

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json that `from_hf` reads back to an equal configuration."""
        write = _write_llada if self.family == "llada" else _write_llama
        ids = {f"{name}_token_id": getattr(self, f"{name}_id") for name in ("mask", "eos", "pad")}
        own = {name: getattr(self, name) for name in ("rope_in_fp32", "shifted_logits", "causal_block")}
        return {**write(self), **{name: None if value < 0 else value for name, value in ids.items()}, **own}


# Defaults of a family's published code for what its config.json leaves out.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "illada": {"tie_embeddings": True, "mask_id": 5, "max_seq_len": 8192},
    "llada": {"rope_in_fp32": True, "mask_id": 126336, "max_seq_len": 4096},
    "dream": {"shifted_logits": True, "qkv_bias": True, "mask_id": 151666},
    "sdar": {"qk_norm": True, "causal_block": 4, "mask_id": 151669},
    "qwen2": {"shifted_logits": True, "qkv_bias": True, "causal_block": 1},
    "qwen3": {"shifted_logits": True, "qk_norm": True, "causal_block": 1},
}
_ARCHITECTURES = {"illada": "ILLaDAModelLM", "dream": "DreamModel", "sdar": "SDARForCausalLM"}
_ARCHITECTURES.update(llada="LLaDAModelLM", qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM")


def _family(hf: dict[str, Any]) -> str:
    names = [str(hf.get("model_type") or ""), *map(str, hf.get("architectures") or ())]
    for name in names:
        if name.lower() in FAMILIES:
            return name.lower()
    for name in names:  # an architecture: iLLaDAModelLM, LLaDAModelLM, DreamModel, SDARForCausalLM ...
        for family in FAMILIES:
            rest = name.lower().removeprefix(family)
            if rest != name.lower() and rest in ("modellm", "model", "forcausallm"):
                return family
    came = ", ".join(filter(None, names)) or "neither model_type nor architectures"
    raise ConfigError(f"config.json: expected one of the types {', '.join(FAMILIES)}, got {came}")


def _plain(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value  # eos_token_id may be a list


def _id(hf: dict[str, Any], name: str, family_default: int = -1) -> Any:
    value = hf.get(f"{name}_token_id", family_default)
    return -1 if value is None else value


def _refuse(hf: dict[str, Any], **supported: Any) -> None:
    for name, value in supported.items():
        if hf.get(name, value) not in (value, None):
            raise ConfigError(f"config.json: {name} = {hf[name]!r} is not supported, expected {value!r}")


def _own(hf: dict[str, Any]) -> dict[str, Any]:
    return {name: hf[name] for name in ("rope_in_fp32", "shifted_logits", "causal_block") if name in hf}


def _ids(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the ids that config.json states; mask_id may be left to the family's default."""
    ids = {f"{name}_id": _id(hf, name) for name in ("eos", "pad")}
    return ids if "mask_token_id" not in hf else {**ids, "mask_id": _id(hf, "mask")}


def _read_llada(hf: dict[str, Any]) -> dict[str, Any]:
    _refuse(hf, block_type="llama", activation_type="silu", layer_norm_type="rms", rope=True, alibi=False)
    _refuse(hf, scale_logits=False, include_bias=False, attention_layer_norm=False, input_emb_norm=False)
    heads = hf["n_heads"]
    return {
        "dim": hf["d_model"],
        "n_layers": hf["n_layers"],
        "n_heads": heads,
        "n_kv_heads": hf.get("n_kv_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["d_model"] // heads,
        "ffn_dim": hf.get("mlp_hidden_size") or hf["mlp_ratio"] * hf["d_model"],
        "vocab_size": hf.get("embedding_size") or hf["vocab_size"],
        "rope_theta": hf.get("rope_theta", 10000.0),
        "rope_in_fp32": hf.get("rope_full_precision", True),
        "norm_eps": hf.get("rms_norm_eps", 1e-5),
        "tie_embeddings": hf.get("weight_tying", False),
        "qkv_bias": hf.get("include_qkv_bias", False),
        "qk_norm": hf.get("qk_norm", False),
        "max_seq_len": hf["max_sequence_length"],
        "init_std": hf.get("init_std", 0.02),
        **_ids(hf),
        **_own(hf),
    }


def _read_llama(hf: dict[str, Any]) -> dict[str, Any]:
    _refuse(hf, hidden_act="silu", mlp_bias=False, use_sliding_window=False)
    rope = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"config.json: rope_scaling of type {kind!r} is not supported; remove it to run without")
    heads = hf["num_attention_heads"]
    family = _family(hf)
    fields = {
        "dim": hf["hidden_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "ffn_dim": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "rope_theta": hf.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", _FAMILY_DEFAULTS[family].get("tie_embeddings", False)),
        "max_seq_len": hf["max_position_embeddings"],
        "init_std": hf.get("initializer_range", 0.02),
        **_ids(hf),
        **_own(hf),
    }
    for name, key in (("qkv_bias", "attention_bias"), ("qk_norm", "qk_norm")):
        if hf.get(key) is not None:
            fields[name] = hf[key]
    if family == "sdar" and "block_size" in hf:
        fields.setdefault("causal_block", hf["block_size"])
    return fields


def _write_llada(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": [_ARCHITECTURES["llada"]],
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
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
        "include_bias": False,
        "include_qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "max_sequence_length": config.max_seq_len,
        "init_std": config.init_std,
    }


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "Dream" if config.family == "dream" else config.family,
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
        "attention_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
    }


PRESETS = {
    # rope_theta and norm_eps of iLLaDA are not published apart from its config.json: `load` reads them there.
    "iLLaDA-8B": ModelConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=14336,
        vocab_size=155136,
        rope_theta=500000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_seq_len=8192,
        mask_id=5,
        eos_id=2,
        pad_id=1,
    ),
    "LLaDA-8B": ModelConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        ffn_dim=12288,
        vocab_size=126464,
        rope_theta=500000.0,
        rope_in_fp32=True,
        norm_eps=1e-5,
        max_seq_len=4096,
        mask_id=126336,
        eos_id=126081,
        pad_id=126081,
        family="llada",
    ),
    "Dream-7B": ModelConfig(
        dim=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        ffn_dim=18944,
        vocab_size=152064,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        max_seq_len=2048,
        shifted_logits=True,
        mask_id=151666,
        eos_id=151643,
        pad_id=151643,
        family="dream",
    ),
    "SDAR-8B": ModelConfig(
        dim=4096,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=12288,
        vocab_size=151936,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
        max_seq_len=32768,
        causal_block=4,
        mask_id=151669,
        eos_id=151643,
        pad_id=151643,
        family="sdar",
    ),
    # Its mask is an unused row of the embedding: a placeholder for the token that comes next.
    "Qwen2.5-7B": ModelConfig(
        dim=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        ffn_dim=18944,
        vocab_size=152064,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        max_seq_len=32768,
        shifted_logits=True,
        causal_block=1,
        mask_id=151665,
        eos_id=151643,
        pad_id=151643,
        family="qwen2",
    ),
    # What three minutes on two cores train best (docs/measurements/model.md, "Demo training"). Ids are those of bytes.
    "demo": ModelConfig(
        dim=128,
        n_layers=3,
        n_heads=4,
        n_kv_heads=4,
        head_dim=32,
        ffn_dim=352,
        vocab_size=259,
        qk_norm=True,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_seq_len=1024,
        mask_id=256,
        eos_id=257,
        pad_id=258,
        init_std=0.05,
    ),
}
