"""Checkpoints of every family: what transformers saves loads here, gives the same logits, and goes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from illada import GenerationConfig, ModelConfig, load, save
from illada.checkpoint import read_config
from illada.decoding.settings import checked
from illada.errors import ConfigError, DataError
from illada.hf_config import FAMILIES
from illada.model import rope_angles
from illada.tokenizer import load_tokenizer
from safetensors.torch import load_file, save_file

from tests.helpers.models import make, tiny

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 47,
    "bos_token_id": 46,
    "eos_token_id": 48,
    "rms_norm_eps": 1e-5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# family: transformers' model, what its config.json says besides, block of the mask (0 full), prefixes of its tensors
PUBLISHED = {
    "llama": ("Llama", {"architectures": ["LlamaForCausalLM"]}, 1, {}),
    "qwen2": ("Qwen2", {"architectures": ["Qwen2ForCausalLM"]}, 1, {}),
    "qwen3": ("Qwen3", {"architectures": ["Qwen3ForCausalLM"]}, 1, {}),
    "stable_diffcoder": ("Llama", {"architectures": ["StableDiffcoderForCausalLM"]}, 4, {}),
    "a2d_qwen2": (
        "Qwen2",
        {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], "mask_token_id": 49},
        0,
        {},
    ),
    "a2d_qwen3": (
        "Qwen3",
        {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "mask_token_id": 49},
        0,
        {},
    ),
    "nemotron_labs_diffusion": (
        "Ministral3",
        {
            "model_type": "nemotron_labs_diffusion",
            "architectures": ["NemotronLabsDiffusionModel"],
            "dlm_paradigm": "bidirectional",
            "block_size": 32,
            "mask_token_id": 49,
        },
        0,
        {"model.": "encoder.", "lm_head.": "diffusion_head."},
    ),
}
every_family = pytest.mark.parametrize("family", PUBLISHED)


@pytest.fixture
def published(request, tmp_path):
    """(transformers' model, the folder as it is published)"""
    transformers = pytest.importorskip("transformers", minversion="5", reason="transformers makes the checkpoints")
    name, says, _, renamed = PUBLISHED[request.param]
    own = {"head_dim": 6} if name != "Qwen2" else {}
    rope = {"rope_parameters": YARN} if name == "Ministral3" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **own, **rope, attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **says}))
    tensors = load_file(tmp_path / "model.safetensors")
    for old, new in renamed.items():
        tensors = {new + key.removeprefix(old) if key.startswith(old) else key: t for key, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return model, tmp_path


def additive_mask(length: int, block: int) -> torch.Tensor:
    at = torch.arange(length) // (block or length)
    allowed = at[:, None] >= at
    return torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("family, published", [(f, f) for f in PUBLISHED], indirect=["published"])
def test_published_folders_load_and_give_the_same_logits(family, published):
    theirs, folder = published
    model = load(folder)
    assert model.config.family == family
    assert model.config.shifted_logits == (PUBLISHED[family][2] == 1)
    tokens = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=additive_mask(11, PUBLISHED[family][2]).expand(2, -1, -1, -1)).logits
        found = model(tokens, shift=False) @ model.head_weight.T
    # angles are float32 in both, summed in another order for YaRN
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family, published", [(f, f) for f in PUBLISHED], indirect=["published"])
def test_saving_a_published_folder_changes_nothing_but_the_weights_files(family, published, tmp_path):
    _, folder = published
    before, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    model = load(folder)
    for target in (folder, tmp_path / "beside"):
        save(model, target)
        assert json.loads((target / "config.json").read_text()) == before
        again = load_file(target / "model.safetensors")
        assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_model_of_every_family_goes_out_and_back(family, tmp_path):
    config = tiny("demo", family=family, forbid_mask=False)
    save(make(config, dtype=torch.float32), tmp_path)
    assert read_config(tmp_path) == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_hf({**written, "model_type": None}).family == family


# ---- YaRN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_factor": 1.3}, {"truncate": False}, {"beta_fast": 4.0}, {"mscale": 0.0}, {"factor": 1.0}],
    ids=str,
)
def test_yarn_s_angles_are_those_of_transformers(changes):
    pytest.importorskip("transformers", minversion="5", reason="transformers is the oracle")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**{k: v for k, v in YARN.items() if k != "llama_4_scaling_beta"}, **changes}
    theirs = LlamaConfig(**{**SIZES, "hidden_size": 512}, head_dim=128, rope_parameters=scaling)
    frequency, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    config = tiny(
        "demo", head_dim=128, rope_theta=1e6, rope_scaling={k: v for k, v in scaling.items() if k != "rope_theta"}
    )
    at = torch.arange(64)[None]
    cos, sin = rope_angles(config, at, torch.float32)
    angle = at[..., None, None] * frequency
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin, angle.sin() * factor, rtol=1e-5, atol=1e-5)


def test_queries_are_scaled_only_beyond_where_nemotron_s_context_ends_here():
    says = {**SIZES, "model_type": "nemotron_labs_diffusion", "mask_token_id": 49, "rope_parameters": YARN}
    assert ModelConfig.from_hf(says).max_seq_len == 16
    unscaled = {k: v for k, v in YARN.items() if k != "llama_4_scaling_beta"}
    assert ModelConfig.from_hf({**says, "rope_parameters": unscaled}).max_seq_len == 64
    with pytest.raises(ConfigError, match="dlm_paradigm = 'block_diff' is not supported, expected 'bidirectional'"):
        ModelConfig.from_hf({**says, "dlm_paradigm": "block_diff"})
    with pytest.raises(ConfigError, match="rope_scaling: factor: expected a positive number, got None"):
        ModelConfig.from_hf({**says, "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}})
    with pytest.raises(ConfigError, match="rope_parameters: expected rope_theta and attention_factor, beta_fast"):
        ModelConfig.from_hf({**says, "rope_parameters": {**YARN, "short_factor": [1.0]}})


# ---- what is refused, and what a caller may change ---------------------------------------------------------------


@pytest.mark.parametrize(
    "says",
    [
        {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]},
        {"model_type": "LLaDAMoEModelLM", "architectures": ["LLaDAMoEModelLM"]},
        {"model_type": "qwen3_moe"},
        {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]},
        {"model_type": "rnd1"},
        {"model_type": "diffusion_gemma"},
        {"model_type": "qwen3", "num_experts": 128},
    ],
    ids=lambda says: says["model_type"],
)
def test_mixtures_of_experts_are_refused_by_name(says):
    with pytest.raises(ConfigError, match=f"{says['model_type']} is a mixture of experts, which is not supported"):
        ModelConfig.from_hf({**SIZES, **says})


def test_fields_of_the_configuration_may_be_overridden(tmp_path):
    save(make(tiny("demo"), dtype=torch.float32), tmp_path)
    model = load(tmp_path, causal_block=4, mask_id=45, max_seq_len=32)
    assert (model.config.causal_block, model.config.mask_id, model.config.max_seq_len) == (4, 45, 32)
    save(model, tmp_path)
    assert load(tmp_path).config == model.config
    with pytest.raises(ConfigError, match="load: blok: expected fields of ModelConfig, causal_block, dim"):
        load(tmp_path, blok=4)
    with pytest.raises(ConfigError, match=r"mask_id: expected -1 \(none\) or an id below 50, got 50"):
        load(tmp_path, mask_id=50)


@pytest.mark.parametrize(
    "preset, variable", [("iLLaDA-8B", True), ("LLaDA-8B", False), ("Dream-7B", False), ("SDAR-8B", True)]
)
def test_masks_appear_as_the_family_s_code_shows_them(preset, variable):
    config = ModelConfig.preset(preset)
    assert checked(None, config).variable_length is variable
    assert checked(GenerationConfig(variable_length=not variable), config).variable_length is not variable
    assert ModelConfig.from_hf(config.to_hf()).variable_length is variable
    assert "variable_length" not in config.to_hf()


# ---- tokenizers --------------------------------------------------------------------------------------------------

TEXTS = ["Hello, wörld! It's 2026:\n\n  x = [1, 23]\t\r\n", "ﬁne é ñ <|mask|> <|endoftext|>", "你好 123   end "]


@pytest.fixture
def byte_pairs(tmp_path) -> Path:
    """A folder with vocab.json and merges.txt, learned from TEXTS, as Dream's."""
    tokenizers = pytest.importorskip("tokenizers")
    learned = tokenizers.ByteLevelBPETokenizer()
    learned.train_from_iterator(TEXTS * 20, vocab_size=300, min_frequency=2)
    learned.save_model(str(tmp_path))
    size = learned.get_vocab_size()
    names = ("<|endoftext|>", "<|mask|>")
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    tokens = {str(size + i): {"content": name, **flags} for i, name in enumerate(names)}
    says = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": tokens, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    return tmp_path


def test_vocab_and_merges_cut_text_as_transformers_does(byte_pairs):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    theirs = transformers.Qwen2Tokenizer.from_pretrained(byte_pairs)
    mask, eos = (theirs.convert_tokens_to_ids(name) for name in ("<|mask|>", "<|endoftext|>"))
    ours = load_tokenizer(byte_pairs, 400, mask, eos, eos)
    for text in (TEXTS[0], TEXTS[2], "ﬁne é ñ"):
        assert ours.encode(text.encode()).tolist() == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text.encode())) == theirs.decode(theirs(text)["input_ids"])
    assert ours.encode(b"<|endoftext|>", special=True).tolist() == [eos] != ours.encode(b"<|endoftext|>").tolist()


def test_a_tokenizer_class_that_cuts_otherwise_is_refused(byte_pairs):
    file = byte_pairs / "tokenizer_config.json"
    says = json.loads(file.read_text())
    file.write_text(json.dumps({**says, "tokenizer_class": "BartTokenizer"}))
    with pytest.raises(DataError, match=r"tokenizer_class: expected Qwen2Tokenizer, .*, got 'BartTokenizer'"):
        load_tokenizer(byte_pairs, 400, 1, 2, 3)
    tokens = {str(int(i) + 3): token for i, token in says["added_tokens_decoder"].items()}
    file.write_text(json.dumps({**says, "added_tokens_decoder": tokens}))
    with pytest.raises(DataError, match=r"added_tokens_decoder: expected '<\|endoftext\|>' to have the next id"):
        load_tokenizer(byte_pairs, 400, 1, 2, 3)
    (byte_pairs / "merges.txt").write_text("nonsense\n")
    file.write_text(json.dumps(says))
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt hold no byte pairs"):
        load_tokenizer(byte_pairs, 400, 1, 2, 3)


def test_a_tokenizer_of_another_model_is_refused(byte_pairs):
    with pytest.raises(DataError, match=r"the tokenizer has ids up to \d+, the model only below 290; they are not of"):
        load_tokenizer(byte_pairs, 290, 1, 2, 3)
