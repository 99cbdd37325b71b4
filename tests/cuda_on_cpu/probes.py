"""Random programs for the probe kernels (kernels/probes_sm90a.cu), with the answer that the documents give.

The layouts are written down here once more, from the PTX ISA's text and in the notation of CuTe's headers
(cute/atom/mma_traits_sm90_gmma.hpp, copy_traits_sm75.hpp), independently of the emulator. A program is a function name,
its arguments (tensors for pointers), which of them it writes, and what should be there afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

IMAGE = 32768  # bytes of an image of shared memory in probe_wgmma


@dataclass
class Program:
    name: str
    function: str
    arguments: list[Any]
    expected: dict[int, torch.Tensor]  # argument index -> its content afterwards


def cute(shape: tuple[int, ...], stride: tuple[int, ...], index: torch.Tensor) -> torch.Tensor:
    """Offset of a linear index in a CuTe layout shape:stride (the first mode varies fastest)."""
    offset = torch.zeros_like(index)
    for extent, step in zip(shape, stride):
        offset += index % extent * step
        index = index // extent
    return offset


def swizzle_128(offset: torch.Tensor) -> torch.Tensor:
    """Swizzle<3,4,3> on byte addresses: the 16-byte piece within 128 bytes is exchanged by the row of 128 bytes."""
    return offset ^ (((offset >> 7) & 7) << 4)


# ---- wgmma -----------------------------------------------------------------------------------------------------------
def operand_offsets(rows: int, mn_major: bool, start: int, stride: int, lead: int) -> torch.Tensor:
    """(rows, 16) byte offsets of a tile in its image: the canonical 128-byte-swizzle layouts of 16-bit elements."""
    row, k = torch.arange(rows)[:, None], torch.arange(16)[None, :]
    sbo, lbo = stride // 2, lead // 2  # in elements
    if mn_major:  # ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), T = 8
        elements = cute((8, 8, 4), (1, 8, lbo), row) + cute((8, 2), (64, sbo), k)
    else:  # ((8,m),(T,2)):((8T,SBO),(1,T))
        elements = cute((8, 32), (64, sbo), row) + cute((8, 2), (1, 8), k)
    return swizzle_128(start + 2 * elements)


def fragment_index(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(128, n / 2) row and column of accumulator i of thread t, from CLayout_64xN (a column-major 64 x n matrix)."""
    thread, value = torch.arange(128)[:, None], torch.arange(n // 2)[None, :]
    flat = cute((4, 8, 4), (128, 1, 16), thread) + cute((2, 2, n // 8), (64, 8, 512), value)
    return flat % 64, flat // 64


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


def wgmma_program(n: int, dtype: torch.dtype, a_kind: int, b_kind: int, seed: int) -> Program:
    """a_kind: 0 K-major, 1 MN-major, 2 registers; b_kind likewise. Small integers: every sum is exact."""
    random = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=random).float()

    def choose(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=random))]

    a, b, d = integers(64, 16), integers(n, 16), integers(64, n)  # b as (column, k)
    images, places = [], []
    for kind, tile in ((a_kind, a), (b_kind, b)):
        rows = tile.shape[0]
        if kind == 1:  # 8 k are 1024 bytes; the tiles of 64 rows lie `lead` apart
            start, stride = choose(0, 1024, 4096), choose(1024, 2048)
            lead = choose(stride * 2, stride * 2 + 1024)
        else:  # k16 is a quarter of the 128 bytes; 8 rows are 1024 bytes
            start, stride, lead = choose(0, 32, 64, 96), choose(1024, 1024 if rows > 64 else 3072), 16
            start += 0 if rows * stride // 8 > IMAGE - 2048 else choose(0, 2048)
        image = torch.full((IMAGE // 2,), -1, dtype=torch.int16)  # NaN where the tile is not
        if kind != 2:
            offsets = operand_offsets(rows, kind == 1, start, stride, lead)
            image[offsets // 2] = bits(tile.to(dtype))
        images.append(image)
        places.append([start, stride, lead])
    row, column = fragment_index(16)
    words = bits(a[row, column].to(dtype)).view(torch.int32)  # (128, 4): the A fragment is that of 16 columns
    row, column = fragment_index(n)
    accumulate = choose(0, 1)
    expected = (a @ b.T + accumulate * d)[row, column]
    arguments = [
        n,
        int(dtype == torch.float16),
        a_kind,
        b_kind,
        accumulate,
        *places[0],
        *places[1],
        images[0],
        words,
        images[1],
        d[row, column].contiguous(),
        None,
    ]
    name = f"wgmma n={n} {str(dtype)[6:]} A={('K', 'MN', 'registers')[a_kind]} B={('K', 'MN')[b_kind]} seed={seed}"
    return Program(name, "probe_wgmma", arguments, {14: expected})


def wgmma_programs() -> list[Program]:
    bf16, fp16 = torch.bfloat16, torch.float16
    some = [
        wgmma_program(n, dtype, a, b, seed)
        for n in (8, 64, 136, 256)
        for dtype in (bf16, fp16)
        for a in (0, 1, 2)
        for b in (0, 1)
        for seed in (1, 2)
    ]
    every_n = [wgmma_program(n, bf16, 0, 0, n) for n in range(8, 257, 8)]
    return some + every_n + [wgmma_program(n, fp16, 1, 1, n) for n in range(8, 257, 8)]


# ---- bulk tensor copies ----------------------------------------------------------------------------------------------
COLUMNS, ROWS, DEPTH = 72, 21, 3  # of the tensor that probe_load and probe_store see: odd on purpose


def box_offsets(swizzled: bool) -> torch.Tensor:
    """(8 rows, 64 columns) byte offsets in shared memory of a box of 16-bit elements."""
    offset = torch.arange(8)[:, None] * 128 + torch.arange(64)[None, :] * 2
    return swizzle_128(offset) if swizzled else offset


def box_places(x: int, y: int, z: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row and column in the tensor of each element of the box, and whether it lies inside."""
    row, column = (y + torch.arange(8))[:, None].expand(8, 64), (x + torch.arange(64))[None, :].expand(8, 64)
    inside = (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS) & (0 <= z < DEPTH)
    return row, column, inside


CORNERS = [(0, 0, 0), (8, 3, 1), (64, 16, 2), (-8, -3, 0), (70, 20, 1), (0, 0, -1), (0, 0, 3), (-64, 0, 0), (3, -1, 2)]


def load_program(swizzled: bool, x: int, y: int, z: int) -> Program:
    tensor = torch.arange(DEPTH * ROWS * COLUMNS, dtype=torch.int16).view(DEPTH, ROWS, COLUMNS) + 1
    row, column, inside = box_places(x, y, z)
    box = torch.zeros(8, 64, dtype=torch.int16)  # what lies outside is zero
    box[inside] = tensor[min(max(z, 0), DEPTH - 1)][row[inside], column[inside]]
    image = torch.empty(512, dtype=torch.int16)
    image[box_offsets(swizzled) // 2] = box
    arguments = [tensor, COLUMNS, ROWS, DEPTH, int(swizzled), x, y, z, torch.zeros(512, dtype=torch.int16), None]
    return Program(f"load swizzled={swizzled} at {x, y, z}", "probe_load", arguments, {8: image})


def store_program(swizzled: bool, add: bool, x: int, y: int, z: int) -> Program:
    random = torch.Generator().manual_seed(100 + x + 7 * y + z)
    tensor = torch.randint(-50, 51, (DEPTH, ROWS, COLUMNS), generator=random).bfloat16()
    box = torch.randint(-50, 51, (8, 64), generator=random).bfloat16()
    image = torch.empty(512, dtype=torch.bfloat16)
    image[box_offsets(swizzled) // 2] = box
    row, column, inside = box_places(x, y, z)
    expected = tensor.clone()
    if 0 <= z < DEPTH:
        old = tensor[z][row[inside], column[inside]] if add else 0
        expected[z][row[inside], column[inside]] = box[inside] + old
    arguments = [tensor, COLUMNS, ROWS, DEPTH, int(swizzled), x, y, z, image, int(add), None]
    return Program(f"store swizzled={swizzled} add={add} at {x, y, z}", "probe_store", arguments, {0: expected})


def add_f32_program(x: int, y: int, blocks: int) -> Program:
    random = torch.Generator().manual_seed(blocks)
    tensor = torch.randint(-50, 51, (11, 20), generator=random).float()
    box = torch.randint(-50, 51, (8, 16), generator=random).float()
    expected = tensor.clone()
    for i in range(8):
        for j in range(16):
            if 0 <= y + i < 11 and 0 <= x + j < 20:
                expected[y + i, x + j] += blocks * box[i, j]
    arguments = [tensor, 20, 11, x, y, blocks, box, None]
    return Program(f"add float32 at {x, y}, {blocks} blocks", "probe_add_f32", arguments, {0: expected})


def bulk_program(bytes_: int, add: bool) -> Program:
    source, target = torch.arange(bytes_ // 4).float(), torch.full((bytes_ // 4,), 7.0)
    arguments = [source, target, bytes_, int(add), None]
    return Program(f"bulk {bytes_} add={add}", "probe_bulk", arguments, {1: source + 7 if add else source})


def copy_programs() -> list[Program]:
    flags = (False, True)
    return [
        *(load_program(s, *corner) for s in flags for corner in CORNERS),
        *(store_program(s, a, *corner) for s in flags for a in flags for corner in CORNERS),
        *(add_f32_program(x, y, blocks) for x, y in ((0, 0), (8, 5), (-3, -2)) for blocks in (1, 5)),
        *(bulk_program(n, a) for n in (16, 4096) for a in flags),
    ]


# ---- ldmatrix and stmatrix, clusters ---------------------------------------------------------------------------------
def matrix_program(count: int, transpose: bool, store: bool, seed: int) -> Program:
    """Lane l holds, of matrix i, row l / 4 and columns l % 4 * 2 and the next, in register i. From
    copy_traits_sm75.hpp, in bits of a matrix of 8 rows of 128 bits: (32, 32):(32, 1), transposed
    ((4, 8), (16, 2)):((256, 16), (1, 128))."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randperm(64, generator=random)[:32] * 16  # where each lane's row lies in the image
    lane, half = torch.arange(32)[:, None], torch.arange(2)[None, :]
    if transpose:
        element = cute((4, 8), (256 // 16, 1), lane) + half * (128 // 16)
    else:
        element = lane * 2 + half
    matrix = torch.arange(count)[None, :, None]
    row_of = rows[matrix * 8 + (element // 8)[:, None, :]]  # (32, count, 2)
    place = row_of // 2 + (element % 8)[:, None, :]  # in the image, in 16-bit elements
    image = torch.randint(-30000, 30001, (512,), generator=random).to(torch.int16)
    registers = torch.randint(-30000, 30001, (32, count, 2), generator=random).to(torch.int16)
    if store:
        expected = image.clone()
        expected[place] = registers
    else:
        expected = image[place]
    arguments = [count, int(transpose), image, rows.int(), registers, int(store), None]
    name = f"{'st' if store else 'ld'}matrix x{count} transpose={transpose} seed={seed}"
    return Program(name, "probe_matrix", arguments, {2 if store else 4: expected})


def multicast_program(clusters: int, rounds: int) -> Program:
    tensor = torch.arange(16 * rounds * 64).remainder(101).view(16 * rounds, 64).bfloat16()
    thread = torch.arange(64)
    sums = torch.zeros(64)
    for i in range(rounds):
        for box in range(2):
            sums += tensor[(2 * i + box) * 8 + thread % 8, 0].float() * (i + 1)
    arguments = [tensor, 16 * rounds, torch.zeros(2 * clusters, 64), clusters, rounds, None]
    return Program(
        f"multicast {clusters} clusters {rounds} rounds",
        "probe_multicast",
        arguments,
        {2: sums.expand(2 * clusters, 64)},
    )


def barrier_program(rounds: int) -> Program:
    thread = torch.arange(128)
    expected = thread // 64 * 64 + (thread + rounds) % 64 + 1000  # one lane of each warp is elected
    return Program(
        f"barriers {rounds} rounds",
        "probe_barriers",
        [torch.zeros(128, dtype=torch.int32), rounds, None],
        {0: expected.int()},
    )


def matrix_and_cluster_programs() -> list[Program]:
    flags = (False, True)
    return [
        *(barrier_program(rounds) for rounds in (0, 1, 5)),
        *(matrix_program(c, t, s, seed) for c in (1, 2, 4) for t in flags for s in flags for seed in (1, 2)),
        *(multicast_program(*shape) for shape in ((1, 1), (2, 5), (3, 8))),
    ]
