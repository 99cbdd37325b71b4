"""The ops under what a caller may have set up around them: default dtype, saved tensors, torch.jit.trace, autocast."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from illada_kernels import (
    KeyRanges,
    Remask,
    TopK,
    _extension,
    attention,
    masked_loss,
    masked_loss_from_logits,
    scaled_dot_product_attention,
    unmask,
    unmask_from_logits,
)
from illada_kernels.ops.attention import op

CPU = pytest.param("cpu", marks=pytest.mark.skipif(_extension.extension_reason() is not None, reason="no extension"))
MASK = 3


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def other_default(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def everything(backend: str) -> list[torch.Tensor]:
    """Outputs and gradients of all ops in float32."""
    draw = torch.Generator().manual_seed(0)
    f = torch.float32
    hidden, head = (torch.randn(s, 8, generator=draw, dtype=f).requires_grad_() for s in (700, 40))
    targets, masked = torch.randint(40, (700,), generator=draw), torch.arange(700) % 3 > 0
    rows = {"backend": backend, "label_smoothing": 0.1, "z_loss": 1e-3, "forbid": (MASK,)}
    targets = torch.where(targets == MASK, 0, targets)
    results = []
    for reduction in ("sum", "mean", "none"):
        for budget in (None, 250_000, 1):  # one chunk, chunks of rows, slices
            loss = masked_loss(hidden, head, targets, masked, reduction=reduction, memory_budget=budget, **rows)
            results += [loss, *torch.autograd.grad(loss.sum() * 2, (hidden, head))]
        logits = (hidden.detach() @ head.detach().T).requires_grad_()
        loss = masked_loss_from_logits(logits, targets, masked, reduction=reduction, max_masked=500, **rows)
        results += [loss, *torch.autograd.grad(loss.sum(), logits)]
    results.append(masked_loss(hidden, head, targets, masked, max_masked=1, reduction="none", **rows))
    steps = {"mask_id": MASK, "backend": backend, "temperature": 0.5, "revise": Remask(1)}
    positions = torch.arange(30).expand(2, 30)
    for bias in (None, ([1, 5], [0.5, -1.0])):
        for dtype in (torch.float32, torch.bfloat16):
            rows_of = hidden.detach()[:60].view(2, 30, 8)
            tokens = torch.full((2, 30), MASK)
            given = rows_of @ head.detach().T
            results += [*unmask_from_logits(given, tokens, positions, TopK(7), logit_bias=bias, **steps), tokens]
            tokens = tokens.clone()
            source, weight = rows_of.to(dtype), head.detach().to(dtype)
            results += [*unmask(source, weight, tokens, positions, TopK(7), logit_bias=bias, **steps), tokens]
    q = torch.randn(1, 40, 2, 8, generator=draw, dtype=f).requires_grad_()
    out, lse = attention(q, q, q, return_lse=True, backend=backend)
    return [*results, out, lse, *torch.autograd.grad(out.sum() + lse.sum(), q)]


@pytest.mark.parametrize("backend", [CPU, "reference"])
def test_the_default_dtype_changes_no_result(backend, other_default):
    expected = everything(backend)
    torch.set_default_dtype(other_default)
    for i, (got, want) in enumerate(zip(everything(backend), expected, strict=True)):
        assert got.dtype == want.dtype, i
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=f"result {i}")


@pytest.mark.parametrize("backend", [CPU, "reference"])
def test_autograd_notices_that_tokens_it_saved_were_written(backend):
    embedding = torch.randn(8, 4, requires_grad=True)
    tokens = torch.full((1, 2), MASK)
    embedded = torch.nn.functional.embedding(tokens, embedding)
    logits, positions = torch.randn(1, 2, 8), torch.tensor([[0, 1]])
    assert unmask_from_logits(logits, tokens, positions, TopK(2), mask_id=MASK, backend=backend).committed.all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        embedded.sum().backward()


def test_tokens_made_in_inference_mode_can_be_written():
    with torch.inference_mode():
        tokens = torch.full((1, 2), MASK)
        unmask_from_logits(torch.randn(1, 2, 8), tokens, torch.tensor([[0, 1]]), TopK(2), mask_id=MASK)
    assert (tokens != MASK).all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", [CPU, "reference"])
def test_a_traced_function_computes_what_the_eager_one_does(backend):
    def self_attention(x):
        return attention(x, x, x, backend=backend)

    first, second = torch.randn(2, 1, 5, 1, 8)
    traced = torch.jit.trace(self_attention, (first,), check_trace=False)
    assert torch.equal(traced(second), self_attention(second))


@pytest.mark.parametrize("backend", [CPU, "reference"])
def test_autocast_casts_hidden_head_and_bias_that_differ_in_dtype(backend):
    hidden, head, bias = torch.randn(1, 6, 16), torch.randn(9, 16), torch.randn(9)
    step = {"positions": torch.arange(6)[None], "rule": TopK(6), "mask_id": MASK, "backend": backend}
    half = [x.bfloat16() for x in (hidden, head, bias)]
    want = unmask(half[0], half[1], torch.full((1, 6), MASK), head_bias=half[2], **step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = unmask(hidden, half[1], torch.full((1, 6), MASK), head_bias=bias, **step)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
@pytest.mark.parametrize("backend", [CPU, "reference"])
def test_an_infinite_confidence_temperature_in_a_tensor_makes_allowed_ids_equally_likely(backend, confidence):
    ids = 9  # one of them forbidden: 8 remain
    tokens, positions = torch.full((1, 40), MASK), torch.arange(40)[None]
    hot = torch.tensor(torch.inf)
    result = unmask_from_logits(
        torch.randn(1, 40, ids),
        tokens,
        positions,
        TopK(5),
        mask_id=MASK,
        confidence=confidence,
        confidence_temperature=hot,
        backend=backend,
    )
    want = {"probability": 1 / 8, "margin": 0.0, "neg_entropy": -torch.tensor(8.0).log().item()}[confidence]
    torch.testing.assert_close(result.confidence, torch.full((1, 40), want), rtol=2**-22, atol=0)
    assert result.committed.nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4]  # all tie: the lowest positions


@pytest.mark.parametrize("argument", ["hidden", "head_weight", "head_bias", "tokens"])
def test_an_argument_of_unmask_that_is_no_tensor_is_named(argument):
    call = {
        "hidden": torch.randn(1, 2, 8),
        "head_weight": torch.randn(9, 8),
        "head_bias": torch.randn(9),
        "tokens": torch.full((1, 2), MASK),
    }
    with pytest.raises(TypeError, match=f"{argument}: expected a tensor of .*, got list"):
        unmask(**{**call, argument: [1]}, positions=torch.tensor([[0, 1]]), rule=TopK(1), mask_id=MASK)


def test_an_instruction_set_that_there_is_not_is_an_error():
    code = "import torch, illada_kernels as k; x = torch.ones(1, 2, 1, 8); k.attention(x, x, x)"
    environment = {**os.environ, "ILLADA_CPU_ISA": "sse9", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if _extension.extension_reason() is not None:
        pytest.skip("no extension")
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "ILLADA_CPU_ISA: expected scalar, avx2, avx512 or avx512_bf16" in result.stderr


def test_masked_loss_takes_meta_tensors():
    hidden, head = torch.empty(4, 8, device="meta"), torch.empty(9, 8, device="meta")
    targets, masked = torch.empty(4, dtype=torch.int64, device="meta"), torch.empty(4, dtype=torch.bool, device="meta")
    assert masked_loss(hidden, head, targets, masked, max_masked=4).shape == ()


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_a_row_whose_scores_all_overflow_has_no_keys(backend):
    q, k, v = torch.full((1, 3, 1, 8), 1e30), torch.full((1, 5, 1, 8), -1e30), torch.ones(1, 5, 1, 8)
    out, lse = attention(q, k, v, scale=1.0, return_lse=True, backend=backend)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


@pytest.mark.skipif(_extension.extension_reason() is not None, reason="no extension")
def test_what_a_nan_key_touches_does_not_depend_on_threads():
    """Only row 500 attends to the NaN key; rows beside it may turn NaN, but the same ones whatever the threads."""
    q, k = torch.randn(1, 512, 1, 64), torch.randn(1, 128, 1, 64)
    k[0, 100] = torch.nan
    bounds = torch.tensor([0, 50, 50, 50], dtype=torch.int32).repeat(1, 512, 1)
    bounds[0, 500] = torch.tensor([0, 101, 101, 101])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4, 8):
        torch.set_num_threads(threads)
        results.append(attention(q, k, torch.randn_like(k).copy_(k), KeyRanges(bounds, 128), backend="cpu"))
    torch.set_num_threads(before)
    assert results[0].isnan().any() and results[0][0, 500].isnan().all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_a_lazy_minus_sign_counts(backend):
    q, k, v = torch.randn(3, 1, 4, 1, 8).unbind()
    lazy, eager = (attention(minus_q, k, v, backend=backend) for minus_q in (torch._neg_view(q), -q))
    torch.testing.assert_close(lazy, eager)


def test_a_kernel_that_an_op_does_not_have_is_named_with_what_can_run(monkeypatch):
    others = tuple(b for b in op.BACKENDS if b.name != "triton")
    monkeypatch.setattr(op.OPERATOR, "backends", others)
    x = torch.ones(1, 2, 1, 8)
    with pytest.raises(RuntimeError, match=r"attention has no 'triton' backend(.|\n)*reference: can run it"):
        attention(x, x, x, backend="triton")


def test_a_tensor_that_is_not_dense_is_named():
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged)
    sparse, targets, masked = torch.randn(4, 8).to_sparse(), torch.zeros(4, dtype=torch.int64), torch.ones(4) > 0
    for name, call in {
        "q": lambda: attention(nested, nested, nested),
        "query": lambda: scaled_dot_product_attention(*(nested.transpose(1, 2),) * 3),
        "hidden": lambda: masked_loss(sparse, torch.randn(9, 8), targets, masked),
        "head_weight": lambda: masked_loss(torch.randn(4, 8), torch.randn(9, 8).to_sparse(), targets, masked),
        "logits": lambda: masked_loss_from_logits(sparse, targets, masked),
    }.items():
        with pytest.raises(TypeError, match=rf"{name}: expected a dense tensor, got layout torch\.(jagged|sparse_coo)"):
            call()
