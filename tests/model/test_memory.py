"""What a generation allocates beside the weights."""

from __future__ import annotations

import pytest
import torch
from illada import GenerationConfig, Model, ModelConfig, generate

from benchmarks.measure import peak_memory


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_generation_needs_at_most_a_quarter_of_its_weights_beside_them(dtype, cache):
    sizes = {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "ffn_dim": 1408}
    sizes |= {"vocab_size": 16384, "mask_id": 5, "eos_id": 2, "pad_id": 1}
    model = Model(ModelConfig.preset("iLLaDA-8B", **sizes), dtype=dtype).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    how = GenerationConfig(max_new_tokens=64, block_length=32, steps_per_block=2, cache=cache)
    peak = peak_memory(lambda: generate(model, [list(range(10, 138))], how), "cpu")
    rows = 128 * 512 * dtype.itemsize  # the hidden rows of the prompt, which every pass over it has
    assert rows < peak <= weights / 4
