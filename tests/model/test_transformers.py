"""Folders that `save` writes are those of transformers, and the other way round."""

from __future__ import annotations

import json

import pytest
import torch
from illada.checkpoint import load, save

from tests.helpers.models import make, tiny

transformers = pytest.importorskip("transformers")
CAUSAL = {"causal_block": 1, "shifted_logits": True, "head_dim": 8, "norm_in_fp32": False}


@pytest.mark.parametrize("preset, family", [("Qwen2.5-7B", "qwen2"), ("SDAR-8B", "qwen3")])
def test_transformers_and_we_read_what_the_other_wrote(preset, family, tmp_path):
    model = make(tiny(preset, family=family, **CAUSAL), dtype=torch.float32)
    tokens = torch.randint(0, 45, (2, 9), generator=torch.Generator().manual_seed(0))
    save(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(model(tokens, shift=False) @ model.head_weight.T, logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    assert back.config == model.config
    save(back, tmp_path / "again")
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again")]
    assert written[0] == written[1]
    x = torch.randn(50, 24).bfloat16()  # RMSNorm rounds at the same place
    assert torch.equal(theirs.bfloat16().model.norm(x), model.bfloat16().norm(x))
