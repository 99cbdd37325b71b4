"""The five-product backward (deterministic=False) on the emulator: bar, masks, poison, memory, and planted faults."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import KeyRanges
from illada_kernels.ops.attention import cases, cuda, reference
from illada_kernels.ops.attention.problem import Problem
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import KernelFault, Kernels, compile_kernels, missing, skipped
from tests.helpers.attention_cuda import backward, with_faults
from tests.helpers.attention_oracle import HALF, Result, assert_close, draw, poisoned

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
PREPROCESS, FUSED = (f"csrc/cuda/attention_bwd_{name}_sm90a.cu" for name in ("preprocess", "fused"))
WRONG = "wrong result"


def gradients(*inputs: Any, ranges: KeyRanges | None = None, kernels: Kernels | None = None, seed: int = 0) -> Result:
    """The kernels' gradients after the reference's forward, on two blocks: the first items of each, and drawn ones."""
    q, k, v, dout, dlse = inputs
    bounds, scale = None if ranges is None else ranges.bounds, q.shape[3] ** -0.5
    problem = Problem(q, k, v, bounds, scale, deterministic=False)
    out, lse = reference.forward(problem)
    emulated = Emulated(PREPROCESS, seed=seed)
    emulated.kernels.append(kernels or compile_kernels(FUSED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "launch", emulated)
        patch.setattr(cuda, "processors", lambda device: 2)
        return Result(out, lse, *cuda.backward(problem, dout, dlse, out, lse))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_every_head_dim_meets_the_numerics_bar(dim: int, dtype: torch.dtype) -> None:
    """Rows and keys that end within tiles, a group of two, a tile of each kind, NaN where it must not matter."""
    inputs = draw(1, 70, 150, 2, 1, dim, dtype=dtype)
    ranges = cases.hostile_masks(1, 70, 150)["every_third_row_empty"]
    assert_close(gradients(*inputs), *inputs)
    assert_close(gradients(*inputs, ranges=ranges), *inputs, ranges)


def test_hostile_masks_meet_the_numerics_bar_and_poison_reaches_nothing() -> None:
    inputs = draw(2, 70, 150, 1, 1, 64, dtype=torch.bfloat16)
    for name, ranges in cases.hostile_masks(2, 70, 150).items():
        try:
            if ranges is None:
                assert_close(gradients(*inputs), *inputs)
                continue
            clean = poisoned(inputs, ranges, 0.0)
            ours = gradients(*poisoned(inputs, ranges, math.nan), ranges=ranges)
            assert_close(ours, *clean, ranges)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("rows, keys, heads, kv_heads", [(1, 129, 1, 1), (65, 1, 3, 3), (129, 257, 4, 2)])
def test_awkward_lengths_and_groups_meet_the_numerics_bar(rows: int, keys: int, heads: int, kv_heads: int) -> None:
    inputs = draw(2, rows, keys, heads, kv_heads, 64, seed=keys, dtype=torch.float16)
    assert_close(gradients(*inputs), *inputs)


def masks() -> dict[str, Tensor]:
    """Keys that no row attends to: between the rows' ranges, in tiles that are never whole; behind them, in a tile
    that few query tiles touch; and, of the second batch entry, in a tile that is whole in the first."""
    row = torch.arange(200)[:, None]
    between = torch.where(row % 2 == 0, torch.tensor([0, 10, 10, 10]), torch.tensor([140, 150, 160, 165]))
    late = torch.where(row < 130, torch.tensor([0, 128, 128, 128]), torch.tensor([0, 0, 200, 230]))
    late = torch.where(row % 7 == 5, torch.tensor([0, 0, 0, 0]), late)
    late = torch.where(row >= 196, torch.tensor([0, 0, 200, 240]), late)
    whole = torch.where(row < 200, torch.tensor([0, 256, 256, 256]), 0)
    return {"between": torch.stack([between, between]), "entries differ": torch.stack([whole, late])}


@pytest.mark.parametrize("dim, poison", [(64, math.nan), (128, math.inf)])
def test_poisoned_padding_never_reaches_a_gradient(dim: int, poison: float) -> None:
    inputs = draw(2, 200, 260, 1, 1, dim, dtype=torch.bfloat16)
    for name, bounds in masks().items():
        ranges = KeyRanges(bounds.int().contiguous(), 260)
        ours = gradients(*poisoned(inputs, ranges, poison), ranges=ranges)
        clean = gradients(*poisoned(inputs, ranges, 0.0), ranges=ranges)
        for x in ("dq", "dk", "dv"):
            assert torch.equal(getattr(ours, x), getattr(clean, x)), (name, x)


def test_dk_and_dv_are_the_same_bits_as_those_of_the_deterministic_kernel() -> None:
    inputs = draw(1, 130, 300, 2, 1, 64, dtype=torch.bfloat16)
    ranges = cases.hostile_masks(1, 130, 300)["random"]
    assert ranges is not None
    problem = Problem(*inputs[:3], ranges.bounds, 0.125)
    out, lse = reference.forward(problem)
    emulated = Emulated(PREPROCESS, *(f"csrc/cuda/attention_bwd_{name}_sm90a.cu" for name in ("keys", "queries")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "launch", emulated)
        patch.setattr(cuda, "processors", lambda device: 3)
        _, dk, dv = cuda.backward(problem, inputs[3], inputs[4], out, lse)
    ours = gradients(*inputs, ranges=ranges)
    assert torch.equal(ours.dk, dk) and torch.equal(ours.dv, dv)


def test_columns_in_whole_pieces_give_the_same_bits() -> None:
    """The way out for head_dim 96: products of 128 columns."""
    inputs = draw(1, 130, 300, 2, 1, 96, dtype=torch.bfloat16)
    ranges = cases.hostile_masks(1, 130, 300)["random"]

    def variant(source: str) -> Kernels:
        return compile_kernels(source, text=backward(source, 96), defines=("ILLADA_WHOLE_PIECES",))

    theirs = gradients(*inputs, ranges=ranges)
    mine = gradients(*inputs, ranges=ranges, kernels=variant(FUSED))
    assert torch.equal(mine.dk, theirs.dk) and torch.equal(mine.dv, theirs.dv)
    assert_close(mine, *inputs, ranges)
    assert ranges is not None
    problem = Problem(*inputs[:3], ranges.bounds, 96**-0.5)
    out, lse = reference.forward(problem)
    sources = [PREPROCESS, *(f"csrc/cuda/attention_bwd_{name}_sm90a.cu" for name in ("keys", "queries"))]
    results = []
    for compiled in (compile_kernels, variant):
        emulated = Emulated()
        emulated.kernels = [compiled(source) for source in sources]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "launch", emulated)
            patch.setattr(cuda, "processors", lambda device: 3)
            results.append(cuda.backward(problem, inputs[3], inputs[4], out, lse))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_head_dim_256_takes_the_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(cuda, "launch", lambda name, *arguments: launched.append(name))
    monkeypatch.setattr(cuda, "processors", lambda device: 2)
    for dim, used in ((256, ["preprocess", "keys", "queries"]), (128, ["preprocess", "fused"])):
        launched.clear()
        q, k, v, dout, dlse = draw(1, 3, 3, 1, 1, dim, dtype=torch.bfloat16)
        cuda.backward(Problem(q, k, v, None, 1.0, deterministic=False), dout, dlse, dout, dlse)
        assert launched == [f"attention_bwd_{name}_sm90a" for name in used]


# ---- planted faults --------------------------------------------------------------------------------------------------


@functools.cache
def with_all_faults(dim: int) -> Kernels:
    return with_faults(FUSED, dim, FAULTS.values())


def planted(name: str | None, dim: int) -> Kernels:
    kernels = with_all_faults(dim)
    kernels.plant(list(FAULTS).index(name) + 1 if name else 0)
    return kernels


@functools.cache
def faulted_inputs(dim: int) -> tuple[tuple[Tensor, ...], KeyRanges]:
    ranges = KeyRanges(masks()["entries differ"].int().contiguous(), 260)
    return poisoned(draw(2, 200, 260, 2, 1, dim, dtype=torch.bfloat16), ranges, math.nan), ranges


@functools.cache
def right(dim: int) -> Result:
    inputs, ranges = faulted_inputs(dim)
    return gradients(*inputs, ranges=ranges)


STAGED = "  fence_proxy_async();\n{}  if (t == 0) {{\n    bulk_reduce"
BARRIER = "bar_sync(2 + warpgroup, 128);\n"
TURNED = "(static_cast<uint8_t*>(to) + query * 128 + (key * 2 ^ query % 8 * 16), ds[i]);"
OF_ENTRY = "item.batch, first + lane)];\n      touched = tile.hulls.touches(item.key, end)"
# name: (old, new, what is seen of it[, head_dim])
FAULTS: dict[str, tuple[Any, ...]] = {
    "dS read before the other warpgroup wrote it": (
        *skipped("  mbar_wait(&s.ds_full[buffer], pending.number / kGradients % 2);"),
        ".",
    ),
    "dS overwritten while the other warpgroup reads it": (
        *skipped("  mbar_wait(&s.ds_empty[buffer], mine.number / kGradients % 2 ^ 1);"),
        ".",
    ),
    "the last dQ of an item forgotten": (
        "    if (pending.tile >= 0) {\n      float dq",
        "    if (!FAULT && pending.tile >= 0) {\n      float dq",
        WRONG,
    ),
    "dS unfenced": (
        "ds_operand);\n  fence_proxy_async();\n",
        "ds_operand);\n  if (!FAULT) fence_proxy_async();\n",
        "without fence_proxy_async",
    ),
    "dS not turned over": (
        f"stmatrix<true>{TURNED}",
        f"if (FAULT) stmatrix<false>{TURNED}\n    else stmatrix<true>{TURNED}",
        WRONG,
    ),
    "one buffer of dS": ("store_transposed(s.ds[buffer]", "store_transposed(s.ds[FAULT ? 0 : buffer]", "."),
    "dQ staged while it leaves": (
        "  if (t == 0) bulk_wait_read<0>();  //",
        "  if (!FAULT && t == 0) bulk_wait_read<0>();  //",
        ".",
    ),
    "dQ read unfinished": (*skipped("  wgmma_wait<0>();", "  reg_fence(dq);"), "."),
    "dQ copied before all staged it": (
        STAGED.format(f"  {BARRIER}"),
        STAGED.format(f"  if (!FAULT) {BARRIER}"),
        ".",
    ),
    "K overwritten by dK": (
        "    bar_sync(1, kConsumers);  // both",
        "    if (!FAULT) bar_sync(1, kConsumers);  // both",
        ".",
    ),
    "stage given up before dK": (*skipped("    wgmma_wait<1>();", "    reg_fence(dk);"), "."),
    "one tile of dQ": (
        "sums + int64_t(pending.tile) * kTileRows * D",
        "sums + int64_t(FAULT ? 0 : pending.tile) * kTileRows * D",
        WRONG,
    ),
    "second half of K's columns": (
        "s.k + warpgroup_of_thread() * kAt",
        "s.k + (FAULT ? 0 : warpgroup_of_thread()) * kAt",
        WRONG,
        128,
    ),
    "unattended keys not cleared": (*skipped("    clear_unattended_keys(s, w, item);"), WRONG),
    "searched in the first batch entry": (
        "w.bounds_at(item.batch, 0) * kTileRows;",
        "w.bounds_at(item.batch, 0) * kTileRows * !FAULT;",
        WRONG,
    ),
    "whole in any batch entry": (OF_ENTRY, f"FAULT ? 0 : {OF_ENTRY}", WRONG),
    "search ends early": (
        "to = first + 32 - __clz(tiles);",
        "to = first + 32 - FAULT - __clz(tiles);",
        WRONG,
    ),
}


SEEDS = (28, *range(8))  # of 40, those under which a dQ leaves so late that the next overwrites it: 28, 31, 34, 39


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str) -> None:
    """Sums of dq differ by their order: wrong is what is a hundredth off, or NaN."""
    _, _, said, *rest = FAULTS[name]
    dim = rest[0] if rest else 64
    (inputs, ranges), clean, kernels = faulted_inputs(dim), right(dim), planted(name, dim)
    seen = []
    for seed in SEEDS:
        try:
            ours = gradients(*inputs, ranges=ranges, kernels=kernels, seed=seed)
            pairs = [(getattr(ours, x).float(), getattr(clean, x).float()) for x in ("dq", "dk", "dv")]
            same = all(bool((a - b).norm() < 0.01 * b.norm()) for a, b in pairs)
            seen += [] if same else [WRONG]
        except KernelFault as fault:
            seen.append(str(fault))
        if any(re.search(said, report) for report in seen):
            break
    print(f"{name}: seed {seed};", seen[0] if seen else "")
    assert any(re.search(said, report) for report in seen), seen


@pytest.mark.parametrize("dim", [64, 128])
def test_without_a_fault_nothing_is_seen(dim: int) -> None:
    (inputs, ranges), clean = faulted_inputs(dim), right(dim)
    for seed in SEEDS[:3]:
        ours = gradients(*inputs, ranges=ranges, kernels=planted(None, dim), seed=seed)
        for x in ("dq", "dk", "dv"):
            a, b = getattr(ours, x).float(), getattr(clean, x).float()
            assert (a - b).norm() < 0.01 * b.norm(), x
