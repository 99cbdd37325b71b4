"""patch replaces flash-attn's functions too: SDAR, LLaDA and LLaDA-V call them by name where that package is there."""

from __future__ import annotations

import gc
import sys
import types
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from illada_kernels.integrations import _flash_attn, patch, unpatch


def theirs(*arguments, **options):
    raise AssertionError("flash-attn ran")


@pytest.fixture
def flash(monkeypatch):
    """A package of that name, whose functions do nothing but fail."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = lambda *a, **k: theirs()
    package.flash_attn_varlen_func = lambda *a, **k: theirs()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return package


def dense(q, k, v, allowed):
    """Attention of one sequence, (S, H, D), under a bool mask (Sq, Sk); rows without keys give 0."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).nan_to_num().transpose(0, 1)


def allowed(queries, keys, causal, window):
    """flash-attn's mask: the last query stands at the last key."""
    distance = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + keys - queries)
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen &= (distance >= -left) if left >= 0 else True
    return seen & (distance <= right) if right >= 0 else seen


MASKS = [(False, (-1, -1)), (True, (-1, -1)), (False, (2, 1)), (True, (3, -1)), (False, (-1, 0)), (False, (0, -1))]


@pytest.mark.parametrize("causal, window", MASKS)
@pytest.mark.parametrize("queries, keys", [(6, 6), (2, 7), (7, 3)])
def test_masks_are_those_of_flash_attn(queries, keys, causal, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, 4, 16), torch.randn(2, keys, 2, 16), torch.randn(2, keys, 2, 16)
    found = _flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window)
    mask = allowed(queries, keys, causal, window)
    wanted = torch.stack([dense(q[b], k[b], v[b], mask) for b in range(2)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal, window", MASKS)
@pytest.mark.parametrize("queries, keys", [([3, 1, 5], [3, 1, 5]), ([2, 4, 1], [6, 2, 3])])
def test_sequences_end_to_end_see_themselves_alone(queries, keys, causal, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(queries), 4, 16), torch.randn(sum(keys), 2, 16), torch.randn(sum(keys), 2, 16)
    of_q, of_k = (torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) for lengths in (queries, keys))
    longest = max(queries), max(keys)
    found = _flash_attn.flash_attn_varlen_func(q, k, v, of_q, of_k, *longest, causal=causal, window_size=window)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    wanted = [dense(*part, allowed(len(part[0]), len(part[1]), causal, window)) for part in parts]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)


# ---- what layers share -----------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """The masks that are computed."""
    seen = []
    real = _flash_attn._ranges
    monkeypatch.setattr(_flash_attn, "_ranges", lambda *a: seen.append(a) or real(*a))
    _flash_attn._cached_of_batch.cache_clear()
    return seen


def packed(x, of_q, of_k, **options):
    return _flash_attn.flash_attn_varlen_func(x, x, x, of_q, of_k, 9, 9, **options)


def seen(x, offsets, causal=False):
    """What `packed` should give, document by document."""
    parts = x.split(offsets.diff().tolist())
    return torch.cat([dense(p, p, p, allowed(len(p), len(p), causal, (-1, -1))) for p in parts])


def test_layers_share_the_mask_of_their_documents(made):
    x, offsets = torch.randn(9, 2, 16), torch.tensor([[0, 4, 9]] * 2, dtype=torch.int32)
    for _ in range(32):  # a new view in each layer
        torch.testing.assert_close(packed(x, offsets[0], offsets[0]), seen(x, offsets[0]), atol=1e-5, rtol=1e-5)
    assert len(made) == 1
    for options in ({"causal": True}, {"window_size": (1, 2)}, {"window_size": [1, 2]}):
        packed(x, offsets[0], offsets[0], **options)
    assert len(made) == 3
    packed(x, offsets[0], offsets[1])
    packed(x[:9], offsets[0].clone(), offsets[0])
    assert len(made) == 5
    for _ in range(32):
        _flash_attn.flash_attn_func(x[None], x[None], x[None], causal=True)
    _flash_attn.flash_attn_func(x[None], x[None, :4], x[None, :4], causal=True)
    assert len(made) == 7


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 1)}])
@pytest.mark.parametrize("last", [7, 8])
def test_rows_behind_the_last_sequence_give_zero(last, options):
    x, offsets = torch.randn(9, 2, 16, requires_grad=True), torch.tensor([0, 4, last], dtype=torch.int32)
    found = packed(x, offsets, offsets, **options)
    torch.testing.assert_close(found[:last], packed(x[:last], offsets, offsets, **options))
    found.sum().backward()
    assert (found[last:] == 0).all() and (x.grad[last:] == 0).all()
    assert (packed(x, offsets[:1], offsets[:1], **options) == 0).all()  # no sequence at all


def through_numpy(offsets):
    offsets.numpy()[1] = 2


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("write", [lambda x: x[1].fill_(2), lambda x: x.data[1].fill_(2), through_numpy])
def test_offsets_that_were_written_to_are_read_again(write, which, made):
    x, both = torch.randn(9, 2, 16), [torch.tensor([0, 4, 9]) for _ in range(2)]
    packed(x, *both)
    write(both[which])
    found = packed(x, *both)
    assert len(made) == 2
    torch.testing.assert_close(found, packed(x, *(offsets.clone() for offsets in both)))
    packed(x, *both)
    assert len(made) == 3  # of the copies
    write(both[1 - which])
    torch.testing.assert_close(packed(x, *both), seen(x, both[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_a_mask_dies_with_its_offsets(which, made):
    _flash_attn._sequences.kept.clear()
    x, both = torch.randn(9, 2, 16), [torch.tensor([0, 4, 9]) for _ in range(2)]
    packed(x, *both)
    ranges = weakref.ref(next(iter(_flash_attn._sequences.kept.values()))[2])
    assert ranges() is not None
    del both[which]
    gc.collect()
    assert ranges() is None and not _flash_attn._sequences.kept
    with torch.inference_mode():  # without versions
        offsets = torch.tensor([0, 4, 9])
        packed(x, offsets, offsets)
        offsets[1] = 2
        torch.testing.assert_close(packed(x, offsets, offsets), seen(x, offsets), atol=1e-5, rtol=1e-5)
    assert not _flash_attn._sequences.kept


def test_a_graph_computes_the_mask_itself():
    x, offsets = torch.randn(9, 2, 16), torch.tensor([0, 4, 9])
    packed(x, offsets, offsets, causal=True)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, offsets, offsets, causal=True), seen(x, offsets, causal=True))
        offsets[1] = 2


def test_what_changes_scores_is_refused():
    q = torch.randn(1, 4, 2, 16)
    options = {"dropout_p": 0.1, "softcap": 30.0, "alibi_slopes": torch.ones(2), "return_attn_probs": True}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"^{name}: expected none in a patched model, got "):
            _flash_attn.flash_attn_func(q, q, q, **{name: value})
    cu = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="block_table: expected None, paged caches are not supported"):
        _flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, block_table=cu)


def test_a_model_that_calls_flash_attn_runs_on_ours(flash, monkeypatch):
    monkeypatch.setitem(globals(), "flash_attn_func", flash.flash_attn_func)

    class AsSDAR(nn.Module):  # by name where a mask hides nothing, torch's function elsewhere
        def forward(self, x, mask):
            if mask.all():
                return flash_attn_func(x, x, x, causal=False, softmax_scale=0.5)  # type: ignore[name-defined]  # noqa: F821
            heads = x.transpose(1, 2)
            return F.scaled_dot_product_attention(heads, heads, heads, mask, scale=0.5).transpose(1, 2)

    class AsLLaDA(nn.Module):  # kept in an attribute
        def __init__(self):
            super().__init__()
            self.flash_attn_func = flash.flash_attn_func

        def forward(self, x):
            return self.flash_attn_func(x, x, x, dropout_p=0.0, causal=False)

    class AsLLaDAV(nn.Module):  # imported inside
        def forward(self, x):
            from flash_attn import flash_attn_varlen_func

            cu = torch.tensor([0, 4, 7], dtype=torch.int32)
            return flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 4, 4, softmax_scale=0.5)

    x, every = torch.randn(1, 7, 2, 16), torch.ones(7, 7, dtype=torch.bool)
    some = every.tril()
    model = nn.ModuleList([AsSDAR(), AsLLaDA(), AsLLaDAV()])
    assert patch(model) == ["0.forward", "1.flash_attn_func", "2.forward"]
    for mask in (every, some):
        torch.testing.assert_close(model[0](x, mask)[0], scaled(x[0], mask))
    torch.testing.assert_close(model[1](x)[0], dense(x[0], x[0], x[0], every))
    torch.testing.assert_close(
        model[2](x), torch.cat([scaled(x[0, :4], every[:4, :4]), scaled(x[0, 4:], every[4:, 4:])])
    )
    unpatch(model)
    for layer, arguments in zip(model, ((x, every), (x,), (x,)), strict=True):
        with pytest.raises(AssertionError, match="flash-attn ran"):
            layer(*arguments)


def scaled(x, mask):
    x = x.transpose(0, 1)
    return F.scaled_dot_product_attention(x, x, x, mask, scale=0.5).transpose(0, 1)


def test_without_flash_attn_nothing_is_looked_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert _flash_attn.wanted() == {}
