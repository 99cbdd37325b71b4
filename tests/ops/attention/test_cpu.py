"""attention on every backend of this machine: numerics against one precision up, masks, poison, strides, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from illada_kernels import KeyRanges, attention
from illada_kernels.key_ranges import clamp_bounds
from illada_kernels.ops.attention import cases, reference
from illada_kernels.ops.attention.problem import Problem
from illada_kernels.testing import tolerance
from tests.helpers.attention_oracle import HALF, NAMES, assert_close, draw, run, run_plain

backends = pytest.mark.parametrize("backend", NAMES)
compiled_backends = pytest.mark.parametrize("backend", [name for name in NAMES if name != "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])


def double(backend, x):
    """float64 where the backend has it: the reference is also the oracle of gradcheck."""
    return x.double() if backend == "reference" else x


# ---- the reference is right ------------------------------------------------------------------------------------------

GRADCHECK_MASKS = {
    "full": None,
    "causal": KeyRanges.causal(5)[:, 1:5],
    "two ranges": KeyRanges(torch.tensor([[[0, 1, 3, 5], [1, 1, 2, 3], [0, 2, 4, 4], [4, 5, 5, 5]]]).int(), 5),
}


@pytest.mark.parametrize("mask", GRADCHECK_MASKS)
def test_reference_passes_gradcheck(mask):
    q, k, v, *_ = (x.double().requires_grad_() for x in draw(2, 4, 5, 4, 2, 3, 2))

    def both(q, k, v):
        return attention(q, k, v, GRADCHECK_MASKS[mask], return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_reference_gradients_equal_autograd_through_its_forward():
    q, k, v, dout, dlse = (x.double() for x in draw(2, 6, 9, 4, 2, 5, 3))
    bounds = cases.hostile_masks(2, 6, 9)["first_and_last_key"].bounds
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = reference.forward(Problem(*leaves, bounds, 0.7))
    expected = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    explicit = reference.backward(Problem(q, k, v, bounds, 0.7), dout, dlse, out.detach(), lse.detach())
    for ours, right in zip(explicit, expected):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)  # some hundred roundings of 1e-16


def test_reference_in_float64_agrees_with_plain_pytorch():
    inputs = [x.double() for x in draw(2, 17, 29, 4, 2, 8, 6)]
    for ranges in cases.hostile_masks(2, 17, 29).values():
        ours, plain = run("reference", *inputs, ranges), run_plain(torch.float64, *inputs, ranges)
        assert ours.lse.dtype == torch.float64
        for name, x in ours.tensors().items():
            torch.testing.assert_close(x, getattr(plain, name), rtol=1e-11, atol=1e-12)


# ---- numerics --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("queries", cases.SIZES)
def test_every_pair_of_awkward_lengths_meets_the_numerics_bar(backend, queries):
    for i, keys in enumerate(cases.SIZES):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        inputs = draw(1, queries, keys, 2, 1, 20, seed=keys, dtype=dtype)
        ranges = (None, cases.hostile_masks(1, queries, keys)["random"])[i // 2 % 2]
        assert_close(run(backend, *inputs, ranges), *inputs, ranges)


@backends
@dtypes
def test_hostile_masks_meet_the_numerics_bar(backend, dtype):
    inputs = draw(2, 150, 171, 4, 2, 24, 40, dtype=dtype)
    for name, ranges in cases.hostile_masks(2, 150, 171).items():
        try:
            assert_close(run(backend, *inputs, ranges), *inputs, ranges)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


MODEL_MASKS = {
    "block_diffusion": lambda: KeyRanges.block_diffusion(96, 32),
    "block_diffusion_ragged": lambda: KeyRanges.block_diffusion(96, 7, torch.tensor([0, 30, 31, 90])),
    "packed": lambda: KeyRanges.packed(torch.tensor([0, 1, 70, 128, 192]), 192),
    "block_causal": lambda: KeyRanges.block_causal(192, 32),
    "window": lambda: KeyRanges.window(192, 17, 5),
    "cached": lambda: KeyRanges.cached(torch.tensor([32, 161]), 192, 192),
}


@backends
@pytest.mark.parametrize("mask", MODEL_MASKS)
def test_masks_of_the_field_meet_the_numerics_bar(backend, mask):
    inputs = draw(2, 192, 192, 4, 1, 32, dtype=torch.bfloat16)
    ranges = MODEL_MASKS[mask]()
    assert_close(run(backend, *inputs, ranges), *inputs, ranges)


@backends
@pytest.mark.parametrize(
    "dim, value_dim", [(1, 1), (3, 5), (16, 17), (33, 8), (64, 64), (80, 80), (96, 96), (128, 100), (256, 256)]
)
def test_every_head_dim_meets_the_numerics_bar(backend, dim, value_dim):
    for dtype in (torch.float32, torch.float16):
        inputs = draw(1, 37, 150, 2, 2, dim, value_dim, dtype=dtype)
        assert_close(run(backend, *inputs), *inputs)


@backends
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (6, 2), (7, 1), (12, 1), (32, 8)])
def test_every_grouping_of_heads_meets_the_numerics_bar(backend, heads, kv_heads):
    inputs = draw(2, 40, 70, heads, kv_heads, 16)
    ranges = cases.hostile_masks(2, 40, 70)["random"]
    assert_close(run(backend, *inputs, ranges), *inputs, ranges)


@backends
@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.3, 1e-20])
def test_any_finite_scale_meets_the_numerics_bar(backend, scale):
    inputs = draw(1, 33, 65, 2, 1, 16)
    ranges = cases.hostile_masks(1, 33, 65)["causal"]
    assert_close(run(backend, *inputs, ranges, scale), *inputs, ranges, scale)


@backends
@dtypes
def test_extreme_logits_stay_finite_and_pick_the_largest(backend, dtype):
    q, k, v, dout, dlse = draw(1, 40, 300, 2, 1, 16, dtype=dtype)
    q = q * 100  # logits of some hundreds to a thousand: exp overflows unless the maximum is subtracted
    inputs = (q, k * 10, v, dout, dlse)
    ours = run(backend, *inputs)
    for name, x in ours.tensors().items():
        assert x.isfinite().all(), name
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), (k * 10).double().repeat_interleave(2, 2)) / 4
    top = scores.topk(2, -1)
    certain = top.values[..., 0] - top.values[..., 1] > 40  # the other keys weigh less than 300 * exp(-40)
    assert certain.float().mean() > 0.5
    winner = v[0, top.indices[0, ..., 0], 0]  # (Hq, Sq, Dv)
    torch.testing.assert_close(ours.out[0].transpose(0, 1)[certain[0]], winner[certain[0]])


@backends
def test_gradient_of_lse_is_the_probability_weighted_key(backend):
    inputs = draw(2, 33, 70, 4, 2, 16)
    ranges = cases.hostile_masks(2, 33, 70)["every_third_row_empty"]
    q, k, v, _, dlse = inputs
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    _, lse = attention(q, k, v, ranges, return_lse=True, backend=backend)
    grads = torch.autograd.grad(torch.where(lse.isfinite(), lse, 0), (q, k, v), dlse)
    zero = (q, k, v, torch.zeros(2, 33, 4, 16), dlse)
    exact, same = run_plain(torch.float64, *zero, ranges), run_plain(torch.float32, *zero, ranges)
    for name, ours in zip(("dq", "dk", "dv"), grads):
        right = getattr(exact, name)
        assert (ours - right).abs().max().item() <= tolerance(getattr(same, name), right), name


# ---- rows and keys that must not matter ------------------------------------------------------------------------------


@backends
@dtypes
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poisoned_padding_never_reaches_output_or_gradient(backend, dtype, poison):
    lengths = torch.tensor([0, 1, 64, 130])
    inputs = draw(4, 45, 150, 4, 2, 16, dtype=dtype)
    for side in ("left", "right"):
        ranges = KeyRanges.padding(lengths, 150, side)
        padding = ~ranges.dense()[:, 0]  # (B, Sk)
        bounds = ranges.bounds.expand(4, 45, 4).clone()
        bounds[:, 5::7] = 0  # rows without keys
        ranges = KeyRanges(bounds, 150)
        clean = run(backend, *inputs, ranges)
        q, k, v, dout, dlse = (x.clone() for x in inputs)
        empty = ~ranges.dense().any(-1)  # (B, Sq)
        k[padding], v[padding], q[empty], dout[empty] = poison, poison, poison, poison
        dlse.transpose(1, 2)[empty] = poison
        poisoned = run(backend, q, k, v, dout, dlse, ranges)
        for name, x in poisoned.tensors().items():
            assert torch.equal(x, getattr(clean, name)), (side, name)


@backends
def test_poisoned_rows_of_another_batch_entry_stay_there(backend):
    q, k, v, dout, dlse = draw(2, 40, 50, 2, 2, 16)
    ranges = KeyRanges.full(50)
    clean = run(backend, q, k, v, dout, dlse, ranges)
    for x in (q, k, v, dout, dlse):
        x[1] = math.nan
    poisoned = run(backend, q, k, v, dout, dlse, ranges)
    for name, x in poisoned.tensors().items():
        assert torch.equal(x[0], getattr(clean, name)[0]), name


@backends
def test_keys_between_the_ranges_of_two_rows_are_never_used(backend):
    """Whole tiles of keys lie between the two ranges, within what a tile of rows spans, and no row attends to them. The
    first batch entry attends to inf and leaves it in whatever memory a kernel uses again."""
    keys = 768
    q, k, v, dout, dlse = draw(2, 2, keys, 1, 1, 16)
    bounds = torch.tensor([[[0, keys, keys, keys]] * 2, [[0, 10, 10, 10], [700, 710, 710, 710]]], dtype=torch.int32)
    ranges = KeyRanges(bounds, keys)
    clean = run(backend, q, k, v, dout, dlse, ranges)
    k[0], v[0] = math.inf, math.inf
    poisoned = run(backend, q, k, v, dout, dlse, ranges)
    for name, x in poisoned.tensors().items():
        assert torch.equal(x[1], getattr(clean, name)[1]), name


@backends
def test_row_without_keys_gives_zero_minus_infinity_and_no_gradient(backend):
    inputs = draw(2, 35, 20, 4, 2, 16, dtype=torch.bfloat16)
    for name in ("nothing", "nothing_at_the_end"):
        ours = run(backend, *inputs, cases.hostile_masks(2, 35, 20)[name])
        assert (ours.lse == -torch.inf).all()
        for x in (ours.out, ours.dq, ours.dk, ours.dv):
            assert not x.any()


@backends
@pytest.mark.parametrize("batch, queries, keys", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (2, 0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_dimensions_work(backend, batch, queries, keys, masked):
    inputs = draw(batch, queries, keys, 4, 2, 8, 6)
    ranges = KeyRanges.full(keys) if masked else None
    ours = run(backend, *inputs, ranges)
    assert ours.out.shape == (batch, queries, 4, 6) and ours.lse.shape == (batch, 4, queries)
    assert ours.dq.shape == (batch, queries, 4, 8)
    assert ours.dk.shape == (batch, keys, 2, 8) and ours.dv.shape == (batch, keys, 2, 6)
    assert (ours.lse == -torch.inf).all()  # no key for any row there is
    for x in (ours.out, ours.dq, ours.dk, ours.dv):
        assert not x.any()


@backends
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 80), min_size=12, max_size=12))
def test_malformed_bounds_act_as_their_clamped_form(backend, values):
    bounds = torch.tensor(values, dtype=torch.int32).reshape(1, 3, 4)
    inputs = draw(2, 3, 70, 2, 1, 8)
    ours = run(backend, *inputs, KeyRanges(bounds, 70))
    clamped = run(backend, *inputs, KeyRanges(clamp_bounds(bounds, 70), 70))
    for name, x in ours.tensors().items():
        assert torch.equal(x, getattr(clamped, name)), name


@backends
def test_bounds_broadcast_over_batch_and_rows(backend):
    inputs = draw(3, 20, 30, 2, 1, 8)
    small = {
        (1, 1): torch.tensor([[[3, 9, 20, 25]]]),
        (3, 1): torch.tensor([[[3, 9, 20, 25]], [[0, 0, 1, 2]], [[0, 30, 30, 30]]]),
        (1, 20): cases.hostile_masks(1, 20, 30)["random"].bounds,
    }
    for shape, bounds in small.items():
        assert bounds.shape[:2] == shape
        whole = bounds.int().expand(3, 20, 4).contiguous()
        ours, expanded = (run(backend, *inputs, KeyRanges(b, 30)) for b in (bounds.int(), whole))
        for name, x in ours.tensors().items():
            assert torch.equal(x, getattr(expanded, name)), (shape, name)


# ---- memory ----------------------------------------------------------------------------------------------------------


def in_padded_storage(x, fill=math.nan):
    """The same values and strides of 3 rows and heads more, at an odd offset, everything around them `fill`."""
    batch, rows, heads, dim = x.shape
    store = torch.full((batch + 2, rows + 3, heads + 1, dim + 3), fill, dtype=x.dtype)
    view = store[1:-1, 2:-1, 1:, 1:-2]
    view.copy_(x)
    assert view.shape == x.shape and view.stride(-1) == 1
    return view


LAYOUTS = {
    "padded": in_padded_storage,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows reversed twice in memory": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_surroundings_do_not_change_a_bit(backend, layout):
    inputs = draw(2, 45, 70, 4, 2, 19, dtype=torch.bfloat16)
    ranges = cases.hostile_masks(2, 45, 70)["hulls_overlap"]
    plain = run(backend, *inputs, ranges)
    moved = run(backend, *(LAYOUTS[layout](x) for x in inputs[:4]), inputs[4], ranges)
    for name, x in moved.tensors().items():
        assert torch.equal(x, getattr(plain, name)), name


@backends
def test_broadcast_inputs_and_expanded_gradients_work(backend):
    q, k, v, _, dlse = draw(3, 20, 30, 2, 1, 8)
    q, k, v = (x[:1].expand(3, -1, -1, -1) for x in (q, k, v))  # batch stride 0
    dout, dlse = torch.ones(()).expand(3, 20, 2, 8), torch.ones(()).expand(3, 2, 20)  # what .sum().backward() passes
    ours = run(backend, q, k, v, dout, dlse)
    copied = run(backend, *(x.contiguous() for x in (q, k, v, dout, dlse)))
    for name, x in ours.tensors().items():
        assert torch.equal(x, getattr(copied, name)), name


@backends
def test_outputs_are_written_whole_and_nothing_beside_them(backend, monkeypatch):
    """Every buffer the backend allocates starts as a sentinel between guard zones."""
    sentinel, guard, blocks = -123.0, 64, []

    def guarded(shape, dtype, fill):
        size = math.prod(shape)
        store = torch.full((size + 2 * guard,), sentinel, dtype=dtype)
        store[guard : guard + size] = fill
        blocks.append(store)
        return store[guard : guard + size].view(shape)

    def new_empty(self, *shape, dtype=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guarded(tuple(shape), dtype or self.dtype, sentinel)

    inputs = draw(2, 45, 70, 4, 2, 19, dtype=torch.float16)
    ranges = cases.hostile_masks(2, 45, 70)["every_third_row_empty"]
    expected = run(backend, *inputs, ranges)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype=None, **_: guarded(tuple(shape[0]), dtype, 0.0))
    ours = run(backend, *inputs, ranges)
    monkeypatch.undo()
    for name, x in ours.tensors().items():
        assert torch.equal(x, getattr(expected, name)), name
    for store in blocks:
        assert (store[:guard] == sentinel).all() and (store[-guard:] == sentinel).all()


@backends
def test_inputs_are_left_alone_and_backward_may_run_twice(backend):
    q, k, v, dout, _ = draw(1, 40, 70, 2, 1, 16)
    before = [x.clone() for x in (q, k, v, dout)]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, backend=backend)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, dout), before))


@compiled_backends
def test_offsets_beyond_two_to_the_31_elements_are_right(backend):
    """Two rows (and two keys) 2**31 elements apart; only the touched pages of the buffer are ever backed by memory."""
    far, dim = 2**31, 16
    try:
        store = torch.empty(far + 1024, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    q, k, v, dout, dlse = draw(1, 2, 2, 1, 1, dim, dtype=torch.bfloat16)
    views = []
    for i, x in enumerate((q, k, v, dout)):
        view = store.as_strided((1, 2, 1, dim), (far, far, dim, 1), 128 * i)
        views.append(view.copy_(x))
    ours, near = run(backend, *views, dlse), run(backend, q, k, v, dout, dlse)
    for name, x in ours.tensors().items():
        assert torch.equal(x, getattr(near, name)), name


# ---- repeatability ---------------------------------------------------------------------------------------------------


@backends
@dtypes
def test_same_inputs_give_the_same_bits(backend, dtype):
    inputs = draw(2, 300, 515, 4, 2, 24, dtype=dtype)
    ranges = cases.hostile_masks(2, 300, 515)["random"]
    first = run(backend, *inputs, ranges)
    for _ in range(3):
        for name, x in run(backend, *inputs, ranges).tensors().items():
            assert torch.equal(x, getattr(first, name)), name


@compiled_backends
@dtypes
def test_number_of_threads_does_not_change_a_bit(backend, dtype):
    inputs = draw(2, 300, 1100, 4, 2, 24, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for ranges in (None, cases.hostile_masks(2, 300, 1100)["random"]):
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run(backend, *inputs, ranges))
            for other in results[1:]:
                for name, x in other.tensors().items():
                    assert torch.equal(x, getattr(results[0], name)), name
    finally:
        torch.set_num_threads(before)


@compiled_backends
@pytest.mark.parametrize("starts", [(0, 256, 400, 512, 768, 1000, 1024), (0, 256, 600, 1024)], ids=["apart", "shared"])
def test_documents_are_the_same_for_any_number_of_threads(backend, starts):
    inputs = draw(2, 1024, 1024, 4, 2, 16)  # a unit of the backward is 256 keys, which only "apart" never straddles
    ranges = KeyRanges.packed(torch.tensor(starts), 1024)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(backend, *inputs, ranges).tensors())
    finally:
        torch.set_num_threads(before)
    for name, x in run("reference", *inputs, ranges).tensors().items():
        torch.testing.assert_close(results[0][name], x, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(other[name], results[0][name]) for other in results[1:]), name


@backends
def test_a_batch_entry_does_not_depend_on_its_company(backend):
    inputs = draw(3, 70, 90, 4, 2, 16)
    ranges = cases.hostile_masks(3, 70, 90)["random"]
    whole = run(backend, *inputs, ranges)
    one = run(backend, *(x[1:2] for x in inputs), ranges[1:2])
    for name, x in one.tensors().items():
        torch.testing.assert_close(x, getattr(whole, name)[1:2], rtol=1e-5, atol=1e-5)  # other tiles, other sums


@backends
def test_rows_of_a_slice_are_rows_of_the_whole(backend):
    q, k, v, *_ = draw(2, 96, 192, 4, 2, 16)
    ranges = KeyRanges.block_diffusion(96, 32)
    whole = attention(q.repeat(1, 2, 1, 1), k, v, ranges, backend=backend)
    part = attention(q[:, 32:64], k, v, ranges[:, 32:64], backend=backend)
    torch.testing.assert_close(part, whole[:, 32:64], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpu" not in NAMES, reason="needs the compiled extension")
@pytest.mark.parametrize("dim", [63, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_multiplied_where_they_lie_give_the_bits_of_packed_ones(dtype, dim):
    """The CPU's kernel packs queries of several key tiles, of odd dimensions, of a negative scale, and last rows."""
    q, k, v, *_ = draw(1, 256, 256, 4, 2, dim, dtype=dtype)
    packed, one_tile = KeyRanges.packed(torch.tensor([0, 128, 256]), 256), slice(0, 128)
    out = attention(q, k, v, packed, scale=0.3, backend="cpu")
    assert torch.equal(attention(-q, k, v, packed, scale=-0.3, backend="cpu"), out)
    alone = attention(*(x[:, one_tile] for x in (q, k, v)), scale=0.3, backend="cpu")
    assert torch.equal(alone, out[:, one_tile])
    last_rows = attention(q[:, :33], k[:, one_tile], v[:, one_tile], scale=0.3, backend="cpu")
    assert torch.equal(last_rows, out[:, :33])


# ---- random shapes, strides and masks --------------------------------------------------------------------------------


@st.composite
def problems(draw_value):
    batch, queries, keys = (draw_value(st.integers(*span)) for span in ((1, 3), (1, 70), (1, 150)))
    group, kv_heads = draw_value(st.integers(1, 4)), draw_value(st.integers(1, 3))
    dim, value_dim = draw_value(st.integers(1, 40)), draw_value(st.integers(1, 40))
    dtype = draw_value(st.sampled_from([torch.float32, *HALF]))
    mask = draw_value(st.sampled_from(sorted(cases.hostile_masks(1, 1, 1))))
    layouts = [draw_value(st.sampled_from(sorted(LAYOUTS))) for _ in range(4)]
    inputs = draw(
        batch, queries, keys, group * kv_heads, kv_heads, dim, value_dim, dtype, seed=draw_value(st.integers(0, 99))
    )
    moved = [LAYOUTS[layout](x) for layout, x in zip(layouts, inputs)]
    return [*moved, inputs[4]], cases.hostile_masks(batch, queries, keys)[mask]


@backends
@settings(deadline=None, derandomize=True, max_examples=60)
@given(problem=problems())
def test_random_shapes_strides_and_masks_meet_the_numerics_bar(backend, problem):
    inputs, ranges = problem
    assert_close(run(backend, *inputs, ranges), *inputs, ranges)


@backends
@pytest.mark.parametrize("scale", [3e38, -3.4e38, 2e38])
def test_scales_up_to_the_largest_float_agree(backend, scale):
    q, k, v, dout, dlse = draw(1, 6, 9, 2, 1, 8)
    q, k = q * 1e-30, k * 1e-8
    ours = run(backend, q, k, v, dout, dlse, None, scale)
    assert all(x.isfinite().all() for x in ours.tensors().values())
    assert_close(ours, q, k, v, dout, dlse, None, scale)
