"""llama.cpp as a peer: it computes what our model computes, and writes the same tokens; where it is installed."""

from __future__ import annotations

import pytest
import torch
from illada import Model, ModelConfig

from benchmarks import peers
from benchmarks.peers import generate as llama_cpp
from benchmarks.suites import generate as suite

IDS = {"mask_id": 5, "eos_id": 2, "pad_id": 1}
TINY = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 352, "vocab_size": 1000}
installed = pytest.mark.skipif(llama_cpp.why_not() is not None, reason=f"llama.cpp: {llama_cpp.why_not()}")


def config() -> ModelConfig:
    return ModelConfig.preset("LLaDA-8B", **TINY, **IDS)


@installed
@pytest.mark.parametrize(
    "kind, rounding",  # of activations: keys and values are float16, those that meet Q8_0 and Q4_0 blocks of int8
    [("F32", 2**-11), ("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 1 / 254), ("Q4_0", 1 / 254)],
)
def test_llama_cpp_gives_the_logits_of_the_same_weights(kind, rounding):
    import gguf

    torch.manual_seed(0)
    model = Model(config()).eval()
    for layer in model.layers:
        layer.qkv_proj.weight.data *= 6.0  # otherwise attention would average, and hardly depend on positions
    for weight in model.parameters():
        if weight.dim() > 1:
            stored = gguf.quants.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType[kind])
            weight.data = torch.from_numpy(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]).copy())
    tokens = torch.randint(6, 1000, (1, 40))
    with torch.no_grad():
        wanted = model(tokens)[0] @ model.head_weight.T
    llama = llama_cpp.LlamaCpp(model, kind, 40)
    found = llama(tokens[0])
    products = 7 * model.config.n_layers + 1  # one after the other; each may add its rounding
    assert (found - wanted).norm() <= products * rounding * wanted.norm()


@installed
def test_llama_cpp_writes_the_tokens_of_our_loop_and_llada_s():
    work = suite.build_packed(config(), 16, 16, 8, "none", "float32")
    ours = torch.tensor(work.ours["packed"]().tokens)
    assert set(work.peers) == {"llama.cpp F32", "LLaDA's loop"} and not work.absent
    assert work.notes["llama.cpp F32"].startswith("llama-cpp-python 0.")
    for peer in work.peers.values():
        assert torch.equal(peer(), ours)


@pytest.mark.parametrize("weights", suite.WEIGHTS)
def test_without_llama_cpp_its_rows_say_why(weights, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    work = suite.build_pass(config(), 16, weights)
    assert not any("llama" in name for name in work.peers)
    assert work.absent == {f"llama.cpp {kind}": "llama_cpp: not installed" for kind in llama_cpp.KINDS[weights]}
    with torch.no_grad():
        assert work.ours["packed"]().isfinite().all()
