"""scaled_dot_product_attention answers as torch's: the same arguments, layout, results and gradients."""

from __future__ import annotations

import gc
import inspect
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torchs

from illada_kernels import KeyRanges, _bounds, _streams
from illada_kernels import scaled_dot_product_attention as ours
from illada_kernels.ops.attention import sdpa


def draw(*lead, queries=6, keys=9, heads=4, kv_heads=4, width=6):
    torch.manual_seed(0)
    q, k, v = ((*lead, heads, queries, 8), (*lead, kv_heads, keys, 8), (*lead, kv_heads, keys, width))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in (q, k, v)]


def assert_as_torchs(inputs, *args, **options):
    out, right = ours(*inputs, *args, **options), torchs(*inputs, *args, **options)
    torch.testing.assert_close(out, right, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(right, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lead", [(2,), (), (2, 3)])
@pytest.mark.parametrize("queries, keys", [(6, 9), (9, 6), (6, 6), (1, 5)])
def test_without_a_mask_and_causal_from_the_top(lead, queries, keys):
    inputs = draw(*lead, queries=queries, keys=keys)
    assert_as_torchs(inputs)
    assert_as_torchs(inputs, is_causal=True, scale=0.3)


def allowed():
    mask = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    mask[0, :, :, :5] = mask[1, :, :, 2:4] = mask[1, :, 3, 6:] = True
    return mask


MASKS = {
    "one per batch entry": allowed(),
    "one for all": allowed()[:1],
    "two dimensions": allowed()[1, 0],
    "of keys": allowed()[:, :, :1],
    "of queries": torch.ones(6, 1, dtype=torch.bool),
    "one per head": allowed().expand(2, 4, 6, 9).clone(),
    "heads first": allowed()[:1].expand(1, 4, 6, 9).clone()[0],
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "lowest", "-inf"])
def test_masks_are_broadcast_and_read(name, kind):
    mask = MASKS[name]
    if kind != "bool":
        low = -torch.inf if "inf" in kind else torch.finfo(torch.float64).min
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)
    assert_as_torchs(draw(2), mask)


def test_grouped_heads_only_when_asked_for():
    inputs = draw(2, kv_heads=2)
    assert_as_torchs(inputs, enable_gqa=True)
    with pytest.raises(ValueError, match=r"key: expected \(2, 4\) .* like query, got \(2, 2\); .*enable_gqa"):
        ours(*inputs)
    assert_as_torchs(draw(kv_heads=2), enable_gqa=True)


@pytest.mark.parametrize(
    "of_q, of_k, of_v",
    [
        ((2, 4), (2, 1), (2, 1)),
        ((2, 4), (1, 4), (1, 4)),
        ((1, 4), (2, 4), (2, 4)),
        ((2, 1), (2, 4), (2, 4)),
        ((2, 4), (2, 1), (2, 4)),
        ((3, 2, 4), (1, 2, 1), (3, 1, 1)),
        ((2,), (1,), (2,)),
    ],
    ids=str,
)
def test_leading_dimensions_are_broadcast_as_by_torch(of_q, of_k, of_v):
    torch.manual_seed(0)
    shapes = (*of_q, 6, 8), (*of_k, 9, 8), (*of_v, 9, 6)
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert_as_torchs(inputs)
    assert_as_torchs(inputs, torch.rand(6, 1) * torch.arange(9) < 5)


@pytest.mark.parametrize(
    "of_q, of_k, of_v",
    [
        ((2, 4), (2, 2), (2, 1)),
        ((2, 4), (2, 2), (2, 4)),
        ((2, 6), (2, 2), (2, 3)),
        ((2, 4), (1, 2), (1, 2)),
        ((1, 4), (2, 2), (2, 2)),
        ((2, 4), (1, 2), (2, 4)),
        ((3, 2, 4), (1, 2, 2), (3, 1, 1)),
        ((4,), (2,), (1,)),
        ((2, 4), (2,), (2,)),
    ],
    ids=str,
)
def test_grouped_heads_are_broadcast_as_by_torch(of_q, of_k, of_v):
    torch.manual_seed(0)
    shapes = (*of_q, 6, 8), (*of_k, 9, 8), (*of_v, 9, 6)
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert_as_torchs(inputs, enable_gqa=True)
    assert_as_torchs(inputs, torch.rand(6, 1) * torch.arange(9) < 5, enable_gqa=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, enable_gqa=True), torchs(*inputs, enable_gqa=True))


def test_ranks_that_differ_are_broadcast():
    q, k, v = draw(2)
    assert_as_torchs([q, *(x[0].detach().requires_grad_() for x in (k, v))])
    assert_as_torchs([q[0].detach().requires_grad_(), k, v])


def test_grouped_heads_that_do_not_fit_are_named():
    q, k, v = draw(2)
    with pytest.raises(ValueError, match=r"value: expected a number of heads that divides query's 4, got 3"):
        ours(q, k, v[:, :3], enable_gqa=True)
    with pytest.raises(ValueError, match=r"key: expected \(2,\) before the heads like query, got \(3,\)"):
        ours(q, torch.zeros(3, 4, 9, 8, dtype=torch.float64), v, enable_gqa=True)


def test_leading_dimensions_that_do_not_fit_are_named():
    q, k, _ = draw(2)
    with pytest.raises(ValueError, match=r"value: expected \(2, 4\) .* got \(3, 4\)"):
        ours(q, k, torch.zeros(3, 4, 9, 6, dtype=torch.float64))


def test_ranges_go_straight_through():
    inputs, ranges = draw(2), KeyRanges.causal(6, 9)
    out = ours(*inputs, ranges)
    torch.testing.assert_close(out, torchs(*inputs, ranges.dense()[:, None]))


def test_rows_without_keys_give_zero():
    mask = allowed()
    mask[0, :, 2] = False
    assert not ours(*draw(2), mask)[0, :, 2].any()


@pytest.fixture
def readings(monkeypatch):
    """Counts what would synchronise."""
    counted = []
    original = _bounds.refuse
    monkeypatch.setattr("illada_kernels.key_ranges.refuse", lambda *args: counted.append(1) or original(*args))
    return counted


@pytest.mark.parametrize("additive", [False, True])
def test_layers_that_share_a_mask_read_it_once(readings, additive):
    mask, inputs = allowed(), draw(2)
    mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask
    for _ in range(32):
        ours(*inputs, mask[:, :, :, :9])  # a new view in each layer, as models slice masks
    assert len(readings) == 1
    ours(*inputs, mask[:, :, :, :9].logical_not() if not additive else mask * 1)
    assert len(readings) == 2


def test_a_mask_that_was_written_to_is_read_again(readings):
    mask, inputs = allowed(), draw(2)
    ours(*inputs, mask)
    mask[:, :, :, 0] = False
    torch.testing.assert_close(ours(*inputs, mask), torchs(*inputs, mask))
    assert len(readings) == 2


def rows_of(mask):
    mask.numpy()[:, :, 1:5, 6:] ^= True


WRITES = {  # that change no version
    "data": lambda mask: mask.data[:, :, :, 2:4].logical_not_(),
    "two rows alike": lambda mask: mask.data[:, :, 2:4, 3:].logical_not_(),
    "numpy": lambda mask: rows_of(mask),
    "other data": lambda mask: setattr(mask, "data", mask.flip(3)),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_past_the_version_is_seen_on_the_cpu(name, dtype, readings):
    allow, inputs = allowed(), draw(2)
    mask = allow if dtype == torch.bool else torch.zeros(allow.shape, dtype=dtype).masked_fill(~allow, -torch.inf)
    view = mask[:, :, :, ::1]
    ours(*inputs, view)
    version = mask._version
    if dtype == torch.bool:
        WRITES[name](mask)
    else:
        WRITES[name](allow)
        mask.data.copy_(torch.zeros(allow.shape, dtype=dtype).masked_fill(~allow, -torch.inf))
    assert mask._version == version
    here = mask if name == "other data" else view
    torch.testing.assert_close(ours(*inputs, here), torchs(*inputs, here))
    assert len(readings) == 2
    ours(*inputs, here)
    assert len(readings) == 2


def test_a_mask_with_gaps_in_memory_is_remembered(readings):
    mask = torch.zeros(6, 18, dtype=torch.bool)[:, ::2].logical_not()
    wide = torch.ones(2, 1, 6, 18, dtype=torch.bool)
    for _ in range(2):
        ours(*draw(2), mask)
        ours(*draw(2), wide[..., ::2].expand(2, 4, 6, 9))
        ours(*draw(2), wide[:, :, :1, 9:].transpose(0, 1).transpose(0, 1))
    assert len(readings) == 3


def test_what_is_remembered_dies_with_the_mask():
    inputs = draw(2)
    before = len(sdpa._masks.kept)
    mask = allowed()
    ours(*inputs, mask)
    assert len(sdpa._masks.kept) == before + 1
    del mask
    gc.collect()
    assert len(sdpa._masks.kept) == before


def test_slices_of_a_long_lived_mask_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(sdpa._masks, "most", 4)
    mask, inputs = torch.ones(20, 9, dtype=torch.bool), draw(2)
    sdpa._masks.kept.clear()
    for row in range(14):
        ours(*inputs, mask[row : row + 6])
    assert len(sdpa._masks.kept) == 4


def test_inference_tensors_are_read_in_each_call(readings):
    inputs = [x.detach() for x in draw(2)]
    with torch.inference_mode():
        mask = allowed()
        for _ in range(2):
            ours(*inputs, mask)
            mask.logical_not_()
    assert len(readings) == 2


def test_compiles_into_one_graph_with_a_mask_of_any_kind():
    inputs = [x.detach() for x in draw(2)]
    compiled = torch.compile(lambda q, k, v, m: ours(q, k, v, m), fullgraph=True, backend="aot_eager")
    for mask in (None, allowed(), torch.zeros(6, 9), KeyRanges.causal(6, 9)):
        torch.testing.assert_close(compiled(*inputs, mask), ours(*inputs, mask))
    causal = torch.compile(lambda q, k, v: ours(q, k, v, is_causal=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(causal(*inputs), ours(*inputs, is_causal=True))


def test_causal_ranges_made_under_inference_mode_train():
    with torch.inference_mode():
        ours(*(x.detach() for x in draw(2, queries=7, keys=7)), is_causal=True)
    assert_as_torchs(draw(2, queries=7, keys=7), is_causal=True)


def test_nothing_that_is_made_in_a_captured_graph_is_used_outside_of_it(monkeypatch):
    captured = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _streams.reuse(captured) is None and _streams.reuse(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    assert _streams.reuse(captured) == 7


def test_a_mask_that_a_captured_graph_would_not_read_again_is_refused(monkeypatch):
    monkeypatch.setattr(sdpa, "is_captured", lambda device: True)
    with pytest.raises(ValueError, match="attn_mask: expected KeyRanges or None while a CUDA graph is captured"):
        ours(*draw(2), allowed())


@pytest.mark.parametrize("levels", [1, 2])
def test_masks_under_vmap_are_read_and_refused_as_alone(levels):
    q, k, v = (x.detach() for x in draw(3, 2))
    masks = torch.stack([allowed(), allowed().flip(-1), allowed().flip(0)]).expand(3, 2, 4, 6, 9).clone()
    call = ours
    for _ in range(levels):
        call = torch.func.vmap(call)
    if levels == 2:
        masks = masks[:, :, :1]
    torch.testing.assert_close(call(q, k, v, masks), torchs(q, k, v, masks).nan_to_num())
    masks[2, ..., 5, :] = torch.arange(9) % 2 == 0
    with pytest.raises(ValueError, match="batch entry 0, row 5 has 5"):
        call(q, k, v, masks)


BAD = {
    "a bias": ({"attn_mask": torch.full((6, 9), 0.5)}, "biases that are neither 0 nor"),
    "a NaN": ({"attn_mask": torch.full((6, 9), torch.nan)}, "biases that are neither 0 nor"),
    "heads that differ": ({"attn_mask": torch.rand(2, 4, 6, 9) < 0.5}, "batch entry 0, row 0 has"),
    "a shape": (
        {"attn_mask": torch.ones(5, 9, dtype=torch.bool)},
        "attn_mask: expected a shape that broadcasts to",
    ),
    "a learned bias": ({"attn_mask": torch.zeros(6, 9, requires_grad=True)}, "attn_mask: expected requires_grad=False"),
    "dropout": ({"dropout_p": 0.1}, r"dropout_p: expected 0, got 0\.1"),
    "a mask beside is_causal": ({"attn_mask": allowed(), "is_causal": True}, "attn_mask: expected None with is_causal"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        ours(*draw(2), **options)


def test_the_signature_is_torchs_and_a_backend():
    said = inspect.signature(ours).parameters
    plain = [
        name if one.default is one.empty else f"{name}={one.default}"
        for name, one in said.items()
        if one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    assert f"scaled_dot_product_attention({', '.join(plain)})" in " ".join(str(torchs.__doc__).split())
    assert [name for name, one in said.items() if one.kind is one.KEYWORD_ONLY] == ["backend"]


def test_wrong_types_are_named():
    q, k, v = draw(2)
    with pytest.raises(TypeError, match=r"attn_mask: expected torch\.bool or .* got torch\.int64"):
        ours(q, k, v, torch.ones(6, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="attn_mask: expected device cpu like query, got meta"):
        ours(q, k, v, torch.ones(6, 9, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="query: expected \\(\\.\\.\\., heads"):
        ours(q[0, 0], k[0, 0], v[0, 0])
