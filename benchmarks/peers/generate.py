"""llama.cpp as a peer of decoding: the same weights in a GGUF, all columns in every pass, as its diffusion example.

`pip install 'illada-kernels[llama-cpp]'` compiles it for this processor. Ready-made wheels leave AVX-512 out, so they
would be slower than what a user can have.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from illada.model import Model
from torch import Tensor

from . import absent

KINDS = {"float32": ("F32",), "bfloat16": ("F16", "BF16"), "int8": ("Q8_0",), "int4": ("Q4_0",)}  # of equal weights


def why_not() -> str | None:
    """Returns None, or why llama.cpp cannot be measured here."""
    reasons = absent()
    return next((f"{name}: {reasons[name]}" for name in ("llama_cpp", "gguf") if name in reasons), None)


class LlamaCpp:
    """A LLaDA model of `columns` tokens in llama.cpp, its matrices stored as `kind`; a call is one pass."""

    def __init__(self, model: Model, kind: str, columns: int) -> None:
        import llama_cpp as api

        self.api, self.columns, self.vocab_size = api, columns, model.config.vocab_size
        self.quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write(model, path, kind)
            self.weights = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = columns
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = api.llama_init_from_model(self.weights, options) if self.weights else None
        if not self.context:
            raise RuntimeError(f"llama.cpp {api.__version__} does not load the model that was written as {kind}")
        api.llama_set_causal_attn(self.context, False)
        self.batch = api.llama_batch_init(columns, 0, 1)
        used = re.findall(r"(\w+) = 1", api.llama_print_system_info().decode())
        self.note = f"llama-cpp-python {api.__version__}, with {', '.join(used)}"

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the logits (S, vocab) of one sequence (S,), a view of what the next call overwrites."""
        batch, ids = self.batch, tokens.tolist()
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp: llama_decode returned {status}")
        size = len(ids) * self.vocab_size * 4
        address: Any = ctypes.cast(self.api.llama_get_logits(self.context), ctypes.c_void_p).value
        held = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(held, dtype=torch.float32).view(len(ids), self.vocab_size)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)
        if getattr(self, "weights", None):
            self.api.llama_model_free(self.weights)


def write(model: Model, path: Path, kind: str) -> None:
    """Writes a model of LLaDA's architecture as a GGUF without a tokenizer, its matrices as `kind`, say Q4_0."""
    import gguf

    c, out = model.config, gguf.GGUFWriter(path, "llada")
    out.add_vocab_size(c.vocab_size)
    out.add_context_length(c.max_seq_len)
    out.add_embedding_length(c.dim)
    out.add_block_count(c.n_layers)
    out.add_feed_forward_length(c.ffn_dim)
    out.add_head_count(c.n_heads)
    out.add_head_count_kv(c.n_kv_heads)
    out.add_key_length(c.head_dim)
    out.add_value_length(c.head_dim)
    out.add_rope_dimension_count(c.head_dim)
    out.add_rope_freq_base(c.rope_theta)
    out.add_layer_norm_rms_eps(c.norm_eps)
    out.add_causal_attention(False)
    out.add_tokenizer_model("none")
    kinds: Any = gguf.GGMLQuantizationType
    for name, tensor in tensors(model).items():
        chosen = kinds["F32" if tensor.dim() == 1 else kind]
        stored = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), chosen)
        out.add_tensor(name, stored, raw_dtype=chosen)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def tensors(model: Model) -> dict[str, Tensor]:
    """Returns {GGUF's name: weight}. Heads of q and k have the two halves of RoPE's pairs side by side there."""
    c, found = model.config, {}
    found["token_embd.weight"], found["output_norm.weight"] = model.embed.weight, model.norm.weight
    found["output.weight"] = model.head_weight
    for i, layer in enumerate(model.layers):
        q, k, v = layer.qkv_proj.weight.split([n * c.head_dim for n in layer.heads])
        q, k = (x.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2) for x in (q, k))
        gate, up = layer.gate_up_proj.weight.chunk(2)
        parts = {"attn_norm": layer.attn_norm.weight, "attn_q": q, "attn_k": k, "attn_v": v}
        parts |= {"attn_output": layer.o_proj.weight, "ffn_norm": layer.ffn_norm.weight}
        parts |= {"ffn_gate": gate, "ffn_up": up, "ffn_down": layer.down_proj.weight}
        found |= {f"blk.{i}.{name}.weight": weight for name, weight in parts.items()}
    return found
