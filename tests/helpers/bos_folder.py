"""A folder of a tiny Llama whose tokenizer writes BOS before a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from illada import Model, ModelConfig, save

TINY = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 40, "max_seq_len": 64}
NAMES = ("<s>", "</s>", "<pad>", "<mask>")  # ids 0 to 3


def tokenizer(single: str | None = "<s> $A") -> Any:
    """Returns a byte-level tokenizer whose post-processor writes `single`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made, level = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    made.pre_tokenizer, made.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*NAMES], initial_alphabet=level.alphabet())
    made.train_from_iterator(["on and on and on"], trainer)
    if single is not None:
        special = [(name, i) for i, name in enumerate(NAMES)]
        made.post_processor = processors.TemplateProcessing(single, f"{single} $B:1", special)
    return made


def write(folder: Path, preset: str | None = None, single: str | None = "<s> $A", **says: Any) -> Model:
    """Writes model and tokenizer, with `says` in tokenizer_config.json; returns the model."""
    tokens = tokenizer(single)
    ids = {"vocab_size": tokens.get_vocab_size(), "eos_id": 1, "pad_id": 2}
    torch.manual_seed(0)
    if preset is None:
        config = ModelConfig(**TINY, **ids, family="llama", shifted_logits=True, causal_block=1, init_std=0.3)
    else:
        config = ModelConfig.preset(preset, **TINY, **ids, mask_id=3)
    model = Model(config).eval()
    save(model, folder)
    tokens.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **says}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return model
