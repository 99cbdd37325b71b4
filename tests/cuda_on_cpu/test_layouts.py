"""Each Hopper primitive of the emulator against the documented layouts (probes.py), exactly, in several schedules."""

import pytest
import torch

from tests.cuda_on_cpu import probes
from tests.cuda_on_cpu.library import GlobalArray, compile_kernels, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = "tests/cuda_on_cpu/kernels/probes_sm90a.cu"


def run_and_compare(program: probes.Program, seeds: int) -> None:
    kernels = compile_kernels(SOURCE)
    for seed in range(seeds):
        arguments = [
            GlobalArray(a, f"argument {i}") if isinstance(a, torch.Tensor) else a
            for i, a in enumerate(program.arguments)
        ]
        assert kernels.run(program.function, *arguments, seed=seed) == 0, program.name
        for i, expected in program.expected.items():
            assert torch.equal(arguments[i].tensor.view(expected.dtype), expected), f"{program.name}, schedule {seed}"


def test_wgmma_operands_and_accumulators_lie_where_documented() -> None:
    for program in probes.wgmma_programs():
        run_and_compare(program, seeds=1)


def test_bulk_copies_swizzle_and_fill_with_zero_as_documented() -> None:
    for program in probes.copy_programs():
        run_and_compare(program, seeds=2)


def test_matrix_fragments_and_multicast_lie_where_documented() -> None:
    for program in probes.matrix_and_cluster_programs():
        run_and_compare(program, seeds=4)


def test_accumulator_table_is_that_of_the_ptx_isa() -> None:
    """The PTX ISA's formula for D of m64nNk16 (warp, lane / 4, lane % 4) against CuTe's CLayout_64xN."""
    thread, i = torch.arange(128)[:, None], torch.arange(128)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + (i // 2 % 2) * 8
    column = i // 4 * 8 + thread % 4 * 2 + i % 2
    cute_row, cute_column = probes.fragment_index(256)
    assert torch.equal(row.expand(128, 128), cute_row) and torch.equal(column, cute_column)


def test_swizzle_table_is_that_of_the_programming_guide() -> None:
    """CU_TENSOR_MAP_SWIZZLE_128B: the first and second of 8 rows of 8 pieces of 16 bytes, and that it repeats."""
    pieces = probes.swizzle_128(torch.arange(128) * 16) // 16
    assert pieces[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert (pieces[8:16] - 8).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert (pieces[16:24] - 16).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert (pieces[56:64] - 56).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(pieces[64:], pieces[:64] + 64)
