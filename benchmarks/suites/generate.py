"""Decoding as a whole, random weights: diffusion, two tokens a pass, and the same kind of model read left to right.
On a GPU also 256 tokens by 1, 2 and 4 a pass for 1, 8 and 32 sequences, and single passes (gpu_passes.py).

Diffusion's peer is the loop that LLaDA's own generate.py runs, with the same weights and passes:
scaled_dot_product_attention, logits of every position at every pass, softmax, top-k per sequence, no cache. The
autoregressive row is a Qwen2.5 of the same sizes, one token a pass with its cache; its peer is transformers' generate.
On a CPU, packed models (`illada.pack`) also meet llama.cpp with weights of equal size: whole generations, whose passes
compute all columns there, and single passes of wide layers, whose vocab is so small that the head costs nothing.
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
from illada.decoding.cache import Cache
from illada.decoding.config import GenerationConfig
from illada.decoding.generate import generate
from illada.model import Model, rope_angles
from illada.packing import pack
from torch import Tensor
from torch.nn import functional as F

from illada_kernels import KeyRanges, TopK, unmask

from ..measure import Case, Job, Work
from ..peers import generate as llama_cpp
from ..peers.layer import plain_norm, plain_rope
from . import gpu_passes

PER_PASS = 2
BATCHES = (1, 8, 32)
LONG = 3e15  # flops of a generation without a cache that would take a GPU many seconds
exact, dual = "none", "dual"
SMALL = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64, "ffn_dim": 1408, "vocab_size": 32768}
WIDE = {
    "dim": 2048,
    "n_layers": 8,
    "n_heads": 16,
    "n_kv_heads": 16,
    "head_dim": 128,
    "ffn_dim": 5632,
    "vocab_size": 256,
}
WEIGHTS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}  # bytes of a weight


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """Yields cases of preset, sequences, prompt, new tokens, block, cache (dual is approximate, the others change
    nothing)."""
    blocks = "block_causal"
    if device == "cuda":
        sizes, dtype = {}, "bfloat16"
        shapes = [("iLLaDA-8B", 1, 512, 64, 32, exact), ("iLLaDA-8B", 1, 512, 64, 32, dual)]
        shapes += [("iLLaDA-8B", 8, 512, 64, 32, dual), ("SDAR-8B", 1, 512, 64, 4, blocks)]
        shapes += [("Qwen2.5-7B", 1, 512, 64, 1, blocks), ("Qwen2.5-7B", 8, 512, 64, 1, blocks)]
        shapes += [("iLLaDA-8B", 1, 512, 32, 32, dual)]  # a block with its refresh
        shapes += [("Qwen2.5-7B", batch, 512, 256, 1, blocks) for batch in BATCHES]
    else:  # a model of 10 million parameters, half of them the head
        sizes = {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 704}
        sizes |= {"vocab_size": 32768, "mask_id": 5, "eos_id": 2, "pad_id": 1}
        shapes = [("iLLaDA-8B", 4, 96, 32, 16, exact), ("iLLaDA-8B", 4, 96, 32, 16, dual)]
        shapes += [("SDAR-8B", 4, 96, 32, 4, blocks), ("Qwen2.5-7B", 4, 96, 32, 1, blocks)]
        shapes += [("iLLaDA-8B", 1, 960, 64, 32, exact), ("iLLaDA-8B", 1, 960, 64, 32, dual)]
        shapes += [("Qwen2.5-7B", 1, 960, 64, 1, blocks)]
        dtype = "float32"
    for preset, batch, prompt, new, block, cache in shapes:
        config = ModelConfig.preset(preset, **sizes)
        size = "tiny " + preset.rpartition("-")[0] if sizes else preset
        name = f"{size}, {batch} x ({prompt} + {new}), block {block}, cache {cache}"
        yield Case("generate", name, dtype, partial(build, config, batch, prompt, new, block, cache, device, dtype))
    if device == "cpu":
        yield from packed_cases()
        return
    config = ModelConfig.preset("iLLaDA-8B")
    for batch in BATCHES:
        for per_pass in (1, 2, 4):
            name = f"iLLaDA-8B, {batch} x (512 + 256), block 32, cache dual, {per_pass} a pass"
            shape = (config, batch, 512, 256, 32, dual, device, dtype, per_pass)
            yield Case("generate", name, dtype, partial(build, *shape))
        for fp8 in (False, True):
            name = f"one cached pass, iLLaDA-8B, {batch} x 32 rows, 768 keys" + (", FP8 linears" if fp8 else "")
            yield Case("generate", name, dtype, partial(gpu_passes.build, config, batch, 32, 768, fp8, device, dtype))


def packed_cases() -> Iterator[Case]:
    ids = {"mask_id": 5, "eos_id": 2, "pad_id": 1}
    for weights in WEIGHTS:
        dtype, more = ("bfloat16", f", {weights} weights") if weights.startswith("int") else (weights, "")
        for rows in (32, 128):
            config = ModelConfig.preset("LLaDA-8B", **WIDE, **ids)
            name = f"one pass of {rows} rows, 8 layers of 2048{more}"
            yield Case("generate", name, dtype, partial(build_pass, config, rows, weights))
        for cache in (exact, dual) if weights in ("float32", "bfloat16") else (dual,):
            config = ModelConfig.preset("LLaDA-8B", **SMALL, **ids)
            name = f"small LLaDA, packed, 1 x (32 + 128), block 32, cache {cache}{more}"
            yield Case("generate", name, dtype, partial(build_packed, config, 32, 128, 32, cache, weights))


def packed(config: ModelConfig, weights: str) -> tuple[Model, Model]:
    """Returns a float32 model and a packed copy of it, rounded to `weights`."""
    torch.manual_seed(0)
    model = Model(config).eval()
    copy = Model(config)
    copy.load_state_dict(model.state_dict())
    if weights == "float32":
        return model, pack(copy.eval())
    return model, pack(copy.eval().bfloat16(), weights="same" if weights == "bfloat16" else weights)


def llamas(model: Model, weights: str, columns: int) -> tuple[dict[str, llama_cpp.LlamaCpp], dict[str, str]]:
    """Returns llama.cpp's models of these weights, and those that cannot be measured here."""
    names = {f"llama.cpp {kind}": kind for kind in llama_cpp.KINDS[weights]}
    if reason := llama_cpp.why_not():
        return {}, dict.fromkeys(names, reason)
    return {name: llama_cpp.LlamaCpp(model, kind, columns) for name, kind in names.items()}, {}


def build_pass(config: ModelConfig, rows: int, weights: str) -> Work:
    model, ours = packed(config, weights)
    tokens = torch.randint(6, config.vocab_size, (1, rows))
    theirs, absent = llamas(model, weights, rows)
    plain = torch.no_grad()(partial(plain_hidden, model.to(ours.dtype), tokens))
    body = config.num_parameters - 2 * config.vocab_size * config.dim
    flops = 2 * body * rows + 4 * rows**2 * config.n_heads * config.head_dim * config.n_layers
    peers: dict[str, Job] = {name: partial(llama, tokens[0]) for name, llama in theirs.items()}
    work = Work({"packed": torch.no_grad()(partial(ours, tokens))}, peers, flops, body * WEIGHTS[weights])
    if not weights.startswith("int"):  # of which torch has no plain layers
        work.peers["PyTorch"] = plain
    work.absent, work.notes = absent, {name: llama.note for name, llama in theirs.items()}
    return work


def build_packed(config: ModelConfig, prompt: int, new: int, block: int, cache: str, weights: str) -> Work:
    model, ours = packed(config, weights)
    prompts = torch.randint(6, config.vocab_size, (1, prompt))
    settings = GenerationConfig(new, block, rule=TopK(PER_PASS), cache=cache, stop_ids=())
    work = Work({"packed": partial(generate, ours, prompts, settings)}, {})
    work.flops, work.bytes = needed(config, 1, prompt, new, block, cache, WEIGHTS[weights], whole=True)
    theirs, work.absent = llamas(model, weights, prompt + new)
    work.notes = {name: llama.note for name, llama in theirs.items()}
    work.peers = {name: partial(llama_loop, llama, config, prompts, new, block) for name, llama in theirs.items()}
    if not weights.startswith("int"):
        model = model.to(ours.dtype)
        work.peers["LLaDA's loop"] = partial(plain_loop, model, prompts, new, block, whole=True)
        other = ModelConfig.preset("Qwen2.5-7B", **{**SMALL, "mask_id": 5, "eos_id": 2, "pad_id": 1})
        causal = Model(other, dtype=ours.dtype).eval()
        work.beside["transformers' generate, one token a pass"] = transformers_generate(causal, prompts, new)
        one = GenerationConfig(new, 1, rule=TopK(1), cache="block_causal", stop_ids=())
        work.beside["ours, one token a pass"] = partial(generate, pack(causal), prompts, one)
    return work


@torch.no_grad()
def llama_loop(llama: llama_cpp.LlamaCpp, config: ModelConfig, prompts: Tensor, new: int, block: int) -> Tensor:
    """Runs the passes of `plain_loop` with all masks shown, on llama.cpp; reads the logits of a block's masks alone."""
    tokens = F.pad(prompts[0], (0, new), value=config.mask_id)
    for begin in range(len(tokens) - new, len(tokens), block):
        part = tokens[begin : begin + block]
        for _ in range(-(-block // PER_PASS)):
            at = (part == config.mask_id).nonzero()[:, 0]
            logits = llama(tokens)[begin + at]
            logits[:, config.mask_id] = -torch.inf
            sure, best = logits.softmax(-1).max(-1)
            chosen = sure.topk(PER_PASS).indices
            part[at[chosen]] = best[chosen]
    return tokens[None, prompts.shape[1] :]


def build(
    config: ModelConfig,
    batch: int,
    prompt: int,
    new: int,
    block: int,
    cache: str,
    device: str,
    dtype: str,
    per_pass: int = PER_PASS,
) -> Work:
    torch.manual_seed(0)
    model = Model(config, device=device, dtype=getattr(torch, dtype)).eval()
    prompts = torch.randint(6, config.vocab_size - 1000, (batch, prompt), device=device)
    settings = GenerationConfig(new, block, rule=TopK(min(per_pass, block)), cache=cache, stop_ids=())
    itemsize = getattr(torch, dtype).itemsize
    flops, moved = needed(config, batch, prompt, new, block, cache, itemsize, per_pass=per_pass)
    work = Work({"default": partial(generate, model, prompts, settings)}, {}, flops, moved)
    without = needed(config, batch, prompt, new, block, exact, itemsize, per_pass=per_pass)[0]
    if block == 1:
        work.peers["transformers' generate"] = transformers_generate(model, prompts, new)
        work.beside["its passes alone"] = partial(own_passes, model, prompts, new)
    elif without < LONG:
        work.peers["LLaDA's loop"] = partial(plain_loop, model, prompts, new, block, per_pass=per_pass)
    else:
        work.absent["LLaDA's loop"] = f"{without * 1e-15:.0f} PFLOP a generation, too many to measure beside"
    return work


def needed(
    config: ModelConfig,
    batch: int,
    prompt: int,
    new: int,
    block: int,
    cache: str,
    itemsize: float,
    whole: bool = False,
    per_pass: int = PER_PASS,
) -> tuple[float, float]:
    """Returns (flops, bytes) of decoding with this cache; `whole`: all masks are there from the start."""
    embeddings = config.vocab_size * config.dim
    body = config.num_parameters - embeddings * (1 if config.tie_embeddings else 2)
    passes, flops = 0, 0.0
    for end in range(prompt + block, prompt + new + 1, block):
        end = prompt + new if whole else end
        for step in range(-(-block // min(per_pass, block))):
            first_pass = 2 * block if cache == "block_causal" and end > prompt + block else end
            columns = end if cache == "none" else block if step else first_pass
            columns = columns - 1 if block == 1 else columns  # the token's own row predicts only the next one
            attention = 4 * columns * end * config.n_heads * config.head_dim * config.n_layers
            flops += batch * (2 * body * columns + attention + 2 * embeddings * (block - step * per_pass))
            passes += 1
    return flops, passes * itemsize * (body + embeddings)


def transformers_generate(model: Model, prompts: Tensor, new: int) -> Callable[[], Tensor]:
    """Decodes greedily with the same weights by transformers' Qwen2, with its cache and SDPA."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation="sdpa")
    other = other.to(model.device).eval()
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": model.config.pad_id}
    attended = torch.ones_like(prompts)
    return lambda: other.generate(prompts, attention_mask=attended, **options)[:, prompts.shape[1] :]


@torch.no_grad()
def own_passes(model: Model, prompts: Tensor, new: int) -> Tensor:
    """Runs the passes of an autoregressive generation without the loop around them: the prompt, then a token a pass."""
    (batch, prompt), config = prompts.shape, model.config
    tokens = F.pad(prompts, (0, new), value=config.mask_id)
    cache = Cache(config, batch, prompt + new, device=model.device, dtype=model.dtype)
    for end in range(prompt, prompt + new):
        first = 0 if end == prompt else end - 1
        at = torch.arange(first, end, device=model.device)[None]
        ranges = (
            KeyRanges.causal(prompt, device=model.device) if first == 0 else KeyRanges.full(end, device=model.device)
        )
        hidden = model(tokens[:, first:end], ranges, at, cache.at(first, end), shift=False)
        where = torch.full((batch, 1), end, device=model.device)
        unmask(hidden[:, -1:], model.head_weight, tokens, where, TopK(1), mask_id=config.mask_id)
    return tokens[:, prompt:]


@torch.no_grad()
def plain_loop(
    model: Model, prompts: Tensor, new: int, block: int, whole: bool = False, per_pass: int = PER_PASS
) -> Tensor:
    """Runs LLaDA's generate.py, low-confidence remasking, temperature 0; unless `whole`, blocks appear one by one."""
    config, (batch, prompt) = model.config, prompts.shape
    tokens = F.pad(prompts, (0, new if whole else 0), value=config.mask_id)
    for end in range(prompt + block, prompt + new + 1, block):
        if not whole:
            tokens = F.pad(tokens, (0, block), value=config.mask_id)
        for _ in range(-(-block // per_pass)):
            logits = plain_hidden(model, tokens) @ model.head_weight.T
            logits[..., config.mask_id] = -torch.inf
            best = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, best[..., None])[..., 0]
            masked = tokens == config.mask_id
            masked[:, end:] = False
            confidence = confidence.masked_fill(~masked, -torch.inf)
            chosen = torch.zeros_like(masked)
            for b in range(batch):
                chosen[b, confidence[b].topk(per_pass).indices] = True
            tokens = torch.where(chosen & masked, best, tokens)
    return tokens[:, prompt:]


def plain_hidden(model: Model, tokens: Tensor) -> Tensor:
    """Runs the same model on PyTorch's attention."""
    config, length = model.config, tokens.shape[1]
    rope = rope_angles(config, torch.arange(length, device=tokens.device)[None], model.dtype)
    allowed = None
    if config.causal_block:
        number = torch.arange(length, device=tokens.device) // config.causal_block
        allowed = number[:, None] >= number
    h = model.embed(tokens)
    for layer in model.layers:
        qkv = layer.qkv_proj(plain_norm(layer.attn_norm, h)).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.split(layer.heads, dim=2)
        q, k = plain_rope(plain_norm(layer.q_norm, q), *rope), plain_rope(plain_norm(layer.k_norm, k), *rope)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        h = h + layer.o_proj(out.transpose(1, 2).flatten(2))
        gate, up = layer.gate_up_proj(plain_norm(layer.ffn_norm, h)).chunk(2, dim=-1)
        h = h + layer.down_proj(F.silu(gate) * up)
    return plain_norm(model.norm, h)
