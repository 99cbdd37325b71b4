"""Tiny models in which every part matters, and a plain transformer to compare them with."""

from __future__ import annotations

import torch
from illada.config import ModelConfig
from illada.model import Model
from torch import Tensor
from torch.nn import functional as F


def tiny(preset: str = "demo", **changes) -> ModelConfig:
    sizes = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "ffn_dim": 40, "vocab_size": 50}
    ids = {"mask_id": 49, "eos_id": 48, "pad_id": 47, "max_seq_len": 64}
    return ModelConfig.preset(preset, **{**sizes, **ids, **changes})


def make(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    """Weights in which every part matters: gains off 1, biases off 0, projections large enough to move the stream."""
    torch.manual_seed(seed)
    model = Model(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name != "embed.weight":
                parameter.normal_(0, 0.3)
    return model.eval()


def model_of(preset: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Model:
    """Proposals of every confidence: the head is scaled so that probabilities spread over 0.1 .. 0.9."""
    model = make(tiny(preset), seed, dtype)
    with torch.no_grad():
        model.head_weight.mul_(3.0 if model.config.tie_embeddings else 1.5)
    return model


def tokens_of(config: ModelConfig, batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- the plain transformer ---------------------------------------------------------------------------------------


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def plain_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x (B, H, S, D) as D / 2 complex numbers (x[i], x[i + D / 2]), each turned by position * theta**(-2i / D)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions[:, None, :, None].double() * speed)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def plain_forward(model: Model, tokens: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    """Unshifted hidden rows; allowed is bool (B, 1, S, S)."""
    c, w = model.config, dict(model.named_parameters())
    h = w["embed.weight"][tokens]
    for i in range(c.n_layers):
        p = {name.removeprefix(f"layers.{i}."): value for name, value in w.items()}
        x = plain_norm(h, p["attn_norm.weight"], c.norm_eps)
        qkv = x @ p["qkv_proj.weight"].T + p.get("qkv_proj.bias", 0)
        sizes = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
        q, k, v = (y.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for y in qkv.split(sizes, dim=-1))
        if c.qk_norm:
            q, k = plain_norm(q, p["q_norm.weight"], c.norm_eps), plain_norm(k, p["k_norm.weight"], c.norm_eps)
        q, k = plain_rope(q, positions, c.rope_theta), plain_rope(k, positions, c.rope_theta)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        h = h + out.transpose(1, 2).flatten(2) @ p["o_proj.weight"].T
        x = plain_norm(h, p["ffn_norm.weight"], c.norm_eps)
        gate, up = (x @ p["gate_up_proj.weight"].T).split(c.ffn_dim, dim=-1)
        h = h + (F.silu(gate) * up) @ p["down_proj.weight"].T
    return plain_norm(h, w["norm.weight"], c.norm_eps)
