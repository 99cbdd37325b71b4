"""patch and unpatch on models of the structures that people have: LLaDA's, Dream's, SDAR's, and one by hand."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import CrossEntropyLoss
from torch.nn.functional import scaled_dot_product_attention

from illada_kernels.integrations import _stand_ins, patch, unpatch


class Projections(nn.Module):
    def __init__(self, heads=4, kv_heads=4):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q_proj, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k_proj, self.v_proj = nn.Linear(32, 8 * kv_heads), nn.Linear(32, 8 * kv_heads)

    def project(self, x):
        return (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class InAMethod(Projections):
    """LLaDA's: an inner method that repeats key heads and takes an additive bias."""

    def _scaled_dot_product_attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)

    def forward(self, x, mask=None):
        bias = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
        return self.out(self._scaled_dot_product_attention(*self.project(x), attn_mask=bias).transpose(1, 2).flatten(2))


class ByFullName(Projections):
    """Dream's: torch.nn.functional in full, a boolean mask (B, 1, N, N), super() and a default."""

    def forward(self, x, mask=None, *, scale=None):
        q, k, v = super().project(x)
        k, v = k.repeat_interleave(self.heads // self.kv_heads, 1), v.repeat_interleave(self.heads // self.kv_heads, 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.out(out.transpose(1, 2).flatten(2))


class ByImportedName(Projections):
    def forward(self, x, mask=None):
        def attend():
            return scaled_dot_product_attention(*self.project(x), attn_mask=mask, enable_gqa=True)

        return self.out(attend().transpose(1, 2).flatten(2))


def traced(label):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            assert label
            return function(self, *args, **kwargs)

        return wrapper

    return decorate


class Decorated(Projections):
    @traced("twice")
    @traced("outer")
    def forward(self, x, mask=None):
        out = nn.functional.scaled_dot_product_attention(*self.project(x), attn_mask=mask, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Handmade(Projections):
    def forward(self, x, mask=None):
        q, k, v = self.project(x)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, attention, **options):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(attention(**options) for _ in range(2))
        self.head = nn.Linear(32, 11)

    def forward(self, x, mask=None, labels=None):
        for block in self.blocks:
            x = x + block(x, mask)
        logits = self.head(x)
        if labels is None:
            return logits
        loss = CrossEntropyLoss()(logits.flatten(0, 1), labels.flatten())
        return loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


KINDS = [(InAMethod, 2), (ByFullName, 2), (ByImportedName, 2), (ByFullName, 4), (Decorated, 2)]
x = torch.randn(2, 9, 32)
mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
mask[1, :, :, :3] = False


@pytest.mark.parametrize("kind, kv_heads", KINDS)
def test_outputs_and_gradients_stay_and_unpatch_restores(kind, kv_heads):
    model = Model(kind, kv_heads=kv_heads)
    before = [dict(vars(module)) for module in model.modules()]

    def run():
        model.zero_grad()
        out = model(x, mask)
        out.square().sum().backward()
        return out.detach(), [p.grad for p in model.parameters()]

    right = run()
    replaced = patch(model)
    assert len(replaced) == 3 and replaced[-1].startswith("blocks.1.")  # two attentions, and the loss
    assert patch(model) == replaced
    torch.testing.assert_close(run(), right, rtol=1e-4, atol=1e-5)
    unpatch(model)
    assert [dict(vars(module)).keys() for module in model.modules()] == [b.keys() for b in before]
    torch.testing.assert_close(run(), right, rtol=0, atol=0)
    unpatch(model)  # of no consequence


@pytest.mark.parametrize("kind, kv_heads", KINDS)
def test_only_the_patched_model_runs_on_ours(kind, kv_heads, monkeypatch):
    ran = []
    ours = _stand_ins.ours
    monkeypatch.setattr(_stand_ins, "ours", lambda *a, **k: ran.append(1) or ours(*a, **k))
    model, other = Model(kind, kv_heads=kv_heads), Model(kind, kv_heads=kv_heads)
    patch(model)
    other(x, mask)
    assert not ran
    model(x, mask)
    assert len(ran) == 2


def test_the_loss_is_torchs_and_may_be_left_alone():
    labels = torch.randint(0, 11, (2, 9))
    labels[0, :4] = -100
    model = Model(InAMethod)
    right = torch.autograd.grad(model(x, labels=labels), model.head.weight)[0]
    patch(model)
    torch.testing.assert_close(torch.autograd.grad(model(x, labels=labels), model.head.weight)[0], right)
    unpatch(model)
    assert patch(model, loss=False) == [f"blocks.{i}._scaled_dot_product_attention" for i in range(2)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"weight": torch.rand(11)}])
def test_cross_entropy_is_torchs(reduction, options):
    logits, target = torch.randn(6, 11), torch.tensor([1, 3, -100, 0, 10, 3])
    if options.get("ignore_index") == 3:
        target = target.clamp(min=0)
    torch.testing.assert_close(
        _stand_ins.cross_entropy(logits, target, reduction=reduction, **options),
        F.cross_entropy(logits, target, reduction=reduction, **options),
    )
    soft = torch.randn(6, 11).softmax(-1)
    assert torch.equal(_stand_ins.cross_entropy(logits, soft), F.cross_entropy(logits, soft))


def test_the_mean_of_no_token_is_nan_as_in_torch():
    assert _stand_ins.cross_entropy(torch.randn(2, 5), torch.tensor([-100, -100])).isnan()


def test_an_attention_that_calls_nothing_known_is_an_error_that_says_what_was_looked_for():
    model = Model(Handmade)
    with pytest.raises(ValueError, match=r"found no attention in Model: .* torch's scaled_dot_product_attention"):
        patch(model)
    assert "forward" not in vars(model) and model(x).shape == (2, 9, 11)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        patch("model")


def test_a_model_on_transformers_interface_is_switched_and_switched_back():
    transformers = pytest.importorskip("transformers", reason="no transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=11)
    ).eval()
    right = model(torch.tensor([[1, 2, 3]])).logits
    assert 'attn_implementation="illada"' in patch(model)
    assert model.config._attn_implementation == "illada"
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, right)
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_patched_models_compile_into_one_graph_and_can_be_copied():
    model = Model(ByFullName, kv_heads=2)
    patch(model)
    right = model(x, mask)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, mask), right)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight.zero_()
    torch.testing.assert_close(twin(x, mask), right)


def test_a_model_of_transformers_with_attention_of_its_own_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    with pytest.raises(ValueError, match="found no attention in BloomForCausalLM"):
        patch(model)
    assert model.config._attn_implementation != "illada"
