"""KeyRanges against the definition of each mask, a predicate on (row, key); no synchronisation; every bad argument."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from illada_kernels import KeyRanges
from illada_kernels.key_ranges import clamp_bounds

CU = torch.tensor([0, 3, 3, 7, 10])  # documents of 3, 0, 4 and 3 tokens


def by_definition(rows, keys, allowed):
    return torch.tensor([[bool(allowed(i, j)) for j in range(keys)] for i in range(rows)]).reshape(rows, keys)


def document(i):
    return next((n for n in range(len(CU) - 1) if CU[n] <= i < CU[n + 1]), None)


def noisy_clean(length, block, cu=None, causal=None):
    """BD3-LM by its definition: noisy sees its noisy block and earlier clean ones, clean sees clean up to its own.

    Causal where a loss is autoregressive: of clean rows (Nemotron-Labs-Diffusion), or within noisy blocks too (I-DLM).
    """

    def place(token):
        position = token % length
        doc = 0 if cu is None else document(position)
        start = 0 if cu is None or doc is None else int(cu[doc])
        return token < length, doc, (position - start) // block

    def allowed(i, j):
        (noisy_i, doc_i, block_i), (noisy_j, doc_j, block_j) = place(i), place(j)
        if doc_i is None or doc_i != doc_j:
            return False
        if noisy_i and noisy_j:
            return block_i == block_j and (causal != "both" or j <= i)
        if noisy_i and not noisy_j:
            return block_i > block_j
        return not noisy_j and block_i >= block_j and (causal is None or j <= i)

    return by_definition(2 * length, 2 * length, allowed)


def same_document(i, j):
    return document(i) is not None and document(i) == document(j)


def anchored(anchors, length, block, cu=None):
    """DFlash by its definition: the context before the anchor, within its document, and the row's own block."""

    def allowed(i, j):
        anchor = int(anchors[i // block])
        if anchor < 0:
            return False
        if j >= length:
            return (j - length) // block == i // block
        return j < anchor and (cu is None or same_document(j, anchor))

    return by_definition(len(anchors) * block, length + len(anchors) * block, allowed)


def in_cache(length, s_new, num_keys, block=None, left=None):
    """A cache by its definition: row i stands at slot length - s_new + i."""
    block = s_new if block is None else block

    def allowed(i, j):
        place, slot = length - s_new + i, j - (length - s_new)  # slot >= 0: a new key
        return j < length and slot // block <= i // block and (left is None or place - left <= j)

    return by_definition(s_new, num_keys, allowed)


TURNS = torch.tensor([[0, 2, 6], [3, 3, 9]])


def turn(b, i):
    return sum(1 for start in TURNS[b].tolist() if 0 < start <= i)


DEFINITIONS = {
    "full": (lambda: KeyRanges.full(5), by_definition(1, 5, lambda i, j: True)[None]),
    "full of nothing": (lambda: KeyRanges.full(0), torch.zeros(1, 1, 0, dtype=torch.bool)),
    "right padding": (
        lambda: KeyRanges.padding(torch.tensor([0, 3, 5]), 5),
        torch.stack([by_definition(1, 5, lambda i, j, n=n: j < n) for n in (0, 3, 5)]),
    ),
    "left padding": (
        lambda: KeyRanges.padding(torch.tensor([0, 3, 5], dtype=torch.int32), 5, "left"),
        torch.stack([by_definition(1, 5, lambda i, j, n=n: j >= 5 - n) for n in (0, 3, 5)]),
    ),
    "padding longer than the keys": (
        lambda: KeyRanges.padding(torch.tensor([9, -2]), 5, "left"),
        torch.stack([by_definition(1, 5, lambda i, j, n=n: j >= 5 - n) for n in (5, 0)]),
    ),
    "packed": (lambda: KeyRanges.packed(CU, 10), by_definition(10, 10, same_document)[None]),
    "packed with loose tokens": (lambda: KeyRanges.packed(CU.int(), 12), by_definition(12, 12, same_document)[None]),
    "packed of no document": (lambda: KeyRanges.packed(CU[:1], 3), torch.zeros(1, 3, 3, dtype=torch.bool)),
    "causal": (lambda: KeyRanges.causal(6), by_definition(6, 6, lambda i, j: j <= i)[None]),
    "window": (lambda: KeyRanges.window(9, 2, 1), by_definition(9, 9, lambda i, j: i - 2 <= j <= i + 1)[None]),
    "window of itself": (lambda: KeyRanges.window(4, 0, 0), torch.eye(4, dtype=torch.bool)[None]),
    "window open left": (lambda: KeyRanges.window(7, None, 2), by_definition(7, 7, lambda i, j: j <= i + 2)[None]),
    "window open right": (lambda: KeyRanges.window(7, 3, None), by_definition(7, 7, lambda i, j: j >= i - 3)[None]),
    "causal of a cache": (lambda: KeyRanges.causal(3, 8), by_definition(3, 8, lambda i, j: j <= i + 5)[None]),
    "causal of more rows than keys": (
        lambda: KeyRanges.causal(6, 4),
        by_definition(6, 4, lambda i, j: j <= i - 2)[None],
    ),
    "window of a cache": (
        lambda: KeyRanges.window(3, 2, 1, 8),
        by_definition(3, 8, lambda i, j: i + 3 <= j <= i + 6)[None],
    ),
    "window of more rows than keys": (
        lambda: KeyRanges.window(7, 1, 2, 4),
        by_definition(7, 4, lambda i, j: i - 4 <= j <= i - 1)[None],
    ),
    "block causal": (lambda: KeyRanges.block_causal(10, 4), by_definition(10, 10, lambda i, j: j // 4 <= i // 4)[None]),
    "block causal by cu_seqlens": (
        lambda: KeyRanges.block_causal(10, CU),
        by_definition(10, 10, lambda i, j: document(j) <= document(i))[None],
    ),
    "dialogue turns": (
        lambda: KeyRanges.block_causal(8, TURNS),
        torch.stack([by_definition(8, 8, lambda i, j, b=b: turn(b, j) <= turn(b, i)) for b in (0, 1)]),
    ),
    "block causal without boundaries": (
        lambda: KeyRanges.block_causal(3, CU[:0]),
        torch.ones(1, 3, 3, dtype=torch.bool),
    ),
    "block diffusion": (lambda: KeyRanges.block_diffusion(8, 4), noisy_clean(8, 4)[None]),
    "block diffusion, short last block": (lambda: KeyRanges.block_diffusion(7, 3), noisy_clean(7, 3)[None]),
    "block diffusion, packed": (lambda: KeyRanges.block_diffusion(10, 2, CU), noisy_clean(10, 2, CU)[None]),
    "block diffusion, loose tokens": (lambda: KeyRanges.block_diffusion(12, 2, CU), noisy_clean(12, 2, CU)[None]),
    "block diffusion of nothing": (lambda: KeyRanges.block_diffusion(0, 4), torch.zeros(1, 0, 0, dtype=torch.bool)),
    "block diffusion, clean rows causal": (
        lambda: KeyRanges.block_diffusion(12, 2, CU, causal="clean"),
        noisy_clean(12, 2, CU, "clean")[None],
    ),
    "block diffusion, all rows causal": (
        lambda: KeyRanges.block_diffusion(12, 3, CU, causal="both"),
        noisy_clean(12, 3, CU, "both")[None],
    ),
    "block diffusion, all rows causal, short last block": (
        lambda: KeyRanges.block_diffusion(7, 3, causal="both"),
        noisy_clean(7, 3, causal="both")[None],
    ),
    "anchor blocks": (
        lambda: KeyRanges.anchor_blocks(torch.tensor([0, 5, -1, 3, 9]), 9, 3),
        anchored([0, 5, -1, 3, 9], 9, 3)[None],
    ),
    "anchor blocks, packed, per sequence": (
        lambda: KeyRanges.anchor_blocks(torch.tensor([[0, 2, 3], [-1, 6, 9]], dtype=torch.int32), 10, 2, CU),
        torch.stack([anchored([0, 2, 3], 10, 2, CU), anchored([-1, 6, 9], 10, 2, CU)]),
    ),
    "no anchor blocks": (lambda: KeyRanges.anchor_blocks(CU[:0], 4, 2), torch.zeros(1, 0, 4, dtype=torch.bool)),
    "cached blocks": (
        lambda: KeyRanges.cached(torch.tensor([5, 9, 8]), 5, 9, block=2),
        torch.stack([in_cache(n, 5, 9, 2) for n in (5, 9, 8)]),
    ),
    "cached causal in a window": (
        lambda: KeyRanges.cached(torch.tensor([4, 7]), 3, 9, block=1, left=2),
        torch.stack([in_cache(n, 3, 9, 1, 2) for n in (4, 7)]),
    ),
    "cached in a window": (
        lambda: KeyRanges.cached(torch.tensor([4, 7]), 3, 9, left=3),
        torch.stack([in_cache(n, 3, 9, left=3) for n in (4, 7)]),
    ),
    "cached of fewer keys than rows": (
        lambda: KeyRanges.cached(torch.tensor([2, 0]), 3, 9, block=1, left=2),
        torch.stack([in_cache(n, 3, 9, 1, 2) for n in (2, 0)]),
    ),
    "cached": (
        lambda: KeyRanges.cached(torch.tensor([4, 7]), 2, 9),
        torch.stack([by_definition(1, 9, lambda i, j, n=n: j < n) for n in (4, 7)]),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_constructor_matches_the_definition_of_its_mask(name):
    build, expected = DEFINITIONS[name]
    ranges = build()
    assert torch.equal(ranges.dense(), expected)
    assert ranges.density().item() == pytest.approx(expected.float().mean().item() if expected.numel() else 0.0)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_constructor_gives_normal_form(name):
    ranges = DEFINITIONS[name][0]()
    assert ranges.bounds.dtype == torch.int32
    assert torch.equal(clamp_bounds(ranges.bounds, ranges.num_keys), ranges.bounds)


def test_block_diffusion_density_is_the_published_one():
    length, block = 1024, 32  # (L * L + L * b) / (4 * L * L)
    density = KeyRanges.block_diffusion(length, block).density().item()
    assert density == pytest.approx((length**2 + length * block) / (4 * length**2))


# ---- random masks ----------------------------------------------------------------------------------------------------


@st.composite
def bounds(draw, batch=None, rows=None, keys=None):
    keys = draw(st.integers(0, 12)) if keys is None else keys
    batch = draw(st.integers(0, 3)) if batch is None else batch
    rows = draw(st.integers(0, 5)) if rows is None else rows
    row = st.lists(st.integers(0, keys), min_size=4, max_size=4).map(sorted)
    values = draw(st.lists(row, min_size=batch * rows, max_size=batch * rows))
    return KeyRanges(torch.tensor(values, dtype=torch.int32).reshape(batch, rows, 4), keys)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(bounds(), st.integers(0, 3))
def test_from_dense_inverts_dense(ranges, heads):
    mask = ranges.dense()
    if heads:
        mask = mask[:, None].expand(-1, heads, -1, -1)
    back = KeyRanges.from_dense(mask)
    assert torch.equal(back.dense(), ranges.dense())
    assert torch.equal(clamp_bounds(back.bounds, back.num_keys), back.bounds)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.data())
def test_intersection_allows_what_both_allow_or_names_the_row(data):
    keys = data.draw(st.integers(0, 12))
    a = data.draw(bounds(data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3])), keys))
    b = data.draw(bounds(2, 3, keys))
    both = a.dense() & b.dense()  # (2, 3, keys)
    starts = both & ~torch.nn.functional.pad(both, (1, 0))[..., :-1]
    needs_three = starts.sum(-1) > 2
    if needs_three.any():
        batch, row = needs_three.nonzero()[0].tolist()
        with pytest.raises(ValueError, match=f"batch entry {batch}, row {row} would need three"):
            a & b
    else:
        result = a & b
        assert torch.equal(result.dense(), both)
        assert torch.equal(clamp_bounds(result.bounds, keys), result.bounds)


def test_ranges_that_touch_count_as_one_in_an_intersection():
    a = KeyRanges(torch.tensor([[[0, 5, 5, 10]]], dtype=torch.int32), 10)
    b = KeyRanges(torch.tensor([[[0, 7, 7, 10]]], dtype=torch.int32), 10)
    assert (a & b).bounds.tolist() == [[[0, 10, 10, 10]]]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(bounds(), st.data())
def test_slicing_selects_rows_without_copying(ranges, data):
    batch, rows = ranges.bounds.shape[:2]
    b0, s0 = data.draw(st.integers(0, batch)), data.draw(st.integers(0, rows))
    b1, s1 = data.draw(st.integers(b0, batch)), data.draw(st.integers(s0, rows))
    part = ranges[b0:b1, s0:s1]
    expected = ranges.dense()
    expected = expected if batch == 1 else expected[b0:b1]
    expected = expected if rows == 1 else expected[:, s0:s1]
    assert torch.equal(part.dense(), expected)
    assert part.bounds.untyped_storage().data_ptr() == ranges.bounds.untyped_storage().data_ptr()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(-20, 20), min_size=4, max_size=4))
def test_malformed_bounds_stay_inside_the_keys(values):
    ranges = KeyRanges(torch.tensor(values, dtype=torch.int32).reshape(1, 1, 4), 7)
    lo0, hi0, lo1, hi1 = clamp_bounds(ranges.bounds, 7).flatten().tolist()
    assert 0 <= lo0 <= hi0 <= lo1 <= hi1 <= 7
    expected = [lo0 <= j < hi0 or lo1 <= j < hi1 for j in range(7)]
    assert ranges.dense().flatten().tolist() == expected


# ---- from masks ------------------------------------------------------------------------------------------------------


def test_from_padding_reads_either_side_and_empty_rows():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    ranges = KeyRanges.from_padding(mask)
    assert ranges.bounds.shape == (5, 1, 4)
    assert torch.equal(ranges.dense()[:, 0], mask)


def test_from_padding_names_the_batch_entry_with_a_hole():
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 3] = False
    with pytest.raises(ValueError, match="batch entry 2 has 2"):
        KeyRanges.from_padding(mask)


def test_from_dense_names_the_row_with_three_runs():
    mask = torch.ones(2, 4, 7, dtype=torch.bool)
    mask[1, 2] = torch.tensor([1, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    with pytest.raises(ValueError, match="batch entry 1, row 2 has 3 runs"):
        KeyRanges.from_dense(mask)


def test_from_dense_names_the_row_whose_heads_differ():
    mask = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    mask[1, 2, 3, 0] = False
    with pytest.raises(ValueError, match="batch entry 1, row 3 has heads that differ"):
        KeyRanges.from_dense(mask)


# ---- no synchronisation, tracing -------------------------------------------------------------------------------------

CONSTRUCTORS = {
    "full": lambda cu, n: KeyRanges.full(9, device=cu.device),
    "padding": lambda cu, n: KeyRanges.padding(n, 9, "left"),
    "packed": lambda cu, n: KeyRanges.packed(cu, 12),
    "causal": lambda cu, n: KeyRanges.causal(12, device=cu.device),
    "window": lambda cu, n: KeyRanges.window(12, 2, None, device=cu.device),
    "block_causal": lambda cu, n: KeyRanges.block_causal(12, 5, device=cu.device),
    "block_causal boundaries": lambda cu, n: KeyRanges.block_causal(12, cu),
    "block_diffusion": lambda cu, n: KeyRanges.block_diffusion(12, 5, device=cu.device),
    "block_diffusion packed": lambda cu, n: KeyRanges.block_diffusion(12, 5, cu),
    "block_diffusion causal": lambda cu, n: KeyRanges.block_diffusion(12, 5, cu, causal="both"),
    "anchor_blocks": lambda cu, n: KeyRanges.anchor_blocks(n, 12, 3, cu),
    "cached": lambda cu, n: KeyRanges.cached(n, 4, 12),
    "cached blocks": lambda cu, n: KeyRanges.cached(n, 4, 12, block=2, left=3),
    "slice": lambda cu, n: KeyRanges.cached(n, 4, 12)[0:1, 0:2],
    "moved": lambda cu, n: KeyRanges.packed(cu, 12).to(cu.device),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructor_never_reads_the_device(name):
    build = CONSTRUCTORS[name]
    real = build(CU, torch.tensor([3, 5]))
    shapes = real.bounds.shape, real.dense().shape
    with FakeTensorMode() as mode:  # a read of a value, a boolean index or nonzero raises here
        fake = build(mode.from_tensor(CU), mode.from_tensor(torch.tensor([3, 5])))
        assert (fake.bounds.shape, fake.dense().shape) == shapes and fake.density().shape == ()
    meta = build(CU.to("meta"), torch.tensor([3, 5], device="meta"))
    assert meta.bounds.is_meta and (meta.bounds.shape, meta.dense().shape) == shapes


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructor_traces_into_one_graph(name):
    torch._dynamo.reset()  # the lambdas share one code object, whose recompilations are limited
    build = CONSTRUCTORS[name]
    compiled = torch.compile(lambda cu, n: build(cu, n).bounds, fullgraph=True, backend="eager")
    assert torch.equal(compiled(CU, torch.tensor([3, 5])), build(CU, torch.tensor([3, 5])).bounds)


def test_key_ranges_pass_into_and_out_of_a_compiled_function():
    compiled = torch.compile(lambda r: (r[:, 2:4], r.dense(), r.density()), fullgraph=True, backend="eager")
    for ranges in (KeyRanges.causal(6), KeyRanges.causal(9)):  # the second with other sizes
        part, dense, density = compiled(ranges)
        assert isinstance(part, KeyRanges) and part.num_keys == ranges.num_keys
        assert torch.equal(part.dense(), ranges.dense()[:, 2:4])
        assert torch.equal(dense, ranges.dense()) and torch.equal(density, ranges.density())


# ---- bad arguments ---------------------------------------------------------------------------------------------------

HUGE = 2**31 - 1
ok = torch.zeros(2, 3, 4, dtype=torch.int32)
mask = torch.ones(2, 3, 4, dtype=torch.bool)
BAD = {
    "bounds of floats": (lambda: KeyRanges(ok.float(), 4), TypeError, "bounds: expected torch.int32, got"),
    "bounds of int64": (lambda: KeyRanges(ok.long(), 4), TypeError, "bounds: expected torch.int32, got"),
    "bounds a list": (
        lambda: KeyRanges([[0, 1, 1, 1]], 4),
        TypeError,
        "bounds: expected a tensor of torch.int32, got list",
    ),
    "bounds of 2 dimensions": (lambda: KeyRanges(ok[0], 4), ValueError, "bounds: expected shape"),
    "bounds of 3 numbers": (lambda: KeyRanges(ok[..., :3], 4), ValueError, "bounds: expected shape"),
    "bounds transposed": (lambda: KeyRanges(ok.transpose(0, 2).contiguous().transpose(0, 2), 4), ValueError, "stride"),
    "num_keys negative": (lambda: KeyRanges(ok, -1), ValueError, "num_keys: expected an int from 0 to 2147483647, got"),
    "num_keys too large": (
        lambda: KeyRanges(ok, 2**31),
        ValueError,
        "num_keys: expected an int from 0 to 2147483647, got",
    ),
    "num_keys a tensor": (lambda: KeyRanges(ok, torch.tensor(4)), TypeError, "num_keys: expected an int"),
    "full of a float": (lambda: KeyRanges.full(4.0), TypeError, "num_keys: expected an int"),
    "lengths a list": (
        lambda: KeyRanges.padding([3], 4),
        TypeError,
        "lengths: expected a tensor of torch.int32 or torch.int64",
    ),
    "lengths of floats": (
        lambda: KeyRanges.padding(torch.ones(2), 4),
        TypeError,
        "lengths: expected torch.int32 or torch.int64",
    ),
    "lengths of 2 dimensions": (lambda: KeyRanges.padding(ok[0], 4), ValueError, "lengths: expected 1 dimensions"),
    "side": (lambda: KeyRanges.padding(ok[0, 0], 4, "both"), ValueError, "side: expected"),
    "no offsets": (lambda: KeyRanges.packed(ok[0, 0][:0], 4), ValueError, "cu_seqlens: expected N"),
    "num_tokens": (lambda: KeyRanges.packed(ok[0, 0], -4), ValueError, "num_tokens: expected an int from 0"),
    "window left": (lambda: KeyRanges.window(4, -1, 1), ValueError, "left: expected an int from 0"),
    "window right": (lambda: KeyRanges.window(4, 1, 1.5), TypeError, "right: expected an int"),
    "block of 0": (lambda: KeyRanges.block_causal(4, 0), ValueError, "block: expected an int from 1"),
    "block of floats": (
        lambda: KeyRanges.block_causal(4, torch.ones(2)),
        TypeError,
        "block: expected torch.int32 or torch.int64",
    ),
    "device of boundaries": (
        lambda: KeyRanges.block_causal(4, ok[0, 0], device="meta"),
        ValueError,
        "device: expected cpu, where block is, got meta",
    ),
    "device of documents": (
        lambda: KeyRanges.block_diffusion(4, 2, ok[0, 0], device="meta"),
        ValueError,
        "device: expected cpu, where cu_seqlens is, got meta",
    ),
    "diffusion block": (lambda: KeyRanges.block_diffusion(4, 0), ValueError, "block: expected an int from 1"),
    "diffusion length": (
        lambda: KeyRanges.block_diffusion(2**30, 2),
        ValueError,
        "length: expected an int from 0 to 1073741823, got 1073741824",
    ),
    "causal of a word": (
        lambda: KeyRanges.block_diffusion(4, 2, causal="noisy"),
        ValueError,
        "causal: expected one of None, 'clean', 'both', got 'noisy'",
    ),
    "causal num_keys": (lambda: KeyRanges.causal(4, 2.5), TypeError, "num_keys: expected an int, got float"),
    "anchors of floats": (
        lambda: KeyRanges.anchor_blocks(torch.ones(2), 4, 2),
        TypeError,
        "anchors: expected torch.int32 or torch.int64",
    ),
    "anchor blocks of 0": (
        lambda: KeyRanges.anchor_blocks(ok[0, 0], 4, 0),
        ValueError,
        "block: expected an int from 1",
    ),
    "anchor blocks too many": (
        lambda: KeyRanges.anchor_blocks(ok[0, 0], HUGE - 7, 2),
        ValueError,
        r"length \+ N \* block: expected an int from 0",
    ),
    "device of the context's documents": (
        lambda: KeyRanges.anchor_blocks(ok[0, 0], 4, 2, ok[0, 0].to("meta")),
        ValueError,
        "device: expected meta, where cu_seqlens is, got cpu",
    ),
    "cached block": (lambda: KeyRanges.cached(ok[0, 0], 2, 4, block=0), ValueError, "block: expected an int from 1"),
    "cached left": (lambda: KeyRanges.cached(ok[0, 0], 2, 4, left=-1), ValueError, "left: expected an int from 0"),
    "s_new": (lambda: KeyRanges.cached(ok[0, 0], 5, 4), ValueError, "s_new: expected at most num_keys = 4"),
    "padding mask of ints": (lambda: KeyRanges.from_padding(ok[0]), TypeError, "mask: expected torch.bool"),
    "padding mask of 3 dimensions": (
        lambda: KeyRanges.from_padding(mask),
        ValueError,
        r"mask: expected shape \(B, Sk\), got \(2, 3, 4\)",
    ),
    "dense mask of integers": (lambda: KeyRanges.from_dense(mask.int()), TypeError, "mask: expected torch.bool"),
    "dense mask of biases": (lambda: KeyRanges.from_dense(mask.float()), ValueError, "batch entry 0, row 0 has biases"),
    "dense mask of 2 dimensions": (
        lambda: KeyRanges.from_dense(mask[0]),
        ValueError,
        r"mask: expected shape \(B, Sq, Sk\), got \(3, 4\); or give \(B, 1 or H",
    ),
    "dense mask without heads": (lambda: KeyRanges.from_dense(mask[:, None][:, :0]), ValueError, "at least one head"),
    "index by number": (lambda: KeyRanges(ok, 4)[0], TypeError, "index: expected slices"),
    "index of 3": (lambda: KeyRanges(ok, 4)[:, :, :2], TypeError, "index: expected slices"),
    "& of other keys": (lambda: KeyRanges(ok, 4) & KeyRanges(ok, 5), ValueError, "&: expected the same num_keys"),
    "& of other rows": (lambda: KeyRanges(ok, 4) & KeyRanges(ok[:, :2], 4), ValueError, "&: expected batch and rows"),
    "& of a mask": (lambda: KeyRanges(ok, 4) & mask, TypeError, "unsupported operand"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_broadcast_dimension_stays_when_sliced():
    ranges = KeyRanges.full(5)
    for b, s in itertools.product((slice(3, 4), slice(0, 0)), repeat=2):
        assert ranges[b, s].bounds.shape == (1, 1, 4)


def test_limits_as_large_as_they_may_be_do_not_overflow():
    cu = torch.tensor([0, 2, 4], dtype=torch.int32)
    assert KeyRanges.window(4, HUGE, HUGE).dense().all()
    assert torch.equal(KeyRanges.window(4, HUGE, 0).dense(), KeyRanges.causal(4).dense())
    assert KeyRanges.block_causal(4, HUGE).dense().all()
    assert torch.equal(KeyRanges.window(6, HUGE, HUGE, 4).dense(), torch.ones(1, 6, 4, dtype=torch.bool))
    got = KeyRanges.cached(cu, 3, 4, block=HUGE, left=HUGE)
    assert torch.equal(got.dense(), KeyRanges.cached(cu, 3, 4).dense().expand(-1, 3, -1))
    for documents in (None, cu, cu.long()):
        for causal in (None, "clean", "both"):
            got = KeyRanges.block_diffusion(4, HUGE, documents, causal=causal).dense()
            assert torch.equal(got, KeyRanges.block_diffusion(4, 4, documents, causal=causal).dense())


def test_every_public_constructor_and_use_has_an_example():
    members = [item for kind in KeyRanges.__mro__ for item in vars(kind).items()]
    names = [name for name, value in members if isinstance(value, (staticmethod, classmethod))]
    assert len(names) >= 10 and all(">>> " in getattr(KeyRanges, name).__doc__ for name in names)
