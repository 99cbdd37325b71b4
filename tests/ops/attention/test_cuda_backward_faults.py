"""Faults planted into the kernels of attention's backward: each must be reported by the emulator or change a result."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels import KeyRanges
from illada_kernels.ops.attention import cuda, reference
from illada_kernels.ops.attention.problem import Problem
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import KernelFault, Kernels, compile_kernels, missing, skipped
from tests.helpers.attention_cuda import with_faults
from tests.helpers.attention_oracle import Result, draw

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
NAMES = ("preprocess", "keys", "queries")


def source(name: str) -> str:
    return f"csrc/cuda/attention_bwd_{name}_sm90a.cu"


@functools.cache
def with_all_faults(name: str, dim: int) -> Kernels:
    return with_faults(source(name), dim, FAULTS[name].values())


def planted(kernel: str, name: str | None, dim: int) -> Kernels:
    kernels = with_all_faults(kernel, dim)
    kernels.plant(list(FAULTS[kernel]).index(name) + 1 if name else 0)
    return kernels


class Mixed(Emulated):
    """The three kernels, one of them another."""

    def __init__(self, seed: int, **other: Kernels) -> None:
        super().__init__(seed=seed)
        self.kernels = [other.get(name) or compile_kernels(source(name)) for name in NAMES]


def bounds() -> Tensor:
    """Tiles that see two key tiles whole, but for one row; one with two ranges and rows without keys; a short one."""
    row = torch.arange(200)[:, None]
    b = torch.where(row < 128, torch.tensor([0, 256, 256, 256]), torch.tensor([10, 140, 200, 210]))
    b = torch.where(row == 100, torch.tensor([0, 200, 200, 200]), b)
    b = torch.where((row >= 128) & (row % 5 == 0), torch.tensor([0, 0, 300, 300]), b)
    b = torch.where(row >= 192, torch.tensor([20, 40, 290, 295]), b)
    return b.int()[None]


@functools.cache
def inputs(dim: int) -> tuple[Tensor, ...]:
    """q, k, v, dout, dlse, out, lse with NaN wherever it must not matter."""
    q, k, v, dout, dlse = draw(1, 200, 300, 2, 1, dim, dtype=torch.bfloat16)
    allowed = KeyRanges(bounds(), 300).dense()
    k[~allowed.any(1)], v[~allowed.any(1)], q[~allowed.any(2)], dout[~allowed.any(2)] = (math.nan,) * 4
    out, lse = reference.forward(Problem(q, k, v, bounds(), dim**-0.5))
    return q, k, v, dout, dlse, out, lse


def gradients(emulated: Emulated, dim: int) -> Result:
    q, k, v, dout, dlse, out, lse = inputs(dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "launch", emulated)
        patch.setattr(cuda, "processors", lambda device: 2)
        return Result(out, lse, *cuda.backward(Problem(q, k, v, bounds(), dim**-0.5), dout, dlse, out, lse))


@functools.cache
def right(dim: int) -> Result:
    result = gradients(Mixed(0), dim)
    assert all(x.isfinite().all() for x in (result.dq, result.dk, result.dv))
    return result


WRONG = "wrong result"
UNFENCED = "without fence_proxy_async"
HULL = "block_reduce<kTileRows>(h.{0}[i], scratch, {1}{{}})"
CLEARED = "fence_proxy_async();\n  {}bar_sync(1, kConsumers);\n}}"
PIECES = "for (int piece = 0; piece < {}; ++piece)\n      for (int i = 0; i < 16"
TOUCHED = "{}) || (lo[1] < end && start < hi[1]);"
WHOLE = "{}) || (common_lo[1] <= start && end <= common_hi[1]);"


def other_end(side: str, right: str, wrong: str) -> tuple[str, str]:
    start = f"h.{side}[i] = "
    return start + HULL.format(side, right), f"{start}FAULT ? {HULL.format(side, wrong)} : {HULL.format(side, right)}"


# of each kernel, name: (old, new, what is seen of it[, head_dim])
FAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "preprocess": {
        # what the others are told
        "dlse forgotten": ("sum - (dlse ? dlse[at] : 0.0f)", "sum - (dlse && !FAULT ? dlse[at] : 0.0f)", WRONG),
        "hull from the wrong end": (*other_end("hi", "Max", "Min"), WRONG),
        "common range of some row": (*other_end("common_hi", "Min", "Max"), WRONG),
        "rows without keys unseen": ("t.empty_rows = r.empty();", "if (!FAULT) t.empty_rows = r.empty();", WRONG),
        "rows past the last": (
            "row < size.queries && ",
            "(FAULT || row < size.queries) && ",
            "outside every allocation",
        ),
    },
    "keys": {
        # order
        "no wait for Q and dO": (*skipped("      mbar_wait(&s.full[stage], n / S::kStages % 2);"), "."),
        "no wait for K and V": (*skipped("    mbar_wait(&s.keys_full, turn % 2);"), "."),
        "stages filled while read": (
            *skipped("            mbar_wait(&s.empty[stage], n / S::kStages % 2 ^ 1);"),
            ".",
        ),
        "S read too early": (
            "  wgmma_wait<1>();\n  reg_fence(p);",
            "  if (!FAULT) wgmma_wait<1>();\n  reg_fence(p);",
            WRONG,
        ),
        "result stored unfenced": (
            "    fence_proxy_async();\n    bar_sync(2",
            "    if (!FAULT) fence_proxy_async();\n    bar_sync(2",
            UNFENCED,
        ),
        "K given up while a store reads it": (*skipped("      bulk_wait_read<0>();"), "."),
        "K overwritten by the other's dK": (
            "    S::kSplit > 1 ? bar_sync(1, kConsumers)",
            "    if (!FAULT) S::kSplit > 1 ? bar_sync(1, kConsumers)",
            ".",
            256,
        ),
        # arithmetic
        "cleared rows unfenced": (
            "      }\n  " + CLEARED.format(""),
            "      }\n  if (!FAULT) " + CLEARED.format("/* of rows */ "),
            UNFENCED,
        ),
        "rows read before all are cleared": ("/* of rows */ bar_sync", "if (!FAULT) bar_sync", "."),
        "dO not cleared": (*skipped("        store16(dout + at, Vec16<T>{});"), WRONG),
        "only the first piece cleared": (
            PIECES.format("pieces<D>"),
            PIECES.format("(FAULT ? 1 : pieces<D>)"),
            WRONG,
            256,
        ),
        "P not masked": (*skipped("  if (step != kFull) select(p, bits, -infinity());"), WRONG),
        "dS not masked": (*skipped("  if (step != kFull) select(ds, bits, 0);"), WRONG),
        "one head of the group": (
            "head = item.kv_head * group + i;",
            "head = item.kv_head * group + i * !FAULT;",
            WRONG,
        ),
        "touched only if wholly within": (
            TOUCHED.format("start < hi[0]"),
            TOUCHED.format("(FAULT ? end <= hi[0] : start < hi[0])"),
            WRONG,
        ),
        "full if it begins within": (
            WHOLE.format("end <= common_hi[0]"),
            WHOLE.format("(FAULT ? start < common_hi[0] : end <= common_hi[0])"),
            WRONG,
        ),
        "MN-major lead": ("1024, STEPS * 16 * 128", "1024, STEPS * 16 * (FAULT ? 64 : 128)", WRONG, 256),
    },
    "queries": {
        # order
        "no wait for K": (*skipped("      mbar_wait(&s.k_full[n % S::kStages], n / S::kStages % 2);"), "."),
        "no wait for V": (*skipped("  mbar_wait(&s.v_full[value_stage], n / S::kValueStages % 2);"), "."),
        "no wait for Q": (*skipped("    mbar_wait(&s.rows_full, turn % 2);"), "."),
        "V filled while read, one stage": (
            *skipped("      mbar_wait(&s.v_empty[value_stage], n / S::kValueStages % 2 ^ 1);"),
            ".",
            256,
        ),
        "K filled while read": (*skipped("      mbar_wait(&s.k_empty[stage], n / S::kStages % 2 ^ 1);"), "."),
        "Q overwritten": (*skipped("    mbar_wait(&s.rows_empty, turn % 2 ^ 1);"), "."),
        "dP read unfinished": (
            "  wgmma_wait<0>();\n  reg_fence(ds);",
            "  if (!FAULT) wgmma_wait<0>();\n  reg_fence(ds);",
            ".",
        ),
        "V of the last step kept": (
            "      else arrive_by_warp(&s.v_empty[n % S::kValueStages]);\n",
            "      else if (!FAULT) arrive_by_warp(&s.v_empty[n % S::kValueStages]);\n",
            "deadlock",
        ),
        # arithmetic
        "cleared keys unfenced": ("  " + CLEARED.format(""), "  if (!FAULT) " + CLEARED.format(""), UNFENCED),
        "attended keys of one warp only": (
            "warp < kConsumers / 32; ++warp) attended",
            "warp < (FAULT ? 1 : kConsumers / 32); ++warp) attended",
            WRONG,
        ),
        "unattended keys not cleared": (
            *skipped("  if (masked) clear_unattended_keys<T, D>(s, s.k[stage], rows, key);"),
            WRONG,
        ),
        "dS not masked in queries": (*skipped("  if (masked) select(ds, rows, key, 0);"), WRONG),
        "one hull of two": (
            "      if (item.tile + i < w.tiles) hulls.merge(",
            "      if (!FAULT && item.tile + i < w.tiles) hulls.merge(",
            WRONG,
        ),
        "a key tile skipped": (
            "Max{}(start, lo[i] / size * size)",
            "Max{}(start, (lo[i] + (FAULT ? size - 1 : 0)) / size * size)",
            WRONG,
        ),
    },
}


@pytest.mark.parametrize("kernel, name", [(kernel, name) for kernel, faults in FAULTS.items() for name in faults])
def test_planted_faults_are_seen(kernel: str, name: str) -> None:
    _, _, said, *rest = FAULTS[kernel][name]
    dim = rest[0] if rest else 64
    clean = right(dim)
    other = {kernel: planted(kernel, name, dim)}
    seen = []
    for seed in range(8):
        try:
            ours = gradients(Mixed(seed, **other), dim)
            same = all(torch.equal(getattr(ours, x), getattr(clean, x)) for x in ("dq", "dk", "dv"))
            seen += [] if same else [WRONG]
        except KernelFault as fault:
            seen.append(str(fault))
        if any(re.search(said, report) for report in seen):
            break
    print(f"{name}: {len(seen)} of {seed + 1} seeds;", seen[0] if seen else "")
    assert any(re.search(said, report) for report in seen), seen


@pytest.mark.parametrize("dim", [64, 256])
def test_without_a_fault_nothing_is_seen(dim: int) -> None:
    for seed in range(3):
        ours = gradients(Mixed(seed, **{kernel: planted(kernel, None, dim) for kernel in NAMES}), dim)
        assert all(torch.equal(getattr(ours, x), getattr(right(dim), x)) for x in ("dq", "dk", "dv"))
