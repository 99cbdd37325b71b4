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
from tests.cuda_on_cpu.library import ROOT, KernelFault, Kernels, compile_kernels, missing
from tests.helpers.attention_oracle import Result, draw

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
HEADERS = (
    "attention_bwd_keys_sm90a.cuh",
    "attention_bwd_sm90a.cuh",
    "attention_tile_sm90a.cuh",
    "attention_bwd_workspace.cuh",
    "key_ranges.cuh",
)
NAMES = ("preprocess", "keys", "queries")


def source(name: str) -> str:
    return f"csrc/cuda/attention_bwd_{name}_sm90a.cu"


def planted(name: str, dim: int, old: str, new: str) -> Kernels:
    """One kernel with its headers in it, for one dtype and head_dim (a second to compile, not ten), with a fault."""
    text = (ROOT / source(name)).read_text()
    for header in HEADERS:
        inside = (ROOT / "csrc/cuda" / header).read_text().replace("#pragma once\n", "")
        text = text.replace(f'#include "{header}"\n', inside)
    text = re.sub(rf"      case (?!{dim}:).*\n", "", text)
    text = re.sub(r"  if \(dtype == fp16_code\).*\n", "", text)
    assert text.count(old) == 1, f"{text.count(old)} times: {old}"
    return compile_kernels(source(name), text=text.replace(old, new))


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
# of each kernel, name: (old, new, what is seen of it[, head_dim])
FAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "preprocess": {
        # what the others are told
        "dlse forgotten": ("sum - (dlse ? dlse[at] : 0.0f)", "sum", WRONG),
        "hull from the wrong end": (
            "h.hi[i] = block_reduce<kTileRows>(h.hi[i], scratch, Max{})",
            "h.hi[i] = block_reduce<kTileRows>(h.hi[i], scratch, Min{})",
            WRONG,
        ),
        "common range of some row": (
            "h.common_hi[i] = block_reduce<kTileRows>(h.common_hi[i], scratch, Min{})",
            "h.common_hi[i] = block_reduce<kTileRows>(h.common_hi[i], scratch, Max{})",
            WRONG,
        ),
        "rows without keys unseen": ("t.empty_rows = r.empty();", "", WRONG),
        "rows past the last": ("row < size.queries && ", "", "outside every allocation"),
    },
    "keys": {
        # order
        "no wait for Q and dO": ("      mbar_wait(&s.full[stage], n / S::kStages % 2);\n", "", "."),
        "no wait for K and V": ("    mbar_wait(&s.keys_full, turn % 2);\n", "", "."),
        "stages filled while read": ("            mbar_wait(&s.empty[stage], n / S::kStages % 2 ^ 1);\n", "", "."),
        "S read too early": ("  wgmma_wait<1>();\n  reg_fence(p);", "  reg_fence(p);", WRONG),
        "result stored unfenced": (
            "    fence_proxy_async();\n    bar_sync(2",
            "    bar_sync(2",
            "without fence_proxy_async",
        ),
        "K given up while a store reads it": ("      bulk_wait_read<0>();\n", "", "."),
        "K overwritten by the other's dK": (
            "    S::kSplit > 1 ? bar_sync(1, kConsumers) : bar_sync(2 + warpgroup, 128);\n",
            "",
            ".",
            256,
        ),
        # arithmetic
        "cleared rows unfenced": (
            "      }\n  fence_proxy_async();\n  bar_sync(1, kConsumers);\n}",
            "      }\n  bar_sync(1, kConsumers);\n}",
            "without fence_proxy_async",
        ),
        "rows read before all are cleared": (
            "      }\n  fence_proxy_async();\n  bar_sync(1, kConsumers);\n}",
            "      }\n  fence_proxy_async();\n}",
            ".",
        ),
        "dO not cleared": ("        store16(dout + at, Vec16<T>{});\n", "", WRONG),
        "only the first piece cleared": (
            "for (int piece = 0; piece < pieces<D>; ++piece)\n      for (int i = 0; i < 16",
            "for (int piece = 0; piece < 1; ++piece)\n      for (int i = 0; i < 16",
            WRONG,
            256,
        ),
        "P not masked": ("  if (step != kFull) select(p, bits, -infinity());\n", "", WRONG),
        "dS not masked": ("  if (step != kFull) select(ds, bits, 0);\n", "", WRONG),
        "one head of the group": ("head = item.kv_head * group + i;", "head = item.kv_head * group;", WRONG),
        "touched only if wholly within": (
            "start < hi[0]) || (lo[1] < end && start < hi[1]);",
            "end <= hi[0]) || (lo[1] < end && start < hi[1]);",
            WRONG,
        ),
        "full if it begins within": (
            "end <= common_hi[0]) || (common_lo[1] <= start && end <= common_hi[1]);",
            "start < common_hi[0]) || (common_lo[1] <= start && end <= common_hi[1]);",
            WRONG,
        ),
        "MN-major lead": ("1024, STEPS * 16 * 128", "1024, STEPS * 16 * 64", WRONG, 256),
    },
    "queries": {
        # order
        "no wait for K": ("      mbar_wait(&s.k_full[n % S::kStages], n / S::kStages % 2);\n", "", "."),
        "no wait for V": ("  mbar_wait(&s.v_full[value_stage], n / S::kValueStages % 2);\n", "", "."),
        "no wait for Q": ("    mbar_wait(&s.rows_full, turn % 2);\n", "", "."),
        "V filled while read, one stage": (
            "      mbar_wait(&s.v_empty[value_stage], n / S::kValueStages % 2 ^ 1);\n",
            "",
            ".",
            256,
        ),
        "K filled while read": ("      mbar_wait(&s.k_empty[stage], n / S::kStages % 2 ^ 1);\n", "", "."),
        "Q overwritten": ("    mbar_wait(&s.rows_empty, turn % 2 ^ 1);\n", "", "."),
        "dP read unfinished": ("  wgmma_wait<0>();\n  reg_fence(ds);", "  reg_fence(ds);", "."),
        "V of the last step kept": (
            "      else arrive_by_warp(&s.v_empty[n % S::kValueStages]);\n",
            "",
            "deadlock",
        ),
        # arithmetic
        "cleared keys unfenced": (
            "  fence_proxy_async();\n  bar_sync(1, kConsumers);\n}",
            "  bar_sync(1, kConsumers);\n}",
            "without fence_proxy_async",
        ),
        "attended keys of one warp only": (
            "warp < kConsumers / 32; ++warp) attended",
            "warp < 1; ++warp) attended",
            WRONG,
        ),
        "unattended keys not cleared": (
            "  if (masked) clear_unattended_keys<T, D>(s, s.k[stage], rows, key);\n",
            "",
            WRONG,
        ),
        "dS not masked in queries": ("  if (masked) select(ds, rows, key, 0);\n", "", WRONG),
        "one hull of two": (
            "      if (item.tile + i < w.tiles) hulls.merge(",
            "      if (false) hulls.merge(",
            WRONG,
        ),
        "a key tile skipped": (
            "Max{}(start, lo[i] / size * size)",
            "Max{}(start, (lo[i] + size - 1) / size * size)",
            WRONG,
        ),
    },
}


@pytest.mark.parametrize("kernel, name", [(kernel, name) for kernel, faults in FAULTS.items() for name in faults])
def test_planted_faults_are_seen(kernel: str, name: str) -> None:
    old, new, said, *rest = FAULTS[kernel][name]
    dim = rest[0] if rest else 64
    clean = right(dim)
    other = {kernel: planted(kernel, dim, old, new)}
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
