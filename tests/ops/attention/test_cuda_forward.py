"""The CUDA forward of attention, and the Python around it, run on the CPU by tests/cuda_on_cpu."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from illada_kernels import KeyRanges
from illada_kernels.ops.attention import cases, cuda
from illada_kernels.ops.attention.problem import Problem
from illada_kernels.testing import attention_lse_tolerance, attention_sums, tolerance
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import Kernels, compile_kernels, missing, switchable
from tests.helpers import attention_cuda

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SOURCES = ("csrc/cuda/attention_fwd_bf16_sm90a.cu", "csrc/cuda/attention_fwd_fp16_sm90a.cu")
Forward = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Forward:
    """cuda.forward in the emulator, under the schedule `seed`, on a GPU with that many processors."""
    kernels = {torch.bfloat16: SOURCES[:1], torch.float16: SOURCES[1:]}

    def run(q, k, v, ranges=None, scale=None, seed=0, processors=4, emulated=None):
        monkeypatch.setattr(cuda, "processors", lambda device: processors)
        monkeypatch.setattr(cuda, "launch", emulated or Emulated(*kernels[q.dtype], seed=seed))
        bounds = None if ranges is None else ranges.bounds
        return cuda.forward(Problem(q, k, v, bounds, q.shape[3] ** -0.5 if scale is None else scale))

    return run


def draw(batch, rows, keys, heads, kv_heads, dim, dtype=torch.bfloat16, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (torch.randn(batch, n, h, dim, generator=g).to(dtype) for n, h in shapes)
    return q, k, v


def poisoned(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges | None) -> tuple[Tensor, Tensor, Tensor]:
    """NaN and inf wherever they must not reach a result: rows without keys, keys outside every row's ranges."""
    if ranges is None:
        return q, k, v
    allowed = ranges.dense()
    rows, keys = allowed.any(2)[..., None, None], allowed.any(1)[..., None, None]
    bad = torch.tensor([torch.nan, torch.inf]).repeat(q.shape[3] // 2).to(q.dtype)
    return torch.where(rows, q, bad), torch.where(keys, k, bad), torch.where(keys, v, -bad)


def assert_right(got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, ranges=None, scale=None) -> None:
    """The numerics bar. `q`, `k` and `v` without poison."""
    out, lse = got
    number = q.shape[3] ** -0.5 if scale is None else scale
    exact = cases.plain(q.float(), k.float(), v.float(), ranges, number)
    same = cases.plain(q, k, v, ranges, number)
    floor = attention_sums(q.float(), k.float(), v.float(), torch.ones_like(q).float(), ranges, number, q.dtype)
    limit = tolerance(same[0], exact[0]) + floor["out"]
    error = (out.float() - exact[0]).abs().max().item() if out.numel() else 0.0
    assert error <= limit, f"out: off by {error:.3g}, limit {limit:.3g}"
    empty = exact[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out.transpose(1, 2)[empty].any()
    off = (torch.where(empty, 0, lse) - torch.where(empty, 0, exact[1])).abs().max() if lse.numel() else 0.0
    assert off <= attention_lse_tolerance(q, k, number, exact[1]), f"lse: off by {off:.3g}"


# ---- numerics --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", [64, 256])
def test_the_rotation_of_warpgroups_changes_no_bit(dim: int, forward: Forward) -> None:
    """A variant that is only measured, of three warpgroups and of two: items and key tiles of every kind, several of
    each."""
    q, k, v = draw(2, 150, 400, 2, 1, dim)
    ranges = cases.hostile_masks(2, 150, 400)["random"]
    poison = poisoned(q, k, v, ranges)
    variant = Emulated(SOURCES[0], text=attention_cuda.forward(dim), defines=("ILLADA_ATTENTION_FWD_ROTATION",), seed=3)
    for mask, inputs in ((ranges, poison), (None, (q, k, v))):
        for mine, theirs in zip(*(forward(*inputs, mask, processors=2, emulated=e) for e in (variant, None))):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_meets_the_bar_under_every_schedule(dim: int, dtype: torch.dtype, forward: Forward) -> None:
    tensors = draw(1, 150, 290, 2, 2, dim, dtype)
    ranges = KeyRanges.window(290, 40, 60)[:, 100:250]
    full, masked = forward(*tensors), forward(*poisoned(*tensors, ranges), ranges)
    assert_right(full, *tensors)
    assert_right(masked, *tensors, ranges)
    for seed in range(1, 3):
        assert all(map(torch.equal, full, forward(*tensors, seed=seed)))
        assert all(map(torch.equal, masked, forward(*tensors, ranges, seed=seed)))


MASKS = cases.hostile_masks(2, 70, 150)


@pytest.mark.parametrize("name", MASKS)
def test_hostile_masks_with_poison_outside(name: str, forward: Forward) -> None:
    ranges = MASKS[name]
    shapes = ((2, 1, 64), (2, 2, 64), (6, 2, 64), (7, 1, 96), (1, 1, 256))
    for seed, (heads, kv_heads, dim) in enumerate(shapes):  # heads of a tile: 2, 1, 3, 7, 1
        tensors = draw(2, 70, 150, heads, kv_heads, dim, seed=seed)
        got = forward(*poisoned(*tensors, ranges), ranges, seed=seed, processors=2)
        assert_right(got, *tensors, ranges)


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 193])
def test_odd_sizes(rows: int, forward: Forward) -> None:
    for keys in (1, 7, 63, 64, 65, 127, 128, 129, 257):
        tensors = draw(1, rows, keys, 2, 1, 64, seed=keys)
        assert_right(forward(*tensors, seed=keys, processors=1), *tensors)


def test_block_diffusion_skips_and_fills_tiles(forward: Forward) -> None:
    ranges = KeyRanges.block_diffusion(300, 20)
    for heads in (1, 4):
        tensors = draw(1, 600, 600, heads, 1, 64)
        assert_right(forward(*tensors, ranges, processors=3), *tensors, ranges)


def test_scales_of_any_sign_and_size(forward: Forward) -> None:
    ranges = KeyRanges.causal(140)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = draw(1, 140, 140, 1, 1, 64, dtype)
        for scale in (-0.3, 0.0, -1e-35, 1e-12, 3.0):
            assert_right(forward(*tensors, ranges, scale), *tensors, ranges, scale)


# ---- schedules -------------------------------------------------------------------------------------------------------
def test_bits_depend_neither_on_the_grid_nor_on_who_takes_which_item(forward: Forward) -> None:
    tensors, ranges = draw(3, 200, 260, 4, 2, 64), KeyRanges.padding(torch.tensor([260, 3, 130]), 260, side="left")
    first = forward(*tensors, ranges, processors=1)
    assert_right(first, *tensors, ranges)
    for processors, seed in ((2, 1), (3, 2), (5, 3)):
        assert all(map(torch.equal, first, forward(*tensors, ranges, processors=processors, seed=seed)))


@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 1, 64), (7, 1, 64), (2, 2, 128), (2, 1, 96), (2, 1, 256)])
def test_new_queries_against_a_cache_split_over_keys(heads: int, kv_heads: int, dim: int, forward: Forward) -> None:
    lengths = torch.tensor([37, 700, 513])
    for rows, dtype in ((1, torch.bfloat16), (16, torch.float16)):
        ranges = KeyRanges.cached(lengths, rows, 700)
        tensors = draw(3, rows, 700, heads, kv_heads, dim, dtype)
        assert cuda.schedule(3, rows, 700, heads, kv_heads, dim, 24).splits > 1
        got = forward(*poisoned(*tensors, ranges), ranges, processors=24)
        assert_right(got, *tensors, ranges)
        assert all(map(torch.equal, got, forward(*tensors, ranges, processors=24, seed=1)))


def test_a_split_without_keys_and_rows_without_any(forward: Forward) -> None:
    ranges = KeyRanges.padding(torch.tensor([0, 5]), 900, side="right")
    tensors = draw(2, 3, 900, 2, 1, 64)
    assert_right(forward(*poisoned(*tensors, ranges), ranges, processors=12), *tensors, ranges)


def test_schedules_fill_the_processors() -> None:
    # 16k tokens of iLLaDA's heads: four heads share a tile, blocks take many items, nothing is split
    assert cuda.schedule(1, 16384, 16384, 32, 8, 128, 132) == (4, 8 * 342, 1)
    # 32 new queries: 128 rows in one tile, 8 tiles; 16 splits use 128 processors
    assert cuda.schedule(1, 32, 4096, 32, 8, 128, 132) == (4, 8, 16)
    assert cuda.schedule(16, 32, 4096, 32, 8, 128, 132) == (4, 128, 1)
    # no more splits than key tiles, and none of a single tile
    assert cuda.schedule(1, 32, 100, 32, 8, 128, 132).splits == 1
    # 28 heads on 4: seven share 63 of 64 rows; 40 would leave 24 empty, unless all rows fit one tile anyway
    assert cuda.schedule(1, 4096, 4096, 28, 4, 128, 132).pack == 7
    assert [cuda.schedule(1, rows, 4096, 40, 1, 128, 132).pack for rows in (4096, 4)] == [1, 40]


# ---- arguments -------------------------------------------------------------------------------------------------------
def test_strides_and_broadcast_bounds(forward: Forward) -> None:
    g = torch.Generator().manual_seed(1)
    room = torch.randn(2, 6, 90, 72, generator=g).bfloat16()  # (batch, heads, rows, padded dim)
    q, k, v = (x.transpose(1, 2) for x in (room[:, :4, :, :64], room[:, 4:5, :80, :64], room[:, 5:, 5:85, 8:]))
    ranges = KeyRanges(torch.tensor([[[3, 50, 60, 80]], [[0, 9, 9, 70]]], dtype=torch.int32), 80)
    wide = torch.zeros(2, 1, 9, dtype=torch.int32)
    wide[..., 3:7] = ranges.bounds  # rows of four at an odd address
    for r in (None, ranges, KeyRanges(wide[..., 3:7], 80)):
        assert_right(forward(q, k, v, r), q, k, v, r)


def test_malformed_bounds_stay_in_range(forward: Forward) -> None:
    wild = torch.randint(-300, 300, (1, 90, 4), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    wild[0, 5] = torch.tensor([2**31 - 1, -(2**31), 2**31 - 1, 5])
    tensors, ranges = draw(1, 90, 150, 1, 1, 64), KeyRanges(wild, 150)
    assert_right(forward(*tensors, ranges), *tensors, ranges)


@pytest.mark.parametrize("batch, rows, keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_dimensions(batch: int, rows: int, keys: int, forward: Forward) -> None:
    out, lse = forward(*draw(batch, rows, keys, 2, 1, 64))
    assert out.shape == (batch, rows, 2, 64) and not out.any()
    assert lse.shape == (batch, 2, rows) and (lse == -torch.inf).all()


def test_supports_names_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(2, 5, 6, 2, 2, 64)

    def reason(q=q, k=k, v=v) -> str | None:
        return cuda.supports(Problem(q, k, v))

    assert reason() is None
    assert reason(k=k.transpose(1, 2).contiguous().transpose(1, 2)) is None
    assert "not torch.float32" in str(reason(q.float()))
    assert "head_dim of 64, 96, 128, 256, alike" in str(reason(q[..., :32], k[..., :32], v[..., :32]))
    assert "not 64 and 32" in str(reason(v=v[..., :32]))
    assert "k has strides" in str(reason(k=torch.zeros(2, 6, 2, 65, dtype=k.dtype)[..., :64]))
    assert "k has strides" in str(reason(k=k[:, :1].expand(2, 6, 2, 64)))
    assert "v starts at" in str(reason(v=torch.zeros(2, 6, 2, 72, dtype=k.dtype)[..., 1:65]))


# ---- planted faults --------------------------------------------------------------------------------------------------
@functools.cache
def with_faults() -> Kernels:
    return compile_kernels(SOURCES[0], text=switchable(attention_cuda.forward(64), FAULTS.values()))


class Faulty(Emulated):
    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.kernels = [with_faults()]


def test_columns_in_whole_pieces_give_the_same_bits(forward: Forward) -> None:
    """The way out for head_dim 96: MMAs of 128 columns."""
    variant = Emulated(SOURCES[0], text=attention_cuda.forward(96), defines=("ILLADA_WHOLE_PIECES",), seed=1)
    for ranges, processors in ((KeyRanges.window(400, 130, 70)[:, 100:300], 1), (None, 4)):
        tensors = draw(1, 200, 400, 1, 1, 96)
        expected = forward(*tensors, ranges, processors=processors)
        got = forward(*tensors, ranges, processors=processors, emulated=variant)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected))


SKIPPING = KeyRanges(
    torch.tensor([[0, 30, 30, 30]] * 64 + [[0, 700, 700, 700]] * 36, dtype=torch.int32)[None], 700
)  # the first warpgroup passes most tiles on
LAST = "if (n == plan.end - 1) release(&shared.q_empty[wg]);"
UNLESS_LAST = "if (!FAULT && n == plan.end - 1) release(&shared.q_empty[wg]);"
FAULTS = {  # what to replace, by what, and so on
    "bounds read before they have come": ("  copy_async_wait();\n", "  if (!FAULT) copy_async_wait();\n"),
    "an item is never drawn": ("item = gridDim.x + atomicAdd", "item = gridDim.x + FAULT + atomicAdd"),
    "shares of the keys loaded for another turn": ("first + u + kAhead);", "first + u + kAhead + FAULT);"),
    "no wait for the values": (
        "  mbar_wait(&shared.v_full[stage], phase);\n  if constexpr",
        "  if (!FAULT) mbar_wait(&shared.v_full[stage], phase);\n  if constexpr",
    ),
    "values released before their product is done": (
        "  wgmma_wait<0>();\n  reg_fence(rows.o);\n  release(&shared.v_empty[stage]);",
        "  if (FAULT) release(&shared.v_empty[stage]);\n"
        "  wgmma_wait<0>();\n  reg_fence(rows.o);\n  if (!FAULT) release(&shared.v_empty[stage]);",
    ),
    "a skipped tile is passed on before it is there": (
        "  mbar_wait(&shared.k_full[stage], phase);\n"
        "  __syncwarp();  // because a lane that still waits could miss a phase\n",
        "  if (!FAULT) mbar_wait(&shared.k_full[stage], phase);\n  if (!FAULT) __syncwarp();\n",
    ),
    "a skipped tile is not passed on": (
        "else skip(shared, plan, wg, n, use);",
        "else if (!FAULT) skip(shared, plan, wg, n, use);",
    ),
    "queries released before their product is done": (
        f"  wgmma_wait<0>();\n  reg_fence(s);\n  release(&shared.k_empty[stage]);\n  {LAST}",
        f"  if (FAULT) {{ {LAST} }}\n"
        f"  wgmma_wait<0>();\n  reg_fence(s);\n  release(&shared.k_empty[stage]);\n  {UNLESS_LAST}",
    ),
    "queries are not passed on where the last tile is skipped": (
        f"  release(&shared.v_empty[stage]);\n  {LAST}",
        f"  release(&shared.v_empty[stage]);\n  {UNLESS_LAST}",
    ),
    "values are used before they are cleaned": (
        "if (needs_cleaning<D>(problem, plan, plan.first_key(n))) mbar_wait(&shared.v_clean[stage], phase);",
        "if (!FAULT && needs_cleaning<D>(problem, plan, plan.first_key(n))) mbar_wait(&shared.v_clean[stage], phase);",
        "if (needs_cleaning<D>(p, plan, start)) clean_values",  # slowly: else it mostly is done in time
        "for (int i = 0; FAULT && i < 300; ++i) __syncwarp();\n"
        "      if (needs_cleaning<D>(p, plan, start)) clean_values",
    ),
    "cleaning is not fenced": (
        "Vec16<T>{});\n  }\n  fence_proxy_async();",
        "Vec16<T>{});\n  }\n  if (!FAULT) fence_proxy_async();",
    ),
    "cleaning looks at the first warpgroup's rows only": (
        "i < Tile<D>::warpgroups * kRows; i += 32",
        "i < (FAULT ? 1 : Tile<D>::warpgroups) * kRows; i += 32",
    ),
    "a plan is filled before the last was read": (
        "    mbar_wait(&shared.plan_empty[slot], i / Tile<D>::plans % 2 ^ 1);\n",
        "    if (!FAULT) mbar_wait(&shared.plan_empty[slot], i / Tile<D>::plans % 2 ^ 1);\n",
    ),
    "the mask is off by one": ("Min{}(x & 7, 2)", "Min{}(x & 7, FAULT ? 1 : 2)"),
    "a full tile is one that the hull holds": (
        "if (lane == 0) plan.hulls[wg] = hulls;",
        "if (FAULT) hulls.common_lo[0] = hulls.lo[0], hulls.common_hi[0] = hulls.hi[0];\n"
        "if (lane == 0) plan.hulls[wg] = hulls;",
    ),
    "the tile's hulls are the first warpgroup's": (
        "wg < Tile<D>::warpgroups; ++wg) of_tile",
        "wg < (FAULT ? 1 : Tile<D>::warpgroups); ++wg) of_tile",
    ),
    "no care for rows without keys so far": (
        "rows.top[r] == -infinity() ? 0.0f : rows.top[r] * scale_log2",
        "!FAULT && rows.top[r] == -infinity() ? 0.0f : rows.top[r] * scale_log2",
    ),
    "parts are added without their weights": ("total[v].x += w * ring", "total[v].x += (FAULT ? 1.0f : w) * ring"),
}


def with_poison(forward: Forward, seed: int) -> None:
    """A few calls which between them need all of the kernel."""
    calls = [
        (draw(1, 200, 400, 1, 1, 64), KeyRanges.window(400, 130, 70)[:, 100:300], 1),
        (draw(2, 5, 700, 2, 1, 64), KeyRanges.cached(torch.tensor([40, 690]), 5, 700), 8),
        (draw(2, 100, 700, 1, 1, 64), SKIPPING, 1),
        (draw(1, 5, 700, 1, 1, 64), KeyRanges.cached(torch.tensor([690]), 5, 700), 8),
    ]
    for tensors, ranges, processors in calls:
        got = forward(*poisoned(*tensors, ranges), ranges, processors=processors, emulated=Faulty(seed))
        assert_right(got, *tensors, ranges)


def test_the_calls_that_find_faults_pass_without_one(forward: Forward) -> None:
    with_faults().plant(0)
    for seed in range(3):
        with_poison(forward, seed)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, forward: Forward) -> None:
    with_faults().plant(list(FAULTS).index(name) + 1)
    with pytest.raises(AssertionError) as seen:  # of which KernelFault is one
        for seed in range(8):
            with_poison(forward, seed)
    print(f"{name}: {seen.value}")
