"""The worked example: a Hopper GEMM runs on the CPU, and each fault planted in a copy of it is caught."""

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

SOURCE = "tests/cuda_on_cpu/kernels/gemm_sm90a.cu"
SENTINEL = -12345.0


def gemm_is_right(kernels: Kernels, m: int, n: int, k: int, consumers: int, seed: int) -> bool:
    """Runs it on small integers, whose products and sums are exact in float32."""
    random = torch.Generator().manual_seed(seed)
    a = GlobalArray(torch.randint(-4, 5, (m, k), generator=random).bfloat16(), "a")
    b = GlobalArray(torch.randint(-4, 5, (n, k), generator=random).bfloat16(), "b")
    c = GlobalArray(torch.full((m, n), SENTINEL), "c")
    assert kernels.run("gemm_bf16", a, b, c, m, n, k, consumers, None, seed=seed) == 0
    return torch.equal(c.tensor, a.tensor.float() @ b.tensor.float().T)


@pytest.mark.parametrize("consumers", [1, 2])
@pytest.mark.parametrize("m, n, k", [(64, 64, 64), (128, 64, 512), (100, 76, 200), (1, 4, 8), (130, 196, 456)])
def test_gemm_agrees_exactly_under_every_schedule(m: int, n: int, k: int, consumers: int) -> None:
    kernels = compile_kernels(SOURCE)
    for seed in range(8):
        assert gemm_is_right(kernels, m, n, k, consumers, seed)


# What is planted, and what the report must say for at least one seed; None: only the result is wrong. Written down from
# what was seen, so a check that goes blind shows here.
FAULTS = {
    "no wait for the loads": (
        "mbar_wait(&s.full[stage], phase);",
        "if (!FAULT) mbar_wait(&s.full[stage], phase);",
        "still being written by a bulk copy",
    ),
    "stage released before it is read": (
        "    wgmma_wait<0>();\n    reg_fence(sum);\n    if (t == 0) mbar_arrive(&s.empty[stage]);",
        "    if (FAULT && t == 0) mbar_arrive(&s.empty[stage]);\n    wgmma_wait<0>();\n    reg_fence(sum);\n"
        "    if (!FAULT && t == 0) mbar_arrive(&s.empty[stage]);",
        "still being written by a bulk copy",
    ),
    "wrong phase of the empty barrier": (
        "mbar_wait(&s.empty[stage], phase ^ 1)",
        "mbar_wait(&s.empty[stage], phase ^ !FAULT)",
        "deadlock",
    ),
    "wrong phase of the full barrier": (
        "mbar_wait(&s.full[stage], phase)",
        "mbar_wait(&s.full[stage], phase ^ FAULT)",
        "(deadlock|still being written)",
    ),
    "no wait for the products": (*skipped("    wgmma_wait<0>();"), "without a wgmma_wait"),
    "no wgmma_fence": (*skipped("    wgmma_fence();"), "without wgmma_fence"),
    "no proxy fence": (*skipped("  fence_proxy_async();"), "without fence_proxy_async"),
    "no barrier before the store": (*skipped("  bar_sync(1 + warpgroup, 128);"), "a bulk store reads shared memory"),
    "no wait for the store": (*skipped("    bulk_wait_read<0>();"), "before a bulk store had read"),
    "no fence after the barriers' initialisation": (*skipped("    mbar_init_fence();"), "without mbar_init_fence"),
    "no block barrier after the initialisation": (*skipped("  __syncthreads();"), "is not initialised"),
    "wrong descriptor stride": ("smem_desc(s.b[stage] + kk)", "smem_desc(s.b[stage] + kk, FAULT ? 512 : 1024)", None),
    "wrong swizzle of a map": (
        "{depth, columns}, Swizzle::bytes128",
        "{depth, columns}, FAULT ? Swizzle::none : Swizzle::bytes128",
        None,
    ),
    "too few bytes expected": (
        "sizeof s.a[0] + sizeof s.b[0]",
        "sizeof s.a[0] + sizeof s.b[0] * !FAULT",
        "(deadlock|still being written|under way)",
    ),
    "too many bytes expected": (
        "sizeof s.a[0] + sizeof s.b[0]",
        "16 * FAULT + sizeof s.a[0] + sizeof s.b[0]",
        "deadlock",
    ),
    "too many arrivals expected": (
        "mbar_init(&s.empty[i], CONSUMERS)",
        "mbar_init(&s.empty[i], CONSUMERS + FAULT)",
        "deadlock",
    ),
    "a tensor map with a row too many": ("{k, m}, &k_bytes", "{k, m + FAULT}, &k_bytes", "past the end of it"),
    "misaligned store": (
        "&tile[tile_row * kColumns + tile_column])",
        "&tile[tile_row * kColumns + tile_column + FAULT])",
        "not aligned for its type",
    ),
    "register index out of range": ("sum[i + 1]);", "sum[i + 1 + FAULT]);", "index outside an array"),
    "too many registers": (
        "reg_increase<240>()",
        "FAULT ? reg_increase<256>() : reg_increase<240>()",
        "start with at most 64512",
    ),
    "barrier for too many threads": (
        "bar_sync(1 + warpgroup, 128)",
        "bar_sync(1 + warpgroup, FAULT ? 256 : 128)",
        "named barrier 1 .128 of 256 threads",
    ),
    "a coordinate off by one": ("tma_store(c, tile, column,", "tma_store(c, tile, column + FAULT,", None),
}


@functools.cache
def with_faults() -> Kernels:
    """All faults in one text, because each would take a third of a second to compile alone."""
    return compile_kernels(SOURCE, text=switchable((ROOT / SOURCE).read_text(), (f[:2] for f in FAULTS.values())))


def test_the_text_with_faults_is_right_while_none_is_chosen() -> None:
    with_faults().plant(0)
    for consumers in (1, 2):
        assert all(gemm_is_right(with_faults(), 100, 76, 328, consumers, seed) for seed in range(20))


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str) -> None:
    said, kernels = FAULTS[name][2], with_faults()
    kernels.plant([*FAULTS].index(name) + 1)
    reports, wrong = [], 0
    for seed in range(20):
        try:
            wrong += not gemm_is_right(kernels, 100, 76, 328, 1 if name != "too many registers" else 2, seed)
        except KernelFault as fault:
            reports.append(str(fault))
    print(f"{name}: {len(reports)} reports, {wrong} wrong results of 20;", reports[0] if reports else "")
    if said is None:
        assert wrong
    else:
        assert any(re.search(said, r) for r in reports), reports[:1]
