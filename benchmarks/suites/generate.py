"""Decoding as a whole, random weights: diffusion, two tokens a pass, and the same kind of model read left to right.

Diffusion's peer is the loop that LLaDA's own generate.py runs, with the same weights and passes:
scaled_dot_product_attention, logits of every position at every pass, softmax, top-k per sequence, no cache. The
autoregressive row is a Qwen2.5 of the same sizes, one token a pass with its cache; its peer is transformers' generate.
The floor counts what the mathematics needs: the products of the columns that must be computed, of the head for
candidate rows, and every weight read once a pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import torch
from illada.checkpoint import save
from illada.config import ModelConfig
from illada.decoding.config import GenerationConfig
from illada.decoding.generate import generate
from illada.model import Model, apply_rope, rope_angles
from torch import Tensor
from torch.nn import functional as F

from illada_kernels import TopK

from ..measure import Case, Work

PER_PASS = 2


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """preset, sequences, prompt, new tokens, block, cache (dual is approximate, the others change nothing)."""
    exact, dual, blocks = "none", "dual", "block_causal"
    if device == "cuda":
        sizes, dtype = {}, "bfloat16"
        shapes = [("iLLaDA-8B", 1, 512, 64, 32, exact), ("iLLaDA-8B", 1, 512, 64, 32, dual)]
        shapes += [("iLLaDA-8B", 8, 512, 64, 32, dual), ("SDAR-8B", 1, 512, 64, 4, blocks)]
        shapes += [("Qwen2.5-7B", 1, 512, 64, 1, blocks), ("Qwen2.5-7B", 8, 512, 64, 1, blocks)]
    else:  # a model of 10 million parameters, half of them the head
        sizes = {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 704}
        sizes |= {"vocab_size": 32768, "mask_id": 5, "eos_id": 2, "pad_id": 1}
        shapes = [("iLLaDA-8B", 4, 96, 32, 16, exact), ("iLLaDA-8B", 4, 96, 32, 16, dual)]
        shapes += [("SDAR-8B", 4, 96, 32, 4, blocks), ("Qwen2.5-7B", 4, 96, 32, 1, blocks)]
        shapes += [("iLLaDA-8B", 1, 960, 64, 32, exact), ("iLLaDA-8B", 1, 960, 64, 32, dual)]
        dtype = "float32"
    for preset, batch, prompt, new, block, cache in shapes:
        config = ModelConfig.preset(preset, **sizes)
        size = "tiny " + preset.rpartition("-")[0] if sizes else preset
        name = f"{size}, {batch} x ({prompt} + {new}), block {block}, cache {cache}"
        yield Case("generate", name, dtype, partial(build, config, batch, prompt, new, block, cache, device, dtype))


def build(
    config: ModelConfig, batch: int, prompt: int, new: int, block: int, cache: str, device: str, dtype: str
) -> Work:
    torch.manual_seed(0)
    model = Model(config, device=device, dtype=getattr(torch, dtype)).eval()
    prompts = torch.randint(6, config.vocab_size - 1000, (batch, prompt), device=device)
    settings = GenerationConfig(new, block, rule=TopK(min(PER_PASS, block)), cache=cache, stop_ids=())
    flops, moved = needed(config, batch, prompt, new, block, cache, getattr(torch, dtype).itemsize)
    ours = {"default": partial(generate, model, prompts, settings)}
    if block == 1:
        return Work(ours, {"transformers' generate": transformers_generate(model, prompts, new)}, flops, moved)
    return Work(ours, {"LLaDA's loop": partial(plain_loop, model, prompts, new, block)}, flops, moved)


def needed(
    config: ModelConfig, batch: int, prompt: int, new: int, block: int, cache: str, itemsize: int
) -> tuple[float, float]:
    """(flops, bytes) of decoding with this cache."""
    embeddings = config.vocab_size * config.dim
    body = config.num_parameters - embeddings * (1 if config.tie_embeddings else 2)
    passes, flops = 0, 0.0
    for end in range(prompt + block, prompt + new + 1, block):
        for step in range(-(-block // min(PER_PASS, block))):
            first_pass = 2 * block if cache == "block_causal" and end > prompt + block else end
            columns = end if cache == "none" else block if step else first_pass
            columns = columns - 1 if block == 1 else columns  # the token's own row predicts only the next one
            attention = 4 * columns * end * config.n_heads * config.head_dim * config.n_layers
            flops += batch * (2 * body * columns + attention + 2 * embeddings * (block - step * PER_PASS))
            passes += 1
    return flops, passes * itemsize * (body + embeddings)


def transformers_generate(model: Model, prompts: Tensor, new: int) -> Callable[[], Tensor]:
    """Greedy decoding of the same weights by transformers' Qwen2, with its cache and SDPA."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation="sdpa")
    other = other.to(model.device).eval()
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": model.config.pad_id}
    attended = torch.ones_like(prompts)
    return lambda: other.generate(prompts, attention_mask=attended, **options)[:, prompts.shape[1] :]


@torch.no_grad()
def plain_loop(model: Model, prompts: Tensor, new: int, block: int) -> Tensor:
    """LLaDA's generate.py for blocks that appear one after the other, low-confidence remasking, temperature 0."""
    config, (batch, prompt) = model.config, prompts.shape
    tokens = prompts
    for _ in range(new // block):
        masks = torch.full((batch, block), config.mask_id, device=prompts.device)
        tokens = torch.cat([tokens, masks], dim=1)
        for _ in range(-(-block // PER_PASS)):
            logits = plain_hidden(model, tokens) @ model.head_weight.T
            logits[..., config.mask_id] = -torch.inf
            best = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, best[..., None])[..., 0]
            masked = tokens == config.mask_id
            confidence = confidence.masked_fill(~masked, -torch.inf)
            chosen = torch.zeros_like(masked)
            for b in range(batch):
                chosen[b, confidence[b].topk(PER_PASS).indices] = True
            tokens = torch.where(chosen & masked, best, tokens)
    return tokens[:, prompt:]


def plain_hidden(model: Model, tokens: Tensor) -> Tensor:
    """The same model on PyTorch's attention."""
    config, length = model.config, tokens.shape[1]
    rope = rope_angles(config, torch.arange(length, device=tokens.device)[None], model.dtype)
    allowed = None
    if config.causal_block:
        number = torch.arange(length, device=tokens.device) // config.causal_block
        allowed = number[:, None] >= number
    h = model.embed(tokens)
    for layer in model.layers:
        q, k, v = layer.qkv_proj(layer.attn_norm(h)).unflatten(-1, (-1, config.head_dim)).split(layer.heads, dim=2)
        q, k = apply_rope(layer.q_norm(q), *rope), apply_rope(layer.k_norm(k), *rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        h = h + layer.o_proj(out.transpose(1, 2).flatten(2))
        gate, up = layer.gate_up_proj(layer.ffn_norm(h)).chunk(2, dim=-1)
        h = h + layer.down_proj(F.silu(gate) * up)
    return model.norm(h)
