"""The Triton kernels of attention in Triton's interpreter, on small tiles: numerics, masks, poison, strides."""

from __future__ import annotations

import math

import pytest
import torch

from illada_kernels import KeyRanges, attention
from illada_kernels.ops.attention import cases, op, reference
from illada_kernels.ops.attention.problem import Problem
from illada_kernels.ops.attention.triton import measure
from illada_kernels.ops.attention.triton import tuning as room
from tests.helpers.attention_oracle import assert_close, draw, run

pytest.importorskip("triton", reason="no triton")

from illada_kernels.ops.attention.triton import bwd_keys, fwd
from tests.helpers import attention_triton as checks
from tests.helpers.attention_triton import meets_the_bar, triton, use_small_tiles
from tests.helpers.triton_interpreter import interpreted


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


# ---- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", cases.hostile_masks(1, 1, 1))
def test_hostile_masks_meet_the_numerics_bar(mask):
    inputs = draw(1, 40, 71, 2, 1, 64, dtype=torch.float16)
    meets_the_bar(inputs, cases.hostile_masks(1, 40, 71)[mask])


@pytest.mark.parametrize("mask", ["full", "random", "every_third_row_empty"])
def test_float32_meets_the_numerics_bar(mask):
    inputs = draw(2, 23, 41, 2, 2, 64)
    meets_the_bar(inputs, cases.hostile_masks(2, 23, 41)[mask])


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 129), (7, 63), (64, 7), (63, 65), (127, 64), (65, 127)])
def test_awkward_lengths_meet_the_numerics_bar(queries, keys):
    inputs = draw(1, queries, keys, 2, 1, 64, dtype=torch.float16)
    meets_the_bar(inputs, (None, cases.hostile_masks(1, queries, keys)["random"])[keys % 4 // 2])


@pytest.mark.parametrize("dim", [96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_head_dim_and_dtype_meets_the_numerics_bar(dim, dtype):
    inputs = draw(1, 20, 40, 2, 1, dim, dtype=dtype)
    meets_the_bar(inputs, cases.hostile_masks(1, 20, 40)["hulls_overlap"])


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (3, 1), (10, 2)])
def test_any_grouping_of_heads_meets_the_numerics_bar(heads, kv_heads):
    inputs = draw(1, 11, 40, heads, kv_heads, 64, dtype=torch.float16)
    meets_the_bar(inputs, cases.hostile_masks(1, 11, 40)["causal"])


MODEL_MASKS = {
    "block_diffusion": lambda: KeyRanges.block_diffusion(64, 16),
    "packed": lambda: KeyRanges.packed(torch.tensor([0, 1, 70, 128]), 128),
    "window": lambda: KeyRanges.window(128, 40, 5),
    "cached": lambda: KeyRanges.cached(torch.tensor([101]), 128, 128),
}


@pytest.mark.parametrize("mask", MODEL_MASKS)
def test_masks_of_the_field_meet_the_numerics_bar(mask):
    meets_the_bar(draw(1, 128, 128, 1, 1, 64, dtype=torch.float16), MODEL_MASKS[mask]())


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-20])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_any_finite_scale_meets_the_numerics_bar(scale, mask):
    meets_the_bar(draw(1, 33, 65, 1, 1, 64), cases.hostile_masks(1, 33, 65)[mask], scale)


@pytest.mark.parametrize("scale", [30.0, -30.0])
def test_extreme_logits_stay_finite(scale):
    ours = triton(*draw(1, 33, 65, 1, 1, 64, dtype=torch.float16), scale=scale)
    assert all(x.isfinite().all() for x in ours.tensors().values())
    assert ours.lse.abs().max() > 300


@pytest.mark.parametrize("dim, scale", [(64, 0.1), (64, -0.1), (96, 0.1)])
def test_rows_whose_scores_are_all_minus_infinity_give_zero(dim, scale):
    """In tiles with and without mask code, first or after finite ones; rows with one finite score stay right."""
    q, k, v, *_ = draw(1, 40, 100, 1, 1, dim, dtype=torch.float16)
    q, k = q.abs() + 0.1, k.clone()
    k[:, :, :, 0] = math.copysign(math.inf, -scale)
    q[:, ::2, :, 0] = 0.5
    for finite in (None, 3, 99):
        if finite is not None:
            k[:, finite] = 0.25
        with interpreted(op):
            out, lse = attention(q, k, v, scale=scale, backend="triton", return_lse=True)
        expected, expected_lse = reference.forward(Problem(q, k, v, None, scale))
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, expected, rtol=2**-9, atol=2**-9)
        assert finite is not None or (not out.any() and (lse == -math.inf).all())


@pytest.mark.parametrize("dim", [64, 128])
def test_the_committed_tiles_meet_the_numerics_bar(monkeypatch, dim):
    monkeypatch.undo()
    meets_the_bar(draw(1, 90, 150, 2, 1, dim, dtype=torch.float16), cases.hostile_masks(1, 90, 150)["hulls_overlap"])


def test_more_row_tiles_than_a_key_tile_looks_at_together():
    assert 16 * bwd_keys.SCAN.value < 2 * 290
    meets_the_bar(draw(1, 290, 30, 2, 1, 64, dtype=torch.float16), cases.hostile_masks(1, 290, 30)["causal"])


# ---- rows and keys that must not matter ------------------------------------------------------------------------------


def test_poisoned_keys_and_rows_never_reach_output_or_gradient():
    checks.poisoned_keys_and_rows_never_reach_output_or_gradient()


def test_skipped_tiles_are_never_loaded(monkeypatch):
    """Keys that no row of the tile can see lie in tiles that are not read at all, nor are rows by those keys."""
    from triton.runtime import interpreter

    bounds = torch.tensor([[[0, 20, 100, 110]]], dtype=torch.int32).repeat(1, 64, 1)
    bounds[:, 32:] = torch.tensor([150, 160, 160, 160])
    q, k, v, *_ = draw(1, 64, 192, 1, 1, 64, dtype=torch.float16)
    with interpreted(op):
        load, read = interpreter.InterpreterBuilder.create_masked_load, set()

        def recording(self, pointers, mask, *rest, **options):
            first = k.data_ptr()
            at = pointers.data[mask.data].astype("int64")
            read.update(((at[(at >= first) & (at < first + k.numel() * 2)] - first) // 128).tolist())
            return load(self, pointers, mask, *rest, **options)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", recording)
        attention(q, k, v, KeyRanges(bounds, 192), backend="triton")
        monkeypatch.undo()
    assert read == {*range(32), *range(96, 112), *range(144, 160)}  # parts of 16 keys


def test_malformed_bounds_act_as_their_clamped_form():
    checks.malformed_bounds_act_as_their_clamped_form()


@pytest.mark.parametrize("batch, queries, keys", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_dimensions_work(batch, queries, keys):
    for ranges in (None, KeyRanges.full(keys)):
        ours = triton(*draw(batch, queries, keys, 4, 2, 64), ranges=ranges)
        assert ours.out.shape == (batch, queries, 4, 64) and (ours.lse == -torch.inf).all()
        assert not any(x.any() for x in (ours.out, ours.dq, ours.dk, ours.dv))


def test_bounds_broadcast_over_batch_and_rows():
    inputs = draw(2, 20, 30, 1, 1, 64, dtype=torch.float16)
    for bounds in (
        torch.tensor([[[3, 9, 20, 25]]]),
        torch.tensor([[[3, 9, 20, 25]], [[0, 0, 1, 2]]]),
        cases.hostile_masks(1, 20, 30)["random"].bounds,
    ):
        whole = bounds.int().expand(2, 20, 4).contiguous()
        ours, expanded = (triton(*inputs, ranges=KeyRanges(b, 30)) for b in (bounds.int(), whole))
        for name, x in ours.tensors().items():
            assert torch.equal(x, getattr(expanded, name)), (tuple(bounds.shape), name)


# ---- memory and repeatability ----------------------------------------------------------------------------------------


def in_padded_storage(x):
    """The same values and strides of 3 rows and heads more, at an odd offset, everything around them NaN."""
    batch, rows, heads, dim = x.shape
    view = torch.full((batch + 2, rows + 3, heads + 1, dim + 3), math.nan, dtype=x.dtype)[1:-1, 2:-1, 1:, 1:-2]
    return view.copy_(x)


def test_strides_and_surroundings_do_not_change_a_bit():
    inputs = draw(2, 9, 45, 4, 2, 64, dtype=torch.float16)
    ranges = cases.hostile_masks(2, 9, 45)["hulls_overlap"]
    plain = triton(*inputs, ranges=ranges)
    for move in (in_padded_storage, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        moved = triton(*(move(x) for x in inputs[:4]), inputs[4], ranges=ranges)
        for name, x in moved.tensors().items():
            assert torch.equal(x, getattr(plain, name)), name


def test_offsets_beyond_two_to_the_31_elements_are_right():
    """Two rows (and two keys) 2**31 elements apart; only the touched pages of the buffer are ever backed by memory."""
    far = 2**31
    try:
        store = torch.empty(far + 1024, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    q, k, v, dout, dlse = draw(1, 2, 2, 1, 1, 64, dtype=torch.float16)
    views = [store.as_strided((1, 2, 1, 64), (far, far, 64, 1), 64 * i) for i in range(4)]
    with interpreted(op, overflow=True):
        ours = run("triton", *(view.copy_(x) for view, x in zip(views, (q, k, v, dout))), dlse)
    for name, x in triton(q, k, v, dout, dlse).tensors().items():
        assert torch.equal(x, getattr(ours, name)), name


def test_same_inputs_give_the_same_bits_and_are_left_alone():
    inputs = draw(1, 40, 50, 2, 1, 64, dtype=torch.float16)
    before = [x.clone() for x in inputs]
    ranges = cases.hostile_masks(1, 40, 50)["random"]
    first, second = (triton(*inputs, ranges=ranges) for _ in range(2))
    assert all(torch.equal(x, getattr(first, name)) for name, x in second.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


def test_gradient_without_an_upstream_of_lse():
    inputs = [*draw(1, 20, 40, 2, 1, 64, dtype=torch.float16)[:4], None]
    assert_close(triton(*inputs), *inputs)


# ---- the table, and what it may not say ------------------------------------------------------------------------------


def test_every_table_has_a_tile_for_every_head_dim():
    for table in (room.FORWARD, room.KEYS_BACKWARD, room.QUERIES_BACKWARD):
        assert set(table["any"]) == set(table["float32"]) == {64, 96, 128, 256} >= set(table.get("sm_90", {}))
        for tiles in table.values():
            for tile in tiles.values():
                assert tile.keys % tile.part == 0 and all(n & (n - 1) == 0 for n in tile[:4])


def test_compiled_tiles_fit_and_hardly_spill():
    """By the committed table. What is compiled for sm_80 also serves GPUs with 99 KiB of shared memory a block."""
    from tests.gpu_code.triton_code import read_table

    rows = [row for row in read_table()[1] if row.configuration.startswith("attention.")]
    assert len(rows) == 65
    assert max(row.shared for row in rows if row.arch == 80) <= 99 * 1024
    spills = {(row.configuration, row.arch): row.stack for row in rows if row.stack}
    assert spills == {
        ("attention.bwd_keys head_dim 64", 100): 24,
        ("attention.bwd_queries head_dim 96 float32", 80): 40,
        ("attention.fwd head_dim 96 float32", 80): 8,
        ("attention.fwd head_dim 256 float32", 80): 32,
    }


def test_tuning_uses_the_fastest_tile_from_then_on(monkeypatch):
    from triton import testing
    from triton.runtime.errors import OutOfResources

    monkeypatch.undo()  # the real tables
    monkeypatch.setattr(room, "measured", {})
    q, k, v, *_ = draw(1, 4, 4, 1, 1, 64, dtype=torch.float16)
    wanted = room.choose(room.FORWARD, q)._replace(rows=64, stages=4)

    def bench(run):
        tile = room.choose(room.FORWARD, q)
        if tile.rows == 256:
            raise OutOfResources(1 << 20, 1 << 10, "shared memory")
        return 1.0 if tile == wanted else 2.0

    monkeypatch.setattr(testing, "do_bench", bench)
    with interpreted(op):
        tuned = measure.tune(q, k, v)
    assert tuned["forward"] == (wanted, 1.0) and room.choose(room.FORWARD, q) == wanted
    assert room.choose(room.FORWARD, q.bfloat16()) == room.FORWARD["any"][64]


def test_importing_the_room_does_not_import_triton(python):
    code = (
        "import sys; sys.modules['triton'] = None; from illada_kernels.ops.attention import op, triton\n"
        "reason = triton.available(); assert 'triton cannot be imported' in reason, reason"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_call_that_it_does_not_take_is_named():
    q, k, v, *_ = draw(1, 2, 2, 1, 1, 80)
    with interpreted(op), pytest.raises(RuntimeError, match="head_dim of 64, 96, 128 or 256, not 80"):
        attention(q, k, v, backend="triton")
    with pytest.raises(RuntimeError, match="triton: runs on cuda, the tensors are on cpu"):
        attention(*(torch.zeros(1, 2, 1, 64) for _ in range(3)), backend="triton")


assert fwd  # imported before the interpreter is entered
