"""A config.json as it is read: checked types, and what becomes of keys that nobody has read."""

from __future__ import annotations

import re
import warnings
from typing import Any

from ..errors import ConfigError

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


class Settings(dict[str, Any]):
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


def check_unknown(hf: Settings, warn: bool) -> None:
    """Raises ConfigError for a key that was not read and may change the numbers; names others in a warning."""
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
