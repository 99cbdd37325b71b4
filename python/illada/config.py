"""ModelConfig: the shape of a Llama-like encoder, presets of published models, Hugging Face config.json in and out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from . import hf_config
from .errors import ConfigError
from .hf_config import FAMILIES


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer with RMSNorm, grouped-query attention, RoPE and SwiGLU.

    Parameters
    ----------
    dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size : int
    rope_theta : float
    rope_in_fp32 : bool
        Rotate queries and keys in float32 (LLaDA), otherwise in their own dtype. Angles are always float32.
    norm_in_fp32 : bool
        Multiply with RMSNorm's weight in float32 and round once (SDAR), otherwise round before the weight.
    norm_eps : float
    tie_embeddings, qkv_bias, qk_norm : bool
    max_seq_len : int
    mask_id, eos_id, pad_id : int
        -1: the model has no such token.
    more_eos_ids : tuple of int
        Further ids that end a text.
    shifted_logits : bool
        Row i predicts token i + 1 (Dream, autoregressive models).
    causal_block : int
        What a token sees: 0 everything; n all blocks of n tokens up to its own (SDAR); 1 itself and what came before.
    family : str
        One of `FAMILIES`; names the checkpoint's tensors.
    forbid_mask : bool
        The training loss gives the mask's logit -inf (MDLM, BD3-LM); LLaDA, iLLaDA, Dream and SDAR do not. Decoding
        and evaluation never propose the mask in any case.
    variable_length : bool
        Decoding appends a block of masks when it is reached (iLLaDA); False: all masks are there from the start (LLaDA,
        Dream). The default of `GenerationConfig`.
    next_token : bool
        Rows of clean tokens were trained to predict the token after them under a causal mask, although a mask's row
        predicts itself (the joint objectives, Nemotron-Labs-Diffusion). Likelihoods from left to right read these rows.
    rope_scaling : dict, optional
        YaRN, in the words of config.json: {"rope_type": "yarn", "factor": 16.0, ...}.
    init_std : float
        Standard deviation of fresh weights.
    hf : dict
        The config.json that was read, whose settings `to_hf` keeps where nothing changed. Not compared.

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
    norm_in_fp32: bool = False
    more_eos_ids: tuple[int, ...] = ()
    forbid_mask: bool = False
    variable_length: bool = True
    next_token: bool = False
    rope_scaling: dict[str, Any] | None = None
    hf: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

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
        object.__setattr__(self, "more_eos_ids", tuple(self.more_eos_ids))  # JSON has lists
        ids = [(name, getattr(self, name), -1) for name in ("mask_id", "eos_id", "pad_id")]
        for name, value, least in [*ids, *(("more_eos_ids", value, 0) for value in self.more_eos_ids)]:
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < self.vocab_size:
                none = "-1 (none) or " if least < 0 else ""
                raise ConfigError(f"{name}: expected {none}an id below {self.vocab_size}, got {value!r}")
        if self.mask_id >= 0 and self.mask_id in (*self.eos_ids, self.pad_id):
            raise ConfigError(f"mask_id: expected an id of its own, got {self.mask_id}, which is eos_id or pad_id too")
        for name, default in ((f.name, f.default) for f in dataclasses.fields(self)):
            if isinstance(default, bool) and not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if not isinstance(self.causal_block, int) or isinstance(self.causal_block, bool) or self.causal_block < 0:
            raise ConfigError(f"causal_block: expected 0 (full) or a block length, got {self.causal_block!r}")
        _check_yarn(self.rope_scaling)
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
        """Returns the number of weights."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        bias = self.head_dim * (self.n_heads + 2 * self.n_kv_heads) * self.qkv_bias
        layer = attention + bias + 2 * self.head_dim * self.qk_norm + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return self.n_layers * layer + self.dim + self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads a parsed config.json. Raises ConfigError for a model type or a setting that is not supported."""
        return cls(**hf_config.read(hf), hf=dict(hf))

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json that `from_hf` reads back to an equal configuration.

        Of the one that was read it keeps every setting whose meaning has not changed. Raises ConfigError for what the
        family's config.json cannot say.
        """
        new = hf_config.write(self)
        if self.hf:
            before = ModelConfig(**hf_config.read(self.hf, warn=False))
            old = hf_config.write(before)
            changed = {name: value for name, value in new.items() if old.get(name, ...) != value}
            new = {**self.hf, **changed}
            if before.rope_scaling != self.rope_scaling:
                new = hf_config.with_rope(new, self)
            if "rope_theta" in changed and isinstance(new.get("rope_parameters"), dict):
                new["rope_parameters"] = {**new["rope_parameters"], "rope_theta": self.rope_theta}
        there = ModelConfig(**hf_config.read(new, warn=False))
        names = {f.name for f in dataclasses.fields(self)} - {"hf", *hf_config.OWN}
        lost = sorted(name for name in names if getattr(there, name) != getattr(self, name))
        if lost:
            raise ConfigError(f"{', '.join(lost)}: a config.json of the family {self.family} has no key for it")
        own = {name: getattr(self, name) for name in hf_config.OWN if getattr(there, name) != getattr(self, name)}
        return {**new, **own}

    @property
    def autoregressive(self) -> bool:
        """Returns whether each token is predicted from the row before it, which sees none after: no mask is needed."""
        return self.shifted_logits and self.causal_block == 1

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Returns all ids that end a text."""
        return (self.eos_id, *self.more_eos_ids) if self.eos_id >= 0 else self.more_eos_ids


def _check_yarn(scaling: Any) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, dict) or scaling.get("rope_type") != "yarn":
        raise ConfigError(f'rope_scaling: expected None or {{"rope_type": "yarn", ...}}, got {scaling!r}')
    for name in ("factor", "original_max_position_embeddings"):
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConfigError(f"rope_scaling: {name}: expected a positive number, got {value!r}")


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
        variable_length=False,
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
        variable_length=False,
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
        norm_in_fp32=True,
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
        forbid_mask=True,
        init_std=0.05,
    ),
}
