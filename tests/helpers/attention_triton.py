"""Attention's Triton kernels on small tiles in the interpreter: calls and checks that several test files make."""

from __future__ import annotations

import math

import torch

from illada_kernels import KeyRanges
from illada_kernels.ops.attention import op
from illada_kernels.ops.attention.triton import tuning as room
from tests.helpers.attention_oracle import assert_close, draw, run
from tests.helpers.triton_interpreter import interpreted

SMALL = {  # several tiles in each direction on shapes of a hundred; parts of a tile where there is a mask
    id(room.FORWARD): room.Tile(32, 32, 16, 4, 1, 1),
    id(room.KEYS_BACKWARD): room.Tile(16, 32, 32, 4, 1, 1),
    id(room.QUERIES_BACKWARD): room.Tile(32, 32, 16, 4, 1, 1),
}


def use_small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(room, "choose", lambda table, q: SMALL[id(table)])


def triton(*inputs, **options):
    with interpreted(op):
        return run("triton", *inputs, **options)


def meets_the_bar(inputs, ranges=None, scale=None):
    assert_close(triton(*inputs, ranges=ranges, scale=scale), *inputs, ranges, scale)


def poisoned_keys_and_rows_never_reach_output_or_gradient():
    """Keys beyond the lengths, keys between the ranges of all rows, and rows without keys."""
    bounds = torch.tensor([[[3, 20, 41, 60]], [[35, 36, 67, 67]]], dtype=torch.int32).repeat(1, 23, 1)
    bounds[0, :5], bounds[0, 5::4], bounds[1, ::2] = torch.tensor([0, 2, 2, 2]), 0, torch.tensor([64, 64, 66, 67])
    ranges = KeyRanges(bounds, 67)
    inputs = draw(2, 23, 67, 2, 1, 64, dtype=torch.float16)
    clean = triton(*inputs, ranges=ranges)
    unseen, empty = ~ranges.dense().any(1), ~ranges.dense().any(2)
    assert unseen.any(1).all() and empty.any()
    q, k, v, dout, dlse = (x.clone() for x in inputs)
    k[unseen], v[unseen], q[empty], dout[empty] = math.nan, math.nan, math.nan, math.inf
    dlse.transpose(1, 2)[empty] = math.nan
    poisoned = triton(q, k, v, dout, dlse, ranges=ranges)
    for name, x in poisoned.tensors().items():
        assert torch.equal(x, getattr(clean, name)), name


def malformed_bounds_act_as_their_clamped_form():
    from illada_kernels.key_ranges import clamp_bounds

    g = torch.Generator().manual_seed(0)
    bounds = torch.randint(-60, 130, (1, 40, 4), generator=g, dtype=torch.int32)
    bounds[0, :4] = torch.tensor([[-(2**31), 2**31 - 1, 5, 3], [2**31 - 1] * 4, [-(2**31)] * 4, [9, 3, 2**31 - 1, 0]])
    inputs = draw(1, 40, 50, 1, 1, 64, dtype=torch.float16)
    ours, clamped = (triton(*inputs, ranges=KeyRanges(b, 50)) for b in (bounds, clamp_bounds(bounds, 50)))
    for name, x in ours.tensors().items():
        assert torch.equal(x, getattr(clamped, name)), name
