"""Puts ops into a model that was written for torch's functions, without touching its code.

Run: python examples/foreign_model.py
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from illada_kernels import KeyRanges
from illada_kernels.integrations import patch, unpatch


class Layer(nn.Module):  # somebody's code: LLaDA's, dllm's, yours
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.layers = nn.ModuleList(Layer(dim, 4) for _ in range(3))

    def forward(self, tokens, labels, mask=None):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


torch.manual_seed(0)
model = Model(vocab=100, dim=64)
tokens = torch.randint(0, 99, (2, 48))
masked = torch.rand(2, 48) < 0.5
inputs = tokens.masked_fill(masked, 99), tokens.masked_fill(~masked, -100)

ranges = KeyRanges.block_causal(48, 16)  # a dense mask of 48 x 48, or four integers a row
before = model(*inputs, mask=ranges.dense())

print("replaced:", ", ".join(patch(model)))
after = model(*inputs, mask=ranges.dense())  # read once, remembered for all layers
faster = model(*inputs, mask=ranges)  # no dense mask at all
torch.testing.assert_close(after, before, atol=0, rtol=1e-5)
torch.testing.assert_close(faster, before, atol=0, rtol=1e-5)

unpatch(model)
assert torch.equal(model(*inputs, mask=ranges.dense()), before)
print(f"the same loss: {before.item():.4f} by torch, {after.item():.4f} patched")
