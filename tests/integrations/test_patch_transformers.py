"""patch on models of transformers, and on remote code that takes its masks from transformers; 4.57 and 5."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="no transformers")

from illada_kernels.integrations import _stand_ins, patch, unpatch  # noqa: E402


def tiny(kind, config, **options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    sizes |= {"vocab_size": 11, "num_key_value_heads": 2, **options}
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()


ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
padding = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


class NamedByItself(nn.Module):
    """A layer of remote code: transformers' mask, torch's function by name, and on another path the interface."""

    def __init__(self, theirs):
        super().__init__()
        self.config, self.inner, self.by_interface, self.is_causal = theirs.config, theirs, False, True

    def forward(self, hidden_states, position_embeddings, attention_mask, **_):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        theirs = self.inner
        q, k, v = (p(hidden_states).unflatten(-1, (-1, 8)).transpose(1, 2) for p in theirs.children_of_qkv())
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.by_interface:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            out = attend(self, q, k, v, attention_mask)[0]
        else:
            causal = attention_mask is None
            out = F.scaled_dot_product_attention(q, k, v, attention_mask, is_causal=causal).transpose(1, 2)
        return theirs.o_proj(out.flatten(2)), None


def mixed(by_interface=(False, False)):
    model = tiny("LlamaForCausalLM", "LlamaConfig")
    for layer, flag in zip(model.model.layers, by_interface):
        theirs = layer.self_attn
        object.__setattr__(theirs, "children_of_qkv", lambda t=theirs: (t.q_proj, t.k_proj, t.v_proj))
        layer.self_attn = NamedByItself(theirs)
        layer.self_attn.by_interface = flag
    return model


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("mask", [None, padding], ids=["no mask", "padding"])
@pytest.mark.parametrize("by_interface", [(False, False), (True, False), (True, True)])
def test_layers_by_name_and_by_interface_share_the_masks_of_transformers(by_interface, mask, ran):
    model = mixed(by_interface)
    real = padding.bool() if mask is not None else slice(None)
    right = model(ids, attention_mask=mask).logits[real]
    replaced = patch(model)
    assert 'attn_implementation="illada"' not in replaced and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], right)
    assert len(ran) == 2
    unpatch(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], right, rtol=0, atol=0)
    assert len(ran) == 2


def test_layers_by_interface_beside_layers_by_name_leave_eager_attention(ran):
    model = mixed((True, False))
    right = model(ids, attention_mask=padding).logits[padding.bool()]
    model.config._attn_implementation = "eager"
    assert patch(model)[-1] == 'attn_implementation="sdpa"'
    torch.testing.assert_close(model(ids, attention_mask=padding).logits[padding.bool()], right)
    assert len(ran) == 2
    unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_a_layer_that_asks_the_interface_without_a_configuration(ran):
    class Literal(nn.Module):
        def forward(self, x):
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            return ALL_ATTENTION_FUNCTIONS["sdpa"](self, x, x, x, None, is_causal=False)[0]

    model, x = nn.Sequential(Literal()), torch.randn(2, 3, 5, 8)
    right = model(x)
    assert patch(model) == ["0.forward"]
    torch.testing.assert_close(model(x), right)
    assert ran
    unpatch(model)


def test_a_layer_by_name_reads_the_bounds_of_our_own_mask_function(ran):
    model = mixed()
    right = model(ids, attention_mask=padding).logits[padding.bool()]
    from illada_kernels.integrations import transformers as illada

    illada.register()
    model.config._attn_implementation = "illada"  # the user's own choice
    patch(model)
    torch.testing.assert_close(model(ids, attention_mask=padding).logits[padding.bool()], right)
    assert len(ran) == 2
    unpatch(model)
    assert model.config._attn_implementation == "illada"


def test_layers_of_transformers_in_a_container_of_anybodys():
    model = tiny("LlamaForCausalLM", "LlamaConfig")
    right = model.model(ids).last_hidden_state
    container = nn.Sequential(model.model)
    assert patch(container) == ['attn_implementation="illada"']
    torch.testing.assert_close(container(ids).last_hidden_state, right)
    unpatch(container)
    assert model.config._attn_implementation == "sdpa"


def test_compiled_models_of_transformers_are_patched(ran):
    model = tiny("LlamaForCausalLM", "LlamaConfig")
    right = model(ids).logits
    compiled = torch.compile(model, backend="eager")
    assert 'attn_implementation="illada"' in patch(compiled)
    torch.testing.assert_close(compiled(ids).logits, right)
    unpatch(compiled)
    assert model.config._attn_implementation == "sdpa"


def test_every_configuration_within_is_restored():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 11}, vision_config={**sizes, "image_size": 8, "patch_size": 4}
    )
    model = transformers.CLIPModel(config).eval()
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [one._attn_implementation for one in configs]
    patch(model.text_model)
    patch(model)
    assert "illada" in [one._attn_implementation for one in configs]
    unpatch(model.text_model)
    unpatch(model)
    assert [one._attn_implementation for one in configs] == before
    patch(model)
    patch(model.text_model)
    unpatch(model)
    assert [one._attn_implementation for one in configs] == before


def test_the_loss_that_transformers_computes_for_the_model_is_ours(monkeypatch):
    calls = []
    ours = _stand_ins.masked_loss_from_logits
    monkeypatch.setattr(_stand_ins, "masked_loss_from_logits", lambda *a, **k: calls.append(1) or ours(*a, **k))
    model = tiny("LlamaForCausalLM", "LlamaConfig")
    right = model(ids, labels=ids).loss
    assert "loss_function" in patch(model)
    torch.testing.assert_close(model(ids, labels=ids).loss, right)
    assert calls == [1]
    unpatch(model)
    assert patch(model, loss=False) == ['attn_implementation="illada"']
    unpatch(model)


def test_a_decoder_that_was_made_to_see_everything():
    """As dllm makes Qwen into a masked-diffusion model: is_causal off, a mask of the padding alone, four dimensions."""
    model = tiny("Qwen2ForCausalLM", "Qwen2Config")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    mask = torch.zeros(2, 1, 4, 4).masked_fill(padding[:, None, None] == 0, torch.finfo(torch.float32).min)
    causal = model(ids, attention_mask=padding).logits
    right = model(ids, attention_mask=mask).logits
    assert not torch.allclose(right[0], causal[0])
    patch(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[padding.bool()], right[padding.bool()])
    unpatch(model)
