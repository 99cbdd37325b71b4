"""Plain CUDA on the emulator: collectives, atomics, several blocks, vector accesses, and the mistakes it reports."""

import re

import pytest
import torch

from tests.cuda_on_cpu.library import ROOT, GlobalArray, KernelFault, compile_kernels, missing, plant

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = "tests/cuda_on_cpu/kernels/basics.cu"


def test_collectives_give_what_cuda_documents() -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-9, 10, (64,), generator=random)
    lane, warp = torch.arange(64) % 32, torch.arange(64) // 32 * 32
    halves, eights = x.view(2, 32), x.view(8, 8)
    ballot = [sum(1 << i for i in range(32) if h[i] > 0) for h in halves]
    up = torch.where(lane % 16 >= 3, warp + lane - 3, warp + lane)
    down = torch.where(lane + 5 < 32, warp + lane + 5, warp + lane)
    remainder = torch.fmod(x, 4)
    match = [sum(1 << j for j in range(32) if remainder[w + j] == remainder[w + i]) for w in (0, 32) for i in range(32)]
    any7 = torch.tensor([int((h[16:] == 7).any()) for h in halves])
    expected = torch.stack(
        [
            halves.sum(1).repeat_interleave(32),
            eights.max(1).values.repeat_interleave(8),
            x.min().expand(64),
            x[warp + (lane * 7 + 3) % 32],
            x[up],
            x[down],
            torch.tensor(ballot).repeat_interleave(32),
            torch.tensor(match),
            torch.tensor(int((x > 2).sum()) * 4 + int((x > 90).any()) * 2 + int((x > -90).all())).expand(64),
            torch.where(lane < 16, halves[:, :16].sum(1).repeat_interleave(32), any7.repeat_interleave(32)),
        ]
    )
    kernels = compile_kernels(SOURCE)
    for seed in range(20):
        out = GlobalArray(torch.zeros(10, 64, dtype=torch.int32), "out")
        assert kernels.run("run_collectives", GlobalArray(x.int(), "x"), out, None, seed=seed) == 0
        different = (out.tensor != expected.to(torch.int32)).any(1).nonzero()  # to int32: votes are modulo 2^32
        assert not len(different), f"schedule {seed}: collectives {different.flatten().tolist()}"


@pytest.mark.parametrize("host_threads", [1, 2])
def test_blocks_count_together_and_the_last_one_sums(host_threads: int) -> None:
    kernels, blocks = compile_kernels(SOURCE), 9
    n = 64 * blocks
    for seed in range(10):
        x = GlobalArray(torch.arange(n).float(), "x")
        counters = GlobalArray(torch.tensor([0, 0, 2**30, 0, 0, 0, 0], dtype=torch.int32), "counters")
        wide = GlobalArray(torch.zeros(1, dtype=torch.int64), "wide")
        partial, total = GlobalArray(torch.zeros(blocks), "partial"), GlobalArray(torch.zeros(1), "total")
        assert (
            kernels.run(
                "run_count", x, counters, wide, partial, total, blocks, None, seed=seed, host_threads=host_threads
            )
            == 0
        )
        assert counters.tensor.tolist() == [n * (n - 1) // 2, 3 * (n - 1), 5, 2**31 - 1, 99, n, blocks]
        assert wide.tensor.item() == n << 33 and total.tensor.item() == n * (n - 1) / 2


@pytest.mark.parametrize("code, dtype", enumerate([torch.float32, torch.bfloat16, torch.float16]))
@pytest.mark.parametrize("n", [1, 8, 515])
def test_vector_accesses_touch_nothing_beyond_the_row(code: int, dtype: torch.dtype, n: int) -> None:
    x, y = GlobalArray(torch.randn(n).to(dtype), "x"), GlobalArray(torch.zeros(n, dtype=dtype), "y")
    assert compile_kernels(SOURCE).run("run_double", code, x, y, n, None) == 0
    assert torch.equal(y.tensor, 2 * x.tensor)


@pytest.mark.parametrize("code, dtype", [(1, torch.bfloat16), (2, torch.float16)])
def test_conversions_are_torch_s(code: int, dtype: torch.dtype) -> None:
    """Of every 16-bit float, and of floats at, beside and between these: ties, subnormals, overflow, NaN."""
    kernels, bits = compile_kernels(SOURCE), torch.arange(-(2**15), 2**15)
    every = bits.to(torch.int16).view(dtype)
    y = GlobalArray(torch.zeros_like(every), "y")
    assert kernels.run("run_double", code, GlobalArray(every, "x"), y, len(every), None) == 0
    torch.testing.assert_close(y.tensor, 2 * every, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.tensor.signbit() | every.isnan(), every.signbit() | every.isnan())

    some = every[:: 2 if dtype is torch.float16 else 16].float().view(torch.int32)
    tie = 2**12 if dtype is torch.float16 else 2**15  # half of the distance to the next, of numbers that are normal
    x = torch.stack([some, some + 1, some + tie - 1, some + tie, some + tie + 1, some - 1]).view(torch.float32)
    x = torch.cat([x.flatten(), x[3] * 2.0**-12])  # ties of numbers that are subnormal
    one = GlobalArray(torch.zeros(len(x), dtype=dtype), "one")
    pairs = GlobalArray(torch.zeros(len(x) // 2, dtype=torch.int32), "pairs")
    assert len(x) % 128 == 0
    assert kernels.run("run_narrow", int(code == 2), GlobalArray(x, "x"), one, pairs, len(x), None) == 0
    wanted, number = x.to(dtype), ~x.isnan()
    for found in (one.tensor, pairs.tensor.view(dtype)):
        assert torch.equal(found.isnan(), ~number)
        assert torch.equal(found[number].view(torch.int16), wanted[number].view(torch.int16))


def line_of(mistake: int) -> int:
    lines = (ROOT / SOURCE).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if re.search(rf"\bmistake: (\d+, )*{mistake}\b", line))


MISTAKES = {
    0: "4-byte read of shared memory .* never written",
    1: "write of 4 bytes .* outside every allocation; nearest: x, 256 bytes, [0-9]+ bytes past the end of it",
    2: "read of 4 bytes .* outside every allocation; nearest: x, 256 bytes, [0-9]+ bytes before it",
    3: "not aligned for its type",
    4: "not aligned",
    5: "index outside an array",
    6: "signed integer overflow in a multiplication",
    8: "__syncwarp of warp 0 .of the lanes ffffffff only 00000020 are there",
    9: "shuffle from lane 9, which is not in the mask",
    10: r"a write touches shared memory \+[5-9]\d\d to \+\d+; the block has 512 bytes",
    11: "an endless loop",
    12: "shift by a negative or too large count",
    13: "division by zero",
    14: "lanes of one warp are in different collectives",
    16: "write of 4 bytes .* past the end of it",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_reported_with_its_line(mistake: int) -> None:
    x = GlobalArray(torch.zeros(64), "x")
    table = GlobalArray(torch.tensor([0, 0, 0, 4, 2**30, 32, 0, 64], dtype=torch.int32), "table")
    with pytest.raises(KernelFault) as fault:
        compile_kernels(SOURCE).run("run_mistakes", mistake, x, 64, table, 512, None, most_steps=100_000)
    assert re.search(MISTAKES[mistake], str(fault.value), re.S), fault.value
    assert f"basics.cu:{line_of(mistake)}" in str(fault.value), fault.value


def test_deadlock_names_all_that_wait_and_where() -> None:
    """One lane waits for its warp, 63 threads for the block."""
    x, table = GlobalArray(torch.zeros(64), "x"), GlobalArray(torch.zeros(8, dtype=torch.int32), "table")
    with pytest.raises(KernelFault) as fault:
        compile_kernels(SOURCE).run("run_mistakes", 8, x, 64, table, 512, None)
    one, many = sorted(str(fault.value).splitlines()[1:], key=lambda line: "63 threads" in line)
    assert "block (0, 0, 0): 1 threads (5 to 5) wait on __syncwarp" in one and f"basics.cu:{line_of(8)}" in one
    assert "block (0, 0, 0): 63 threads (0 to 63) wait on __syncthreads, barrier 0 (63 of 64 threads are there)" in many
    assert f"basics.cu:{line_of(7)}" in many


def test_missing_barrier_gives_a_wrong_result_under_some_schedule() -> None:
    wrong = 0
    for seed in range(20):
        x, table = GlobalArray(torch.zeros(64), "x"), GlobalArray(torch.zeros(8, dtype=torch.int32), "table")
        try:
            compile_kernels(SOURCE).run("run_mistakes", 15, x, 64, table, 512, None, seed=seed)
            wrong += x.tensor.tolist() != list(range(63, -1, -1))
        except KernelFault as fault:
            assert "never written" in str(fault)
            wrong += 1
    assert wrong >= 10


def test_a_launch_that_no_gpu_could_start_is_an_error() -> None:
    x, table = GlobalArray(torch.zeros(64), "x"), GlobalArray(torch.zeros(8, dtype=torch.int32), "table")
    # cudaFuncSetAttribute refuses it, as on the GPU: cudaErrorInvalidValue and no report
    assert compile_kernels(SOURCE).run("run_mistakes", 99, x, 64, table, 232449, None) == 1


def test_static_shared_memory_is_refused_by_the_compiler() -> None:
    text = plant(SOURCE, "  float local[4] =", "  __shared__ float other[4];\n  float local[4] =")
    with pytest.raises(RuntimeError, match=r"dynamic_smem\(\)"):
        compile_kernels(SOURCE, text=text)


def test_one_seed_repeats_one_run() -> None:
    kernels = compile_kernels(SOURCE)
    x = GlobalArray(torch.arange(64, dtype=torch.int32), "x")
    out = GlobalArray(torch.zeros(10, 64, dtype=torch.int32), "out")
    steps = []
    for seed in (5, 6, 7, 5):
        kernels.run("run_collectives", x, out, None, seed=seed)
        steps.append(kernels.steps)
    assert steps[0] == steps[3]
