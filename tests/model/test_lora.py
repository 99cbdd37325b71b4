"""Adapters: they alone are trained and saved, resume bit for bit, and peft reads them beside the published model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from illada import ModelConfig, save
from illada.cli import main
from illada.training import runs
from safetensors.torch import load_file

from tests.helpers.models import make

ROOT = Path(__file__).parents[2]
PEFT = ROOT / "build" / "peft"
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48, "vocab_size": 259}
IDS = {"mask_id": 256, "eos_id": 257, "pad_id": 258, "max_seq_len": 64, "qk_norm": False, "tie_embeddings": False}
needs_peft = pytest.mark.skipif(not PEFT.exists(), reason="make build/peft installs it, where the package index has it")


@pytest.fixture
def peft(monkeypatch):
    monkeypatch.syspath_prepend(str(PEFT))
    return pytest.importorskip("peft")


@pytest.fixture
def base(tmp_path) -> Path:
    """A checkpoint that knows bytes, and a text beside it."""
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n" * 60)
    save(make(ModelConfig.preset("demo", **SIZES, **IDS), dtype=torch.float32), tmp_path / "base")
    (tmp_path / "base" / "illada_tokenizer.json").write_text(json.dumps({"kind": "bytes", "merges": []}))
    return tmp_path / "base"


def command(base: Path, out: str, *more: str) -> list[str]:
    where = ["--out", str(base.parent / out), "--data", str(base.parent / "text"), "--from", str(base)]
    return ["train", *where, "--length", "32", "--batch-size", "2", "--lora", "3", "--lr", "0.01", "--quiet", *more]


def test_lora_is_refused_in_words_where_peft_is_missing(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(command(base, "run", "--steps", "2")) == 2
    error = capsys.readouterr().err
    assert "lora: it needs the package peft" in error and "pip install peft, or leave --lora out" in error
    assert not (base.parent / "run").exists()


@needs_peft
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_and_the_merged_model_is_base_plus_b_a(base, peft, dtype):
    """Each merged matrix is W + 2 B A, rounded to its dtype; all else is the checkpoint's, to the bit."""
    assert main(command(base, "run", "--steps", "4", "--dtype", dtype)) == 0
    out = base.parent / "run"
    state = torch.load(out / "state.pt", weights_only=True)["model"]
    assert len(state) == 2 * 4 * 2 and all("lora" in name and w.dtype == torch.float32 for name, w in state.items())
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    changed = {name.partition(".lora")[0].removeprefix("base_model.model.") + ".weight" for name in adapter}
    assert len(changed) == 2 * 7 and before.keys() == after.keys()
    unit = torch.finfo(getattr(torch, dtype)).eps
    for name, weight in after.items():
        if name not in changed:
            assert torch.equal(weight, before[name].to(weight.dtype)), name
            continue
        a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        wanted = before[name] + 2 * b @ a
        assert (wanted - before[name]).abs().max() > 0.01, name
        assert (weight.float() - wanted).abs().max() <= 2 * unit * wanted.abs().max(), name  # W, then the sum


class StopAfterThreeSteps:
    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> StopAfterThreeSteps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def number(self) -> int:
        self.asked += 1
        return 2 if self.asked > 3 else 0


@needs_peft
def test_adapters_resume_bit_for_bit_and_generate(base, peft, capsys, monkeypatch):
    assert main(command(base, "whole", "--steps", "6")) == 0
    with monkeypatch.context() as stopped:
        stopped.setattr(runs, "StopSignals", StopAfterThreeSteps)
        assert main(command(base, "parts", "--steps", "6")) == 130
    assert "interrupted at step 3" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(base.parent / "parts"), "--quiet"]) == 0
    for name in ("log.jsonl", "model.safetensors", "adapter/adapter_model.safetensors"):
        assert (base.parent / "parts" / name).read_bytes() == (base.parent / "whole" / name).read_bytes(), name
    capsys.readouterr()
    assert main(["generate", "--model", str(base.parent / "whole"), "--prompt", "def", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def")


@needs_peft
def test_peft_reads_the_adapters_beside_the_published_model(base, peft):
    """transformers' Llama of the same tensors, with peft's own merge, holds the weights of the merged model."""
    transformers = pytest.importorskip("transformers")
    assert main(command(base, "run", "--steps", "3")) == 0
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = transformers.LlamaConfig(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=259)
    model = transformers.LlamaForCausalLM(shape)
    model.load_state_dict(load_file(base / "model.safetensors"))
    merged = peft.PeftModel.from_pretrained(model, base.parent / "run" / "adapter").merge_and_unload().state_dict()
    for name, weight in load_file(base.parent / "run" / "model.safetensors").items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)
