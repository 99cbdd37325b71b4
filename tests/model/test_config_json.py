"""config.json and generation_config.json: every setting is applied, kept or refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from illada import GenerationConfig, generate
from illada.checkpoint import load, read_config, save
from illada.config import ModelConfig
from illada.errors import ConfigError
from illada.model import RMSNorm

from tests.helpers.models import make, tiny

BASE = ModelConfig.preset("Qwen2.5-7B").to_hf()
LLADA = ModelConfig.preset("LLaDA-8B").to_hf()
PER_LAYER_TYPE = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.mark.parametrize(
    "hf, message",
    [
        ({**BASE, "rope_scaling": {"factor": 4.0}}, "rope_scaling of type None is not supported"),
        ({**BASE, "rope_scaling": "linear"}, "rope_scaling: expected null or one object of numbers, got 'linear'"),
        ({**BASE, "rope_scaling": {"rope_type": "default", "factor": 4.0}}, "rope_scaling: expected rope_theta alone"),
        ({**BASE, "rope_parameters": PER_LAYER_TYPE}, "rope_parameters: expected null or one object of numbers"),
        ({**BASE, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported, expected 1.0"),
        ({**BASE, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_theta alone"),
        ({**BASE, "layer_types": ["sliding_attention"] * 28}, "layer_types: expected 'full_attention' alone"),
        ({**BASE, "use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({**BASE, "quantization_config": {"bits": 4}}, "quantization_config = .* may change the numbers"),
        (
            {**BASE, "final_logit_softcapping": 30.0, "a_scale": 2},
            "final_logit_softcapping = 30.0, a_scale = 2 may change",
        ),
        ({**BASE, "num_attention_heads": "28"}, "num_attention_heads: expected a number, got '28'"),
        ({**BASE, "rope_theta": [1e6]}, "rope_theta: expected a number"),
        ({**BASE, "tie_word_embeddings": "false"}, "tie_embeddings: expected true or false, got 'false'"),
        ({**BASE, "causal_block": True}, r"causal_block: expected 0 \(full\) or a block length, got True"),
        ({**BASE, "eos_token_id": "</s>"}, "eos_token_id: expected an id or a list of ids, got '</s>'"),
        ({**BASE, "eos_token_id": [1, 10**9]}, "more_eos_ids: expected an id below 152064"),
        ({**BASE, "architectures": "Qwen2ForCausalLM"}, "architectures: expected a list"),
        ({**LLADA, "clip_qkv": 8.0}, "clip_qkv = 8.0 may change the numbers"),
        ({**LLADA, "alibi": True}, "alibi = True is not supported"),
        ({**LLADA, "layer_norm_with_affine": False}, "layer_norm_with_affine = False is not supported"),
        ({**LLADA, "block_group_size": 4}, "block_group_size = 4 is not supported"),
    ],
)
def test_settings_that_change_numbers_are_refused_by_name(hf, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    "name, message",
    [
        ("rope", "rope is missing, which LLaDA's code takes as False, is not supported, expected True"),
        ("block_type", "block_type is missing, which LLaDA's code takes as 'sequential'"),
        ("activation_type", "activation_type is missing, which LLaDA's code takes as 'swiglu'"),
        ("layer_norm_type", "layer_norm_type is missing, which LLaDA's code takes as 'default'"),
    ],
)
def test_a_key_that_a_llada_folder_lacks_is_what_its_code_takes_it_as(name, message):
    without = {key: value for key, value in LLADA.items() if key != name}
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(without)
    with pytest.raises(ConfigError, match=rf"{name} = None is not supported"):  # no less than nothing
        ModelConfig.from_hf({**LLADA, name: None})


def test_keys_that_a_llada_folder_lacks_have_its_code_s_defaults():
    names = ("weight_tying", "max_sequence_length", "embedding_size", "vocab_size", "include_qkv_bias", "rms_norm_eps")
    names += ("rope_theta", "rope_full_precision", "include_bias", "scale_logits", "alibi", "bias_for_layer_norm")
    ids = {"mask_token_id": 50300, "eos_token_id": 50256, "pad_token_id": 50256}
    config = ModelConfig.from_hf({key: value for key, value in {**LLADA, **ids}.items() if key not in names})
    assert config.tie_embeddings and config.rope_in_fp32 and not config.qkv_bias
    assert (config.max_seq_len, config.vocab_size, config.norm_eps, config.rope_theta) == (1024, 50304, 1e-5, 1e4)
    nulls = ModelConfig.from_hf({**LLADA, "weight_tying": None, "embedding_size": None, "include_qkv_bias": None})
    assert not nulls.tie_embeddings and nulls.vocab_size == LLADA["vocab_size"] and not nulls.qkv_bias
    for shared, heads in ((True, 32), (False, 8)):
        with pytest.raises(ConfigError, match=f"n_kv_heads = {heads} contradicts multi_query_attention = {shared}"):
            ModelConfig.from_hf({**LLADA, "n_kv_heads": heads, "multi_query_attention": shared})


def test_settings_that_change_nothing_pass_and_unknown_ones_are_named():
    harmless = {
        "use_cache": True,
        "sliding_window": None,
        "hidden_act": "swish",
        "layer_types": ["full_attention"] * 28,
    }
    harmless |= {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert ModelConfig.from_hf({**BASE, **harmless}) == ModelConfig.preset("Qwen2.5-7B")
    with pytest.warns(UserWarning, match="not known here and ignored: frobnication"):
        ModelConfig.from_hf({**BASE, "frobnication": 3})


def test_one_key_head_of_multi_query_attention_is_applied():
    hf = {name: value for name, value in LLADA.items() if name != "n_kv_heads"}
    assert ModelConfig.from_hf({**hf, "multi_query_attention": True}).n_kv_heads == 1
    assert ModelConfig.from_hf(hf).n_kv_heads == 32


# ---- what save keeps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["iLLaDA-8B", "LLaDA-8B", "SDAR-8B"])
def test_saving_keeps_every_setting_that_did_not_change(preset, tmp_path):
    save(make(tiny(preset), dtype=torch.float32), tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    foreign = {"auto_map": {"AutoModel": "modeling.Model"}, "attention_dropout": 0.25, "transformers_version": "4.57.1"}
    written = {**json.loads(file.read_text()), **foreign, "dtype": "float32", "architectures": ["ILLaDAModelLM"]}
    del written["torch_dtype"]
    file.write_text(json.dumps(written))
    model = load(tmp_path / "a")
    save(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == written
    model.config = dataclasses.replace(model.config, rope_theta=12345.0)
    assert {**written, "rope_theta": 12345.0} == {**model.config.to_hf(), "dtype": "float32"}


def test_names_are_those_of_the_published_code():
    illada = ModelConfig.preset("iLLaDA-8B").to_hf()
    assert illada["architectures"] == ["ILLaDAForCausalLM"]
    assert ModelConfig.from_hf({**illada, "model_type": None}).family == "illada"
    sdar = ModelConfig.preset("SDAR-8B", causal_block=8).to_hf()
    assert sdar["block_size"] == 8 and "causal_block" not in sdar
    assert ModelConfig.from_hf(sdar).causal_block == 8
    assert LLADA["attention_dropout"] == LLADA["residual_dropout"] == LLADA["embedding_dropout"] == 0
    for preset in ("iLLaDA-8B", "LLaDA-8B", "Dream-7B", "SDAR-8B", "Qwen2.5-7B"):  # nothing that only we understand
        ours = {"rope_in_fp32", "norm_in_fp32", "shifted_logits", "causal_block", "forbid_mask"}
        assert not ours & set(ModelConfig.preset(preset).to_hf())


def test_a_changed_theta_reaches_both_places():
    config = ModelConfig.from_hf({**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    changed = dataclasses.replace(config, rope_theta=5e5).to_hf()
    assert changed["rope_theta"] == changed["rope_parameters"]["rope_theta"] == 5e5


# ---- all ids that end a text -------------------------------------------------------------------------------------


def test_any_end_of_text_id_stops_and_all_are_kept(tmp_path):
    save(make(tiny("SDAR-8B"), dtype=torch.float32), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [48, 45]}))
    model = load(tmp_path)
    assert model.config.eos_ids == (48, 45)
    done = generate(model, [[1, 2, 3, 4]], GenerationConfig(max_new_tokens=8, logit_bias=([45], [1e4])))
    assert done.stopped == [True] and done.tokens == [[]]
    save(model, tmp_path / "again")
    assert read_config(tmp_path / "again").eos_ids == (48, 45)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [46, 48], "temperature": 0.7}')
    assert read_config(tmp_path).eos_ids == (48, 45, 46)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json: expected an object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"eos_id": 7}, {"eos_id": 46}, {"eos_id": -1}, {"eos_id": 7, "more_eos_ids": (8,)}]
)
@pytest.mark.parametrize("where", ["over", "beside"])
def test_ids_that_were_taken_away_do_not_come_back_from_generation_config(changes, where, tmp_path):
    save(make(tiny("SDAR-8B"), dtype=torch.float32), tmp_path / "there")
    generation = {"eos_token_id": [46, 48], "pad_token_id": 47, "temperature": 0.7, "_from_model_config": True}
    (tmp_path / "there" / "generation_config.json").write_text(json.dumps(generation))
    model = load(tmp_path / "there", **{"more_eos_ids": (), **changes, "pad_id": 3})
    folder = tmp_path / ("there" if where == "over" else "beside")
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save(model, folder)
    assert load(folder).config == model.config
    kept = json.loads((folder / "generation_config.json").read_text())
    assert {**generation, **{name: kept[name] for name in ("eos_token_id", "pad_token_id")}} == kept
    assert kept["pad_token_id"] == 3 and not list(folder.glob("generation-*"))


def test_a_generation_config_that_says_nothing_else_stays_as_it_is(tmp_path):
    save(make(tiny("SDAR-8B"), dtype=torch.float32), tmp_path)
    text = '{"eos_token_id": 48, "pad_token_id": 11,\n "bos_token_id": 5}'  # another pad_id than config.json's
    (tmp_path / "generation_config.json").write_text(text)
    save(load(tmp_path), tmp_path)
    assert (tmp_path / "generation_config.json").read_text() == text


# ---- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_fp32", [False, True])
def test_the_norm_rounds_where_its_family_does(in_fp32):
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-6, in_fp32).bfloat16(), torch.randn(50, 64).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    y, w = x.float(), norm.weight.float()
    unit = y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    once, twice = (unit * w).bfloat16(), unit.bfloat16() * norm.weight
    assert not torch.equal(once, twice)
    assert torch.equal(norm(x), once if in_fp32 else twice)
    assert ModelConfig.preset("SDAR-8B").norm_in_fp32 and not ModelConfig.preset("iLLaDA-8B").norm_in_fp32


QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
}


def yarn(factor: float) -> dict[str, object]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", [None, yarn(4.0)])
def test_another_scaling_of_rope_is_read_back(key, scaling):
    theirs = {**QWEN3, key: {**yarn(2.0), **({"rope_theta": 1e4} if key == "rope_parameters" else {})}}
    config = dataclasses.replace(ModelConfig.from_hf(theirs), rope_scaling=scaling)
    written = config.to_hf()
    assert ModelConfig.from_hf(written).rope_scaling == scaling
    assert {"rope_scaling", "rope_parameters"} & written.keys() == {key}


def test_what_a_family_cannot_say_is_not_saved_as_another_model():
    config = dataclasses.replace(ModelConfig.preset("LLaDA-8B"), rope_scaling=yarn(4.0))
    with pytest.raises(ConfigError, match=r"rope_scaling: a config\.json of the family llada has no key"):
        config.to_hf()


def test_a_causal_family_without_causality_sees_all_and_says_so_when_saved():
    """transformers 5 reads is_causal: false likewise."""
    config = ModelConfig.from_hf({**QWEN3, "is_causal": False})
    assert config.causal_block == 0 and config.to_hf()["is_causal"] is False
    written = dataclasses.replace(ModelConfig.from_hf(QWEN3), causal_block=0).to_hf()
    assert written["is_causal"] is False and ModelConfig.from_hf(written).causal_block == 0


@pytest.mark.parametrize("off", [{"use_rope": False}, {"attention_multiplier": 0.0}])
def test_settings_that_change_the_numbers_when_they_are_off_are_refused(off):
    with pytest.raises(ConfigError, match="may change the numbers"):
        ModelConfig.from_hf({**QWEN3, **off})
    ModelConfig.from_hf({**QWEN3, **dict.fromkeys(off)})  # null is no setting


@pytest.mark.parametrize(
    "both",
    [
        {"rope_theta": 10.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_scaling": yarn(2.0), "rope_parameters": {**yarn(4.0), "rope_theta": 1e4}},
        {"rope_scaling": yarn(2.0), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_keys_of_rope_that_contradict_each_other_are_refused(both):
    with pytest.raises(ConfigError, match=r"rope_parameters: .* contradicts"):
        ModelConfig.from_hf({**QWEN3, **both})
