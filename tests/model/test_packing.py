"""Packed linear layers: the same results within rounding, less time a pass, and words for what they cannot do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from illada import CheckpointError, GenerationConfig, Model, ModelConfig, generate, save
from illada.packing import GROUP, Int4Linear, Int8Linear, PackedLinear, fast_dtype, pack, reason
from torch import nn

from tests.helpers.models import make, tiny

HERE = reason(make(tiny("demo"), dtype=torch.float32))
pytestmark = pytest.mark.skipif(HERE is not None, reason=str(HERE))
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], []]


def pair(preset: str, dtype: torch.dtype = torch.float32) -> tuple[Model, Model]:
    plain = make(tiny(preset)).to(dtype)
    return plain, pack(copy.deepcopy(plain))


@pytest.mark.parametrize("preset", ["demo", "SDAR-8B", "Dream-7B", "Qwen2.5-7B"])
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_hidden_rows_are_those_of_the_plain_model(preset, dtype, bar):
    plain, packed = pair(preset, dtype)
    tokens = torch.arange(48).remainder(40).view(2, 24)
    with torch.no_grad():
        wanted, found = plain(tokens).float(), packed(tokens).float()
    assert (found - wanted).norm() <= bar * wanted.norm()
    assert not [m for layer in packed.layers for m in layer.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("preset, cache", [("demo", "none"), ("demo", "dual"), ("SDAR-8B", "block_causal")])
def test_the_same_tokens_are_generated(preset, cache):
    plain, packed = pair(preset)
    config = GenerationConfig(max_new_tokens=8, block_length=plain.config.causal_block or 4, cache=cache, stop_ids=())
    assert generate(packed, PROMPTS, config) == generate(plain, PROMPTS, config)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_any_number_of_rows_and_any_strides(rows, bias):
    linear = nn.Linear(24, 40, bias=bias)
    layer = PackedLinear(linear, 32)
    x = torch.randn(2, rows, 3, 48)[..., ::2]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


def rounded(linear: nn.Linear, weights: str) -> torch.Tensor:
    """The weight that int8 or int4 stands for, in float64."""
    w = linear.weight.detach().double()
    if weights == "int8":
        scale = w.abs().amax(1, keepdim=True) / 127
        return (w / scale).round() * scale.to(linear.weight.dtype).double()
    groups = w.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / 15
    s, z = (x.to(linear.weight.dtype).double() for x in (scale, low + 8 * scale))
    return ((((groups - low) / scale).round() - 8) * s + z).flatten(1)


@pytest.mark.parametrize("weights, kind", [("int8", Int8Linear), ("int4", Int4Linear)])
@pytest.mark.parametrize("rows", [0, 1, 4, 33])
def test_rounded_weights_give_their_products(weights, kind, rows):
    """bar: the result is rounded once to bfloat16, and the bias added with a rounding of its own: 2^-9 of each."""
    torch.manual_seed(0)
    dtype, bar = torch.bfloat16, 2 * 2**-9
    linear = nn.Linear(96, 48).to(dtype)
    layer, x = kind(linear), torch.randn(2, rows, 96).to(dtype)
    with torch.no_grad():
        wanted = x.double() @ rounded(linear, weights).T + linear.bias.double()
        found = layer(x)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert (found.double() - wanted).norm() <= bar * wanted.norm()
    plain = x.double() @ linear.weight.double().T + linear.bias.double()
    assert rows == 0 or (wanted - plain).norm() <= (0.02 if weights == "int8" else 0.12) * plain.norm()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_model_of_rounded_weights_generates(weights):
    torch.manual_seed(0)
    config = tiny("demo", dim=64, head_dim=16, ffn_dim=96)
    model = pack(make(config, dtype=torch.bfloat16), weights=weights)
    done = generate(model, PROMPTS[:2], GenerationConfig(max_new_tokens=8, block_length=4, stop_ids=()))
    assert [len(row) for row in done.tokens] == [8, 8]


def test_widths_that_int4_cannot_take_are_named():
    with pytest.raises(ValueError, match="widths are multiples of 32 and 16, qkv_proj has 24 and 48"):
        pack(pair("demo", torch.bfloat16)[0], weights="int4")
    with pytest.raises(ValueError, match="int8 takes bfloat16, because torch's int8 products"):
        pack(pair("demo")[0], weights="int8")
    with pytest.raises(ValueError, match="weights: expected one of same, int8, int4, got 'int3'"):
        pack(pair("demo")[0], weights="int3")


def test_packed_weights_take_the_place_of_the_plain_ones():
    packed = pair("demo")[1]
    assert {name for name, _ in packed.named_parameters() if "proj" in name} == set()
    sizes = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert {n for n, m in packed.layers[0].named_children() if isinstance(m, PackedLinear)} == sizes


def test_what_a_packed_model_cannot_do_is_said(tmp_path):
    packed = pair("demo")[1]
    with pytest.raises(RuntimeError, match=r"use \.to\(\) before packing"):
        packed.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match="save it before `pack`"):
        save(packed, tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="save the model before packing"):
        packed.state_dict()
    with pytest.raises(RuntimeError, match="no derivative"):
        packed(torch.tensor([[1, 2, 3]])).sum().backward()
    with pytest.raises(ValueError, match="rows: expected an integer of at least 1, got 0"):
        pack(pair("demo")[0], 0)
    with pytest.raises(ValueError, match=r"takes float32 and bfloat16, not torch\.float64"):
        pack(make(tiny("demo")))
    with pytest.raises(ValueError, match="packs for a CPU, the model is on meta"):
        pack(Model(tiny("demo"), device="meta"))


@pytest.mark.parametrize("weights", ["same", "int8", "int4"])
def test_a_packed_model_is_copied_and_not_pickled(weights, tmp_path):
    model = Model(ModelConfig.preset("demo", n_layers=1)).to(torch.bfloat16).eval()
    packed = pack(model, weights=weights)
    twin = copy.deepcopy(packed)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(twin(tokens), packed(tokens))
        packed.embed.weight.zero_()
        assert twin.embed.weight.any()
    assert twin.layers[0].qkv_proj.packed is packed.layers[0].qkv_proj.packed  # nothing writes it
    for write in (pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
        with pytest.raises(RuntimeError, match=r"pack: packed weights cannot be pickled .* before packing"):
            write(packed)


def test_the_fast_dtype_is_one_that_the_processor_multiplies(monkeypatch):
    for amx, avx512, dtype in ((False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512, raising=False)
        assert fast_dtype("cpu") == dtype and fast_dtype("cuda:1") == "bfloat16"
