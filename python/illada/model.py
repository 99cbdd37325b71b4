"""The thin model: tokens in, hidden rows out. The ops multiply them with `model.head_weight`, the LM head."""

from __future__ import annotations

import math
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import illada_kernels
from illada_kernels import KeyRanges
from illada_kernels.layer import add_rms_norm, kernels_for, rms_norm, swiglu

from . import cpu_gradients
from .config import ModelConfig
from .decoding.cache import CacheWindow

Rope = tuple[Tensor, Tensor]  # cos and sin
Kernels = ModuleType | None  # what illada_kernels.layer.kernels_for says of a pass


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x^2) + eps) * weight in float32.

    Rounds to x's dtype before the weight, as LLaDA, iLLaDA, Dream and Qwen do, or with `in_fp32` after it, as SDAR.
    """

    def __init__(self, dim: int, eps: float, in_fp32: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.in_fp32 = eps, in_fp32

    def forward(self, x: Tensor, kernels: Kernels = None) -> Tensor:
        return self.normalized(x, self.weight, kernels)

    def normalized(self, x: Tensor, weight: Tensor, kernels: Kernels = None) -> Tensor:
        """Returns `forward` with this weight."""
        if kernels is None and cpu_gradients.wanted(x, weight):
            normalized: Tensor = cpu_gradients.RMSNorm.apply(x, weight, self.eps)[0]
            return normalized
        return rms_norm(x, weight, self.eps, self.in_fp32, kernels=kernels)

    def of_sum(self, x: Tensor, delta: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """Returns x + delta and its norm."""
        if kernels is None:
            x = x + delta
            return x, self(x)
        return add_rms_norm(x, delta, self.weight, self.eps, self.in_fp32, kernels=kernels)


def rope_angles(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Returns cos and sin of position * theta**(-2i / head_dim), (B or 1, S, 1, head_dim / 2), from float32 angles."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    pair = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=exact)
    frequency, factor = config.rope_theta ** (-pair / config.head_dim), 1.0
    if config.rope_scaling is not None:
        frequency, factor = _yarn(config, config.rope_scaling, frequency)
    angle = positions[..., None, None].to(exact) * frequency
    rotate_in = exact if config.rope_in_fp32 else dtype
    return (angle.cos() * factor).to(rotate_in), (angle.sin() * factor).to(rotate_in)


def _yarn(config: ModelConfig, scaling: dict[str, Any], frequency: Tensor) -> tuple[Tensor, float]:
    """Returns YaRN's frequencies and the factor of cos and sin (arXiv 2309.00071, section 3.4).

    Pairs that turn more than beta_fast times in the original context keep their frequency, those that turn less than
    beta_slow times divide it by the factor; in between it goes over linearly.
    """
    factor, context = float(scaling["factor"]), scaling["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        return config.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_of(scaling.get("beta_fast") or 32.0), pair_of(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, config.head_dim - 1.0)
    index = torch.arange(len(frequency), device=frequency.device, dtype=frequency.dtype)
    divided = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * (1 - divided) + frequency / factor * divided, _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim / 2]) of x (B, S, H, head_dim) in the dtype of cos; returns x's dtype."""
    if cpu_gradients.turns(x, cos, sin):
        rotated: Tensor = cpu_gradients.Rope.apply(x, cos, sin)
        return rotated
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Layer(nn.Module):
    """Computes h + attention(norm(h)), then h + SwiGLU(norm(h)). One GEMM gives q, k and v; one gives gate and up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)  # of q, k and v
        self.attn_norm = RMSNorm(c.dim, c.norm_eps, c.norm_in_fp32)
        self.qkv_proj = nn.Linear(c.dim, sum(self.heads) * c.head_dim, bias=c.qkv_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps, c.norm_in_fp32) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps, c.norm_in_fp32) if c.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps, c.norm_in_fp32)
        self.gate_up_proj = nn.Linear(c.dim, 2 * c.ffn_dim, bias=False)
        self.down_proj = nn.Linear(c.ffn_dim, c.dim, bias=False)

    def forward(
        self,
        h: Tensor,
        rope: Rope,
        key_ranges: KeyRanges | None,
        index: int,
        cache: CacheWindow | None,
        kernels: Kernels = None,
    ) -> Tensor:
        """Returns the next hidden rows (B, S, dim); `index` is this layer's place in the cache."""
        x = self.attn_norm(h, kernels)
        h, x = self.ffn_norm.of_sum(h, self.o_proj(self.attend(x, rope, key_ranges, index, cache, kernels)), kernels)
        return h + self.down_proj(swiglu(self.gate_up_proj(x), kernels=kernels))

    def attend(
        self,
        x: Tensor,
        rope: Rope,
        key_ranges: KeyRanges | None,
        index: int,
        cache: CacheWindow | None,
        kernels: Kernels,
    ) -> Tensor:
        """Returns the heads' outputs side by side, (B, S, n_heads * head_dim)."""
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.config.head_dim)
        q, k, v = qkv.split_with_sizes(self.heads, 2)  # (B, S, H, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q, kernels), self.k_norm(k, kernels)
        cos, sin = rope if self.config.rope_in_fp32 else (rope[0].to(q.dtype), rope[1].to(q.dtype))
        if cache is not None:
            q, k, v = cache.rotate(index, q, k, v, cos, sin, kernels)
        elif kernels is None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        else:
            q, k = illada_kernels.layer.apply_rope(q, k, cos, sin, kernels=kernels)
        return self.mix(q, k, v, key_ranges).flatten(2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges | None) -> Tensor:
        """Returns attention (B, S, H, head_dim). training.parallel replaces it where ranks share the sequence."""
        return illada_kernels.attention(q, k, v, key_ranges)


class Model(nn.Module):
    """A transformer that returns hidden rows; row i times `head_weight` gives the logits of token i.

    Parameters
    ----------
    config : ModelConfig
    device : torch.device or str, optional
        "meta" allocates nothing.
    dtype : torch.dtype, optional

    Notes
    -----
    Weights are drawn from torch's global generator: normal(init_std), projections back into the residual stream divided
    by sqrt(2 * n_layers), the embedding with standard deviation sqrt(1 / (2 * dim)).

    Examples
    --------
    >>> import torch
    >>> from illada import Model, ModelConfig
    >>> model = Model(ModelConfig.preset("demo", n_layers=1))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 128])
    """

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            # given, not drawn: torch's normal_ on "meta" would import its compiler, which takes a second
            self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
            self.norm = RMSNorm(config.dim, config.norm_eps, config.norm_in_fp32)
            self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        if dtype is not None:
            self.to(dtype)
        if device is None or torch.device(device).type != "meta":
            allocate(self, device or torch.get_default_device())
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all weights afresh."""
        for name, parameter in self.named_parameters():
            init_weight(self.config, name, parameter)

    @property
    def head_weight(self) -> Tensor:
        """Returns the LM head (vocab_size, dim), an argument of `masked_loss` and `unmask`."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the weights."""
        return self.embed.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        key_ranges: KeyRanges | None = None,
        positions: Tensor | None = None,
        cache: CacheWindow | None = None,
        shift: bool = True,
    ) -> Tensor:
        """Returns hidden rows; row i times `head_weight` gives the logits of token i.

        Parameters
        ----------
        tokens : int64 (B, S)
        key_ranges : KeyRanges, optional
            Which keys a query sees. None: what `config.causal_block` says.
        positions : int64 (S,), (1, S) or (B, S), optional
            Counted from each sequence's start. None: columns, with a cache its slots.
        cache : CacheWindow, optional
            Keys and values of this window are written there, and queries see its first `num_keys` slots. `key_ranges`
            must then be given.
        shift : bool
            False: with `shifted_logits` row i stays where it is, and predicts token i + 1.

        Returns
        -------
        Tensor (B, S, dim)

        Raises
        ------
        ValueError
            For a wrong dtype or shape, or a cache without key_ranges.

        Notes
        -----
        With `shifted_logits` rows come out shifted: row i comes from token i - 1. A row at position 0, and a window's
        first row, which has no predecessor here, stay as they are. Never synchronises with the host.
        """
        positions = self._positions(tokens, positions, cache)
        if key_ranges is None:
            key_ranges = self._own_ranges(tokens, cache)
        h = self.embed(tokens)
        rope = rope_angles(self.config, positions, h.dtype)
        # frozen embeddings want no gradient where adapters behind them do
        kernels = None if torch.is_grad_enabled() else kernels_for(h, *rope)
        for index, layer in enumerate(self.layers):
            h = layer(h, rope, key_ranges, index, cache, kernels)
        h = self.norm(h, kernels)
        return _shift(h, positions) if shift and self.config.shifted_logits else h

    def _positions(self, tokens: Tensor, positions: Tensor | None, cache: CacheWindow | None) -> Tensor:
        """Returns (B or 1, S)."""
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: expected int64 (B, S), got {tokens.dtype} of shape {tuple(tokens.shape)}")
        batch, length = tokens.shape
        if positions is None:
            positions = torch.arange(length, device=tokens.device) if cache is None else cache.slots(length)
        positions = positions[None] if positions.dim() == 1 else positions  # (B or 1, S)
        if positions.dim() != 2 or positions.shape[1] != length or positions.shape[0] not in (1, batch):
            raise ValueError(f"positions: expected ({batch} or 1, {length}) like tokens, got {tuple(positions.shape)}")
        return positions

    def _own_ranges(self, tokens: Tensor, cache: CacheWindow | None) -> KeyRanges | None:
        if cache is not None:
            raise ValueError("key_ranges: expected the ranges over the cache's slots, got None")
        if self.config.causal_block == 0:
            return None
        return KeyRanges.block_causal(tokens.shape[1], self.config.causal_block, device=tokens.device)


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Gives the parameters of a module on the meta device memory on another, in place. Torch's to_empty would import
    sympy and more of what its compiler needs, half a second."""
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def init_weight(config: ModelConfig, name: str, weight: Tensor) -> None:
    """Draws one weight of a model, in place. Drawn in the order of `Model.named_parameters` they are a seed's."""
    std, into_residual = config.init_std, config.init_std / math.sqrt(2 * config.n_layers)
    if name == "embed.weight":
        weight.normal_(0, math.sqrt(1 / (2 * config.dim)))
    elif name.endswith("norm.weight"):
        weight.fill_(1)
    elif name.endswith("bias"):
        weight.zero_()
    else:
        weight.normal_(0, into_residual if "o_proj" in name or "down_proj" in name else std)


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns parameters by the names of `Model`, without the prefixes that torch.compile and data parallelism add."""
    return {re.sub(r"\b(_orig_mod|module)\.", "", name): p for name, p in model.named_parameters()}


def _shift(h: Tensor, positions: Tensor) -> Tensor:
    before = torch.cat([h[:, :1], h[:, :-1]], dim=1)
    return torch.where((positions == 0)[..., None], h, before)
