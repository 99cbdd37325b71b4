"""One cached pass of a model on a GPU, what decoding does for each step of a block: against reading its weights once.

With FP8 linears a layer's weights are e4m3 with a scale a row, and so are the rows that it multiplies, by torch's
scaled matmul; one compiled kernel rounds the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from illada.config import ModelConfig
from illada.decoding.cache import Cache
from illada.model import Model
from torch import Tensor, nn

from illada_kernels import KeyRanges

from ..measure import Work

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x in e4m3 and a scale a row (rows, 1), so that x is their product."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(FP8), scale


class Fp8Linear(nn.Module):
    def __init__(self, linear: nn.Linear, rounded: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.rounded, self.bias, self.width = rounded, linear.bias, linear.out_features
        weight, scale = rounded(linear.weight.detach())
        self.register_buffer("weight", weight)  # (out, in); the matmul takes its transpose, column-major
        self.register_buffer("scale", scale.T.contiguous())  # (1, out)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = self.rounded(x.flatten(0, -2))
        y = torch._scaled_mm(rows, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype)
        y = y.view(*x.shape[:-1], self.width)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def with_fp8_linears(model: Model) -> Model:
    """Replaces the linear layers, in place, one after the other."""
    compiled = torch.compile(rounded, dynamic=False)
    for layer in model.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, Fp8Linear(child, compiled))
    return model


def build(config: ModelConfig, batch: int, rows: int, keys: int, fp8: bool, device: str, dtype: str) -> Work:
    torch.manual_seed(0)
    model = Model(config, device=device, dtype=getattr(torch, dtype)).eval()
    tokens = torch.randint(6, config.vocab_size, (batch, rows), device=device)
    plain = model(tokens[:1, :1]).detach() if fp8 else None
    model = with_fp8_linears(model) if fp8 else model
    cache, first = Cache(config, batch, keys, device=device, dtype=model.dtype), keys - rows
    cache.keys.normal_()
    cache.values.normal_()
    ranges, positions = KeyRanges.full(keys, device=device), torch.arange(first, keys, device=device)[None]
    weights = [
        x for layer in model.layers for x in (*layer.parameters(), *layer.buffers()) if x.dim() == 2 and len(x) > 1
    ]

    @torch.no_grad()
    def one_pass() -> Tensor:
        return model(tokens, ranges, positions, cache.at(first))

    def read() -> list[Tensor]:
        return [x.view(torch.uint8).view(torch.int64).amax() for x in weights]

    body = sum(x.numel() for x in weights)
    held = 2 * config.n_layers * batch * keys * config.n_kv_heads * config.head_dim * model.dtype.itemsize
    attention = 4 * config.n_layers * batch * rows * keys * config.n_heads * config.head_dim
    bytes = sum(x.numel() * x.element_size() for x in weights) + held
    work = Work({"default": one_pass}, {}, 2 * body * batch * rows + attention, bytes)
    work.beside["weights read once"] = torch.no_grad()(read)
    work.replayed = 1
    if plain is not None:
        with torch.no_grad():
            error = (model(tokens[:1, :1]) - plain).float().norm() / plain.float().norm()
        work.notes["default"] = f"hidden rows differ from those of {dtype} linears by {float(error):.1%}"
    return work
