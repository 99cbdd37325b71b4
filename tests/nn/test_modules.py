"""The modules give what the ops give, and hold nothing but options."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import illada_kernels as ops
from illada_kernels import KeyRanges, TopK, nn
from illada_kernels.nn import layers


def attention_inputs():
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    return q, k, v, KeyRanges.causal(5)


def loss_inputs():
    targets = torch.randint(0, 50, (2, 5))
    return torch.randn(2, 5, 8), torch.randn(50, 8), targets, targets % 2 == 0, torch.rand(2, 5)


def unmask_inputs():
    return torch.randn(1, 4, 8), torch.randn(9, 8), torch.full((1, 6), 8), torch.tensor([[1, 2, 4, 5]])


def heads_first(q, k, v, ranges):
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), ranges


def from_logits(hidden, head, *rest):
    return hidden @ head.T, *rest


RULE = {"rule": TopK(2), "mask_id": 8}
CASES = {  # name: inputs, the op, options that change the result
    "Attention": (attention_inputs, ops.attention, {"scale": 0.3, "backend": "reference"}),
    "ScaledDotProductAttention": (
        lambda: heads_first(*attention_inputs()),
        ops.scaled_dot_product_attention,
        {"scale": 0.3},
    ),
    "MaskedLoss": (loss_inputs, ops.masked_loss, {"reduction": "mean", "forbid": (3,), "z_loss": 0.1}),
    "MaskedLossFromLogits": (
        lambda: from_logits(*loss_inputs()),
        ops.masked_loss_from_logits,
        {"reduction": "none", "softcap": 2.0},
    ),
    "Unmask": (unmask_inputs, ops.unmask, {**RULE, "temperature": 1.5, "seed": 4}),
    "UnmaskFromLogits": (lambda: from_logits(*unmask_inputs()), ops.unmask_from_logits, {**RULE, "forbid": (0, 8)}),
}


def run(call, inputs, options=()):
    """All that a call gives: its results, or what it wrote."""
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    out = call(*inputs, **dict(options))
    return [*(out if isinstance(out, tuple) else (out,)), *(x for x in inputs if isinstance(x, torch.Tensor))]


@pytest.mark.parametrize("name", CASES)
def test_a_module_gives_what_its_op_gives_with_its_options(name):
    inputs, op, options = CASES[name]
    inputs = inputs()
    ours, theirs = run(getattr(nn, name)(**options), inputs), run(op, inputs, options)
    plain = run(op, inputs, RULE if name.startswith("Unmask") else {})
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert any(not torch.equal(a, b) for a, b in zip(ours, plain))  # the options were used


@pytest.mark.parametrize("name", CASES)
def test_a_layer_gives_what_its_op_gives(name):
    inputs, op, _ = CASES[name]
    inputs, rule = inputs(), RULE if name.startswith("Unmask") else {}
    assert all(torch.equal(a, b) for a, b in zip(run(getattr(layers, name)(), inputs, rule), run(op, inputs, rule)))


@pytest.mark.parametrize("name", CASES)
def test_every_argument_of_an_op_is_an_option_or_one_of_the_call(name):
    of_the_op = set(inspect.signature(CASES[name][1]).parameters)
    module = getattr(nn, name)
    of_the_call = set(inspect.signature(module.forward).parameters) | set(inspect.signature(module).parameters)
    assert of_the_call - {"self", "options"} | set(module.accepted) == of_the_op


def test_noise_follows_the_positions_that_are_given():
    hidden, head, tokens, positions = unmask_inputs()
    step = nn.Unmask(**RULE, temperature=1.5, seed=4)
    shifted = step(hidden, head, tokens.clone(), positions, noise_positions=positions + 7).proposal
    assert torch.equal(
        shifted,
        ops.unmask(
            hidden, head, tokens.clone(), positions, **RULE, temperature=1.5, seed=4, noise_positions=positions + 7
        ).proposal,
    )
    out, lse = nn.Attention(return_lse=True)(*attention_inputs())
    assert out.shape == (2, 5, 4, 8) and lse.shape == (2, 4, 5)


def test_modules_and_layers_are_the_same_ops():
    assert set(nn.__all__) == set(layers.__all__) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_module_has_no_state_copies_and_says_its_options(name):
    module = getattr(nn, name)(**CASES[name][2])
    assert not module.state_dict() and not list(module.buffers())
    assert pickle.loads(pickle.dumps(module)).options == copy.deepcopy(module).options == module.options
    assert all(f"{option}={value!r}" in repr(module) for option, value in module.options.items())


def test_an_unknown_option_is_refused_when_the_module_is_made():
    with pytest.raises(TypeError, match=r"Attention: expected options among scale, .*got 'dropout'"):
        nn.Attention(dropout=0.1)
    with pytest.raises(TypeError, match="Unmask: expected options"):
        nn.Unmask(TopK(1), mask_id=3, step=1)


def test_modules_compile_whole_and_gradients_pass():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.loss = nn.Attention(), nn.MaskedLoss(reduction="mean")
            self.head = torch.nn.Parameter(torch.randn(20, 32))

        def forward(self, x, targets):
            return self.loss(self.attend(x, x, x).flatten(2), self.head, targets, targets > 3)

    model = Model()
    x, targets = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randint(0, 20, (2, 5))
    eager = model(x, targets)
    expected = torch.autograd.grad(eager, [x, model.head])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x, targets)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(compiled, [x, model.head]), expected, rtol=0, atol=0)
