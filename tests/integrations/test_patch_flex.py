"""patch replaces torch's flex_attention too, by which SDAR is trained, and what torch.compile made of it."""

from __future__ import annotations

import functools
import gc
import types
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
)

from illada_kernels import KeyRanges
from illada_kernels.integrations import _flex, patch, unpatch

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:return_lse is deprecated")

N, BLOCK = 80, 4
LENGTHS = torch.tensor([2 * N, 90])
DOCUMENTS = torch.tensor([[0] * 70 + [1] * 3 + [2] * 87, [0] * 1 + [1] * 100 + [2] * 59])


def block_diffusion(b, h, q, k, n, size):
    """BD3-LM's: [noisy | clean], each of n tokens in blocks of `size`."""
    of_q, of_k = torch.where(q < n, q, q - n) // size, torch.where(k < n, k, k - n) // size
    clean = k >= n
    return torch.where(q < n, (~clean & (of_q == of_k)) | (clean & (of_k < of_q)), clean & (of_k <= of_q))


def causal(b, h, q, k):
    return q >= k


def padding(b, h, q, k):
    return k < LENGTHS[b]


def packed(b, h, q, k):
    return DOCUMENTS[b, q] == DOCUMENTS[b, k]


def beyond(b, h, q, k):
    """Without keys for some queries."""
    return k < q - 100


diffusion = functools.partial(block_diffusion, n=N, size=BLOCK)
MASKS = {
    "block diffusion": (diffusion, None),
    "packed": (packed, 2),
    "causal": (causal, None),
    "padding": (padding, 2),
    "packed, causal": (and_masks(packed, causal), 2),
    "queries without keys": (beyond, None),
    "full": (None, None),
}


def made(mask_mod, batch, heads=None, queries=2 * N, keys=2 * N, **options):
    return mask_mod and create_block_mask(mask_mod, batch, heads, queries, keys, device="cpu", **options)


def tensors(dtype=torch.float32, queries=2 * N, keys=2 * N):
    torch.manual_seed(0)
    return [torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, queries), (2, keys), (2, keys))]


def dense(q, k, v, allowed, scale=None):
    """Attention and log-sum-exp under a bool mask that broadcasts to (B, H, Sq, Sk); rows without keys give 0."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v, scores.logsumexp(-1)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("name", MASKS)
def test_outputs_are_those_of_flex_attention(name, scale):
    q, k, v = tensors()
    mask = made(*MASKS[name])
    options = {"block_mask": mask, "scale": scale, "enable_gqa": True, "return_lse": True}
    wanted = flex_attention(q, k, v, **options)
    close(_flex.flex_attention(q, k, v, **options), wanted)
    out, aux = _flex.flex_attention(q, k, v, None, mask, scale, True, return_aux=AuxRequest(lse=True))
    close((out, aux.lse), wanted)
    assert aux.max_scores is None


@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_dense_attention(name):
    mask_mod, batch = MASKS[name]
    allowed = torch.ones(1, 1, 1, 2 * N, dtype=torch.bool)
    if mask_mod is not None:
        allowed = create_mask(mask_mod, batch, 1, 2 * N, 2 * N, "cpu")
    inputs = [x.requires_grad_() for x in tensors()]
    out, lse = _flex.flex_attention(*inputs, block_mask=made(mask_mod, batch), enable_gqa=True, return_lse=True)
    of_out, of_lse = torch.randn_like(out), torch.randn_like(lse).where(allowed.any(-1), 0)
    found = torch.autograd.grad([out, lse], inputs, [of_out, of_lse])
    wanted = torch.autograd.grad(dense(*inputs, allowed), inputs, [of_out, of_lse])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_queries_and_keys_may_differ_in_number_and_keys_may_be_of_one_sequence():
    q, k, v = tensors(queries=9)
    mask = made(lambda b, h, q, k: k <= q + 20, None, None, 9, 2 * N)
    close(
        _flex.flex_attention(q, k[:1], v[:1], block_mask=made(padding, 2, None, 9), enable_gqa=True),
        flex_attention(q, k[:1], v[:1], block_mask=made(padding, 2, None, 9), enable_gqa=True),
    )
    close(
        _flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True),
        flex_attention(q, k, v, block_mask=mask, enable_gqa=True),
    )


def test_a_mask_made_of_blocks_alone_is_what_kernels_attend_to():
    """Eager flex_attention looks at the mask function alone, the compiled one at the blocks, as we do."""
    number, indices = torch.tensor([[[1, 2]]]).int(), torch.tensor([[[[0, 1], [1, 0]]]]).int()
    mask = BlockMask.from_kv_blocks(number, indices, BLOCK_SIZE=N)
    allowed = torch.arange(2 * N)[:, None] // N >= torch.arange(2 * N) // N
    q, k, v = tensors()
    found = _flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    close(found, dense(q, k, v, allowed)[0])


def test_masks_are_read_in_parts_of_many_rows(monkeypatch):
    q, k, v = tensors()
    whole = _flex.flex_attention(q, k, v, block_mask=made(diffusion, None), enable_gqa=True)
    monkeypatch.setattr(_flex, "_PAIRS", 2 * 2 * N * 7)
    assert torch.equal(_flex.flex_attention(q, k, v, block_mask=made(diffusion, None), enable_gqa=True), whole)
    with pytest.raises(ValueError, match="batch entry 0, query 5 has 3 runs"):
        three = made(lambda b, h, q, k: (k % 64 == 0) | (q < 5), None)
        _flex.flex_attention(q, k, v, block_mask=three, enable_gqa=True)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        _flex.flex_attention(*tensors(), **{"enable_gqa": True, **options})


def test_what_is_no_mask_of_two_ranges_is_refused():
    refused("^score_mod: expected None in a patched model, .* got relative", score_mod=relative)
    every = "^block_mask: expected at most two runs of allowed keys a query, the same for all heads, batch entry 0, "
    refused(every + "query 0 has 80 runs; reorder", block_mask=made(lambda b, h, q, k: k % 2 == 0, None))
    for heads in (4, None):  # with None the mask function is given each head all the same
        refused(every + "query 1 has heads that differ", block_mask=made(by_head, None, heads))
    refused(r"^block_mask: expected one for 160 queries and 160 keys, got shape \(1, 1, 9, 160\)", **short())
    refused("^block_mask: expected a BlockMask, KeyRanges or None, got Tensor", TypeError, block_mask=torch.ones(1))
    refused("^return_aux: expected .* max_scores are not", return_aux=AuxRequest(max_scores=True))
    refused("^return_aux: expected .* without return_lse", return_aux=AuxRequest(lse=True), return_lse=True)
    refused("^key: expected 4 heads like query, got 2; set enable_gqa=True", enable_gqa=False)
    refused("Cannot use mask_mod from a sliced BlockMask", RuntimeError, block_mask=made(packed, 2)[:, :, :])
    with pytest.raises(ValueError, match=r"^query: expected \(batch, heads, sequence, head_dim\), got shape \(2, 3, 4"):
        _flex.flex_attention(*[torch.ones(2, 3, 4)] * 3)


def relative(score, b, h, q, k):
    return score + (q - k)


def by_head(b, h, q, k):
    return k < q - h


def short():
    return {"block_mask": made(lambda b, h, q, k: k <= q, None, None, 9)}


def test_heads_that_see_the_same_are_one_mask():
    q, k, v = tensors()
    for mask_mod in (packed, lambda b, h, q, k: (k <= q) | (h < 0)):
        mask = made(mask_mod, 2, 4)
        options = {"block_mask": mask, "enable_gqa": True}
        close(_flex.flex_attention(q, k, v, **options), flex_attention(q, k, v, **options))


# ---- what is remembered ----------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch):
    """The masks that are read."""
    seen = []
    real = _flex._read
    monkeypatch.setattr(_flex, "_read", lambda *a: seen.append(a) or real(*a))
    return seen


def attend(mask):
    q, k, v = tensors()
    return _flex.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def test_a_mask_is_read_once_and_forgotten_with_its_block_mask(read):
    for name in ("block diffusion", "packed", "packed, causal"):
        read.clear()
        mask = made(*MASKS[name])
        right = attend(mask)
        for _ in range(31):
            assert torch.equal(attend(mask), right)
        assert len(read) == 1
        assert mask in _flex._masks
        alive = weakref.ref(mask)
        del mask
        read.clear()
        gc.collect()
        assert alive() is None


def test_what_a_mask_function_reads_may_change(read):
    lengths, of_numpy, size, table = torch.tensor([90, 50]), torch.tensor([40, 30]), 3, {"bound": 150}

    class Bound:
        value = 155

        def __call__(self, b, h, q, k):
            return k < self.value

    bound = Bound()

    def mask_mod(b, h, q, k):
        return (k < lengths[b]) & (k >= of_numpy[b]) & (k >= size) & (k < table["bound"]) & bound(b, h, q, k)

    q, k, v = tensors()
    mask = made(mask_mod, 2, BLOCK_SIZE=2 * N)  # one block, in which the function decides

    def right():
        allowed = create_mask(mask_mod, 2, 1, 2 * N, 2 * N, "cpu")
        close(attend(mask), dense(q, k, v, allowed)[0])
        attend(mask)

    right()
    assert len(read) == 1
    lengths[0] = 160
    right()
    of_numpy.numpy()[1] = 20  # past the tensor's version
    right()
    table["bound"] = 70
    right()
    bound.value = 60
    right()
    size = 45
    right()
    assert len(read) == 6
    mask.mask_mod = causal
    close(attend(mask), dense(q, k, v, torch.ones(2 * N, 2 * N).tril().bool())[0])


def test_a_mask_function_that_holds_its_block_mask_or_much_else_is_read_anew(read):
    trainer = types.SimpleNamespace(shift=3)
    trainer.block_mask = made(lambda b, h, q, k: k <= q + trainer.shift, None)
    attend(trainer.block_mask)
    attend(trainer.block_mask)
    assert len(read) == 2 and trainer.block_mask not in _flex._masks
    with torch.inference_mode():
        bound = torch.tensor(20)
    mask = made(lambda b, h, q, k: k < bound, None)
    attend(mask)
    attend(mask)
    assert len(read) == 4


def test_key_ranges_are_taken_as_they_are():
    q, k, v = tensors()
    found = _flex.flex_attention(q, k, v, block_mask=KeyRanges.causal(2 * N), enable_gqa=True)
    close(found, flex_attention(q, k, v, block_mask=made(causal, None), enable_gqa=True))


# ---- models ----------------------------------------------------------------------------------------------------------


@torch.compile(fullgraph=True, backend="aot_eager")
def fused_flex_attention(query, key, value, attention_mask=None, **options):
    return flex_attention(query, key, value, block_mask=attention_mask, **options)


compiled_flex_attention = torch.compile(flex_attention, backend="aot_eager")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x, mask):
        heads = self.qkv(x).unflatten(-1, (8, 16)).transpose(1, 2)
        return self.out(self.attend(*heads.split((4, 2, 2), 1), mask).transpose(1, 2).flatten(2))


class AsSDAR(Layer):
    """A function compiled into one graph in training, torch's by name else."""

    def attend(self, q, k, v, mask):
        if self.training:
            out, weights = fused_flex_attention(
                query=q, key=k, value=v, attention_mask=mask, enable_gqa=True, scale=0.25, return_lse=True
            )
            assert weights.dtype == torch.float32
            return out
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=True)


class ByName(Layer):
    def attend(self, q, k, v, mask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


class Imported(Layer):
    def attend(self, q, k, v, mask):
        from torch.nn.attention.flex_attention import flex_attention as attend

        return attend(q, k, v, block_mask=mask, enable_gqa=True)


class OfCompiledName(Layer):
    def attend(self, q, k, v, mask):
        return compiled_flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


class InAnAttribute(Layer):
    def __init__(self):
        super().__init__()
        self.flex = torch.compile(functools.partial(flex_attention, enable_gqa=True), backend="aot_eager")
        self.attend = lambda q, k, v, mask: self.flex(q, k, v, block_mask=mask)


class CompiledMethod(Layer):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(self, q, k, v, mask):
        return flex_attention(q.contiguous(), k.contiguous(), v, block_mask=mask, enable_gqa=True)


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x, mask):
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


KINDS = [AsSDAR, ByName, Imported, OfCompiledName, InAnAttribute, CompiledMethod]


@pytest.mark.parametrize("kind", KINDS)
def test_models_run_on_ours_read_a_mask_once_and_can_be_trained(kind, read):
    torch._dynamo.reset()
    model = Model(kind)
    x = torch.randn(2, 2 * N, 64)
    masks = [made(*MASKS["block diffusion"]), made(*MASKS["packed"])]
    with torch.no_grad():
        right = [model(x, mask) for mask in masks]
    assert len(patch(model)) >= 2
    model(x, None)  # the first forward is watched
    assert not read
    for mask, wanted in zip(masks * 2, right * 2, strict=True):
        out = model(x, mask)
        close(out, wanted)
        out.sum().backward()  # torch's has no backward on a CPU
    assert len(read) == 2
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(x, masks[0]), right[0])


@pytest.mark.parametrize("kind", [AsSDAR, ByName, OfCompiledName])
def test_a_patched_model_compiles_into_one_graph_which_reads_the_mask(kind):
    torch._dynamo.reset()
    model, x, documents = Model(kind), torch.randn(2, 2 * N, 64), DOCUMENTS.clone()
    mask_mod = and_masks(padding, lambda b, h, q, k: documents[b, q] == documents[b, k])
    right = []
    for some in (DOCUMENTS, DOCUMENTS.flip(0)):
        documents.copy_(some)
        with torch.no_grad():
            right.append((some, mask := made(mask_mod, 2), model(x, mask)))
    patch(model)
    whole = torch.compile(model, fullgraph=True, backend=(graphs := CompileCounterWithBackend("aot_eager")))
    for some, mask, wanted in right:
        documents.copy_(some)
        close(whole(x, mask), wanted)
    documents.copy_(torch.arange(2 * N) % 2)
    with pytest.raises(RuntimeError, match="block_mask: expected at most two runs of allowed keys a query"):
        whole(x, made(mask_mod, 2))
    assert graphs.frame_count == 1


def test_a_compiled_function_names_a_mask_that_does_not_fit():
    torch._dynamo.reset()
    model = Model(AsSDAR)
    patch(model)
    with pytest.raises(ValueError, match=r"^block_mask: expected at most two runs .* query 0 has 80 runs"):
        model(torch.randn(2, 2 * N, 64), made(lambda b, h, q, k: k % 2 == 0, None))


def test_flex_attention_behind_an_object_is_named():
    class Helper:
        def run(self, *arguments):
            return flex_attention(*arguments)

    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.helper = Helper()

        def forward(self, x):
            return self.helper.run(x, x, x) + flex_attention(x, x, x)

    model = Hides()
    patch(model)
    with pytest.warns(RuntimeWarning, match=r"torch's flex_attention ran at .*test_patch_flex\.py:\d+"):
        model(torch.randn(1, 2, 8, 16))
