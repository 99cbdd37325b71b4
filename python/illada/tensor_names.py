"""Names and shapes of the tensors in a checkpoint of each family, and which rows of the model's parameters they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: rows start .. stop of one of the model's parameters."""

    name: str
    parameter: str
    start: int
    stop: int
    shape: tuple[int, ...]


_LLAMA = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_LLADA = {  # ff_proj is the gate; a block's ff_out is the down projection, the top one the head
    "embed": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.",
    "attn_norm": "attn_norm",
    "ffn_norm": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}


_NEMOTRON = {
    **_LLAMA,
    "embed": "encoder.embed_tokens",
    "norm": "encoder.norm",
    "head": "diffusion_head",
    "layer": "encoder.layers.{}.",
}


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Yields the tensors that a checkpoint of this configuration holds; they cover every parameter once."""
    names = _names(config)

    def rows(key: str, parameter: str, start: int, count: int, *rest: int, suffix: str = "weight") -> Entry:
        return Entry(f"{names[key]}.{suffix}", f"{parameter}.{suffix}", start, start + count, (count, *rest))

    def in_layer(index: int, entry: Entry) -> Entry:
        name = names["layer"].format(index) + entry.name
        return Entry(name, f"layers.{index}.{entry.parameter}", entry.start, entry.stop, entry.shape)

    yield rows("embed", "embed", 0, config.vocab_size, config.dim)
    for index in range(config.n_layers):
        for entry in _layer_entries(config, rows):
            yield in_layer(index, entry)
    yield rows("norm", "norm", 0, config.dim)
    if not config.tie_embeddings:
        yield rows("head", "lm_head", 0, config.vocab_size, config.dim)


def _layer_entries(config: ModelConfig, rows: Callable[..., Entry]) -> Iterator[Entry]:
    dim, ffn, queries = config.dim, config.ffn_dim, config.n_heads * config.head_dim
    keys = config.n_kv_heads * config.head_dim
    yield rows("attn_norm", "attn_norm", 0, dim)
    for key, start, count in (("q", 0, queries), ("k", queries, keys), ("v", queries + keys, keys)):
        yield rows(key, "qkv_proj", start, count, dim)
        if config.qkv_bias:
            yield rows(key, "qkv_proj", start, count, suffix="bias")
    if config.qk_norm:
        yield rows("q_norm", "q_norm", 0, config.head_dim)
        yield rows("k_norm", "k_norm", 0, config.head_dim)
    yield rows("o", "o_proj", 0, dim, queries)
    yield rows("ffn_norm", "ffn_norm", 0, dim)
    yield rows("gate", "gate_up_proj", 0, ffn, dim)
    yield rows("up", "gate_up_proj", ffn, ffn, dim)
    yield rows("down", "down_proj", 0, dim, ffn)


def head_name(config: ModelConfig) -> str:
    """Returns the name of the LM head's tensor, which a tied checkpoint may hold as well as the embedding."""
    return _names(config)["head"] + ".weight"


def _names(config: ModelConfig) -> dict[str, str]:
    return {"llada": _LLADA, "nemotron_labs_diffusion": _NEMOTRON}.get(config.family, _LLAMA)
