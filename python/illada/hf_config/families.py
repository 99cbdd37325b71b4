"""The families of models: their names, and what their published code takes where config.json says nothing."""

from __future__ import annotations

import re
from typing import Any

from ..errors import ConfigError

FAMILIES = (
    *("illada", "llada", "dream", "sdar", "qwen2", "qwen3", "llama"),
    *("stable_diffcoder", "a2d_qwen2", "a2d_qwen3", "nemotron_labs_diffusion"),
)

# Defaults of a family's published code for what its config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
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
ARCHITECTURES = {
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
MODEL_TYPES = {  # where they are not the family's name
    "dream": "Dream",
    "stable_diffcoder": "llama",
    "a2d_qwen2": "a2d-qwen2",
    "a2d_qwen3": "a2d-qwen3",
}
_MIXTURE = re.compile(r"moe|mixtral|llada2|rnd1|diffusion_?gemma", re.IGNORECASE)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_of(hf: dict[str, Any]) -> str:
    """Returns the family that a config.json names; raises ConfigError for one that is not known, and for mixtures of
    experts."""
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
    known = {name.lower(): family for table in (MODEL_TYPES, ARCHITECTURES) for family, name in table.items()}
    known.update((family, family) for family in FAMILIES)
    if names[0] == "llama":  # which Stable-DiffCoder says too
        names = [*names[1:], names[0]]
    for name in map(str.lower, names):
        short = re.sub(r"(modellm|model|forcausallm)$", "", name)  # DreamModel, ILLaDAModelLM
        for candidate in (name, short):
            if candidate in known:
                return known[candidate]
    raise ConfigError(f"config.json: expected one of the types {', '.join(FAMILIES)}, got {came}")
