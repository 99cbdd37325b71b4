"""The model against a plain transformer written here, in float64, and the properties that padding and caches need."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from illada.config import PRESETS, ModelConfig
from illada.decoding.cache import Cache
from illada.errors import ConfigError
from illada.model import Model

from illada_kernels import KeyRanges
from tests.helpers.models import make, plain_forward, tiny, tokens_of

EXACT = 1e-12  # float64, values near 1, sums of at most 100 terms: 100 * 2**-53 is 1.1e-14


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rope_in_fp32", [False, True])
def test_hidden_rows_equal_a_plain_transformer(preset, rope_in_fp32):
    config = tiny(preset, rope_in_fp32=rope_in_fp32)
    model, tokens = make(config), tokens_of(config, 3, 17)
    positions = torch.arange(17).expand(3, -1)
    block = torch.arange(17) // config.causal_block if config.causal_block else torch.zeros(17)
    expected = plain_forward(model, tokens, positions, (block[:, None] >= block)[None, None])
    if config.shifted_logits:  # row i predicts token i + 1; row 0 serves its own position too
        expected = expected[:, [0, *range(16)]]
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=EXACT)


def test_positions_move_a_sequence_without_changing_what_it_sees():
    """RoPE is relative: the same offset for every token changes nothing, different distances change everything."""
    config = tiny()
    model, tokens = make(config), tokens_of(config, 1, 9)
    row = torch.arange(9)
    torch.testing.assert_close(model(tokens, positions=row + 5), model(tokens), rtol=0, atol=1e-9)
    assert (model(tokens, positions=2 * row) - model(tokens)).abs().max() > 1e-3
    torch.testing.assert_close(model(tokens, positions=row), model(tokens, positions=row[None]), rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["demo", "Dream-7B", "SDAR-8B"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_row(preset, side):
    config = tiny(preset, causal_block=0)
    model, lengths = make(config), [9, 4, 1]
    batch = tokens_of(config, 3, 9)
    first = [9 - n if side == "left" else 0 for n in lengths]
    positions = (torch.arange(9) - torch.tensor(first)[:, None]).clamp(min=0)
    hidden = model(batch, KeyRanges.padding(torch.tensor(lengths), 9, side=side), positions)
    assert hidden.isfinite().all()
    for b, (start, length) in enumerate(zip(first, lengths)):
        alone = model(batch[b : b + 1, start : start + length])
        torch.testing.assert_close(hidden[b : b + 1, start : start + length], alone, rtol=0, atol=EXACT)


def test_documents_end_to_end_equal_each_alone_with_shifted_logits_too():
    config = tiny("Dream-7B")
    model, tokens = make(config), tokens_of(config, 1, 12)
    cu_seqlens, positions = torch.tensor([0, 5, 12]), torch.cat([torch.arange(5), torch.arange(7)])
    packed = model(tokens, KeyRanges.packed(cu_seqlens, 12), positions)
    alone = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=EXACT)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_cached_blocks_of_a_block_causal_model_equal_one_pass(per_sequence):
    config = tiny("SDAR-8B", causal_block=4)
    model, tokens = make(config), tokens_of(config, 2, 12)
    whole = model(tokens)
    cache = Cache(config, batch=2, capacity=15, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, 12, 4):
            lengths = torch.full((2,), start + 4)
            if per_sequence:  # all slots in view, each sequence sees its own
                window, ranges = cache.at(lengths - 4), KeyRanges.cached(lengths, 4, 15)
            else:
                window, ranges = cache.at(start, start + 4), KeyRanges.full(start + 4)
            block = model(tokens[:, start : start + 4], ranges, cache=window)
            torch.testing.assert_close(block, whole[:, start : start + 4], rtol=0, atol=EXACT)


def test_sequences_of_unequal_length_share_a_cache():
    config = tiny("SDAR-8B", causal_block=4)
    model, tokens = make(config), tokens_of(config, 2, 12)
    lengths = [8, 4]  # what is in the cache before the new block
    cache = Cache(config, batch=2, capacity=12, dtype=torch.float64)
    with torch.no_grad():
        model(tokens[:, :8], KeyRanges.block_causal(8, 4), cache=cache.at(0, 8))
        new = torch.stack([tokens[b, n : n + 4] for b, n in enumerate(lengths)])
        end = torch.tensor(lengths) + 4
        block = model(new, KeyRanges.cached(end, 4, 12), cache=cache.at(end - 4))
        for b, n in enumerate(lengths):
            alone = model(tokens[b : b + 1, : n + 4])[:, n:]
            torch.testing.assert_close(block[b : b + 1], alone, rtol=0, atol=EXACT)


def test_cache_windows_stay_within_the_cache():
    config = tiny()
    cache = Cache(config, batch=1, capacity=4)
    k, cos = torch.ones(1, 2, config.n_kv_heads, config.head_dim), torch.ones(1, 2, 1, config.head_dim // 2)
    with pytest.raises(ValueError, match=r"within 4 slots, got 3 \.\. 5"):
        cache.at(3).rotate(0, k, k, k, cos, 0 * cos)
    with pytest.raises(ValueError, match="num_keys"):
        cache.at(0, 5)
    cache.at(torch.tensor([9])).rotate(0, k, k, k, cos, 0 * cos)
    assert cache.keys[0, 0, :3].abs().max() == 0 and cache.keys[0, 0, 3].min() == 1
    assert cache.keys[1:].abs().max() == 0


def test_norm_is_rounded_before_the_weight_is_applied():
    config = tiny()
    norm = make(config, dtype=torch.bfloat16).norm
    x = torch.randn(64, config.dim, dtype=torch.bfloat16) * 3
    exact = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + config.norm_eps).rsqrt()
    assert torch.equal(norm(x), exact.to(torch.bfloat16) * norm.weight)


def test_rope_in_float32_is_the_more_exact_of_the_two_in_bfloat16():
    """Both are compared with float64 on the same bfloat16 weights; the float32 one rounds less often."""
    errors = {}
    for in_fp32 in (False, True):
        config = tiny(rope_in_fp32=in_fp32, n_layers=1, head_dim=32)
        model, tokens = make(config, dtype=torch.bfloat16), tokens_of(config, 8, 48)
        hidden = model(tokens).double()
        errors[in_fp32] = (hidden - model.double()(tokens)).abs().mean().item()
    assert errors[True] < errors[False]


def test_gradients_reach_every_parameter_and_equal_the_plain_transformers():
    config = tiny("SDAR-8B", causal_block=0, qkv_bias=True)
    tokens, positions = tokens_of(config, 2, 7), torch.arange(7).expand(2, -1)
    model = make(config)
    upstream = torch.randn(2, 7, config.dim, dtype=torch.float64)
    body = [p for name, p in model.named_parameters() if name != "lm_head.weight"]
    ours = torch.autograd.grad((model(tokens) * upstream).sum(), body)
    plain = plain_forward(model, tokens, positions, torch.ones(1, 1, 7, 7, dtype=torch.bool))
    for mine, theirs in zip(ours, torch.autograd.grad((plain * upstream).sum(), body)):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


# Parameters of the published checkpoints: LLaDA's file sizes give 16,031,162,368 bytes of bfloat16.
@pytest.mark.parametrize("preset, parameters", [("iLLaDA-8B", 7_615_025_152), ("LLaDA-8B", 16_031_162_368 // 2)])
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    assert ModelConfig.preset(preset).num_parameters == parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_num_parameters_counts_the_models(preset):
    config = tiny(preset)
    assert sum(p.numel() for p in Model(config, device="meta").parameters()) == config.num_parameters


def test_fresh_weights_have_the_stated_spread():
    torch.manual_seed(0)
    config = tiny(dim=256, ffn_dim=512, n_layers=8, vocab_size=500, tie_embeddings=False, qkv_bias=True, init_std=0.02)
    weights = {name: p.std().item() for name, p in Model(config).named_parameters() if p.numel() > 10000}
    expected = {"embed": (1 / 512) ** 0.5, "o_proj": 0.02 / 4, "down_proj": 0.02 / 4}
    for name, spread in weights.items():
        wanted = next((value for part, value in expected.items() if part in name), 0.02)
        assert spread == pytest.approx(wanted, rel=0.05)  # 10,000 draws: 0.7% is one standard deviation
    assert Model(config).layers[0].qkv_proj.bias.abs().max() == 0 and Model(config).norm.weight.min() == 1


def test_wrong_shapes_are_named():
    config = tiny()
    model, tokens = make(config), tokens_of(config, 2, 5)
    with pytest.raises(ValueError, match="tokens: expected int64"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"positions: expected \(2 or 1, 5\)"):
        model(tokens, positions=torch.arange(4))
    with pytest.raises(ValueError, match="key_ranges: expected the ranges over the cache's slots"):
        model(tokens, cache=Cache(config, 2, 8, dtype=torch.float64).at(0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_heads": 5}, "n_heads: expected a multiple of n_kv_heads = 2, got 5"),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"vocab_size": 0}, "vocab_size: expected an int of at least 1"),
        ({"mask_id": 50}, "mask_id: expected -1 .none. or an id below 50, got 50"),
        ({"mask_id": 48}, "mask_id: expected an id of its own, got 48"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a positive number, got nan"),
        ({"causal_block": -1}, "causal_block: expected 0"),
        ({"family": "gpt"}, "family: expected one of illada"),
    ],
)
def test_a_contradictory_configuration_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny(), **change)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_its_config_json(preset):
    config = ModelConfig.preset(preset)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.filterwarnings("error")
def test_published_config_json_files_are_understood():
    llada = {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "block_type": "llama",
        "d_model": 4096,
        "embedding_size": 126464,
        "eos_token_id": 126081,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": 126336,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 12288,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "pad_token_id": 126081,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "vocab_size": 126464,
        "weight_tying": False,
    }
    assert ModelConfig.from_hf(llada) == ModelConfig.preset("LLaDA-8B")
    dream = {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "mask_token_id": 151666,
        "num_hidden_layers": 28,
        "max_position_embeddings": 2048,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
        "eos_token_id": 151643,
        "pad_token_id": 151643,
    }
    assert ModelConfig.from_hf(dream) == ModelConfig.preset("Dream-7B")
    qwen = {**dream, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
    qwen = {**qwen, "mask_token_id": 151665, "eos_token_id": [151643, 151645]}
    assert ModelConfig.from_hf(qwen) == ModelConfig.preset("Qwen2.5-7B", more_eos_ids=(151645,))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "got gpt2, GPT2LMHeadModel"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope_scaling of type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "original_max_position_embeddings: expected a positive"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
        ({"hidden_size": "wide"}, "hidden_size: expected a number, got 'wide'"),
    ],
)
def test_a_config_json_of_another_model_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf({**tiny().to_hf(), **change})
    incomplete = {name: value for name, value in tiny().to_hf().items() if name != "intermediate_size"}
    with pytest.raises(ConfigError, match="'intermediate_size' is missing, and a illada model needs it"):
        ModelConfig.from_hf(incomplete)
