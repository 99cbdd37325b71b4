"""The Hopper kernels of attention's backward, and the Python around them, run on the CPU by tests/cuda_on_cpu."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import KeyRanges
from illada_kernels.key_ranges import clamp_bounds
from illada_kernels.ops.attention import cases, cuda, reference
from illada_kernels.ops.attention.problem import Problem
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import missing
from tests.helpers.attention_oracle import HALF, Result, assert_close, draw, poisoned

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SOURCES = {name: f"csrc/cuda/attention_bwd_{name}_sm90a.cu" for name in ("preprocess", "keys", "queries")}


class Processors:
    """Makes `cuda` run on the emulator, on so many blocks at most; a number that does not divide the work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, emulated: Emulated, blocks: int = 3) -> Emulated:
        self.monkeypatch.setattr(cuda, "launch", emulated)
        self.monkeypatch.setattr(cuda, "processors", lambda device: blocks)
        return emulated


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Processors:
    use = Processors(monkeypatch)
    use(Emulated(*SOURCES.values()))
    return use


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    ranges: KeyRanges | None = None,
    scale: float | None = None,
) -> Result:
    """The kernels' gradients after the reference's forward."""
    bounds = None if ranges is None else ranges.bounds
    scale = q.shape[3] ** -0.5 if scale is None else scale
    problem = Problem(q, k, v, bounds, scale)
    out, lse = reference.forward(problem)
    return Result(out, lse, *cuda.backward(problem, dout, dlse, out, lse))


def assert_same(ours: Result, theirs: Result, what: Any = None) -> None:
    for name in ("dq", "dk", "dv"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), (what, name)


# ---- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_head_dim_meets_the_numerics_bar(dim: int, dtype: torch.dtype, use: Processors) -> None:
    """Rows and keys that end within tiles, a group of two, several key tiles to a block, all three kinds of tiles."""
    inputs = draw(1, 70, 150, 2, 1, dim, dtype=dtype)
    for ranges in (None, cases.hostile_masks(1, 70, 150)["every_third_row_empty"]):
        assert_close(gradients(*inputs, ranges), *inputs, ranges)


def test_hostile_masks_meet_the_numerics_bar(use: Processors) -> None:
    inputs = draw(2, 135, 171, 1, 1, 64, dtype=torch.bfloat16)
    for name, ranges in cases.hostile_masks(2, 135, 171).items():
        try:
            assert_close(gradients(*inputs, ranges), *inputs, ranges)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 129), (65, 1), (129, 64), (64, 257)])
def test_awkward_lengths_meet_the_numerics_bar(rows: int, keys: int, use: Processors) -> None:
    inputs = draw(1, rows, keys, 1, 1, 64, seed=keys, dtype=torch.float16)
    for ranges in (None, cases.hostile_masks(1, rows, keys)["random"]):
        assert_close(gradients(*inputs, ranges), *inputs, ranges)


def test_masks_of_the_field_meet_the_numerics_bar(use: Processors) -> None:
    masks = {
        "block_diffusion": KeyRanges.block_diffusion(128, 32),
        "packed": KeyRanges.packed(torch.tensor([0, 1, 70, 128, 256]), 256),
        "window": KeyRanges.window(256, 17, 5),
        "cached": KeyRanges.cached(torch.tensor([256, 256]), 256, 256),
    }
    inputs = draw(1, 256, 256, 1, 1, 64, dtype=torch.bfloat16)
    for name, ranges in masks.items():
        ranges = ranges if name != "cached" else ranges[:1]
        assert_close(gradients(*inputs, ranges), *inputs, ranges)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (7, 1)])
def test_every_grouping_of_heads_meets_the_numerics_bar(heads: int, kv_heads: int, use: Processors) -> None:
    inputs = draw(2, 40, 70, heads, kv_heads, 64, dtype=torch.bfloat16)
    ranges = cases.hostile_masks(2, 40, 70)["random"]
    assert_close(gradients(*inputs, ranges), *inputs, ranges)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 1e-20, -1e-42])
def test_any_finite_scale_meets_the_numerics_bar(scale: float, use: Processors) -> None:
    inputs = draw(1, 33, 65, 2, 1, 64, dtype=torch.bfloat16)
    for name in ("causal", "every_third_row_empty"):
        ranges = cases.hostile_masks(1, 33, 65)[name]
        assert_close(gradients(*inputs, ranges, scale), *inputs, ranges, scale)


def test_gradient_of_lse_alone_and_its_absence(use: Processors) -> None:
    q, k, v, dout, dlse = draw(2, 33, 70, 4, 2, 64, dtype=torch.bfloat16)
    ranges = cases.hostile_masks(2, 33, 70)["every_third_row_empty"]
    for inputs in ((q, k, v, torch.zeros_like(dout), dlse), (q, k, v, dout, None)):
        ours = gradients(*inputs, ranges)
        with_zeros = (*inputs[:4], torch.zeros_like(dlse) if inputs[4] is None else dlse)
        assert_close(ours, *with_zeros, ranges)


def test_extreme_logits_stay_finite(use: Processors) -> None:
    q, k, v, dout, dlse = draw(1, 40, 140, 2, 1, 64, dtype=torch.bfloat16)
    ours = gradients(q * 100, k * 10, v, dout, dlse)
    assert all(x.isfinite().all() for x in ours.tensors().values())


# ---- rows and keys that must not matter ------------------------------------------------------------------------------


def poison_masks() -> dict[str, KeyRanges]:
    """Tiles, and parts of tiles, of keys without rows; rows without keys; keys between the hulls of two rows."""
    row = torch.arange(70)
    two = torch.where(row[:, None] % 2 == 0, torch.tensor([0, 10, 10, 10]), torch.tensor([140, 150, 160, 165]))
    left = KeyRanges.padding(torch.tensor([0, 1, 64, 130]), 171, "left").bounds.expand(4, 70, 4).clone()
    left[:, 5::7] = 0
    masks = {
        "between": two.expand(4, 70, 4),
        "left": left,
        "right": torch.stack([row * 0, row + 60, *[row * 0 + 150] * 2], 1)[None],
    }
    return {name: KeyRanges(bounds.int().contiguous(), 171) for name, bounds in masks.items()}


@pytest.mark.parametrize("dim, poison", [(64, math.nan), (64, math.inf), (256, math.nan)])
def test_poisoned_padding_never_reaches_a_gradient(dim: int, poison: float, use: Processors) -> None:
    inputs = draw(4, 70, 171, 1, 1, dim, dtype=torch.bfloat16)
    for name, ranges in poison_masks().items():
        assert_same(
            gradients(*poisoned(inputs, ranges, poison), ranges),
            gradients(*poisoned(inputs, ranges, 0.0), ranges),
            name,
        )


def test_rows_and_keys_that_nothing_attends_to_get_exact_zeros(use: Processors) -> None:
    inputs = draw(2, 35, 150, 2, 1, 64, dtype=torch.bfloat16)
    for name in ("nothing", "nothing_at_the_end", "diagonal", "every_third_row_empty"):
        ranges = cases.hostile_masks(2, 35, 150)[name]
        assert ranges is not None
        ours = gradients(*inputs, ranges)
        allowed = ranges.dense().expand(2, 35, -1)
        assert not ours.dq[~allowed.any(2)].any()
        assert not ours.dk[~allowed.any(1)].any() and not ours.dv[~allowed.any(1)].any()


def test_malformed_and_broadcast_bounds(use: Processors) -> None:
    inputs = draw(2, 70, 150, 1, 1, 64, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    bounds = torch.randint(-50, 200, (1, 70, 4), generator=g, dtype=torch.int32)
    bounds[0, ::9] = torch.tensor([2**31 - 1, -(2**31), 5, 2**31 - 1])
    bounds[0, 1::9] = torch.tensor([3, 20, 20, 40])  # two ranges that touch
    ours = gradients(*inputs, KeyRanges(bounds, 150))
    assert_same(ours, gradients(*inputs, KeyRanges(clamp_bounds(bounds, 150), 150)))
    assert_same(ours, gradients(*inputs, KeyRanges(bounds.expand(2, -1, -1), 150)))
    row = torch.tensor([[[3, 9, 20, 140]]], dtype=torch.int32)
    whole = KeyRanges(row.expand(2, 70, 4).contiguous(), 150)
    assert_same(gradients(*inputs, KeyRanges(row, 150)), gradients(*inputs, whole))
    assert_same(gradients(*inputs, KeyRanges(row.expand(2, 70, 4), 150)), gradients(*inputs, whole))


@pytest.mark.parametrize("batch, rows, keys", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_dimensions_launch_nothing(batch: int, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "launch", None)
    inputs = draw(batch, rows, keys, 4, 2, 64, dtype=torch.bfloat16)
    ours = gradients(*inputs)
    for x, like in zip((ours.dq, ours.dk, ours.dv), inputs):
        assert x.shape == like.shape and not x.any()


# ---- memory ----------------------------------------------------------------------------------------------------------


def in_padded_storage(x: Tensor) -> Tensor:
    """The same values, rows and heads further apart, the surroundings NaN, the address a multiple of 16 bytes."""
    batch, rows, heads, dim = x.shape
    store = torch.full((batch + 1, rows + 3, heads + 1, dim + 8), math.nan, dtype=x.dtype)
    return store[1:, 2:-1, 1:, 8:].copy_(x)


LAYOUTS = {
    "padded": in_padded_storage,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a slice of a fused projection": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_surroundings_do_not_change_a_bit(layout: str, use: Processors) -> None:
    inputs = draw(2, 45, 140, 4, 2, 64, dtype=torch.bfloat16)
    ranges = cases.hostile_masks(2, 45, 140)["hulls_overlap"]
    moved = (*(LAYOUTS[layout](x) for x in inputs[:4]), inputs[4])
    assert_same(gradients(*moved, ranges), gradients(*inputs, ranges))


def test_upstream_gradients_of_any_layout(use: Processors) -> None:
    q, k, v, dout, dlse = draw(2, 45, 70, 2, 1, 64, dtype=torch.bfloat16)
    odd = torch.zeros(dout.numel() + 1, dtype=dout.dtype)[1:].view(dout.shape).copy_(dout)  # at an odd address
    assert_same(gradients(q, k, v, odd, dlse), gradients(q, k, v, dout, dlse))
    one = torch.ones((), dtype=dout.dtype).expand(dout.shape)  # what .sum().backward() passes
    ones = gradients(q, k, v, torch.ones_like(dout), dlse[:1].expand(2, -1, -1).contiguous())
    assert_same(gradients(q, k, v, one, dlse[:1].expand(2, -1, -1)), ones)


def test_extra_memory_is_what_the_docstring_says(use: Processors, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    real = torch.empty

    def empty(*shape: int, **options: Any) -> Tensor:
        made.append(real(*shape, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    for bounds_batches in (1, 2):
        inputs = draw(2, 130, 40, 2, 1, 64, dtype=torch.bfloat16)
        bounds = cases.hostile_masks(bounds_batches, 130, 40)["random"]
        made.clear()
        gradients(*inputs, bounds)
        rows = 3 * 64  # 130, rounded up to tiles
        extra = 8 * 2 * 2 * rows + (16 * rows + 36 * 3) * bounds_batches + 8
        assert sum(x.numel() * x.element_size() for x in made) == extra
        assert extra < 4 * 2 * 130 * 2 * 64  # a float32 dq


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_same_bits_under_every_schedule_and_number_of_blocks(use: Processors) -> None:
    inputs = draw(1, 150, 300, 2, 1, 64, dtype=torch.bfloat16)
    ranges = cases.hostile_masks(1, 150, 300)["random"]
    first = gradients(*inputs, ranges)
    for seed, blocks in enumerate((1, 2, 5, 132, 1, 2)):
        use(Emulated(*SOURCES.values(), seed=seed), blocks)
        assert_same(gradients(*inputs, ranges), first, seed)


@pytest.mark.parametrize("dim", [96, 128, 256])
def test_same_bits_under_other_schedules_for_other_head_dims(dim: int, use: Processors) -> None:
    inputs = draw(1, 70, 200, 2, 1, dim, dtype=torch.float16)
    ranges = cases.hostile_masks(1, 70, 200)["hulls_overlap"]
    first = gradients(*inputs, ranges)
    for seed in range(1, 3):
        use(Emulated(*SOURCES.values(), seed=seed), blocks=2)
        assert_same(gradients(*inputs, ranges), first, seed)


def test_the_last_values_are_told_to_both_warpgroups(use: Processors) -> None:
    """D = 256 has one stage of V. Schedules in which one warpgroup, done with the last tile, meets the end before the
    other has seen that tile's V: an end announced before all have released V would complete V's phase in their stead.
    """
    inputs = draw(1, 128, 128, 1, 1, 256, dtype=torch.bfloat16)
    first = gradients(*inputs)
    for seed in (19, 33, 62, 63, 105, 182, 187, 204):
        use(Emulated(*SOURCES.values(), seed=seed), blocks=1)
        assert_same(gradients(*inputs), first, seed)


def test_tiles_that_no_row_touches_are_not_visited(use: Processors) -> None:
    """Steps of the emulator: 4 of 16 pairs of tiles must cost far less than all."""
    inputs = draw(1, 512, 512, 1, 1, 64, dtype=torch.bfloat16)

    def steps(ranges: KeyRanges) -> list[int]:
        counts = []

        class Counting(Emulated):
            def __call__(self, function: str, device: torch.device, *arguments: Any) -> None:
                super().__call__(function, device, *arguments)
                counts.append(next(k for k in self.kernels if k.holds(f"illada_{function}")).steps)

        use(Counting(*SOURCES.values()), blocks=1)
        gradients(*inputs, ranges)
        return counts[1:]

    blocks = KeyRanges.packed(torch.arange(0, 513, 128), 512)
    for few, all_ in zip(steps(blocks), steps(KeyRanges.full(512))):
        assert few < 0.5 * all_, (few, all_)
