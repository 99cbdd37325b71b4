"""Attention's GPU backends on a GPU: the numerics bar on the named shapes, masks, poison, streams, graphs, offsets."""

from __future__ import annotations

import math

import pytest
import torch

from illada_kernels import KeyRanges, attention
from illada_kernels.ops.attention import cases
from illada_kernels.ops.attention.op import BACKENDS
from tests.helpers.attention_oracle import FASTER, HALF, Result, assert_close, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch can use")
GPU = [b.name for b in BACKENDS if b.devices == ("cuda",)]
dtypes = pytest.mark.parametrize("dtype", HALF, ids=str)


def skip_unless_available(name):
    reason = next(b for b in BACKENDS if b.name == name.removesuffix(FASTER)).available()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(params=GPU)
def backend(request):
    return skip_unless_available(request.param)


@pytest.fixture(params=[*GPU, "cuda" + FASTER])
def variant(request):
    return skip_unless_available(request.param)


def draw(batch, queries, keys, heads, kv_heads, dim, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = [(queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, dim), (queries, heads, dim)]
    tensors = [torch.randn(batch, *shape, generator=g, device="cuda").to(dtype) for shape in shapes]
    return *tensors, torch.randn(batch, heads, queries, generator=g, device="cuda")


def same_bits(a: Result, b: Result):
    for name, x in a.tensors().items():
        assert torch.equal(x, getattr(b, name)), name


BIG = [case.queries * case.keys * case.batch >= 2 * 8192**2 for case in cases.GPU_CASES]
SHAPES = [pytest.param(case, marks=[pytest.mark.large] * big) for case, big in zip(cases.GPU_CASES, BIG)]


@dtypes
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_named_shapes_meet_the_numerics_bar(variant, case, dtype):
    """All of it runs; the last batch entry and key head, which depend on nothing else, are compared."""
    q, k, v, dout = case.inputs(dtype, "cuda")
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], device="cuda")
    ranges = case.key_ranges("cuda")
    ours = run(variant, q, k, v, dout, dlse, ranges)
    group = case.heads // case.kv_heads
    heads, key_head = slice(case.heads - group, None), slice(case.kv_heads - 1, None)
    part = Result(
        ours.out[-1:, :, heads],
        ours.lse[-1:, heads],
        ours.dq[-1:, :, heads],
        ours.dk[-1:, :, key_head],
        ours.dv[-1:, :, key_head],
    )
    inputs = q[-1:, :, heads], k[-1:, :, key_head], v[-1:, :, key_head], dout[-1:, :, heads], dlse[-1:, heads]
    assert_close(part, *inputs, None if ranges is None else ranges[case.batch - 1 :])


@dtypes
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_hostile_masks_meet_the_numerics_bar(variant, dim, dtype):
    inputs = draw(2, 150, 371, 8, 2, dim, dtype)
    for name, ranges in cases.hostile_masks(2, 150, 371, "cuda").items():
        try:
            assert_close(run(variant, *inputs, ranges), *inputs, ranges)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("queries", [1, 7, 63, 64, 65, 127, 129, 1023, 4097])
def test_every_pair_of_awkward_lengths_meets_the_numerics_bar(variant, queries):
    for i, keys in enumerate((1, 7, 63, 64, 65, 127, 129, 1023, 4097)):
        inputs = draw(1, queries, keys, 2, 1, 128, HALF[i % 2])
        ranges = (None, cases.hostile_masks(1, queries, keys, "cuda")["random"])[i // 2 % 2]
        assert_close(run(variant, *inputs, ranges), *inputs, ranges)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-20, 30.0])
def test_any_finite_scale(variant, scale):
    inputs = draw(1, 200, 300, 2, 1, 64)
    ours = run(variant, *inputs, scale=scale)
    if scale != 30.0:
        assert_close(ours, *inputs, scale=scale)
    assert all(x.isfinite().all() for x in ours.tensors().values())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poisoned_keys_and_rows_never_reach_output_or_gradient(variant, poison):
    bounds = torch.tensor([[[3, 120, 241, 260]], [[0, 0, 0, 0]], [[35, 236, 367, 367]]], dtype=torch.int32)
    bounds = bounds.repeat(1, 145, 1)
    bounds[0, :5], bounds[:, 5::7] = torch.tensor([0, 2, 2, 2]), 0
    bounds[2, ::2] = torch.tensor([300, 300, 301, 367])
    ranges = KeyRanges(bounds.cuda(), 367)
    inputs = draw(3, 145, 367, 8, 2, 128)
    clean = run(variant, *inputs, ranges)
    q, k, v, dout, dlse = (x.clone() for x in inputs)
    unseen, empty = ~ranges.dense().any(1), ~ranges.dense().any(2)
    k[unseen], v[unseen], q[empty], dout[empty] = poison, poison, poison, poison
    dlse.transpose(1, 2)[empty] = poison
    ours = run(variant, q, k, v, dout, dlse, ranges)
    assert_close(ours, *inputs, ranges)
    if not variant.endswith(FASTER):
        same_bits(ours, clean)


@pytest.mark.parametrize("batch, queries, keys", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_dimensions_work(variant, batch, queries, keys):
    ours = run(variant, *draw(batch, queries, keys, 4, 2, 64))
    assert (ours.lse == -torch.inf).all()
    assert not any(x.any() for x in (ours.out, ours.dq, ours.dk, ours.dv))


def test_strides_do_not_change_a_bit(backend):
    inputs = draw(2, 145, 270, 4, 2, 128)
    ranges = cases.hostile_masks(2, 145, 270, "cuda")["hulls_overlap"]

    def padded(x):
        batch, rows, heads, dim = x.shape
        store = torch.full((batch + 1, rows + 3, heads + 1, dim + 8), math.nan, dtype=x.dtype, device="cuda")
        return store[1:, 2:-1, 1:, 8:].copy_(x)

    plain = run(backend, *inputs, ranges)
    for move in (padded, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        same_bits(run(backend, *(move(x) for x in inputs[:4]), inputs[4], ranges), plain)


def test_same_bits_run_after_run_and_on_another_stream(backend):
    inputs = draw(2, 1000, 1500, 8, 2, 128)
    ranges = cases.hostile_masks(2, 1000, 1500, "cuda")["random"]
    first = run(backend, *inputs, ranges)
    for _ in range(5):
        same_bits(run(backend, *inputs, ranges), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run(backend, *inputs, ranges)
    stream.synchronize()
    same_bits(second, first)


def test_a_graph_replays_on_new_data_and_new_bounds(backend):
    inputs = draw(2, 300, 500, 8, 2, 128)
    bounds = cases.hostile_masks(2, 300, 500, "cuda")["random"].bounds
    ranges = KeyRanges(bounds, 500)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run(backend, *inputs, ranges)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, *inputs, ranges)
    for x, new in zip(inputs, draw(2, 300, 500, 8, 2, 128, seed=1)):
        x.copy_(new)
    bounds.copy_(bounds.roll(7, 1))
    graph.replay()
    same_bits(captured, run(backend, *inputs, ranges))


def test_no_synchronisation(variant):
    inputs = draw(1, 100, 100, 2, 1, 64)
    ranges = KeyRanges.causal(100, device="cuda")
    run(variant, *inputs, ranges)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(variant, *inputs, ranges)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.large
def test_more_than_2_to_31_elements(backend):
    """q and out of 2**31 elements and more; the last rows are compared with a run of their own."""
    batch, rows, heads, dim = 9, 65536, 32, 128
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    q = torch.randn(batch, rows, heads, dim, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    k, v = (torch.randn(batch, 64, 8, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    whole = attention(q, k, v, backend=backend)
    part = attention(q[-1:, -512:].contiguous(), k[-1:], v[-1:], backend=backend)
    torch.testing.assert_close(whole[-1:, -512:], part)
