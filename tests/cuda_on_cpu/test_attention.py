"""An attention tile: A in registers, an MN-major B and stmatrix at work together, and the faults they invite."""

import ctypes
import functools
import re

import pytest
import torch

from tests.cuda_on_cpu.library import (
    ROOT,
    GlobalArray,
    KernelFault,
    Kernels,
    compile_kernels,
    missing,
    skipped,
    switchable,
)

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = "tests/cuda_on_cpu/kernels/attention_tile_sm90a.cu"


def attention_is_right(kernels: Kernels, rows: int, keys: int, seed: int) -> bool:
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 128, generator=random).bfloat16() for n in (rows, keys, keys))
    out = GlobalArray(torch.full((rows, 128), 7.0).bfloat16(), "out")
    arrays = [GlobalArray(t, n) for t, n in ((q, "q"), (k, "k"), (v, "v"))]
    scale = 128**-0.5
    assert kernels.run("attention_tile_bf16", *arrays, out, rows, keys, ctypes.c_float(scale), None, seed=seed) == 0
    weights = torch.softmax(q.double() @ k.double().T * scale, dim=1)
    # p is rounded to bf16 (relative 2^-9; a mean of v weighted so moves by at most 2^-9 max|v|), and so is the result.
    # All else is float32.
    bound = (2.0**-9 + 2.0**-9 + 1e-5) * v.double().abs().max()
    return bool(((out.tensor.double() - weights @ v.double()).abs() <= bound).all())


@pytest.mark.parametrize("rows, keys", [(64, 64), (64, 320), (100, 130), (1, 1)])
def test_attention_tile_agrees_under_every_schedule(rows: int, keys: int) -> None:
    kernels = compile_kernels(SOURCE)
    for seed in range(6):
        assert attention_is_right(kernels, rows, keys, seed)


TO = "tile + piece * kPiece + row * 64 + byte / 2, words"
FAULTS = {
    "k released before its product is done": (
        "    wgmma_wait<0>();\n    reg_fence(s);\n    mbar_arrive(&shared.k_empty[stage]);",
        "    if (FAULT) mbar_arrive(&shared.k_empty[stage]);\n    wgmma_wait<0>();\n    reg_fence(s);\n"
        "    if (!FAULT) mbar_arrive(&shared.k_empty[stage]);",
        "operand B. reads .* still being written by a bulk copy",
    ),
    "no wait for v": (*skipped("    mbar_wait(&shared.v_full[stage], phase);"), "operand B. reads"),
    "no wait for the scores": (
        "    wgmma_wait<0>();\n    reg_fence(s);\n",
        "    if (!FAULT) wgmma_wait<0>();\n    reg_fence(s);\n",
        None,
    ),
    "no fence before the second product": (
        "  for (int i = 0; i < kTile / 16; ++i) reg_fence(p[i]);\n  wgmma_fence();",
        "  for (int i = 0; i < kTile / 16; ++i) reg_fence(p[i]);\n  if (!FAULT) wgmma_fence();",
        "without wgmma_fence",
    ),
    "lead of v off": ("1024, kPiece * sizeof(bf16))", "1024, kPiece * (FAULT ? 1 : sizeof(bf16)))", None),
    "step along the keys off": ("smem_desc(v + i * 16 * 64,", "smem_desc(v + i * 16 * (FAULT ? 1 : 64),", None),
    "v taken as K-major": (
        "wgmma<bf16, Major::MN>(o",
        "if (FAULT) wgmma<bf16, Major::K>(o, p[i], smem_desc(v + i * 16 * 64, 1024, kPiece * sizeof(bf16)), true);\n"
        "    else wgmma<bf16, Major::MN>(o",
        "part of an mbarrier",
    ),
    "stmatrix without the swizzle": ("column % 64 * 2 ^ row % 8 * 16", "column % 64 * 2 ^ row % 8 * 16 * !FAULT", None),
    "transposed stmatrix": ("    stmatrix(tile", f"    if (FAULT) stmatrix<true>({TO});\n    else stmatrix(tile", None),
    "no mask beyond the last key": ("key < keys_left ?", "key < keys_left || FAULT ?", None),
    "no proxy fence after stmatrix": (*skipped("  fence_proxy_async();"), "without fence_proxy_async"),
}


@functools.cache
def with_faults() -> Kernels:
    """All faults in one text, because each would take a third of a second to compile alone."""
    return compile_kernels(SOURCE, text=switchable((ROOT / SOURCE).read_text(), (f[:2] for f in FAULTS.values())))


def test_the_text_with_faults_is_right_while_none_is_chosen() -> None:
    with_faults().plant(0)
    assert all(attention_is_right(with_faults(), 64, 330, seed) for seed in range(12))


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str) -> None:
    said, kernels = FAULTS[name][2], with_faults()
    kernels.plant([*FAULTS].index(name) + 1)
    reports, wrong, caught = [], 0, False
    for seed in range(64):  # until it is caught: v is late in one schedule of thirty
        try:
            wrong += not attention_is_right(kernels, 64, 330, seed)
        except KernelFault as fault:
            reports.append(str(fault))
        if caught := wrong > 0 if said is None else any(re.search(said, r) for r in reports):
            break
    print(f"{name}: {len(reports)} reports, {wrong} wrong results of {seed + 1};", reports[0] if reports else "")
    assert caught
