"""A training step, forward and backward, with our ops against the same model with SDPA under a dense mask and
F.cross_entropy.

One batch of block diffusion, [noisy ; clean], and one of LLaDA's full-sequence masking. The optimizer is the same in
both and left out. The floor counts the products that the mathematics needs: those of all rows in the body, of masked
rows in the head, three times for forward and backward, and attention over allowed pairs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from illada.config import ModelConfig
from illada.model import Model, rope_angles
from illada.training.objectives import Example, block_diffusion, full_sequence
from torch import Tensor
from torch.nn import functional as F

from ..measure import Case, Work
from ..peers.layer import plain_norm, plain_rope


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """Yields cases, name: objective, sequences, tokens, shape."""
    if device == "cuda":
        sizes = {"dim": 2048, "n_layers": 8, "n_heads": 16, "n_kv_heads": 4, "head_dim": 128, "ffn_dim": 7168}
        sizes |= {"vocab_size": 155136, "mask_id": 5, "eos_id": 2, "pad_id": 1}
        shapes, preset, dtype = [("block 32", 2, 4096), ("full", 2, 8192)], "iLLaDA-8B", "bfloat16"
    else:
        sizes = {"vocab_size": 16384}
        shapes, preset, dtype = [("block 4", 4, 128), ("block 4", 2, 512), ("full", 4, 256)], "demo", "float32"
    for objective, batch, length in shapes:
        block = int(objective.split()[1]) if objective != "full" else 0
        config = ModelConfig.preset(preset, **sizes, causal_block=block)
        name = f"{objective}, batch {batch} x {length}, {preset} shape, {config.n_layers} layers of {config.dim}"
        yield Case("train", name, dtype, partial(build, config, batch, length, device, dtype))


def build(config: ModelConfig, batch: int, length: int, device: str, dtype: str) -> Work:
    torch.manual_seed(0)
    model = Model(config, device=device, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, config.vocab_size, (batch, length), generator=generator)
    block = config.causal_block
    made = (
        block_diffusion(tokens, config.mask_id, generator, block=block)
        if block
        else full_sequence(tokens, config.mask_id, generator)
    ).to(device)
    parameters = list(model.parameters())
    dense = None if made.key_ranges is None else made.key_ranges.dense()[:, None]  # made once, as a mask would be
    ours = partial(step, parameters, lambda: made.loss(model))
    peer = partial(step, parameters, lambda: plain_loss(model, made, dense))
    flops = needed(config, made)
    return Work({"default": ours}, {"SDPA and F.cross_entropy": peer}, flops, 0.0)


def step(parameters: list[Tensor], loss: object) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), parameters)  # type: ignore[operator]


def needed(config: ModelConfig, made: Example) -> float:
    """Returns floating-point operations of forward and backward."""
    body = config.num_parameters - config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    rows, masked = made.tokens.numel(), int(made.masked.sum())
    batch, length = made.tokens.shape
    density = 1.0 if made.key_ranges is None else float(made.key_ranges.density())
    pairs = batch * length * length * density
    attention = 3.5 * 4 * pairs * config.n_heads * config.head_dim * config.n_layers  # backward: 2.5 times the forward
    return 6.0 * (body * rows + config.vocab_size * config.dim * masked) + attention


def plain_loss(model: Model, made: Example, dense: Tensor | None) -> Tensor:
    """Returns the same number: weighted cross-entropies over masked rows, from the logits of all of them."""
    hidden = plain_forward(model, made, dense)[:, : made.targets.shape[1]]
    logits = (hidden @ model.head_weight.T).float().index_fill(-1, forbidden(model, hidden), -torch.inf)
    targets = made.targets.masked_fill(~made.masked, -100)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * made.weight.flatten()).sum()


def forbidden(model: Model, like: Tensor) -> Tensor:
    return torch.tensor([model.config.mask_id], device=like.device)


def plain_forward(model: Model, made: Example, dense: Tensor | None) -> Tensor:
    length = made.tokens.shape[1]
    positions = torch.arange(length, device=model.device)[None] if made.positions is None else made.positions
    h = model.embed(made.tokens)
    cos, sin = rope_angles(model.config, positions, h.dtype)
    for block in model.layers:
        c = block.config
        qkv = block.qkv_proj(plain_norm(block.attn_norm, h)).unflatten(-1, (-1, c.head_dim)).split(block.heads, dim=2)
        q, k = (plain_norm(norm, x) for norm, x in ((block.q_norm, qkv[0]), (block.k_norm, qkv[1])))
        q, k = plain_rope(q, cos, sin), plain_rope(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, qkv[2]))
        grouped = {"enable_gqa": True} if c.n_kv_heads != c.n_heads else {}
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, **grouped).transpose(1, 2).flatten(2)
        h = h + block.o_proj(out)
        gate, up = block.gate_up_proj(plain_norm(block.ffn_norm, h)).chunk(2, dim=-1)
        h = h + block.down_proj(F.silu(gate) * up)
    return plain_norm(model.norm, h)
